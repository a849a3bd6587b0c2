"""Write a calibrated (and fine-tuned) pipeline so that stock ``from_pretrained`` loads it."""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from msfp_cli.calibration.quantize import quantize_, refuse_other_weights
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.in_memory import mark_calibrated_, quantize_text_encoders_
from msfp_cli.checkpoint.quantizer import (
    bytes_of_members,
)
from msfp_cli.files.directories import refuse_existing, replace_directory
from msfp_cli.finetuning.quantize import quantize_tuned_
from msfp_cli.finetuning.result import FinetuneState, load_finetunings
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.memory import read_size
from msfp_cli.pipelines.denoiser import find_denoisers
from msfp_cli.pipelines.loading import Pipeline, load_pipeline
from msfp_cli.run import Run, refuse_stage

MAX_SHARD_SIZE = "10GB"  # of a file of weights, which is diffusers' own default


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written.

    Arguments:
        directory: the export.
        denoiser_bytes: size of the denoisers' safetensors files; networks beside them that stay as
            they are, such as a ControlNet, do not count.
        half_precision_bytes: what the same denoisers take in 16 bits.
        hub_bytes: of the denoisers' size, what the second and further members of the hubs take,
            and the router's tables.
        switching_layers: layers that have more than one member.
        finetunings: by component, how the fine-tuning that is in the export went, in words.
    """

    directory: str
    denoiser_bytes: int
    half_precision_bytes: int
    hub_bytes: int = 0
    switching_layers: int = 0
    finetunings: Mapping[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Size relative to 16 bits."""
        return self.denoiser_bytes / self.half_precision_bytes

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "ratio": self.ratio}


def load_calibrated(
    calibration: Calibration,
    device: str | None = None,
    tuned: Mapping[str, FinetuneState] | None = None,
) -> Pipeline:
    """Load the calibrated model and quantize it: the in-memory twin of an export.

    Arguments:
        tuned: fine-tunings by component; a component without one is as calibrated.

    Raises:
        RunError: a fine-tuning began with another calibration, or the model was changed since it
            was calibrated.
    """
    pipe = load_pipeline(calibration.source, device)
    denoisers = find_denoisers(pipe)
    refuse_other_weights(denoisers, calibration)
    for component in calibration.layers:
        denoiser, learned = denoisers[component], (tuned or {}).get(component)
        if learned is None:
            quantize_(denoiser, calibration, component)
        else:
            quantize_tuned_(denoiser, calibration, component, learned)
        is_tuned = learned is not None and learned.best.step > 0
        mark_calibrated_(denoiser, calibration, component, is_tuned=is_tuned)
    quantize_text_encoders_(pipe, calibration)
    return pipe


def export_(
    calibration: Calibration,
    directory: Path,
    *,
    tuned: Mapping[str, FinetuneState] | None = None,
    device: str | None = None,
    overwrite: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
    remember: Callable[[Path], None] | None = None,
    complete: Callable[[Path], None] = lambda directory: None,
) -> ExportReport:
    """Quantize the calibrated model, fine-tuned or not, and write it.

    Arguments:
        max_shard_size: of the tensors in a file, such as ``2GB``; a larger component has several.
        remember: called with the directory as the last thing before the export gets its name, so
            that whoever notes where it is never misses one.
        complete: adds to the written directory, which does not have its name yet.

    Raises:
        RunError: the directory exists and `overwrite` is not set, or as said by
            `load_calibrated`.
    """
    pipe = load_calibrated(calibration, device, tuned)
    denoisers = {component: pipe.components[component] for component in calibration.layers}
    half = sum(
        _half_precision_bytes(calibration, component, part) for component, part in denoisers.items()
    )
    with replace_directory(directory, overwrite=overwrite) as temporary:
        _write(pipe, temporary, max_shard_size)
        complete(temporary)
        if remember is not None:
            remember(directory)
    size = sum(_safetensors_bytes(directory / component) for component in denoisers)
    layers = chain.from_iterable(quantized_layers(part).values() for part in denoisers.values())
    switching = [layer for layer in layers if layer.scheme.hub > 1]
    return ExportReport(
        directory=str(directory),
        denoiser_bytes=size,
        half_precision_bytes=half,
        hub_bytes=sum(bytes_of_members(directory / component) for component in denoisers),
        switching_layers=len(switching),
        finetunings={component: state.summary() for component, state in (tuned or {}).items()},
    )


def _safetensors_bytes(directory: Path) -> int:
    """Return the size of a component's tensors on disk."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def export_run(
    run: Run,
    directory: Path | None = None,
    *,
    with_finetuning: bool = True,
    device: str | None = None,
    overwrite: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
    complete: Callable[[Path], None] = lambda directory: None,
) -> ExportReport:
    """Export what a run calibrated and fine-tuned, and note in the run where the export is.

    Of a run that may only be read nothing is noted; it can be exported to another place.

    Arguments:
        directory: where to write; None for the run's own export directory.
        with_finetuning: False exports the calibrated state even if the run was fine-tuned.
        complete: see `export_`.

    Raises:
        UsageError: `max_shard_size` is not a size.
        RunError: there is no calibration, the directory exists and `overwrite` is not set, or as
            said by `load_calibrated`.
    """
    read_size(max_shard_size)  # which is refused before a model is loaded
    run.require()
    run.refuse_read_only(directory)
    directory = directory or run.export
    refuse_stage(directory, "export")
    with run.lock(None if run.is_writable else directory):
        calibration = Calibration.load(run.calibration)
        finetunings = load_finetunings(run, calibration) if with_finetuning else {}
        refuse_existing(directory, overwrite=overwrite)
        return export_(
            calibration,
            directory,
            tuned=finetunings,
            device=device,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            remember=run.remember_export if run.is_writable else None,
            complete=complete,
        )


def _half_precision_bytes(calibration: Calibration, component: str, denoiser: nn.Module) -> int:
    """Return what a denoiser takes in 16 bits: weights that became codes, and other parameters."""
    layers = calibration.layers.get(component, {}).values()
    codes = sum(layer.num_weights for layer in layers if layer.scheme.weight is not None)
    return 2 * (codes + sum(parameter.numel() for parameter in denoiser.parameters()))


def save_pipeline(
    pipe: Pipeline,
    directory: Path,
    *,
    overwrite: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write a pipeline with stock ``save_pretrained``, byte for byte the same each time.

    Raises:
        RunError: the directory exists and `overwrite` is not set.
    """
    with replace_directory(directory, overwrite=overwrite) as temporary:
        _write(pipe, temporary, max_shard_size)


def _write(pipe: Pipeline, directory: Path, max_shard_size: str) -> None:
    write = DiffusionPipeline.save_pretrained  # without what we add to it
    size = read_size(str(max_shard_size))
    write(pipe, directory, safe_serialization=True, max_shard_size=size)
    tidy_(directory)


def tidy_(directory: Path) -> None:
    """Make what was saved the same each time: no place of this machine, and headers in order."""
    for path in sorted(directory.rglob("*.json")):
        _forget_origin_(path)
    for path in sorted(directory.rglob("*.safetensors")):
        sort_header_(path)


def _forget_origin_(path: Path) -> None:
    """Take out of a config the directory it was loaded from, which is a place on this machine."""
    config = json.loads(path.read_text("utf-8"))
    if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def sort_header_(path: Path) -> None:
    """Sort the metadata in a safetensors header, which safetensors writes in a random order."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            return  # another escaping than ours; the order stays as it is
        file.seek(8)
        file.write(text.ljust(length))
