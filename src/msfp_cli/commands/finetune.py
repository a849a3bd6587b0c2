"""`msfp finetune`: train LoRA hubs and a router against the recording, and keep what helps."""

import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from msfp_cli.commands import console
from msfp_cli.commands.launch import is_main, processes_for, share_out
from msfp_cli.commands.options import DeviceOption, JsonOption, Options, RunOption, with_options
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.progress import SILENT
from msfp_cli.run import DEFAULT_RUN, Run

if TYPE_CHECKING:
    from msfp_cli.finetuning.result import FinetuneReport

HELP = """Win back quality: train low-rank updates (LoRAs) of the quantized weights.

Each layer has a few LoRAs (a hub), and a router chooses one of them by the timestep. The outputs of
the full-precision model are in the run's recording, so no data and no second model are needed. The
state is saved every few updates: after Ctrl-C, or a crash, the same command goes on. The state with
the lowest error on held-out calls is exported; the export holds 4-bit weights only.

Examples:

    msfp finetune --steps 2000

    msfp finetune --steps 500 --hub-size 4 --rank 64 --restart

    msfp finetune --num-processes 4 --calls-per-update 8

    accelerate launch -m msfp_cli finetune
"""
CheckpointingOption = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="Save memory: compute activations twice instead of keeping them. Slower.",
    ),
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Local processes. Default: one; on a CPU one per core, up to the number of calls per "
        "update.",
    ),
]
ResumeOption = Annotated[
    bool | None,
    typer.Option(
        "--resume/--restart",
        help="Go on with the run's fine-tuning, or begin again. Default: go on if there is one.",
    ),
]


@with_options(FinetuneRecipe)
def finetune(
    options: Options,
    run: RunOption = DEFAULT_RUN,
    gradient_checkpointing: CheckpointingOption = False,
    num_processes: ProcessesOption = None,
    resume: ResumeOption = None,
    device: DeviceOption = None,
    json_: JsonOption = False,
) -> None:
    """Train LoRA hubs and a router."""
    options.recipe(FinetuneRecipe)  # what is wrong is refused before torch is loaded
    state = Run(run)
    share_out(num_processes or 1, state.lock())

    from msfp_cli.finetuning.finetune import finetune_run

    console.quiet_libraries()
    recipe, done = _recipe(state, options, resume, int(os.environ.get("WORLD_SIZE", 1)))
    if num_processes is None and not done:
        share_out(processes_for(recipe.calls_per_update, device), state.lock())
    with console.stop_on_interrupt() as stop:
        reports = finetune_run(
            state,
            recipe,
            device=device,
            restart=resume is False,
            gradient_checkpointing=gradient_checkpointing,
            progress=console.ConsoleProgress() if is_main() else SILENT,
            stop=stop,
        )
    if is_main():
        _show(state, reports, done=done, as_json=json_)
    if not all(report.finished for report in reports):
        raise typer.Exit(1)


def _recipe(
    run: Run, options: Options, resume: bool | None, processes: int
) -> tuple[FinetuneRecipe, bool]:
    """Return what was typed, then the settings of the state to go on from, then the defaults.

    Returns:
        The settings, and whether all updates with them are done.
    """
    from msfp_cli.calibration.result import Calibration
    from msfp_cli.errors import RunError
    from msfp_cli.finetuning.result import load_finetunings

    run.require()
    calibration = Calibration.load(run.calibration)
    saved = {} if resume is False else load_finetunings(run, calibration)
    if resume and not saved:
        raise RunError(
            f"{run.directory} holds no fine-tuning to go on with; leave --resume out to begin"
        )
    fresh = shared_evenly(FinetuneRecipe(), processes)
    base = next((tuned.recipe for tuned in saved.values()), fresh)
    recipe = options.over(base)
    done = [tuned for tuned in saved.values() if tuned.finished and tuned.recipe == recipe]
    return recipe, len(done) == len(calibration.tunable())


def shared_evenly(recipe: FinetuneRecipe, processes: int) -> FinetuneRecipe:
    """Return the recipe with as many calls per update, or a few more, as processes can share."""
    calls = math.ceil(recipe.calls_per_update / processes) * processes
    return replace(recipe, calls_per_update=calls)


def _show(run: Run, reports: "list[FinetuneReport]", *, done: bool, as_json: bool) -> None:
    """Say what training did, and what to type next."""
    from msfp_cli.status import next_command

    if done:
        console.note(f"all {reports[0].steps} updates were done before; --restart begins again")
    for report in reports:
        if not report.finished:
            console.note(
                f"{report.component}: stopped after {report.step} of {report.steps} updates; all "
                "is kept"
            )
        elif report.best_step == 0:
            console.note(
                f"{report.component}: training did not lower the held-out error of "
                f"{report.before:.5f}; the calibrated state is kept. Try a lower --learning-rate "
                "with --restart"
            )
        else:
            console.note(
                f"{report.component}: held-out error {report.before:.5f} -> {report.after:.5f} "
                f"({report.after / report.before:.2f} of the calibrated), best after "
                f"{report.best_step} updates"
            )
    console.result(
        str(run.directory / "finetune"),
        {r.component: r.to_json() for r in reports},
        as_json=as_json,
    )
    console.note(f"next: {next_command(run)}")
