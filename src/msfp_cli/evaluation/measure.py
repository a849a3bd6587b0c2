"""Measure one model of an evaluation: its pictures, its denoiser on recorded calls, what it costs to run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msfp_cli.evaluation.cost import Cost, measure_cost
from msfp_cli.evaluation.features.clip import clip_score
from msfp_cli.evaluation.features.extractors import Extractor
from msfp_cli.evaluation.gallery import Gallery
from msfp_cli.evaluation.measures import (
    compare_pictures,
    distance_between,
    input_histograms,
    prompt_agreement,
)
from msfp_cli.evaluation.models import Subject, denoiser_bytes
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.evaluation.reference import ReferencePictures
from msfp_cli.evaluation.result import Histogram, Measured, OutputNoise
from msfp_cli.evaluation.resume import read_document
from msfp_cli.files import write_text
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.pipelines.denoiser import find_denoisers
from msfp_cli.pipelines.loading import choose_device
from msfp_cli.pipelines.source import ModelSource
from msfp_cli.processes import Processes
from msfp_cli.progress import Progress
from msfp_cli.recording.compare import (
    layer_errors,
    output_error,
    relative_error,
    spread_calls,
)
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.recording.result import Recording

_LAYER_CALLS = 8


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every part of an evaluation needs to know."""

    directory: Path
    options: EvaluateRecipe
    record: RecordRecipe
    source: ModelSource
    extractor: Extractor
    device: str | None
    processes: Processes
    progress: Progress


def measured_of(
    work: Work,
    subject: Subject,
    pipe: Any,  # noqa: ANN401 (a pipeline)
    full: Any,  # noqa: ANN401 (a pipeline)
    gallery: Gallery,
    reference: ReferencePictures | None,
) -> Measured:
    """Measure a model, or read what was measured before an interruption."""
    path = work.directory / "measured" / f"{subject.key}.json"
    if path.exists():
        return read_document(path, Measured.from_json)
    pictures, of_full = (
        gallery.pictures(),
        Gallery(work.directory / "pictures" / "full", work.record),
    )
    features = work.extractor.features(pictures)
    facts: dict[str, Any] = {"denoiser_bytes": denoiser_bytes(pipe)}
    if subject.key != "full":
        facts |= compare_pictures(pictures, of_full.pictures())
        facts["latents"] = relative_error(gallery.latents(), of_full.latents())
        facts["noise"] = _noise(
            work, pipe, full if work.options.layers and subject.key == "export" else None
        )
        facts["to_full"] = distance_between(features, work.extractor.features(of_full.pictures()))
    if reference is not None:
        facts["to_reference"] = distance_between(features, reference.features)
    prompts = [condition for condition in work.record.conditions if condition is not None]
    conditioned = len(prompts) == len(pictures)
    if work.extractor.name == "fashion" and conditioned:
        facts |= prompt_agreement(pictures, prompts)
    if work.options.clip is not None and conditioned:
        facts["clip"] = clip_score(work.options.clip, pictures, prompts, choose_device(work.device))
    if work.options.cost and subject.source is not None:
        facts["cost"] = _cost(work, subject.source)
    result = Measured(key=subject.key, title=subject.title, **facts)
    write_text(path, json.dumps(result.to_json()))
    return result


def _noise(work: Work, pipe: Any, full: Any | None) -> dict[str, OutputNoise]:  # noqa: ANN401 (pipelines)
    """Measure the denoisers on the full-precision trajectories, and their layers where `full` is given."""
    recording, found = Recording(work.directory / "trajectories"), {}
    for component, denoiser in find_denoisers(pipe).items():
        quantized = quantized_layers(denoiser)
        if not quantized:
            continue
        error = output_error(denoiser, recording.calls(component))
        layers, inputs = dict[str, float](), dict[str, Histogram]()
        if full is not None:
            calls, whole = (
                spread_calls(recording, component, _LAYER_CALLS),
                find_denoisers(full)[component],
            )
            layers, inputs = (
                layer_errors(denoiser, whole, quantized, calls),
                input_histograms(whole, calls),
            )
        found[component] = OutputNoise(
            error=error.relative(),
            by_timestep=tuple(error.by_timestep()),
            layers=layers,
            inputs=inputs,
        )
    return found


def _cost(work: Work, source: ModelSource) -> Cost:
    """Measure time and memory with one batch of the pictures."""
    record = work.record
    with work.progress.task(f"Timing {source.model}", None):
        return measure_cost(
            source,
            record.conditions[: record.batch_size],
            record,
            device=work.device,
        )
