"""Measure one model: gather what is known of it, then compute every metric of the table."""

from msfp_cli.checkpoint.pipeline import read_denoisers
from msfp_cli.evaluation.cost import Cost, measure_cost
from msfp_cli.evaluation.features.reference import ReferencePictures
from msfp_cli.evaluation.metrics.denoisers import denoiser_bytes, denoiser_errors
from msfp_cli.evaluation.metrics.evidence import Evidence, PictureSet
from msfp_cli.evaluation.metrics.table import compute_metrics
from msfp_cli.evaluation.models import EvaluatedModel
from msfp_cli.evaluation.plan import EvaluationPlan
from msfp_cli.evaluation.result import Measurements
from msfp_cli.evaluation.resume import read_document
from msfp_cli.files.documents import write_json
from msfp_cli.pipelines.loading import Pipeline
from msfp_cli.recording.result import Recording


def measure_model(
    plan: EvaluationPlan,
    model: EvaluatedModel,
    pipe: Pipeline,
    full: Pipeline,
    reference: ReferencePictures | None,
) -> Measurements:
    """Measure a model whose pictures are drawn, or read what was measured before an interruption.

    Arguments:
        pipe, full: the model's pipeline, and that of full precision.
        reference: real pictures, None if there are none to compare with.
    """
    path = plan.directory / "measured" / f"{model.key}.json"
    if path.exists():
        return read_document(path, Measurements.from_json)
    evidence = _gather(plan, model, pipe, full, reference)
    values, per_picture = compute_metrics(evidence)
    measurements = Measurements(
        key=model.key,
        title=model.title,
        values=values,
        per_picture=per_picture,
        sets=evidence.set_sizes(),
        denoisers=dict(evidence.denoisers),
        denoiser_bytes=evidence.denoiser_bytes,
        cost=evidence.cost,
    )
    write_json(path, measurements.to_json())
    return measurements


def _gather(
    plan: EvaluationPlan,
    model: EvaluatedModel,
    pipe: Pipeline,
    full: Pipeline,
    reference: ReferencePictures | None,
) -> Evidence:
    """Gather what the metrics are computed from; full precision is not compared with itself."""
    own = _picture_set(plan, model.key)
    features = plan.extractor.features(own.pictures)
    full_pictures = None
    feature_sets = {}
    denoisers = {}
    if model.key != "full":
        full_pictures = _picture_set(plan, "full")
        feature_sets["full"] = plan.extractor.features(full_pictures.pictures)
        with_layers = plan.recipe.by_layer and model.key == "export"
        recording = Recording(plan.trajectories)
        denoisers = denoiser_errors(pipe, recording, full if with_layers else None)
    if reference is not None:
        feature_sets["reference"] = reference.features
    return Evidence(
        own=own,
        full=full_pictures,
        features=features,
        feature_sets=feature_sets,
        prompts=_prompts(plan),
        extractor=plan.extractor.name,
        clip=plan.recipe.clip,
        device=plan.device,
        denoisers=denoisers,
        denoiser_bytes=denoiser_bytes(pipe, read_denoisers(plan.export)),
        cost=_cost(plan, model),
    )


def _picture_set(plan: EvaluationPlan, key: str) -> PictureSet:
    gallery = plan.gallery(key)
    return PictureSet(
        pictures=gallery.pictures(),
        latents=gallery.latents(),
        are_drawings=gallery.holds_drawings(),
    )


def _prompts(plan: EvaluationPlan) -> tuple[str, ...] | None:
    """Return the prompt of each picture, None if a picture has none."""
    conditions = plan.record.conditions
    prompts = tuple(condition for condition in conditions if condition is not None)
    return prompts if len(prompts) == len(conditions) else None


def _cost(plan: EvaluationPlan, model: EvaluatedModel) -> Cost | None:
    """Measure time and memory with one batch; a model that exists in memory only has no cost."""
    if not plan.recipe.cost or model.source is None:
        return None
    kernel = plan.recipe.kernel if model.key == "export" else None
    batch = plan.record.conditions[: plan.record.batch_size]
    with plan.processes.progress.task(f"Timing {model.source.model}", None):
        return measure_cost(model.source, batch, plan.record, device=plan.device, kernel=kernel)
