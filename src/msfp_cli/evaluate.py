"""Measure an export against full precision from the same seeds: the workflow of `msfp evaluate`.

For each model (full precision, the steps before, the export) the same pictures are drawn from the same prompts and
seeds, and its denoiser is run on recorded calls of the full-precision one. Layout of an evaluation directory::

    asked.json          the settings; an interrupted evaluation goes on only with the same
    trajectories/       full-precision denoiser calls of the first pictures
    pictures/MODEL/     a gallery for each model
    measured/MODEL.json what was measured of it
    evaluation.json     all of it together
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msfp_cli import __version__
from msfp_cli.asked import begin, read_document, refuse_other
from msfp_cli.atomic import write_text
from msfp_cli.chain import conditions_for
from msfp_cli.clip import clip_score
from msfp_cli.cost import Cost, machine, measure_cost
from msfp_cli.denoiser import find_denoisers
from msfp_cli.errors import UsageError
from msfp_cli.evaluation import Evaluation, Histogram, Measured, OutputNoise
from msfp_cli.extractors import Extractor, load_extractor
from msfp_cli.gallery import Gallery
from msfp_cli.generation import conditioning_of
from msfp_cli.loading import BUILT_IN, choose_device, default_prompts
from msfp_cli.measures import compare_pictures, distance_between, input_histograms, prompt_agreement, relative_error
from msfp_cli.noise import layer_errors, output_error
from msfp_cli.pipeline import read_configs
from msfp_cli.processes import Processes
from msfp_cli.progress import SILENT, Progress
from msfp_cli.recipe import ModelSource, RecordRecipe
from msfp_cli.record import record_calls
from msfp_cli.recording import Recording
from msfp_cli.reference import BUILT_IN_REFERENCE, Reference, built_in_reference, load_reference, require_pictures
from msfp_cli.run import Run
from msfp_cli.sensitivity import spread_calls
from msfp_cli.subjects import Subject, denoiser_bytes, find_subjects, identity_of, refuse_other_model
from msfp_cli.surgery import quantized_layers

_LAYER_CALLS = 8
_SEED = 5_000_011  # far from the seeds of the recordings


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What the user may say about an evaluation.

    Arguments:
        prompts: prompts or class labels, over again with other seeds where there are fewer than pictures; None takes
            built-in ones that the recording does not use.
        num_images: pictures of each model.
        num_trajectories: of these, how many are followed through the denoiser.
        num_inference_steps, guidance_scale: None takes those of the calibration.
        seed: picture i is drawn with ``seed + i``.
        batch_size: pictures per call.
        extractor: see `extractors`; None takes ``fashion`` for the built-in pipeline and ``squeezenet`` else.
        reference: real pictures, see `load_reference`.
        clip: a CLIP model to score with.
        compare: steps before to measure as well, see `find_subjects`.
        layers: whether to measure each layer's output, for which both denoisers are in memory at once.
        cost: whether to measure time and memory, in processes of their own.
    """

    prompts: tuple[str, ...] | None = None
    num_images: int = 32
    num_trajectories: int = 8
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = _SEED
    batch_size: int = 8
    extractor: str | None = None
    reference: Path | None = None
    clip: str | None = None
    compare: tuple[str, ...] | None = None
    layers: bool = True
    cost: bool = True

    def __post_init__(self) -> None:
        for option, value in (("--num-images", self.num_images), ("--num-trajectories", self.num_trajectories)):
            if value < 1:
                raise UsageError(f"{option} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What every part of an evaluation needs to know."""

    directory: Path
    options: EvaluateOptions
    record: RecordRecipe
    source: ModelSource
    extractor: Extractor
    device: str | None
    processes: Processes
    progress: Progress


def evaluate_run(
    run: Run,
    export: Path,
    options: EvaluateOptions,
    *,
    against: ModelSource | None = None,
    directory: Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Evaluation:
    """Evaluate an export; what an interrupted evaluation has is kept.

    Arguments:
        directory: where to work; None for the run's own.
        against: the full-precision model; None takes the one that the export names.

    Raises:
        UsageError: an option does not fit, or what it needs is not installed.
        RunError: the directory holds an evaluation with other settings or of another export.
        ModelError: the export is of another model than `against`.
    """
    processes, place = Processes.current(device), directory or run.evaluation
    subjects = find_subjects(run, export, options.compare, work=place, against=against, device=device)
    source = subjects[0].source
    assert source is not None, "full precision has a source"
    extractor = load_extractor(options.extractor or ("fashion" if source.model == BUILT_IN else "squeezenet"))
    full = subjects[0].load()
    work = _Work(
        directory=place,
        options=options,
        record=_record_recipe(run, full, source, export, options),
        source=source,
        extractor=extractor,
        device=device,
        processes=processes,
        progress=progress,
    )
    asked = _asked(work, subjects, export)
    refuse_other(place, asked, overwrite=overwrite)
    if options.reference is not None:
        require_pictures(options.reference)
    refuse_other_model(full, subjects[-1].load())  # now, not after hours of drawing
    processes.wait()
    if processes.is_first:
        begin(place, asked, overwrite=overwrite)
    processes.wait()
    models = tuple(_measure_all(work, subjects, full))
    evaluation = Evaluation(
        directory=place,
        asked=asked,
        machine=machine(choose_device(device)),
        models=models,
        notes=tuple(_notes(models, extractor)),
    )
    if processes.is_first:
        evaluation.save()
    return evaluation


def _record_recipe(
    run: Run,
    pipe: Any,  # noqa: ANN401 (a pipeline's class is the user's)
    source: ModelSource,
    export: Path,
    options: EvaluateOptions,
) -> RecordRecipe:
    """Return which pictures to draw: prompts that the recording does not use, and the sampler as calibrated."""
    count, prompts = options.num_images, options.prompts
    seen = set(run.load_calibration().record.conditions) if run.calibration.exists() else set()
    if prompts is None and conditioning_of(pipe) == "prompt":
        known = default_prompts(source.model)
        prompts = tuple(prompt for prompt in known if prompt not in seen) or known
    pool = conditions_for(pipe, source, prompts, count)
    sampling = next(iter(read_configs(export).values())).sampling
    steps, guidance = options.num_inference_steps, options.guidance_scale
    return RecordRecipe(
        conditions=tuple(pool[i % len(pool)] for i in range(count)),
        num_inference_steps=sampling.get("num_inference_steps") if steps is None else steps,
        guidance_scale=sampling.get("guidance_scale") if guidance is None else guidance,
        seed=options.seed,
        batch_size=options.batch_size,
    )


def _asked(work: _Work, subjects: Sequence[Subject], export: Path) -> dict[str, Any]:
    """Return the settings as JSON values: what an evaluation that goes on must have in common."""
    options = work.options
    return {
        "version": __version__,
        "export": str(export),
        "against": work.source.to_json(),
        "record": work.record.to_json(),
        "models": [subject.key for subject in subjects],
        "num_trajectories": options.num_trajectories,
        "extractor": work.extractor.name,
        "reference": _reference_name(work),
        "clip": options.clip,
        "layers": options.layers,
        "cost": options.cost,
    }


def _measure_all(work: _Work, subjects: Sequence[Subject], full: Any) -> list[Measured]:  # noqa: ANN401 (a pipeline)
    """Draw and measure every model, full precision first."""
    measured: list[Measured] = []
    reference: Reference | None = None
    for subject in subjects:
        with work.processes.first_goes_first():
            pipe = full if subject.key == "full" else subject.load()
            gallery = Gallery.create(work.directory / "pictures" / subject.key, work.record, identity_of(pipe))
        gallery.fill(pipe, title=subject.title, share=work.processes, progress=work.progress)
        work.processes.wait()
        if not work.processes.is_first:
            continue
        if subject.key == "full":
            _record_trajectories(work, pipe)
            reference = _reference(work, gallery)
        measured.append(_measured(work, subject, pipe, full, gallery, reference))
    return measured


def _record_trajectories(work: _Work, full: Any) -> None:  # noqa: ANN401 (a pipeline)
    """Record the denoiser's calls of the first pictures."""
    few = replace(work.record, conditions=work.record.conditions[: work.options.num_trajectories])
    directory = work.directory / "trajectories"
    record_calls(full, work.source, few, directory, progress=work.progress, description="Following full precision")


def _reference(work: _Work, gallery: Gallery) -> Reference | None:
    """Return the real pictures to compare with, None where there are none."""
    if work.options.reference is not None:
        size = gallery.pictures().shape[2:]
        return load_reference(work.options.reference, work.extractor, size)
    return None if _reference_name(work) is None else built_in_reference()


def _reference_name(work: _Work) -> str | None:
    """Return what the real pictures are, None where there are none."""
    if work.options.reference is not None:
        return str(work.options.reference)
    fits = work.source.model == BUILT_IN and work.extractor.name == "fashion"
    return BUILT_IN_REFERENCE if fits else None


def _measured(
    work: _Work,
    subject: Subject,
    pipe: Any,  # noqa: ANN401 (a pipeline)
    full: Any,  # noqa: ANN401 (a pipeline)
    gallery: Gallery,
    reference: Reference | None,
) -> Measured:
    """Measure a model, or read what was measured before an interruption."""
    path = work.directory / "measured" / f"{subject.key}.json"
    if path.exists():
        return read_document(path, Measured.from_json)
    pictures, of_full = gallery.pictures(), Gallery(work.directory / "pictures" / "full", work.record)
    features = work.extractor.features(pictures)
    facts: dict[str, Any] = {"denoiser_bytes": denoiser_bytes(pipe)}
    if subject.key != "full":
        facts |= compare_pictures(pictures, of_full.pictures())
        facts["latents"] = relative_error(gallery.latents(), of_full.latents())
        facts["noise"] = _noise(work, pipe, full if work.options.layers and subject.key == "export" else None)
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


def _noise(work: _Work, pipe: Any, full: Any | None) -> dict[str, OutputNoise]:  # noqa: ANN401 (pipelines)
    """Measure the denoisers on the full-precision trajectories, and their layers where `full` is given."""
    recording, found = Recording(work.directory / "trajectories"), {}
    for component, denoiser in find_denoisers(pipe).items():
        quantized = quantized_layers(denoiser)
        if not quantized:
            continue
        error = output_error(denoiser, recording.calls(component))
        layers, inputs = dict[str, float](), dict[str, Histogram]()
        if full is not None:
            calls, whole = spread_calls(recording, component, _LAYER_CALLS), find_denoisers(full)[component]
            layers, inputs = layer_errors(denoiser, whole, quantized, calls), input_histograms(whole, calls)
        found[component] = OutputNoise(
            error=error.relative(), by_timestep=tuple(error.by_timestep()), layers=layers, inputs=inputs
        )
    return found


def _cost(work: _Work, source: ModelSource) -> Cost:
    """Measure time and memory with one batch of the pictures."""
    record = work.record
    with work.progress.task(f"Timing {source.model}", None):
        return measure_cost(
            source,
            record.conditions[: record.batch_size],
            num_inference_steps=record.num_inference_steps,
            guidance_scale=record.guidance_scale,
            device=work.device,
        )


def _notes(models: Sequence[Measured], extractor: Extractor) -> list[str]:
    """Say what limits the figures."""
    notes = []
    distances = [d for model in models for d in (model.to_full, model.to_reference) if d is not None]
    if any(distance.few for distance in distances):
        count = min(min(distance.num_pictures) for distance in distances)
        notes.append(
            f"{count} pictures are too few for a Fréchet distance by {extractor.name!r}: it is biased upwards, and the "
            "others are uncertain; give more with --num-images"
        )
    return notes
