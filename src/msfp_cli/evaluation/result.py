"""The result of an evaluation as values and on disk: one JSON file, and the pictures beside it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msfp_cli.errors import RunError
from msfp_cli.evaluation.cost import Cost
from msfp_cli.evaluation.gallery import Gallery
from msfp_cli.files import Json, read_json, write_json
from msfp_cli.recording.recipe import RecordRecipe

_SCHEMA = 1
_RESULT = "evaluation.json"
_REDO = "run `msfp evaluate --overwrite`"


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a set of pictures is from another, by an extractor's features.

    Arguments:
        frechet, kernel: distances, see `metrics`.
        precision, recall: shares in 0..1; None for too few pictures.
        num_pictures: on either side.
        few: whether the Fréchet distance says more about the number of pictures than about their
            quality.
    """

    frechet: float
    kernel: float
    precision: float | None
    recall: float | None
    num_pictures: tuple[int, int]
    few: bool


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How the elements of a layer's input in full precision are spread.

    Arguments:
        minimum, maximum: of the elements; the bins between are of equal width.
        counts: elements in each bin.
    """

    minimum: float
    maximum: float
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class OutputNoise:
    """Relative squared error of a denoiser's output on the full-precision trajectories.

    Arguments:
        error: over all timesteps.
        by_timestep: (timestep, error) from noisy to clean.
        layers: of each quantized layer's output, where they were measured.
        inputs: of each quantized layer, where they were measured.
    """

    error: float
    by_timestep: tuple[tuple[float, float], ...]
    layers: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, Histogram] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model of an evaluation. What compares with full precision is empty for full precision itself.

    Arguments:
        key, title: see `subjects.Subject`.
        denoiser_bytes: size of the denoisers: on disk for an export, in 16 bits for full precision.
        noise: by component.
        latents: relative squared error of the final latents.
        psnr, ssim, deep: of each picture: dB, structural similarity, distance of deep features.
        to_full, to_reference: distances between sets of pictures.
        garment, colour: shares of pictures that show what their prompt asked for (built-in
            pipeline).
        clip: CLIP score.
        cost: time and memory in a process of its own.
    """

    key: str
    title: str
    denoiser_bytes: int | None = None
    noise: dict[str, OutputNoise] = field(default_factory=dict)
    latents: float | None = None
    psnr: tuple[float, ...] = ()
    ssim: tuple[float, ...] = ()
    deep: tuple[float, ...] = ()
    to_full: Distance | None = None
    to_reference: Distance | None = None
    garment: float | None = None
    colour: float | None = None
    clip: float | None = None
    cost: Cost | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Measured":
        """Undo `to_json`."""

        def distance(entry: dict[str, Any] | None) -> Distance | None:
            if entry is None:
                return None
            ours, others = entry["num_pictures"]
            return Distance(**{**entry, "num_pictures": (ours, others)})

        return cls(
            **{
                **data,
                **{key: tuple(data[key]) for key in ("psnr", "ssim", "deep")},
                **{key: distance(data[key]) for key in ("to_full", "to_reference")},
                "noise": {component: _noise(entry) for component, entry in data["noise"].items()},
                "cost": None if data["cost"] is None else Cost(**data["cost"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation.

    Arguments:
        directory: where it is.
        settings: what it was made with, as JSON values.
        machine: what it was measured on.
        models: full precision first, the export last.
        notes: what to know when reading the figures.
        options: of the command, those that differ from their defaults, as words; None in files
            of earlier versions.
    """

    directory: Path
    settings: dict[str, Any]
    machine: dict[str, str]
    models: tuple[Measured, ...]
    notes: tuple[str, ...] = ()
    options: list[str] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "schema": _SCHEMA,
            "asked": self.settings,
            "machine": self.machine,
            "models": [model.to_json() for model in self.models],
            "notes": list(self.notes),
            "options": self.options,
        }

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
            return cls(
                directory=directory,
                settings=document["asked"],
                machine=document["machine"],
                models=tuple(Measured.from_json(entry) for entry in document["models"]),
                notes=tuple(document["notes"]),
                options=document.get("options"),
            )

        return read_json(path, parse, redo=_REDO, schema=_SCHEMA)

    def save(self) -> None:
        """Write the file; it is there whole or not at all."""
        write_json(self.directory / _RESULT, self.to_json())


def _noise(entry: dict[str, Any]) -> OutputNoise:
    inputs = {
        name: Histogram(**{**histogram, "counts": tuple(histogram["counts"])})
        for name, histogram in entry["inputs"].items()
    }
    by_timestep = tuple((float(timestep), float(error)) for timestep, error in entry["by_timestep"])
    return OutputNoise(**{**entry, "by_timestep": by_timestep, "inputs": inputs})
