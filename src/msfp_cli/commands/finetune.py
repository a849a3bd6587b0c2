"""`msfp finetune`: train LoRA hubs and a router against the recording, and keep what helps."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msfp_cli.commands import console
from msfp_cli.commands.launch import is_main, processes_for, progress, share_out
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.options import (
    DEFAULT_RUN,
    DeviceOption,
    JsonOption,
    Options,
    RunOption,
    with_options,
)

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
    share_out(num_processes or 1, run.lock())

    from msfp_cli.finetuning.finetune import finetune_run
    from msfp_cli.finetuning.load import settings_of
    from msfp_cli.status import next_command

    console.quiet_libraries()
    recipe, done = settings_of(
        run, options.over, resume=resume, processes=int(os.environ.get("WORLD_SIZE", 1))
    )
    if num_processes is None and not done:
        share_out(processes_for(recipe.calls_per_update, device), run.lock())
    with console.stop_on_interrupt() as stop:
        reports = finetune_run(
            run,
            recipe,
            device=device,
            restart=resume is False,
            gradient_checkpointing=gradient_checkpointing,
            progress=progress(),
            stop=stop,
        )
    if is_main():
        _show(run.directory / "finetune", reports, done=done, as_json=json_)
        console.note(f"next: {next_command(run)}")
    if not all(report.finished for report in reports):
        raise typer.Exit(1)


def _show(place: Path, reports: "list[FinetuneReport]", *, done: bool, as_json: bool) -> None:
    """Say what training did."""
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
        str(place),
        {r.component: r.to_json() for r in reports},
        as_json=as_json,
    )
