"""What fine-tuning learned, timestep by timestep: the library's half of `msfp inspect`."""

from dataclasses import dataclass

from msfp_cli.calibration.result import Calibration
from msfp_cli.errors import RunError
from msfp_cli.files.documents import Json
from msfp_cli.finetuning.lora import tuned_names
from msfp_cli.finetuning.quantize import member_by_timestep
from msfp_cli.finetuning.result import FinetuneState, load_finetunings
from msfp_cli.layers.replace import select_layers
from msfp_cli.run import Run


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What the fine-tuning of one denoiser learned.

    Arguments:
        state: the fine-tuning.
        members: for each layer, which member of its hub serves each trained timestep, from noisy
            to clean.
    """

    state: FinetuneState
    members: dict[str, list[int]]

    def errors(self) -> list[tuple[float, float, float]]:
        """Return (timestep, held-out error before, and after), from noisy to clean."""
        after = dict(self.state.best.by_timestep)
        return [
            (timestep, error, after[timestep])
            for timestep, error in self.state.history[0].by_timestep
        ]

    def to_json(self) -> dict[str, Json]:
        """Return plain JSON values."""
        keys = ("timestep", "before", "after")
        errors = [dict(zip(keys, row, strict=True)) for row in self.errors()]
        return {"errors": errors, "members": self.members}


def inspect_run(run: Run, pattern: str | None = None) -> dict[str, Inspection]:
    """Return what the fine-tunings of a run learned, by component.

    Arguments:
        pattern: of the layers whose members are wanted; None takes all.

    Raises:
        RunError: the run has no fine-tuning.
        UsageError: no layer matches the pattern.
    """
    run.require()
    calibration = Calibration.load(run.calibration)
    states = load_finetunings(run, calibration)
    if not states:
        raise RunError(f"{run.directory} holds no fine-tuning yet; run `msfp finetune` first")
    inspections = {}
    for component, state in states.items():
        layers = tuned_names(calibration.table(component))
        selected = select_layers(layers, pattern)
        members = member_by_timestep(state, layers)
        inspections[component] = Inspection(
            state=state, members={name: members[name] for name in selected}
        )
    return inspections
