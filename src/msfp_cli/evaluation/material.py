"""Get what models are measured with: their pictures, recorded calls, and real pictures."""

from dataclasses import replace

from msfp_cli.evaluation.features.reference import (
    ReferencePictures,
    built_in_reference,
    load_reference,
    require_pictures,
)
from msfp_cli.evaluation.gallery import Gallery
from msfp_cli.evaluation.identity import identity_of, sealed_files
from msfp_cli.evaluation.models import EvaluatedModel
from msfp_cli.evaluation.plan import EvaluationPlan
from msfp_cli.pipelines.loading import Pipeline
from msfp_cli.processes import ALONE
from msfp_cli.recording.record import record_calls


def draw_pictures(plan: EvaluationPlan, model: EvaluatedModel, full: Pipeline) -> Pipeline:
    """Draw this process's share of a model's pictures, and return the model's pipeline.

    Arguments:
        full: the pipeline of full precision, which is not loaded a second time.

    Raises:
        RunError: the export was replaced, or the gallery is of other settings.
    """
    with plan.processes.first_goes_first():  # what loading makes, the others find
        pipe = full if model.key == "full" else model.load()
        if model.key == "export":
            plan.refuse_replaced_export()
        directory = plan.gallery(model.key).directory
        files = sealed_files(plan.export) if model.key == "export" else None
        images = plan.record.digest_of_images()
        gallery = Gallery.create(directory, plan.record, identity_of(pipe), files, images)
    gallery.fill(pipe, title=model.title, processes=plan.processes)
    return pipe


def record_trajectories(plan: EvaluationPlan, full: Pipeline) -> None:
    """Record the denoiser's calls of the first pictures."""
    record_calls(
        full,
        plan.source,
        plan.trajectory_recipe,
        plan.trajectories,
        processes=replace(ALONE, progress=plan.processes.progress),
        description="Following full precision",
    )


def require_reference(plan: EvaluationPlan) -> None:
    """Refuse a reference that is not there, before anything is drawn to compare with it."""
    if plan.recipe.reference is not None:
        require_pictures(plan.recipe.reference)


def reference_of(plan: EvaluationPlan) -> ReferencePictures | None:
    """Return the real pictures to compare with, None if there are none."""
    if plan.recipe.reference is not None:
        size = plan.gallery("full").pictures().shape[2:]
        return load_reference(plan.recipe.reference, plan.extractor, size)
    return None if plan.reference_name is None else built_in_reference()
