"""The models that an evaluation puts side by side: full precision, the export, and the steps that led to it."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msfp_cli.calibration.calibrate import calibrate_
from msfp_cli.calibration.result import Calibration, quantize_
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.checkpoint.pipeline import read_configs
from msfp_cli.checkpoint.quantizer import REDO, MSFPConfig
from msfp_cli.errors import ModelError, UsageError
from msfp_cli.evaluation.recipe import STEPS_BEFORE
from msfp_cli.files import digest, open_tensors
from msfp_cli.layers.replace import find_layers, quantized_layers
from msfp_cli.pipelines.denoiser import find_denoisers, fingerprint
from msfp_cli.pipelines.loading import load_pipeline
from msfp_cli.pipelines.source import ModelSource
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model of an evaluation.

    Arguments:
        key: ``full``, ``export``, or a name in `STEPS_BEFORE`.
        title: for people.
        source: where its pipeline can be loaded from as it is; None for one that exists in memory
            only.
        load: returns the pipeline.
    """

    key: str
    title: str
    source: ModelSource | None
    load: Callable[[], Any] = field(repr=False)


def identity_of(pipe: Any) -> dict[str, str]:  # noqa: ANN401 (a pipeline's class is the user's)
    """Return, for each denoiser, what tells it from another model or another quantization of the same."""
    return {component: _identity(denoiser) for component, denoiser in find_denoisers(pipe).items()}


def _identity(denoiser: nn.Module) -> str:
    layers = quantized_layers(denoiser)
    if not layers:
        return fingerprint(denoiser)
    table = {
        name: layer.scheme.to_json() for name, layer in layers.items()
    }  # inputs' grids are no tensors
    text = json.dumps(table, sort_keys=True) + digest(denoiser.state_dict())
    return hashlib.sha256(text.encode()).hexdigest()


def find_subjects(
    run: Run,
    export: Path,
    compare: Sequence[str] | None,
    *,
    work: Path,
    against: ModelSource | None,
    device: str | None,
) -> list[Subject]:
    """Return the models to evaluate, full precision first and the export last.

    Arguments:
        compare: names in `STEPS_BEFORE`; None takes all that the run directory knows how to make.
        work: where what is made on the way is kept.
        against: the full-precision model; None takes the one that the export names.

    Raises:
        UsageError: the run has no calibration to make a step before from.
        ModelError: the directory is no export.
    """
    configs = read_configs(export)
    source = against or ModelSource(**next(iter(configs.values())).source)
    made_here = calibration_of(run, export, configs)
    if compare and not made_here:
        raise UsageError(
            f"{export} was not made by the run {run.directory}; use --compare none, or give its --run"
        )
    tuned = made_here is not None and any(
        config.table() != made_here.table(component) for component, config in configs.items()
    )
    names = _steps_before(run, tuned=tuned) if compare is None else tuple(compare)
    subjects = [
        Subject(
            key="full",
            title="full precision",
            source=source,
            load=lambda: load_pipeline(source, device),
        )
    ]
    if made_here:
        before = {
            "signed": Subject(
                key="signed",
                title="signed FP4",
                source=None,
                load=lambda: _load_signed(run, made_here, work / "signed", device),
            ),
            "calibrated": Subject(
                key="calibrated",
                title="MSFP",
                source=None,
                load=lambda: load_calibrated(made_here, device),
            ),
        }
        subjects += [before[name] for name in STEPS_BEFORE if name in names]
    exported = ModelSource(model=str(export), dtype=source.dtype)
    title = "MSFP, fine-tuned" if tuned else "MSFP"
    return [
        *subjects,
        Subject(
            key="export", title=title, source=exported, load=lambda: load_pipeline(exported, device)
        ),
    ]


def _steps_before(run: Run, *, tuned: bool) -> tuple[str, ...]:
    """Return the steps before that the run knows how to make: signed formats are searched on its recording."""
    recorded = all((place / "recording.json").exists() for place in (run.recording, run.held_out))
    possible = {"signed": recorded, "calibrated": tuned}
    return tuple(name for name in STEPS_BEFORE if possible[name])


def calibration_of(run: Run, export: Path, configs: dict[str, MSFPConfig]) -> Calibration | None:
    """Return the run's calibration if the export came from it: the same formats, the same scales of weights."""
    if not run.calibration.exists():
        return None
    calibration = Calibration.load(run.calibration)
    if calibration.layers.keys() != configs.keys():
        return None
    for component, config in configs.items():
        weights = {name: scheme.weight for name, scheme in config.table().items()}
        if weights != {
            name: scheme.weight for name, scheme in calibration.table(component).items()
        }:
            return None
        scales = calibration.scales[component]
        if digest(_exported_scales(export / component)) != digest(
            {n: t for n, t in scales.items() if n in weights}
        ):
            return None
    return calibration


def _exported_scales(directory: Path) -> dict[str, Tensor]:
    """Read the weight scales of an exported denoiser, by layer; fine-tuning leaves them as calibrated.

    Raises:
        CheckpointError: a file is truncated.
    """
    ending, found = ".weight_scale", dict[str, Tensor]()
    for path in sorted(directory.glob("*.safetensors")):
        with open_tensors(path, redo=REDO) as file:
            for name in sorted(file.keys()):
                if name.endswith(ending):
                    found[name.removesuffix(ending)] = file.get_tensor(name)
    return found


def _load_signed(run: Run, calibration: Calibration, place: Path, device: str | None) -> Any:  # noqa: ANN401 (a pipeline)
    """Load the model quantized to signed formats alone, no layer lifted: what plain FP4 gives at these bits.

    Arguments:
        place: where its calibration is kept.
    """
    recipe = replace(calibration.recipe, formats="signed", lift=0.0)
    pipe = load_pipeline(calibration.source, device)
    known = Calibration.load(place) if place.exists() else None
    if known is None or (known.recipe, known.record) != (recipe, calibration.record):
        recording, held_out = Recording(run.recording), Recording(run.held_out)
        calibrate_(pipe, recording, held_out, recipe).save(place, overwrite=True)
        return pipe
    for component, denoiser in find_denoisers(pipe).items():
        if component in known.layers:
            quantize_(denoiser, known, component)
    return pipe


@torch.no_grad()
def refuse_other_model(full: Any, quantized: Any) -> None:  # noqa: ANN401 (pipelines)
    """Refuse a full-precision model that is not what the export was made from.

    Layers must have the same names and shapes, and what quantization leaves alone (norms, biases,
    embeddings) must have the same values, up to the rounding of a shorter type.

    Raises:
        ModelError: they differ; the message names the first difference.
    """
    wholes, denoisers = find_denoisers(full), find_denoisers(quantized)
    for component, denoiser in denoisers.items():
        if not quantized_layers(denoiser):
            continue
        if component not in wholes:
            raise ModelError(
                f"the export is of another model: {component!r} is missing; give it with --against"
            )
        known, layers = dict(wholes[component].named_parameters()), find_layers(wholes[component])
        for name, layer in quantized_layers(denoiser).items():
            if name not in layers or layers[name].weight.shape != layer.weight_shape:
                raise ModelError(
                    f"the export is of another model: its layer {name!r} differs; give it with --against"
                )
        for name, parameter in denoiser.named_parameters():
            if name not in known or not _alike(parameter, known[name]):
                raise ModelError(
                    f"the export is of another model: its {name!r} differs; give it with --against"
                )


def _alike(a: nn.Parameter, b: nn.Parameter) -> bool:
    return a.shape == b.shape and torch.allclose(
        a.float().cpu(), b.float().cpu(), rtol=1e-2, atol=1e-3
    )


def denoiser_bytes(pipe: Any) -> int:  # noqa: ANN401 (a pipeline's class is the user's)
    """Return the size of the denoisers: of a quantized one what its export holds, of another what 16 bits take."""
    return sum(
        tensor.nbytes if quantized_layers(denoiser) else 2 * tensor.numel()
        for denoiser in find_denoisers(pipe).values()
        for tensor in denoiser.state_dict().values()
    )
