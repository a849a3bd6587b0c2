"""The models that an evaluation compares: full precision, the export, and the steps between."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from msfp_cli.calibration.calibrate import load_signed, recordings_of
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.checkpoint.in_memory import quantize_text_encoders_
from msfp_cli.checkpoint.pipeline import load_export
from msfp_cli.errors import UsageError
from msfp_cli.evaluation.provenance import Provenance
from msfp_cli.evaluation.recipe import STEPS_BEFORE, EvaluateRecipe
from msfp_cli.pipelines.loading import ModelSource, Pipeline, load_pipeline
from msfp_cli.run import Run


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
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
    load: Callable[[], Pipeline] = field(repr=False)


def models_to_evaluate(
    provenance: Provenance,
    export: Path,
    recipe: EvaluateRecipe,
    source: ModelSource,
    *,
    work: Path,
    device: str | None,
) -> list[EvaluatedModel]:
    """Return the models to evaluate, full precision first and the export last.

    Arguments:
        provenance: what the run knows of the export.
        recipe: which steps, of `STEPS_BEFORE`, and how the export is computed; None takes all steps
            that the run directory can rebuild.
        source: the full-precision model.
        work: where what is made on the way is kept.

    Raises:
        UsageError: the run has no calibration to rebuild a step from.
    """
    compare = recipe.compare
    run = provenance.run
    calibration = provenance.calibration
    tuned = provenance.is_tuned
    if compare and calibration is None:
        raise UsageError(
            f"{export} was not made by the run {run.directory}; "
            "use --compare none, or give its --run"
        )
    steps = list[EvaluatedModel]()
    if calibration is not None:
        keys = _possible_steps(provenance) if compare is None else compare
        steps = _steps_before(provenance, calibration, keys, work, device)
    title = "MSFP, fine-tuned" if tuned else "MSFP"
    stored = ModelSource(model=str(export), dtype=source.dtype)
    full = EvaluatedModel(
        key="full",
        title="full precision",
        source=source,
        load=partial(load_pipeline, source, device),
    )
    exported = EvaluatedModel(
        key="export",
        title=title,
        source=stored,
        load=partial(load_export, stored, device, recipe.kernel),
    )
    return [full, *steps, exported]


def _possible_steps(provenance: Provenance) -> tuple[str, ...]:
    """Return the steps that can be rebuilt; signed formats are searched on the run's recording."""
    run = provenance.run
    recordings = (run.recording, run.held_out)
    is_recorded = all((place / "recording.json").exists() for place in recordings)
    possible = {"signed": is_recorded, "calibrated": provenance.is_tuned}
    return tuple(name for name in STEPS_BEFORE if possible[name])


def _steps_before(
    provenance: Provenance,
    calibration: Calibration,
    keys: Sequence[str],
    work: Path,
    device: str | None,
) -> list[EvaluatedModel]:
    """Return the models on the way to the export, in the order of `STEPS_BEFORE`.

    Raises:
        RunError: the recordings to search signed formats on are not those of the calibration.
    """
    if "signed" in keys and not (work / "signed").exists():
        recordings_of(provenance.run, calibration)
    signed = EvaluatedModel(
        key="signed",
        title="signed FP4",
        source=None,
        load=partial(_load_signed, provenance.run, calibration, work / "signed", device),
    )
    calibrated = EvaluatedModel(
        key="calibrated",
        title="MSFP",
        source=None,
        load=partial(load_calibrated, calibration, device),
    )
    return [model for model in (signed, calibrated) if model.key in keys]


def _load_signed(run: Run, calibration: Calibration, place: Path, device: str | None) -> Pipeline:
    """Load the model in signed formats, with the text encoders that the export has."""
    pipe = load_signed(run, calibration, place, device)
    quantize_text_encoders_(pipe, calibration)
    return pipe
