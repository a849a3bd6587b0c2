"""The result of an evaluation as values and on disk: one JSON file, and the pictures beside it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from msfp_cli.errors import RunError
from msfp_cli.evaluation.cost import Cost
from msfp_cli.evaluation.gallery import Gallery
from msfp_cli.evaluation.schema_1 import from_schema_1
from msfp_cli.files.documents import Json, read_json, write_json
from msfp_cli.files.typed import read_fields, read_value
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.run import Run

_SCHEMA = 2  # 1, a field for each metric, can still be read
_RESULT = "evaluation.json"
_REDO = "run the same `msfp evaluate` again"
# Settings of an evaluation that are used after it, by key.
_SETTINGS: dict[str, Any] = {
    "export": str,
    "against": dict[str, str | None],
    "record": RecordRecipe,
    "models": tuple[str, ...],
    "num_trajectories": int,
    "extractor": str,
    "reference": str | None,
    "clip": str | None,
    "layers": bool,
    "cost": bool,
}


@dataclass(frozen=True, kw_only=True)
class SetSizes:
    """How many pictures the distances between two sets rest on.

    Arguments:
        num_pictures: in the model's own set, and in the other.
        few: whether the Fréchet distance depends more on these numbers than on the pictures.
    """

    num_pictures: tuple[int, int]
    few: bool


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How the elements of a layer's input in full precision are distributed.

    Arguments:
        minimum, maximum: of the elements; the bins between are of equal width.
        counts: elements in each bin.
    """

    minimum: float
    maximum: float
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DenoiserError:
    """Relative squared error of a denoiser's output on the full-precision trajectories.

    Arguments:
        error: over all timesteps.
        by_timestep: (timestep, error) from noisy to clean.
        layers: error of each quantized layer's output, where they were measured.
        inputs: histogram of each quantized layer's input, where they were measured.
    """

    error: float
    by_timestep: tuple[tuple[float, float], ...]
    layers: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, Histogram] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """The measurements of one model. Full precision has none that compare with full precision.

    Arguments:
        key, title: see `models.EvaluatedModel`.
        values: single values by the key of their metric (see `metrics`).
        per_picture: values for each picture, by the key of their metric.
        sets: sizes of the sets that distances compare, by the other set: ``full`` (pictures by full
            precision), ``reference`` (real pictures).
        denoisers: what is known of each quantized denoiser's error.
        denoiser_bytes: size of the denoisers' tensors: as in the files of an export, without their
            headers, otherwise with 16 bits per number.
        cost: time and memory in a process of its own.
    """

    key: str
    title: str
    values: dict[str, float] = field(default_factory=dict)
    per_picture: dict[str, tuple[float, ...]] = field(default_factory=dict)
    sets: dict[str, SetSizes] = field(default_factory=dict)
    denoisers: dict[str, DenoiserError] = field(default_factory=dict)
    denoiser_bytes: int | None = None
    cost: Cost | None = None

    def value(self, key: str) -> float | None:
        """Return a metric as one number, the mean over the pictures if each has its own.

        Arguments:
            key: of the metric; it gives None if it was not measured.
        """
        if self.per_picture.get(key):
            return mean(self.per_picture[key])
        return self.values.get(key)

    def to_json(self) -> Json:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Json) -> "Measurements":
        """Undo `to_json`; what an earlier msfp wrote is read as well."""
        if "values" not in data:
            data = from_schema_1(data)
        return read_fields(cls, data)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation.

    Arguments:
        directory: where it is.
        settings: what it was made with, as JSON values.
        machine: what it was measured on.
        models: full precision first, the export last.
        notes: what to know when reading the values.
        options: of the command, those that differ from their defaults, as words; None in files
            of earlier versions.
    """

    directory: Path
    settings: Json
    machine: dict[str, str]
    models: tuple[Measurements, ...]
    notes: tuple[str, ...] = ()
    options: list[str] | None = None

    def to_json(self) -> Json:
        """Return plain JSON values."""
        return {
            "schema": _SCHEMA,
            "asked": self.settings,
            "machine": self.machine,
            "models": [model.to_json() for model in self.models],
            "notes": list(self.notes),
            "options": self.options,
        }

    @property
    def export(self) -> Path:
        """Where the export is; it may be named relative to the run that the evaluation is in."""
        return Run(self.directory.parent).place_of(self.settings["export"])

    def gallery(self, key: str) -> Gallery:
        """Return the pictures of a model."""
        return Gallery(
            self.directory / "pictures" / key, RecordRecipe.from_json(self.settings["record"])
        )

    @classmethod
    def load(cls, directory: Path) -> "Evaluation":
        """Read an evaluation.

        Raises:
            RunError: there is none, or it was not finished.
            CheckpointError: it is damaged, or newer than this msfp.
        """
        path = directory / _RESULT
        if not path.exists():
            raise RunError(f"no evaluation in {directory}; run `msfp evaluate` first")

        def parse(document: Json) -> Evaluation:
            own = {key: value for key, value in document.items() if key != "schema"}
            settings = own.pop("asked")
            for key, kind in _SETTINGS.items():
                read_value(kind, settings[key])
            return read_fields(cls, own, directory=directory, settings=settings)

        return read_json(path, parse, redo=_REDO, schema=_SCHEMA)

    def save(self) -> None:
        """Write the file; it is there whole or not at all."""
        write_json(self.directory / _RESULT, self.to_json())
