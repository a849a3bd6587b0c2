"""The run directory: the working state that chains the commands.

msfp-run/
run.json         where the latest export and samples are
recording/       denoiser calls to choose on
held-out/        denoiser calls to measure on, of other prompts and seeds
calibration/     the chosen formats
finetune/        LoRA hubs and router, one file per denoiser
export/          the checkpoint (unless --out put it elsewhere)
samples/         pictures
evaluation/      figures and pictures, against full precision
report/          the report of it
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msfp_cli.calibration.result import Calibration
from msfp_cli.errors import RunError
from msfp_cli.files import Json, read_json, write_json
from msfp_cli.finetuning.result import FinetuneState
from msfp_cli.recipe import DEFAULT_RUN
from msfp_cli.recording.result import Recording


@dataclass(frozen=True)
class Run:
    """A run directory, existing or not."""

    directory: Path

    @property
    def recording(self) -> Path:
        """Where the calibration calls are."""
        return self.directory / "recording"

    @property
    def held_out(self) -> Path:
        """Where the held-out calls are."""
        return self.directory / "held-out"

    @property
    def calibration(self) -> Path:
        """Where the calibration is."""
        return self.directory / "calibration"

    @property
    def evaluation(self) -> Path:
        """Where the evaluation is."""
        return self.directory / "evaluation"

    @property
    def report(self) -> Path:
        """Where the report is."""
        return self.directory / "report"

    def finetuned(self, component: str) -> Path:
        """Where the fine-tuning of a denoiser is."""
        return self.directory / "finetune" / f"{component}.safetensors"

    def load_calibration(self) -> Calibration:
        """Load the calibration.

        Raises:
            RunError: there is none yet; the message says which command makes it.
        """
        self.require()
        return Calibration.load(self.calibration)

    def load_tuned(self, calibration: Calibration) -> dict[str, FinetuneState]:
        """Load the fine-tunings of the calibrated denoisers, by component; empty if there are none.

        Raises:
            RunError: one began with another calibration.
        """
        found = {
            c: FinetuneState.load(self.finetuned(c))
            for c in calibration.layers
            if self.finetuned(c).exists()
        }
        for component, tuned in found.items():
            if tuned.calibration != calibration.identity():
                raise RunError(
                    f"{self.finetuned(component)} began with another calibration; run `msfp finetune --restart`"
                )
        return found

    def require(self) -> None:
        """Refuse a run directory that is not there.

        Raises:
            RunError: it does not exist.
        """
        if not self.directory.is_dir():
            raise RunError(
                f"no run directory {self.directory} here; `msfp calibrate` makes one, or give --run"
            )

    def _read(self) -> dict[str, Any]:
        path = self.directory / "run.json"
        if not path.exists():
            return {}
        return read_json(path, _places, redo="delete it and export again")

    def remember(self, key: str, path: Path) -> None:
        """Keep where a result was put, for the commands that come later."""
        place, here = path.resolve(), self.directory.resolve()
        # Relative inside the run, so that the run directory can be moved.
        kept = place.relative_to(here) if place.is_relative_to(here) else place
        write_json(self.directory / "run.json", {**self._read(), key: str(kept)})

    def latest_export(self) -> Path:
        """Return the latest export.

        Raises:
            RunError: there is none yet.
        """
        self.require()
        export = self._export()
        if export is None:
            raise RunError(f"{self.directory} holds no export yet; run `msfp export` first")
        return export

    def _export(self) -> Path | None:
        known = self._read().get("export")
        path = None if known is None else self.directory / known
        return path if path is not None and path.is_dir() else None

    def _export_is_older(self) -> bool:
        """Whether fine-tuning went on after the latest export."""
        export = self._export()
        files = (self.directory / "finetune").glob("*.safetensors")
        return export is not None and any(
            file.stat().st_mtime > export.stat().st_mtime for file in files
        )

    def next_samples(self) -> Path:
        """Return a fresh directory name for pictures, ``samples/001`` and so on."""
        taken = [
            int(p.name) for p in (self.directory / "samples").glob("[0-9]*") if p.name.isdecimal()
        ]
        return self.directory / "samples" / f"{max(taken, default=0) + 1:03d}"

    def status(self) -> list[tuple[str, str]]:
        """Say in pairs (what, state) what the run holds."""
        self.require()
        rows = []
        for title, path in (("recording", self.recording), ("held-out", self.held_out)):
            if not (path / "recording.json").exists():
                rows.append((title, "none"))
                continue
            recording = Recording(path)
            done = recording.num_shards - len(recording.missing_shards())
            rows.append(
                (
                    title,
                    f"{done} of {recording.num_shards} shards of {recording.recipe['source']['model']}",
                )
            )
        rows.append(("calibration", self._calibration_state()))
        rows.append(("finetune", self._finetune_state()))
        rows.append(("export", str(self._export() or "none")))
        for title, path in (("evaluation", self._evaluated()), ("report", self._reported())):
            rows.append((title, str(path.parent) if path.exists() else "none"))
        return rows

    def _evaluated(self) -> Path:
        """Where a finished evaluation has its figures."""
        return self.evaluation / "evaluation.json"

    def _reported(self) -> Path:
        """Where the page of a report is."""
        return self.report / "report.html"

    def _calibration_state(self) -> str:
        if not self.calibration.exists():
            return "none"
        calibration = Calibration.load(self.calibration)
        count = sum(len(layers) for layers in calibration.layers.values())
        error = max(calibration.held_out_error.values(), default=0.0)
        bits = f"W{calibration.recipe.weights or 16}A{calibration.recipe.activations or 16}"
        return f"{bits} {calibration.recipe.formats}, {count} layers, held-out error {error:.4f}"

    def _finetune_state(self) -> str:
        try:
            tuned = (
                self.load_tuned(Calibration.load(self.calibration))
                if self.calibration.exists()
                else {}
            )
        except RunError as error:
            return str(error)
        return (
            "; ".join(
                f"{component}: {t.step} of {t.recipe.steps} steps, "
                f"held-out error {t.history[0].error:.4f} -> {t.best.error:.4f}"
                for component, t in tuned.items()
            )
            or "none"
        )

    def next_command(self) -> str:
        """Return what to type next."""
        self.require()
        option = (
            "" if self.directory == DEFAULT_RUN else f" --run {shlex.quote(str(self.directory))}"
        )
        if not self.calibration.exists():
            return f"msfp calibrate{option}"
        calibration = Calibration.load(self.calibration)
        try:
            tuned = self.load_tuned(calibration)
        except RunError:
            return f"msfp finetune --restart{option}"
        if any(not t.finished for t in tuned.values()) or (
            tuned.keys() != set(calibration.tunable()) and not self._export()
        ):
            return f"msfp finetune{option}"
        if self._export() is None:
            return f"msfp export{option}"
        if self._export_is_older():
            return f"msfp export --overwrite{option}"
        return f"{self._look(calibration.record.conditions[0])}{option}"

    def _look(self, condition: str | None) -> str:
        """Return which command looks at the latest export: pictures first, then figures, then the page of them."""
        if (self.directory / "samples").is_dir() or self._evaluated().exists():
            for command, result, source in (
                ("msfp evaluate", self._evaluated(), self._export()),
                ("msfp report", self._reported(), self._evaluated()),
            ):
                if not result.exists():
                    return command
                if source is not None and source.stat().st_mtime > result.stat().st_mtime:
                    return f"{command} --overwrite"
        return (
            "msfp sample" if condition is None else f"msfp sample --prompt {shlex.quote(condition)}"
        )


def _places(document: Json) -> dict[str, Any]:
    """Read what `Run.remember` wrote."""
    return {key: str(Path(place)) for key, place in document.items()}
