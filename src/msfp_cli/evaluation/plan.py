"""The plan of an evaluation, settled before the start: what is drawn and measured, and how."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msfp_cli.errors import RunError
from msfp_cli.evaluation.features.extractors import Extractor, load_extractor
from msfp_cli.evaluation.features.reference import BUILT_IN_REFERENCE
from msfp_cli.evaluation.gallery import Gallery
from msfp_cli.evaluation.provenance import Provenance
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.files.seal import REDO, Seal
from msfp_cli.pipelines.conditions import (
    conditioning_of,
    conditions_for,
    prompts_of,
)
from msfp_cli.pipelines.loading import BUILT_IN, ModelSource, Pipeline, default_prompts
from msfp_cli.pipelines.sampling import refuse_untaken, say_conditions
from msfp_cli.processes import Processes
from msfp_cli.progress import SILENT, Progress
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.version import __version__


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What every part of an evaluation needs to know.

    Arguments:
        directory: where the evaluation is.
        export: the exported directory.
        seal: of the export, when it was first looked at.
        source: the full-precision model.
        recipe: what the user chose.
        record: the pictures of each model: prompts, sampler, seed.
        extractor: of the features for distances between sets of pictures.
        device: where pipelines run.
        processes: which of the processes that share the pictures this one is.
    """

    directory: Path
    export: Path
    seal: Seal | None
    source: ModelSource
    recipe: EvaluateRecipe
    record: RecordRecipe
    extractor: Extractor
    device: str
    processes: Processes

    def gallery(self, key: str) -> Gallery:
        """Return the pictures of a model."""
        return Gallery(self.directory / "pictures" / key, self.record)

    def refuse_replaced_export(self) -> None:
        """Refuse to draw with another export than the one that the plan is about.

        Raises:
            RunError: it was exported again meanwhile.
        """
        if seal_of(self.export) != self.seal:
            raise RunError(
                f"{self.export} was replaced while it was evaluated; give the same command with "
                "--overwrite"
            )

    @property
    def trajectories(self) -> Path:
        """The recorded calls of the full-precision denoisers."""
        return self.directory / "trajectories"

    @property
    def trajectory_recipe(self) -> RecordRecipe:
        """The first pictures, whose denoiser calls are recorded."""
        conditions = self.record.conditions[: self.recipe.num_trajectories]
        return replace(self.record, conditions=conditions)

    @property
    def reference_name(self) -> str | None:
        """What the real pictures are, None if there are none to compare with."""
        if self.recipe.reference is not None:
            return str(self.recipe.reference)
        fits = self.source.model == BUILT_IN and self.extractor.name == "fashion"
        return BUILT_IN_REFERENCE if fits else None

    def settings(self, models: list[str]) -> dict[str, Any]:
        """Return the settings as JSON values: an evaluation goes on only with the same.

        Arguments:
            models: keys of the models.
        """
        kernel = {} if self.recipe.kernel == "auto" else {"kernel": self.recipe.kernel}
        return {
            **kernel,
            "version": __version__,
            "export": str(self.export),
            "against": self.source.to_json(),
            "record": self.record.to_json(),
            "models": models,
            "num_trajectories": self.recipe.num_trajectories,
            "extractor": self.extractor.name,
            "reference": self.reference_name,
            "clip": self.recipe.clip,
            "layers": self.recipe.layers,
            "cost": self.recipe.cost,
        }


def seal_of(export: Path) -> Seal | None:
    """Return the seal of an export, which tells whether it is replaced later; None without one.

    Raises:
        CheckpointError: it is damaged.
    """
    return Seal.load(export, redo=REDO)


def with_prompts(recipe: EvaluateRecipe) -> EvaluateRecipe:
    """Return a recipe whose prompts are read from their file, before a model is loaded for them.

    Raises:
        UsageError: the file cannot be read or holds no prompt.
    """
    return replace(recipe, prompts=prompts_of(recipe.prompts))


def extractor_for(recipe: EvaluateRecipe, source: ModelSource) -> Extractor:
    """Load the extractor that the user chose, or the one that fits the model.

    Raises:
        UsageError: the extractor does not exist, or what it needs is not installed.
    """
    default = "fashion" if source.model == BUILT_IN else "squeezenet"
    return load_extractor(recipe.extractor or default)


def pictures_to_draw(
    provenance: Provenance,
    recipe: EvaluateRecipe,
    source: ModelSource,
    full: Pipeline,
    progress: Progress = SILENT,
) -> RecordRecipe:
    """Return prompts and sampling of the pictures, by default those of the calibration.

    Arguments:
        provenance: what a run knows of the export.
        source, full: the full-precision model, and its pipeline.

    Raises:
        UsageError: the prompts or an option do not fit the pipeline.
    """
    refuse_untaken(full, recipe)
    prompts = prompts_of(recipe.prompts)
    if prompts is None and conditioning_of(full) == "prompt":
        prompts = _unrecorded_prompts(provenance, source)
    pool = conditions_for(full, source, prompts, recipe.num_images)
    conditions = tuple(pool[i % len(pool)] for i in range(recipe.num_images))
    record = RecordRecipe.of(conditions, recipe.or_else(provenance.sampling))
    say_conditions(full, conditions, record, progress)
    return record


def _unrecorded_prompts(provenance: Provenance, source: ModelSource) -> tuple[str, ...]:
    """Return the built-in prompts that the run was not calibrated on, or else all of them."""
    prompts = default_prompts(source.model)
    if provenance.calibration is None:
        return prompts
    recorded = set(provenance.calibration.record.conditions)
    return tuple(prompt for prompt in prompts if prompt not in recorded) or prompts
