"""What a run directory holds, and which command comes next."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msfp_cli.calibration.result import Calibration
from msfp_cli.errors import RunError
from msfp_cli.finetuning.result import FinetuneState, load_finetunings
from msfp_cli.formats.float_format import BYTE_BITS
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run, describe_sizes


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a run directory holds, in words.

    Arguments:
        stages: for each stage, what there is of it; ``none`` if there is nothing.
        next_command: what to type next.
    """

    stages: dict[str, str]
    next_command: str

    def to_json(self) -> dict[str, str]:
        """Return plain JSON values."""
        return {**self.stages, "next": self.next_command}


def status_of(run: Run) -> Status:
    """Say what a run holds and what to type next.

    Raises:
        RunError: the run directory does not exist.
        CheckpointError: something in it is damaged.
    """
    contents = _contents(run)
    return Status(
        stages={
            "recording": _describe_recording(run.recording),
            "held-out": _describe_recording(run.held_out),
            "calibration": _describe_calibration(contents.calibration),
            "floats": _describe_floats(contents.calibration),
            "finetune": contents.conflict or _describe_finetunings(contents.finetunings),
            "export": str(contents.export or "none"),
            "components": describe_sizes(contents.export) if contents.export else "none",
            "evaluation": str(contents.figures.parent if contents.figures else "none"),
            "report": str(contents.page.parent if contents.page else "none"),
        },
        next_command=_next_command(contents),
    )


def next_command(run: Run, export: Path | None = None) -> str:
    """Return what to type next.

    Arguments:
        export: what was exported from the run, which may not be able to remember that.

    Raises:
        RunError: the run directory does not exist.
        CheckpointError: something in it is damaged.
    """
    contents = _contents(run)
    if export is None or run.is_writable:
        return _next_command(contents)
    return f"msfp sample {shlex.quote(str(export))}{_prompt_option(contents.calibration)}"


def wider_inputs(calibration: Calibration, device: str | None) -> str:
    """Say that inputs of 8 bits take no more time where the same products are made for them.

    Arguments:
        device: as the user gave it.
    """
    from msfp_cli.layers.kernels.cpu import runs_on_this_cpu
    from msfp_cli.pipelines.loading import choose_device

    bits = calibration.recipe.activations
    if bits is None or bits >= BYTE_BITS or calibration.recipe.weights is None:
        return ""
    if choose_device(device) != "cpu" or not runs_on_this_cpu():
        return ""
    change = f"with --activations {BYTE_BITS} --overwrite"
    if calibration.recipe.input_lift:
        change += ", and without --input-lift,"
    return (
        f"inputs of {BYTE_BITS} bits take the same products on this CPU as those of {bits}; "
        f"the same `msfp calibrate` {change} has a smaller error, and makes the export a little "
        "larger"
    )


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """What a run holds; None or empty where a stage is still to come.

    Arguments:
        finetunings: by component.
        conflict: why the run's fine-tuning does not go with its calibration; empty if it does.
        figures, page: the files that the evaluation and the report end with.
    """

    run: Run
    calibration: Calibration | None
    finetunings: dict[str, FinetuneState]
    conflict: str
    export: Path | None
    figures: Path | None
    page: Path | None

    def is_training(self) -> bool:
        """Whether a fine-tuning was stopped before its last update."""
        return any(not state.finished for state in self.finetunings.values())

    def lacks_training(self) -> bool:
        """Whether a denoiser that can be fine-tuned has not been."""
        assert self.calibration is not None
        return self.finetunings.keys() != set(self.calibration.tunable())

    def is_exported(self) -> bool:
        """Whether there is an export, made after the latest calibration."""
        return self.export is not None and not self.run.is_outdated(self.export)

    def has_newer_training(self) -> bool:
        """Whether fine-tuning went on after the latest export."""
        files = (self.run.directory / "finetune").glob("*.safetensors")
        return any(_is_newer(file, self.export) for file in files)

    def is_unseen(self) -> bool:
        """Whether nobody has looked at an export of this run yet."""
        made = (path for path in self.run.samples.glob("[0-9]*") if path.name.isdecimal())
        return self.figures is None and next(made, None) is None


# What to type next is the command of the first row whose condition holds.
_STEPS: tuple[tuple[str, Callable[[_Contents], bool]], ...] = (
    ("msfp calibrate", lambda run: run.calibration is None),
    ("msfp finetune --restart", lambda run: bool(run.conflict)),
    ("msfp finetune", lambda run: run.is_training()),
    ("msfp finetune", lambda run: not run.is_exported() and run.lacks_training()),
    ("msfp export", lambda run: run.export is None),
    ("msfp export --overwrite", lambda run: not run.is_exported() or run.has_newer_training()),
    ("msfp sample", lambda run: run.is_unseen()),
    ("msfp evaluate", lambda run: run.figures is None),
    ("msfp evaluate --overwrite", lambda run: _is_newer(run.export, run.figures)),
    ("msfp report", lambda run: run.page is None),
    ("msfp report --overwrite", lambda run: _is_newer(run.figures, run.page)),
    ("msfp sample", lambda run: True),
)


def _next_command(contents: _Contents) -> str:
    command = next(command for command, comes_next in _STEPS if comes_next(contents))
    if command == "msfp sample":
        command += _prompt_option(contents.calibration)
    if command == "msfp calibrate":
        command = contents.run.calibration_command()
    return command + contents.run.option


def _prompt_option(calibration: Calibration | None) -> str:
    """Return an example of a prompt for a model that takes one: the first that was recorded."""
    assert calibration is not None
    prompt = calibration.record.conditions[0]
    return "" if prompt is None else f" --prompt {shlex.quote(prompt)}"


def _contents(run: Run) -> _Contents:
    run.require()
    calibration = Calibration.load(run.calibration) if run.calibration.exists() else None
    finetunings: dict[str, FinetuneState] = {}
    conflict = ""
    if calibration is not None:
        try:
            finetunings = load_finetunings(run, calibration)
        except RunError as error:
            conflict = str(error)
    return _Contents(
        run=run,
        calibration=calibration,
        finetunings=finetunings,
        conflict=conflict,
        export=run.find_export(),
        figures=_if_exists(run.evaluation / "evaluation.json"),
        page=_if_exists(run.report / "report.html"),
    )


def _if_exists(path: Path) -> Path | None:
    return path if path.exists() else None


def _is_newer(path: Path | None, other: Path | None) -> bool:
    """Whether both exist and the first was written after the second."""
    if path is None or other is None:
        return False
    return path.stat().st_mtime > other.stat().st_mtime


def _describe_recording(directory: Path) -> str:
    if not (directory / "recording.json").exists():
        return "none"
    recording = Recording(directory)
    count = recording.num_shards - len(recording.missing_shards())
    model = recording.recipe.get("source", {}).get("model", "an unnamed model")
    return f"{count} of {recording.num_shards} shards of {model}"


def _describe_calibration(calibration: Calibration | None) -> str:
    if calibration is None:
        return "none"
    recipe = calibration.recipe
    count = sum(len(layers) for layers in calibration.layers.values())
    error = max(calibration.held_out_error.values(), default=0.0)
    bits = f"W{recipe.weights or 16}A{recipe.activations or 16}"
    inputs = max(map(calibration.input_bits, calibration.layers), default=16.0)
    transforms = filter(None, map(calibration.transforms_in_words, calibration.layers))
    return ", ".join(
        [
            f"{bits} {recipe.formats}, {count} layers, inputs of {inputs:.1f} bits on average",
            *transforms,
            f"held-out error {error:.5f}",
        ]
    )


def _describe_floats(calibration: Calibration | None) -> str:
    """Say what of each denoiser stays in floating point."""
    if calibration is None:
        return "none"
    lines = {name: calibration.floats_in_words(name) for name in calibration.layers}
    return "; ".join(f"{name}: {line}" for name, line in lines.items() if line) or "not known"


def _describe_finetunings(finetunings: dict[str, FinetuneState]) -> str:
    lines = [f"{component}: {state.summary()}" for component, state in finetunings.items()]
    return "; ".join(lines) or "none"
