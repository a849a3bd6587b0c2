"""Quantize the weights of a whole pipeline without a calibration: `msfp quantize`.

Denoisers are read and encoded part by part (`parts`), text encoders that were asked for as
transformers loads them, and all other components are copied. At no time is a component in memory in
full precision.
"""

import inspect
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import transformers

from msfp_cli.errors import UsageError
from msfp_cli.files.atomic import delete
from msfp_cli.files.directories import refuse_existing, replace_directory
from msfp_cli.files.documents import Json, read_json
from msfp_cli.files.lock import beside, only_writer
from msfp_cli.files.weight_files import copy_component
from msfp_cli.pipelines.denoiser import denoiser_names
from msfp_cli.pipelines.loading import ModelSource, fetch_pipeline, pipeline_class
from msfp_cli.progress import SILENT, Progress
from msfp_cli.run import refuse_stage
from msfp_cli.streaming.component import ComponentSize, DenoiserJob
from msfp_cli.streaming.parts import refuse_damaged, refuse_unreadable
from msfp_cli.streaming.recipe import QuantizeRecipe
from msfp_cli.streaming.text_component import TextEncoderJob

# How the components are called that tell families of pipelines apart.
_MAIN = ("text_encoder", "tokenizer", "transformer", "unet", "vae")


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """What was written.

    Arguments:
        directory: the quantized pipeline.
        pipeline: its class.
        components: those that were quantized.
        num_parameters: that were encoded by this process, without those of an earlier one.
        seconds: that it took to encode them.
    """

    directory: str
    pipeline: str
    components: Mapping[str, ComponentSize]
    num_parameters: int
    seconds: float

    @property
    def speed(self) -> float:
        """Parameters per second."""
        return self.num_parameters / self.seconds

    def to_json(self) -> dict[str, Json]:
        """Return plain JSON values."""
        return {**asdict(self), "parameters_per_second": self.speed}


def quantize_pipeline(
    source: ModelSource,
    directory: Path,
    recipe: QuantizeRecipe,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> QuantizeReport:
    """Quantize the weights of a pipeline, and write it for stock ``from_pretrained``.

    Raises:
        ModelError: the pipeline cannot be found, or has no denoiser.
        CheckpointError: its files are damaged.
        UsageError: it is quantized already, or has no such text encoder; or the source names a
            class that diffusers has not.
        RunError: the directory exists and `overwrite` is not set.
    """
    refuse_stage(directory)
    work = beside(directory).with_name(f".{directory.name}.msfp-parts")
    refuse_existing(directory, overwrite=overwrite, work=work)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(directory, beside(directory)):
        place = fetch_pipeline(source)
        index = read_json(place / "model_index.json", dict, redo="download the model again")
        if source.pipeline is not None:
            index = {**index, "_class_name": _fitting_class(source.pipeline, index)}
        jobs = _jobs(source, place, index, recipe, work)
        others = [name for name in _components(index) if name not in jobs]
        for name in _components(index):
            refuse_unreadable(place / name)
        for name in others:
            refuse_damaged(place / name, source.variant, progress)
        start = time.monotonic()
        count = sum(job.encode(progress) for job in jobs.values())
        seconds = time.monotonic() - start
        with replace_directory(directory, overwrite=overwrite) as temporary:
            for name, job in jobs.items():
                job.write(temporary / name)
            for name in others:
                copy_component(place / name, temporary / name, source.variant)
            (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        sizes = {name: job.size(directory / name) for name, job in jobs.items()}
        delete(work)
    return QuantizeReport(
        directory=str(directory),
        pipeline=str(index.get("_class_name")),
        components=sizes,
        num_parameters=count,
        seconds=seconds,
    )


def _jobs(
    source: ModelSource,
    place: Path,
    index: Mapping[str, Any],
    recipe: QuantizeRecipe,
    work: Path,
) -> dict[str, DenoiserJob | TextEncoderJob]:
    """Return what is to be done, by component."""
    names = denoiser_names(index)
    texts = [name for name, entry in index.items() if _is_text_encoder(name, entry)]
    if unknown := sorted(set(recipe.also) - set(texts)):
        raise UsageError(
            f"--also {unknown[0]!r} is not a text encoder of this pipeline; it has "
            f"{', '.join(texts) or 'none'}"
        )
    jobs = dict[str, DenoiserJob | TextEncoderJob]()
    for name in (*names, *dict.fromkeys(recipe.also)):
        is_denoiser = name in names
        job = DenoiserJob if is_denoiser else TextEncoderJob
        jobs[name] = job(
            model_class=getattr(diffusers if is_denoiser else transformers, index[name][1]),
            source=place / name,
            variant=source.variant,
            work=work / name,
            recipe=recipe,
            origin=source.to_json(),
        )
    return jobs


def _is_text_encoder(name: str, entry: Any) -> bool:  # noqa: ANN401 (a value of JSON)
    return name.startswith("text_encoder") and entry[0] == "transformers"


def _fitting_class(name: str, index: Mapping[str, Any]) -> str:
    """Return the name of a pipeline's class, which fits the components of the model.

    Raises:
        UsageError: diffusers has no such class, the model lacks components that it needs, or the
            class has no use for one of the model's main ones.
    """
    found = pipeline_class(name)
    parameters = inspect.signature(found.__init__).parameters
    own: Any = getattr(diffusers, str(index.get("_class_name")), None)
    usual = {"self"} if own is None else {*inspect.signature(own.__init__).parameters}
    optional = {each for each in found._optional_components if not each.startswith(_MAIN)}
    needed = [
        each.name
        for each in parameters.values()
        if each.kind is each.POSITIONAL_OR_KEYWORD
        and (each.default is each.empty or each.name.startswith(_MAIN))
    ]
    if missing := [each for each in needed if each not in {*optional, *usual, *index}]:
        raise UsageError(
            f"--pipeline {name} needs {', '.join(missing)}, which the model does not have; give "
            "another class, or none to take the model's own"
        )
    unused = [each for each in _components(index) if each not in parameters]
    if unused := [each for each in unused if each.startswith(_MAIN)]:
        raise UsageError(
            f"--pipeline {name} has no use for the model's {', '.join(unused)}; give another "
            "class, or none to take the model's own"
        )
    return str(found.__name__)


def _components(index: Mapping[str, Any]) -> list[str]:
    """Return the components that a pipeline has, by its index."""
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    return [name for name, entry in entries.items() if isinstance(entry[0], str)]
