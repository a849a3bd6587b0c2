"""The run directory chains the commands: each finds in it what the one before has left.

A `Run` is a set of paths. What lies there is loaded by the module that also writes it, and
`status` says how far a run got. Layout::

    msfp-run/
        run.json         where the latest export is
        recording/       denoiser calls to choose formats and to train on
        held-out/        denoiser calls to measure on, of different prompts and seeds
        calibration/     the chosen formats
        finetune/        LoRA hubs and router, one file per denoiser
        export/          the checkpoint (unless --out put it elsewhere)
        samples/         pictures
        evaluation/      figures and pictures, against full precision
        report/          the page about it
"""

from dataclasses import dataclass
from pathlib import Path

from msfp_cli.errors import RunError
from msfp_cli.files.documents import Json, read_json, write_json

DEFAULT_RUN = Path("msfp-run")


@dataclass(frozen=True)
class Run:
    """A run directory, whether it exists or not."""

    directory: Path

    @property
    def recording(self) -> Path:
        """The denoiser calls that calibration and fine-tuning use."""
        return self.directory / "recording"

    @property
    def held_out(self) -> Path:
        """The denoiser calls that errors are measured on."""
        return self.directory / "held-out"

    @property
    def calibration(self) -> Path:
        """The calibration's directory."""
        return self.directory / "calibration"

    def finetuned(self, component: str) -> Path:
        """Return the file with the fine-tuning of a denoiser."""
        return self.directory / "finetune" / f"{component}.safetensors"

    @property
    def export(self) -> Path:
        """The directory that an export goes to by default; `latest_export` says where it went."""
        return self.directory / "export"

    @property
    def samples(self) -> Path:
        """The directory with one directory of pictures for each `msfp sample`."""
        return self.directory / "samples"

    @property
    def evaluation(self) -> Path:
        """The evaluation's directory."""
        return self.directory / "evaluation"

    @property
    def report(self) -> Path:
        """The report's directory."""
        return self.directory / "report"

    def require(self) -> None:
        """Refuse a run directory that does not exist.

        Raises:
            RunError: it does not exist.
        """
        if not self.directory.is_dir():
            raise RunError(
                f"no run directory {self.directory} here; `msfp calibrate` makes one, or give --run"
            )

    def remember_export(self, export: Path) -> None:
        """Note in ``run.json`` where an export was written, so that later commands find it."""
        place = export.resolve()
        here = self.directory.resolve()
        # Relative if it lies inside the run, so that the run directory can be moved.
        path = place.relative_to(here) if place.is_relative_to(here) else place
        write_json(self.directory / "run.json", {**self._memory(), "export": str(path)})

    def find_export(self) -> Path | None:
        """Return the latest export, None if there is none or if it was deleted."""
        place = self._memory().get("export")
        if place is None:
            return None
        export = self.directory / place
        return export if export.is_dir() else None

    def latest_export(self) -> Path:
        """Return the latest export.

        Raises:
            RunError: there is none.
        """
        self.require()
        export = self.find_export()
        if export is None:
            raise RunError(f"{self.directory} holds no export yet; run `msfp export` first")
        return export

    def _memory(self) -> dict[str, str]:
        """Return what ``run.json`` holds."""
        path = self.directory / "run.json"
        if not path.exists():
            return {}
        return read_json(path, _parse_memory, redo="delete it and export again")

    def next_samples(self) -> Path:
        """Return a new directory for pictures: ``samples/001``, ``samples/002`` and so on."""
        names = [path.name for path in self.samples.glob("[0-9]*")]
        numbers = [int(name) for name in names if name.isdecimal()]
        return self.samples / f"{max(numbers, default=0) + 1:03d}"


def _parse_memory(document: Json) -> dict[str, str]:
    return {key: str(Path(place)) for key, place in document.items()}
