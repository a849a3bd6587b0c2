"""`msfp finetune`: train LoRA hubs and a router against the recording, and keep what helps."""

import math
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msfp_cli.commands import console
from msfp_cli.commands.launch import is_main, processes_for, share_out
from msfp_cli.commands.options import MAX_SEED, DeviceOption, JsonOption, RunOption
from msfp_cli.finetuning.recipe import INITS, LOSSES, PRECISIONS, SAMPLINGS, FinetuneRecipe
from msfp_cli.progress import SILENT
from msfp_cli.run import DEFAULT_RUN, Run

if TYPE_CHECKING:
    from msfp_cli.finetuning.finetune import FinetuneReport
_HELP = """Win back quality: train timestep-aware LoRAs inside the quantizers, with the denoising-factor loss.

The full-precision outputs lie in the run's recording, so no other data and no teacher are needed. The state is kept
every few updates: after Ctrl-C, or a crash, the same command goes on. The state with the lowest error on held-out calls
is exported; the export holds 4-bit weights only.

Examples:

    msfp finetune --steps 2000

    msfp finetune --steps 500 --hub-size 4 --rank 64 --restart

    msfp finetune --num-processes 4 --gradient-accumulation 8

    accelerate launch -m msfp_cli finetune
"""


def _default(name: str) -> str:
    return f"{getattr(FinetuneRecipe(), name)} by default."


def finetune(
    run: RunOption = DEFAULT_RUN,
    steps: Annotated[int | None, typer.Option(help=f"Updates; {_default('steps')}")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help=f"Rows of a call, each at a timestep of its own; {_default('batch_size')}"
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help=f"Rank of each LoRA; {_default('rank')}")] = None,
    hub_size: Annotated[
        int | None, typer.Option(help=f"LoRAs per layer, 1 for plain LoRA; {_default('hub_size')}")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help=f"Of the LoRAs, in steps of the weights' grids; {_default('learning_rate')}"
        ),
    ] = None,
    router_learning_rate: Annotated[
        float | None, typer.Option(help=f"Of the router; {_default('router_learning_rate')}")
    ] = None,
    input_learning_rate: Annotated[
        float | None,
        typer.Option(
            help=f"Of the inputs' scales and zero points, 0 for none; {_default('input_learning_rate')}"
        ),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help=f"{' or '.join(INITS)}; {_default('init')}")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help=f"{' or '.join(LOSSES)}; {_default('loss')}")
    ] = None,
    loss_power: Annotated[
        float | None,
        typer.Option(help=f"Exponent of the denoising factor; {_default('loss_power')}"),
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(help=f"Drawn by {' or '.join(SAMPLINGS)}; {_default('timesteps')}")
    ] = None,
    mixed_precision: Annotated[
        str | None, typer.Option(help=f"{' or '.join(PRECISIONS)}; {_default('mixed_precision')}")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_SEED, help="Of the initial values and the order of the data."),
    ] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option(help=f"Updates between two measurements; {_default('evaluate_every')}"),
    ] = None,
    gradient_accumulation: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Calls per update, one for each stretch of the schedule, shared among processes; {_default('lanes')}",
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Save memory: compute activations twice."),
    ] = False,
    num_processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that share the work on this machine; by default one, but on a CPU one a core, as far as "
            "there are calls per update.",
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--restart",
            help="Go on, or begin again; by default go on if there is something.",
        ),
    ] = None,
    device: DeviceOption = None,
    json_: JsonOption = False,
) -> None:
    """Train LoRA hubs and a router."""
    given = {
        "steps": steps,
        "batch_size": batch_size,
        "lanes": gradient_accumulation,
        "rank": rank,
        "hub_size": hub_size,
        "learning_rate": learning_rate,
        "router_learning_rate": router_learning_rate,
        "input_learning_rate": input_learning_rate,
        "init": init,
        "loss": loss,
        "loss_power": loss_power,
        "timesteps": timesteps,
        "mixed_precision": mixed_precision,
        "seed": seed,
        "evaluate_every": evaluate_every,
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    FinetuneRecipe(**chosen)
    share_out(num_processes or 1)

    from msfp_cli.finetuning.finetune import finetune_run
    from msfp_cli.pipelines.loading import quiet_libraries

    quiet_libraries()
    state = Run(run)
    recipe, done = _recipe(state, chosen, resume, int(os.environ.get("WORLD_SIZE", 1)))
    if num_processes is None and not done:
        share_out(processes_for(recipe.lanes, device))
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
        if done:
            console.note(f"all {recipe.steps} updates were done before; --restart begins again")
        _show(state, reports, as_json=json_)
    if not all(report.finished for report in reports):
        raise typer.Exit(1)


def calls_per_update(usual: int, processes: int) -> int:
    """Return as many calls per update as usual, or a few more, so that all processes get equal shares."""
    return math.ceil(usual / processes) * processes


def _recipe(
    run: Run, chosen: dict[str, Any], resume: bool | None, processes: int
) -> tuple[FinetuneRecipe, bool]:
    """Return the settings: those that were given, then those of the state to go on from, then the defaults.

    Returns:
        The settings, and whether all updates with them are done.
    """
    from dataclasses import replace

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
    base = next(iter(saved.values())).recipe if saved else FinetuneRecipe()
    lanes = base.lanes if saved else calls_per_update(base.lanes, processes)
    recipe = replace(base, **{"lanes": lanes, **chosen})
    done = [
        component for component, tuned in saved.items() if tuned.finished and tuned.recipe == recipe
    ]
    return recipe, len(done) == len(calibration.tunable())


def _show(run: Run, reports: "list[FinetuneReport]", *, as_json: bool) -> None:
    """Say what training did, and what to type next."""
    from msfp_cli.status import next_command

    for report in reports:
        if not report.finished:
            console.note(
                f"{report.component}: stopped after {report.step} of {report.steps} updates; all is kept"
            )
        elif report.best_step == 0:
            console.note(
                f"{report.component}: training did not lower the held-out error of {report.before:.5f}; the calibrated "
                "state is kept. Try a lower --learning-rate with --restart"
            )
        else:
            console.note(
                f"{report.component}: held-out error {report.before:.5f} -> {report.after:.5f} "
                f"({report.after / report.before:.2f} of the calibrated), best after {report.best_step} updates"
            )
    console.result(
        str(run.directory / "finetune"),
        {r.component: r.to_json() for r in reports},
        as_json=as_json,
    )
    console.note(f"next: {next_command(run)}")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("finetune", help=_HELP)(console.guarded(finetune))
