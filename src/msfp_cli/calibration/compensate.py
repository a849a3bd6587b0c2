"""Round the weights of a denoiser for the output of their layers (`formats.compensation`).

The recording is replayed through the float denoiser once for a group of layers whose sums fit into
memory together. Some calls are held back. On those, each layer is compared with nearest rounding at
a few dampings, by the error of its output, and the best of all is taken: a layer that compensation
does not help keeps nearest rounding. So what a layer gets cannot be worse than nearest rounding on
calls that it was not made from.

The inputs are those of the float denoiser. In the quantized one they carry the errors of the layers
before, which are not a function of this layer's input: made from them, the codes are worse (ours).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from msfp_cli.files.documents import Json, read_document, write_tensors
from msfp_cli.files.typed import read_value
from msfp_cli.formats.compensation import compensated_steps
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.multipliers import expand
from msfp_cli.formats.packing import pack
from msfp_cli.formats.rounding import Grid, quantize, round_steps
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.layers.streamed import weight_in_memory
from msfp_cli.processes import Processes
from msfp_cli.recording.result import Recording

# Less than 0.03 lowers the error of most layers and raises that of the denoiser: once it is
# quantized, its layers get inputs with errors that the samples do not have.
DAMPINGS = (0.03, 0.1, 0.3, 1.0)
_HELD_BACK = 5  # one call in so many is held back
_FACTOR_BYTES = 2**27  # the Cholesky factors that are in use at once, and several copies of them
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
        work: where the codes of a finished group are kept, so that a killed run goes on; None
            keeps nothing.
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
            samples = {
                name: LayerSamples(
                    name, left[name], schemes[name].input, schemes[name].lifted_input
                )
                for name in group
            }
            calls = recording.calls(component, shards)
            sample(denoiser, calls, checks, samples, step, is_lifted_at)
            done = _round_all(samples, schemes, scales, multipliers, step)
            if work:
                number = names.index(group[0])
                _store(work / f"{component}-{number:05d}.safetensors", identity, done)
            new |= done
    rounded |= processes.gather(new, RoundedWeight)
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
        each.cross.clear()
        each.checks.clear()
        step(1)
    return rounded


def round_layer(
    samples: LayerSamples, fmt: FloatFormat, scale: Tensor, multipliers: Tensor | None = None
) -> RoundedWeight:
    """Round one weight: at the damping that does best on the rows to check, or to the nearest.

    Arguments:
        scale: of the weight, ``(out,)``.
        multipliers: uint8 ``(out, groups)``, where its groups have some.
    """
    if not samples.checks:
        return RoundedWeight()
    layer = samples.layer
    scale = weight_rows(layer, scale.to(layer.weight.device))  # (groups, out / groups, 1)
    steps = weight_rows(layer, layer.weight.float()) / scale
    factors = torch.ones_like(steps)
    if multipliers is not None:
        of_weights = expand(multipliers.to(steps.device), layer.weight.shape)
        factors = weight_rows(layer, of_weights.float())
    rows = samples.check_rows()
    exact = _outputs(rows.exact, steps) * scale.mT

    def error(integers: Tensor) -> float:
        """Return the squared error of the layer's output; a NaN where there are no integers."""
        outputs = _outputs(rows.rounded, integers) * scale.mT
        return float((outputs - exact).double().square().sum())

    nearest = error(round_steps(steps / factors, fmt) * factors)
    best = nearest
    chosen = None
    damping = None
    for candidate, integers in _candidates(samples, steps, fmt, factors):
        if (found := error(integers)) < best:
            best = found
            chosen = integers
            damping = candidate
    signal = float(exact.double().square().sum()) or 1.0
    compensation = Compensation(
        damping=damping, error=best / signal, nearest_error=nearest / signal
    )
    if chosen is None:
        return RoundedWeight(None, compensation)
    codes = quantize(chosen / factors, Grid(fmt, 1.0))
    return RoundedWeight(pack(codes, fmt.bits).cpu(), compensation)


def _outputs(rows: Tensor, steps: Tensor) -> Tensor:
    """Return the layer's output in steps, ``(groups, rows, out / groups)``."""
    return rows @ steps.mT


def _candidates(
    samples: LayerSamples, steps: Tensor, fmt: FloatFormat, factors: Tensor
) -> Iterator[tuple[float, Tensor]]:
    """Yield dampings and the weight's integers at each."""
    parts = input_parts(samples.layer)
    largest = max(moments.numel() for moments in samples.moments)
    together = max(1, _FACTOR_BYTES // (4 * largest))
    for first in range(0, len(DAMPINGS), together):
        dampings = DAMPINGS[first : first + together]
        values = torch.tensor(dampings, device=steps.device)
        pieces = []
        for number, part in enumerate(parts):
            cross = samples.cross[number] if samples.cross else None
            own = steps[..., part]
            pieces.append(
                compensated_steps(
                    own, samples.moments[number], cross, fmt, values, factors[..., part]
                )
            )
        yield from zip(dampings, torch.cat(pieces, dim=-1), strict=True)


def _store(path: Path, identity: str, rounded: Mapping[str, RoundedWeight]) -> None:
    """Write what was found for a group of layers."""
    layers = {name: _to_json(each.compensation) for name, each in rounded.items()}
    codes = {name: each.codes for name, each in rounded.items() if each.codes is not None}
    header = {_HEADER: json.dumps({"identity": identity, "layers": layers})}
    write_tensors(path, codes, header)


def _to_json(compensation: Compensation | None) -> Json:
    return None if compensation is None else asdict(compensation)


def _finished(work: Path, component: str, identity: str) -> dict[str, RoundedWeight]:
    """Read what was found for layers before the process was killed, whatever their groups."""

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
