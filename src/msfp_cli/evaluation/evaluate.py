"""Measure an export against full precision from the same seeds: the workflow of `msfp evaluate`.

For each model (full precision, the steps before, the export) the same pictures are drawn from the
same prompts and seeds, and its denoiser is run on recorded calls of the full-precision one. Layout
of an evaluation directory::

    asked.json          the settings; an interrupted evaluation goes on only with the same
    trajectories/       full-precision denoiser calls of the first pictures
    pictures/MODEL/     a gallery for each model
    measured/MODEL.json what was measured of it
    evaluation.json     all of it together
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.pipeline import read_configs
from msfp_cli.evaluation.cost import machine
from msfp_cli.evaluation.features.extractors import Extractor, load_extractor
from msfp_cli.evaluation.gallery import Gallery
from msfp_cli.evaluation.measure import Work, measured_of
from msfp_cli.evaluation.models import Subject, find_subjects, identity_of, refuse_other_model
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.evaluation.reference import (
    BUILT_IN_REFERENCE,
    ReferencePictures,
    built_in_reference,
    load_reference,
    require_pictures,
)
from msfp_cli.evaluation.result import Evaluation, Measured
from msfp_cli.evaluation.resume import begin, refuse_other_settings
from msfp_cli.pipelines.conditions import conditioning_of, conditions_for, prompts_of
from msfp_cli.pipelines.loading import BUILT_IN, choose_device, default_prompts
from msfp_cli.pipelines.source import ModelSource
from msfp_cli.processes import Processes
from msfp_cli.progress import SILENT, Progress
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.recording.record import record_calls
from msfp_cli.run import Run
from msfp_cli.version import __version__


def evaluate_run(
    run: Run,
    export: Path,
    options: EvaluateRecipe,
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
    processes = Processes.current(choose_device(device))
    place = directory or run.evaluation
    words = options.words() + ([] if against is None else ["--against", against.model])
    options = replace(options, prompts=prompts_of(options.prompts))  # before a model is loaded
    subjects = find_subjects(
        run, export, options.compare, work=place, against=against, device=device
    )
    source = subjects[0].source
    assert source is not None, "full precision has a source"
    extractor = load_extractor(
        options.extractor or ("fashion" if source.model == BUILT_IN else "squeezenet")
    )
    full = subjects[0].load()
    work = Work(
        directory=place,
        options=options,
        record=_record_recipe(run, full, source, export, options),
        source=source,
        extractor=extractor,
        device=device,
        processes=processes,
        progress=progress,
    )
    settings = _settings(work, subjects, export)
    refuse_other_settings(place, settings, overwrite=overwrite)
    if options.reference is not None:
        require_pictures(options.reference)
    refuse_other_model(full, subjects[-1].load())  # now, not after hours of drawing
    processes.wait()
    if processes.is_first:
        begin(place, settings, overwrite=overwrite)
    processes.wait()
    models = tuple(_measure_all(work, subjects, full))
    evaluation = Evaluation(
        directory=place,
        settings=settings,
        machine=machine(choose_device(device)),
        models=models,
        notes=tuple(_notes(models, extractor)),
        options=words,
    )
    if processes.is_first:
        evaluation.save()
    return evaluation


def _record_recipe(
    run: Run,
    pipe: Any,  # noqa: ANN401 (a pipeline's class is the user's)
    source: ModelSource,
    export: Path,
    options: EvaluateRecipe,
) -> RecordRecipe:
    """Return which pictures to draw: prompts that the recording does not use, and the sampler as calibrated."""
    count = options.num_images
    prompts = prompts_of(options.prompts)
    seen = set[str | None]()
    if run.calibration.exists():
        seen.update(Calibration.load(run.calibration).record.conditions)
    if prompts is None and conditioning_of(pipe) == "prompt":
        known = default_prompts(source.model)
        prompts = tuple(prompt for prompt in known if prompt not in seen) or known
    pool = conditions_for(pipe, source, prompts, count)
    sampling = next(iter(read_configs(export).values())).sampling
    conditions = tuple(pool[i % len(pool)] for i in range(count))
    return RecordRecipe.of(conditions, options.or_else(sampling))


def _settings(work: Work, subjects: Sequence[Subject], export: Path) -> dict[str, Any]:
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


def _measure_all(work: Work, subjects: Sequence[Subject], full: Any) -> list[Measured]:  # noqa: ANN401 (a pipeline)
    """Draw and measure every model, full precision first."""
    measured: list[Measured] = []
    reference: ReferencePictures | None = None
    for subject in subjects:
        with work.processes.first_goes_first():
            pipe = full if subject.key == "full" else subject.load()
            gallery = Gallery.create(
                work.directory / "pictures" / subject.key, work.record, identity_of(pipe)
            )
        gallery.fill(pipe, title=subject.title, share=work.processes, progress=work.progress)
        work.processes.wait()
        if not work.processes.is_first:
            continue
        if subject.key == "full":
            _record_trajectories(work, pipe)
            reference = _reference(work, gallery)
        measured.append(measured_of(work, subject, pipe, full, gallery, reference))
    return measured


def _record_trajectories(work: Work, full: Any) -> None:  # noqa: ANN401 (a pipeline)
    """Record the denoiser's calls of the first pictures."""
    few = replace(work.record, conditions=work.record.conditions[: work.options.num_trajectories])
    directory = work.directory / "trajectories"
    record_calls(
        full,
        work.source,
        few,
        directory,
        progress=work.progress,
        description="Following full precision",
    )


def _reference(work: Work, gallery: Gallery) -> ReferencePictures | None:
    """Return the real pictures to compare with, None where there are none."""
    if work.options.reference is not None:
        size = gallery.pictures().shape[2:]
        return load_reference(work.options.reference, work.extractor, size)
    return None if _reference_name(work) is None else built_in_reference()


def _reference_name(work: Work) -> str | None:
    """Return what the real pictures are, None where there are none."""
    if work.options.reference is not None:
        return str(work.options.reference)
    fits = work.source.model == BUILT_IN and work.extractor.name == "fashion"
    return BUILT_IN_REFERENCE if fits else None


def _notes(models: Sequence[Measured], extractor: Extractor) -> list[str]:
    """Say what limits the figures."""
    notes = []
    distances = [
        d for model in models for d in (model.to_full, model.to_reference) if d is not None
    ]
    if any(distance.few for distance in distances):
        count = min(min(distance.num_pictures) for distance in distances)
        notes.append(
            f"{count} pictures are too few for a Fréchet distance by {extractor.name!r}: it is biased upwards, and the "
            "others are uncertain; give more with --num-images"
        )
    return notes
