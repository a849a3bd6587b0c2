"""Round the weights of a denoiser for the output of their layers (`formats.compensation`).

The recording is replayed through the float denoiser once for a group of layers whose sums fit into
memory together. Some calls are held back: on those, the damping of each layer is chosen by the
error of its output (`formats.objective`), and the layer is compared with nearest rounding, which it
keeps if compensation does not help. So what a layer gets cannot be worse than nearest rounding on
calls that it was not made from.

The inputs are those of the float denoiser. In the quantized one they carry the errors of the layers
before, which are not a function of this layer's input: made from them, the codes are worse (ours).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from msfp_cli.calibration.result import Calibration, Compensation
from msfp_cli.calibration.samples import (
    LayerSamples,
    can_sample,
    group_bytes,
    group_layers,
    input_parts,
    sample,
    weight_rows,
)
from msfp_cli.errors import RunError
from msfp_cli.files.documents import Json, read_document, write_tensors
from msfp_cli.files.typed import read_value
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.multipliers import expand
from msfp_cli.formats.objective import RoundingObjective
from msfp_cli.formats.packing import pack
from msfp_cli.formats.rounding import Grid, quantize
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.layers.streamed import weight_in_memory
from msfp_cli.processes import Processes
from msfp_cli.recording.result import Recording

_HELD_BACK = 5  # one call in so many is held back
_HEADER = "compensation"


@dataclass(frozen=True)
class RoundedWeight:
    """The packed codes of a weight, None for nearest rounding, and what is known of them.

    Nothing is known where a layer did not run in any call that was held back.
    """

    codes: Tensor | None = None
    compensation: Compensation | None = None


@torch.no_grad()
def compensate(
    component: str,
    denoiser: nn.Module,
    recording: Recording,
    shards: Sequence[int],
    calibration: Calibration,
    processes: Processes,
    work: Path | None = None,
    max_memory: int | None = None,
) -> dict[str, RoundedWeight]:
    """Round the weight of every layer that multiplies by quantized weights, see `can_sample`.

    Arguments:
        denoiser: in floating point; it stays so.
        shards: of the recording, to sample.
        calibration: formats, grids and scales; whatever codes it has are not used.
        processes: those that share the layers; each replays the calls for its own.
        work: where the codes of a finished group are kept, so that a killed run goes on. They are
            mapped from there, and take no memory that the system could not take back. None keeps
            all in memory.
        max_memory: bytes that this process may take: the less, the more often the recording is
            replayed. At least one layer is sampled at a time.
    """
    schemes = calibration.table(component)
    scales = calibration.scales[component]
    multipliers = calibration.multipliers.get(component, {})
    identity = calibration.identity()
    lift = calibration.input_lifts.get(component)
    is_lifted_at = lift.at if lift else lambda timestep: False
    layers = {name: denoiser.get_submodule(name) for name in schemes}
    names = [name for name, each in schemes.items() if each.tunable and can_sample(layers[name])]
    rounded = _finished(work, component, identity) if work else {}
    processes.wait()  # before anyone adds to what is finished
    own = processes.part(
        [name for name in names if name not in rounded],
        lambda name: calibration.layers[component][name].num_weights,
    )
    left = {name: layers[name] for name in own}
    groups = group_layers(left, group_bytes(max_memory))
    num_calls = [recording.num_calls(component, [shard]) for shard in shards]
    checks = held_back(shards, num_calls)
    new = dict[str, RoundedWeight]()
    total = len(checks) * len(groups) + len(left)
    with processes.progress.task(f"Compensating {component}", total) as step:
        for group in groups:
            samples = {name: LayerSamples(name, left[name], schemes[name]) for name in group}
            calls = recording.calls(component, shards)
            sample(denoiser, calls, checks, samples, step, is_lifted_at)
            done = _round_all(samples, schemes, scales, multipliers, step)
            if work:
                number = names.index(group[0])
                _store(work / f"{component}-{number:05d}.safetensors", identity, done)
            else:
                new |= done
    rounded |= processes.gather(new, RoundedWeight)  # all have written theirs when this returns
    if work:
        rounded = _finished_by_all(work, component, identity, names, processes)
    return {name: rounded[name] for name in names}


def held_back(shards: Sequence[int], num_calls: Sequence[int]) -> list[bool]:
    """Say of each call whether it is held back: the calls of the last pictures, if there are more.

    Arguments:
        num_calls: of each shard.
    """
    if len(shards) == 1:
        (count,) = num_calls
        every = min(_HELD_BACK, max(count, 2))
        return [index % every == every - 1 for index in range(count)]
    first = len(shards) - -(-len(shards) // _HELD_BACK)
    marks = ([number >= first] * count for number, count in enumerate(num_calls))
    return list(chain.from_iterable(marks))


def _round_all(
    samples: Mapping[str, LayerSamples],
    schemes: Mapping[str, LayerScheme],
    scales: Mapping[str, Tensor],
    multipliers: Mapping[str, Tensor],
    step: Callable[[int], None],
) -> dict[str, RoundedWeight]:
    rounded = {}
    for name, each in samples.items():
        fmt = schemes[name].weight
        assert fmt is not None
        with weight_in_memory(each.layer):
            rounded[name] = round_layer(each, fmt, scales[name], multipliers.get(name))
        each.moments.clear()  # one layer after another
        each.missing.clear()
        each.checks.clear()
        step(1)
    return rounded


def round_layer(
    samples: LayerSamples, fmt: FloatFormat, scale: Tensor, multipliers: Tensor | None = None
) -> RoundedWeight:
    """Round one weight: at the damping that does best on the rows to check, or to the nearest.

    Arguments:
        samples: completed here.
        scale: of the weight, ``(out,)``.
        multipliers: uint8 ``(out, groups)``, where its groups have some.
    """
    if not samples.checks:
        return RoundedWeight()
    samples.complete_()
    objective = _objective(samples, fmt, scale, multipliers)
    damping, integers = objective.least()
    signal = objective.checks.signal()
    nearest_error = objective.error(objective.nearest()) / signal
    error = objective.error(integers) / signal
    if not error < nearest_error:  # nor is a NaN, where there are no integers
        unchanged = Compensation(damping=None, error=nearest_error, nearest_error=nearest_error)
        return RoundedWeight(None, unchanged)
    codes = quantize(objective.levels(integers), Grid(fmt, 1.0))
    compensation = Compensation(damping=damping, error=error, nearest_error=nearest_error)
    return RoundedWeight(pack(codes, fmt.bits).cpu(), compensation)


def _objective(
    samples: LayerSamples, fmt: FloatFormat, scale: Tensor, multipliers: Tensor | None
) -> RoundingObjective:
    """Return what the rounding of the sampled layer's weight is to make small."""
    layer = samples.layer
    weight = samples.scheme.transform.rotate(layer.weight)
    scale = weight_rows(layer, scale.to(weight.device))
    factors = None
    if multipliers is not None:
        of_weights = expand(multipliers.to(weight.device), weight.shape)
        factors = weight_rows(layer, of_weights.float())
    (checks,) = samples.checks
    return RoundingObjective(
        fmt=fmt,
        scale=scale,
        steps=weight_rows(layer, weight.float()) / scale,
        factors=factors,
        parts=input_parts(layer),
        moments=samples.moments,
        missing=samples.missing,
        checks=checks,
    )


def _store(path: Path, identity: str, rounded: Mapping[str, RoundedWeight]) -> None:
    """Write what was found for a group of layers."""
    layers = {name: _to_json(each.compensation) for name, each in rounded.items()}
    codes = {name: each.codes for name, each in rounded.items() if each.codes is not None}
    header = {_HEADER: json.dumps({"identity": identity, "layers": layers})}
    write_tensors(path, codes, header)


def _to_json(compensation: Compensation | None) -> Json:
    return None if compensation is None else asdict(compensation)


def _finished_by_all(
    work: Path, component: str, identity: str, names: Sequence[str], processes: Processes
) -> dict[str, RoundedWeight]:
    """Map what all processes have finished, which a network file system may show late."""
    rounded = dict[str, RoundedWeight]()

    def is_complete() -> bool:
        rounded.update(_finished(work, component, identity))
        return rounded.keys() >= set(names)

    if not processes.wait_for(is_complete):
        raise RunError(f"{work} lacks what another process wrote there; run the same command again")
    return rounded


def _finished(work: Path, component: str, identity: str) -> dict[str, RoundedWeight]:
    """Map what is finished: by this process or another one, or before a kill, in any groups."""

    def parse(document: Json, codes: dict[str, Tensor]) -> dict[str, RoundedWeight]:
        layers = read_value(dict[str, Compensation | None], document["layers"])
        if document["identity"] != identity:
            return {}
        return {name: RoundedWeight(codes.get(name), each) for name, each in layers.items()}

    rounded: dict[str, RoundedWeight] = {}
    for path in sorted(work.glob(f"{component}-*.safetensors")):
        rounded |= read_document(
            path, _HEADER, parse, redo="delete it and run the same command again"
        )
    return rounded
