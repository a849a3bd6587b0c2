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

from msfp_cli.evaluation.cost import machine, slowness
from msfp_cli.evaluation.identity import refuse_other_model
from msfp_cli.evaluation.material import (
    draw_pictures,
    record_trajectories,
    reference_of,
    require_reference,
)
from msfp_cli.evaluation.measure import measure_model
from msfp_cli.evaluation.models import EvaluatedModel, models_to_evaluate
from msfp_cli.evaluation.plan import (
    EvaluationPlan,
    extractor_for,
    pictures_to_draw,
    seal_of,
    with_prompts,
)
from msfp_cli.evaluation.provenance import provenance_of
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.evaluation.result import Evaluation, Measurements
from msfp_cli.evaluation.resume import begin, refuse_other_settings
from msfp_cli.pipelines.loading import ModelSource, Pipeline, choose_device
from msfp_cli.processes import Processes, meeting
from msfp_cli.progress import SILENT, Progress
from msfp_cli.run import Run


def evaluate_run(
    run: Run,
    export: Path,
    recipe: EvaluateRecipe,
    *,
    against: ModelSource | None = None,
    directory: Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Evaluation:
    """Evaluate an export; what an interrupted evaluation has is kept.

    All that can be wrong is refused before the first picture is drawn.

    Arguments:
        against: the full-precision model; None takes the one that the export names. Class and type
            of it are by default those that the export was made with.
        directory: where to work; None for the run's own.

    Raises:
        UsageError: an option does not fit, or what it needs is not installed.
        RunError: the directory holds an evaluation with other settings or of another export, or
            the export was replaced meanwhile.
        ModelError: the export is of another model than `against`.
    """
    run.refuse_read_only(directory)
    with run.lock(directory, create=True):
        device = choose_device(device)
        place = directory or run.evaluation
        with meeting(device, progress) as processes:
            return _evaluate(
                run, export, recipe, against, place, device, processes, overwrite=overwrite
            )


def _evaluate(
    run: Run,
    export: Path,
    recipe: EvaluateRecipe,
    against: ModelSource | None,
    place: Path,
    device: str,
    processes: Processes,
    *,
    overwrite: bool,
) -> Evaluation:
    """Evaluate an export in a directory that nobody else writes to."""
    words = recipe.words() + ([] if against is None else ["--against", against.model])
    recipe = with_prompts(recipe)
    seal = seal_of(export)
    origin = provenance_of(run, export)
    source = origin.source if against is None else _like(against, origin.source)
    models = models_to_evaluate(origin, export, recipe, source, work=place, device=device)
    full = models[0].load()
    plan = EvaluationPlan(
        directory=place,
        export=export,
        seal=seal,
        source=source,
        recipe=recipe,
        record=pictures_to_draw(origin, recipe, source, full, processes.progress),
        extractor=extractor_for(recipe, source),
        device=device,
        processes=processes,
    )
    settings = plan.settings([model.key for model in models])
    # A run can move with all that is in it.
    settings["export"] = run.name_of(export) if place == run.evaluation else str(export.resolve())
    refuse_other_settings(place, settings, overwrite=overwrite)
    refuse_other_model(full, models[-1].load())
    _begin(plan, settings, overwrite=overwrite)
    measurements = _measure_all(plan, models, full)
    evaluation = Evaluation(
        directory=place,
        settings=settings,
        machine=machine(device),
        models=measurements,
        notes=_notes(measurements, plan),
        options=words,
    )
    if plan.processes.is_first:
        evaluation.save()
    return evaluation


def _like(against: ModelSource, source: ModelSource) -> ModelSource:
    """Return a model with the class and the type of another one, where it does not say its own."""
    pipeline, dtype = against.pipeline or source.pipeline, against.dtype or source.dtype
    return replace(against, pipeline=pipeline, dtype=dtype)


def _begin(plan: EvaluationPlan, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Write the settings, after all processes have checked theirs and before any of them draws."""
    require_reference(plan)
    plan.processes.wait()
    if plan.processes.is_first:
        begin(plan.directory, settings, overwrite=overwrite)
    plan.processes.wait()


def _measure_all(
    plan: EvaluationPlan, models: Sequence[EvaluatedModel], full: Pipeline
) -> tuple[Measurements, ...]:
    """Draw and measure every model, full precision first; only the first process measures."""
    measurements = list[Measurements]()
    reference = None
    for model in models:
        pipe = draw_pictures(plan, model, full)
        plan.processes.wait()
        if not plan.processes.is_first:
            continue
        if model.key == "full":
            record_trajectories(plan, full)
            reference = reference_of(plan)
        measurements.append(measure_model(plan, model, pipe, full, reference))
    return tuple(measurements)


def _notes(models: Sequence[Measurements], plan: EvaluationPlan) -> tuple[str, ...]:
    """Say what limits the values, and whether the export is slower than full precision."""
    notes = []
    if models and plan.gallery("full").holds_drawings():
        notes.append(
            "the model makes sound or embeddings, which are drawn here; what compares pixels is "
            "left out, and the final latents' error says how close the model comes"
        )
    uncertain = list[int]()
    for model in models:
        uncertain += [min(sizes.num_pictures) for sizes in model.sets.values() if sizes.few]
    if uncertain:
        notes.append(
            f"{min(uncertain)} pictures are too few for a Fréchet distance by "
            f"{plan.extractor.name!r}: it is biased upwards, and the others are uncertain; give "
            "more with --num-images"
        )
    costs = [model.cost for model in (models[-1], models[0]) if model.cost] if models else []
    if len(costs) == 2:
        quantized, full = (cost.seconds_per_picture for cost in costs)
        if line := slowness(quantized, full, "a picture", plan.recipe.kernel):
            notes.append(line)
    return tuple(notes)
