"""`msfp inspect`: show what fine-tuning learned, or how the layers of an export run."""

import fnmatch
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msfp_cli.commands import console
from msfp_cli.commands.options import DeviceOption, JsonOption, RunOption
from msfp_cli.run import DEFAULT_RUN, Run

if TYPE_CHECKING:
    from msfp_cli.finetuning.result import FinetuneState

_HELP = """Show what fine-tuning learned: the error at each timestep before and after, and the hubs.

A hub is the few LoRAs of a layer, its members; the router uses one of them at each timestep. The
map has a row for each block of layers and a column for each timestep, from noisy to clean. A digit
is the member that most layers of the block use there.

Examples:

    msfp inspect

    msfp inspect --layers 'up_blocks.1*'

    msfp inspect --kernels
"""
_DEPTH = 2  # parts of a layer's name that make a row of the map


def inspect(
    run: RunOption = DEFAULT_RUN,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Pattern of names of layers to show one by one. Default: rows are blocks."
        ),
    ] = None,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Show instead which kernel computes each layer of the latest export, and why.",
        ),
    ] = False,
    device: DeviceOption = None,
    json_: JsonOption = False,
) -> None:
    """Show what fine-tuning learned, or how an export runs."""
    if kernels:
        _show_kernels(run, layers, device, as_json=json_)
        return
    from msfp_cli.calibration.result import Calibration
    from msfp_cli.errors import RunError, UsageError
    from msfp_cli.finetuning.lora import tuned_names
    from msfp_cli.finetuning.result import load_finetunings, member_by_timestep

    state = Run(run)
    state.require()
    calibration = Calibration.load(state.calibration)
    found = load_finetunings(state, calibration)
    if not found:
        raise RunError(f"{run} holds no fine-tuning yet; run `msfp finetune` first")
    result = {}
    for component, tuned in found.items():
        names = tuned_names(calibration.table(component))
        shown = [name for name in names if layers is None or fnmatch.fnmatchcase(name, layers)]
        if not shown:
            raise UsageError(
                f"no tuned layer matches {layers!r}; the first of {len(names)} is {names[0]!r}"
            )
        members = member_by_timestep(tuned, names)
        result[component] = {
            "errors": _errors(tuned),
            "members": {name: members[name] for name in shown},
        }
        _show_errors(component, tuned)
        _show_map(component, {name: members[name] for name in shown}, one_by_one=layers is not None)
    console.result(str(state.directory / "finetune"), result, as_json=json_)


def _show_kernels(run: Path, pattern: str | None, device: str | None, *, as_json: bool) -> None:
    """Print which kernel runs each layer of the latest export, and why not the others."""
    from msfp_cli.checkpoint.pipeline import MSFPPipeline
    from msfp_cli.errors import UsageError
    from msfp_cli.layers.prepare import prepare_
    from msfp_cli.pipelines.loading import quiet_libraries

    export = Run(run).latest_export()
    quiet_libraries()
    pipe = MSFPPipeline.from_pretrained(export, device=device)
    result: dict[str, dict[str, dict[str, str]]] = {}
    for component in pipe.configs:
        chosen = prepare_(getattr(pipe, component))
        shown = {
            name: how
            for name, how in chosen.items()
            if pattern is None or fnmatch.fnmatchcase(name, pattern)
        }
        if not shown:
            raise UsageError(
                f"no layer matches {pattern!r}; the first of {len(chosen)} is "
                f"{next(iter(chosen))!r}"
            )
        result[component] = {
            name: {"kernel": kernel, "why": why} for name, (kernel, why) in shown.items()
        }
        if pattern is not None:
            rows = [[name, kernel, why] for name, (kernel, why) in shown.items()]
            console.table(f"{component}: kernels", ["layer", "kernel", "why no other"], rows)
        else:
            rows = [
                [kernel, why, str(count)]
                for (kernel, why), count in Counter(shown.values()).most_common()
            ]
            console.table(f"{component}: kernels", ["kernel", "why no other", "layers"], rows)
    console.result(str(export), result, as_json=as_json)


def _errors(tuned: "FinetuneState") -> list[dict[str, float]]:
    """Return the error at each timestep, before and after."""
    after = dict(tuned.best.by_timestep)
    return [
        {"timestep": t, "before": error, "after": after[t]}
        for t, error in tuned.history[0].by_timestep
    ]


def _show_errors(component: str, tuned: "FinetuneState") -> None:
    rows = [
        [
            f"{e['timestep']:g}",
            f"{e['before']:.5f}",
            f"{e['after']:.5f}",
            f"{e['after'] / (e['before'] or 1.0):.2f}",
        ]
        for e in _errors(tuned)
    ]
    before, after = tuned.history[0].error, tuned.best.error
    rows.append(["all", f"{before:.5f}", f"{after:.5f}", f"{after / (before or 1.0):.2f}"])
    title = f"{component}: held-out error, best after {tuned.best.step} of {tuned.step} updates"
    console.table(title, ["timestep", "before", "after", "ratio"], rows)


def _show_map(component: str, members: dict[str, list[int]], *, one_by_one: bool) -> None:
    """Print one row per layer, or per block of layers."""
    blocks: dict[str, list[list[int]]] = {}
    for name, row in members.items():
        blocks.setdefault(name if one_by_one else ".".join(name.split(".")[:_DEPTH]), []).append(
            row
        )
    rows: list[list[Any]] = []
    for block, several in blocks.items():
        commonest = [Counter(column).most_common(1)[0][0] for column in zip(*several, strict=True)]
        switching = sum(len(set(row)) > 1 for row in several)
        rows.append(
            [
                block,
                "".join(_digit(member) for member in commonest),
                f"{switching} of {len(several)}",
            ]
        )
    console.table(
        f"{component}: hub member by timestep, noisy to clean",
        ["layers", "member", "switching"],
        rows,
    )


def _digit(member: int) -> str:
    """Return one character for a member."""
    return "0123456789abcdefghijklmnopqrstuvwxyz"[member] if member < 36 else "+"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("inspect", help=_HELP)(console.guarded(inspect))
