"""`msfp inspect`: show what fine-tuning learned, or how the layers of an export run."""

from collections import Counter
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from msfp_cli.commands import console
from msfp_cli.errors import MsfpError
from msfp_cli.options import DEFAULT_RUN, DeviceOption, JsonOption, RunOption

if TYPE_CHECKING:
    from msfp_cli.checkpoint.pipeline import LayerKernel
    from msfp_cli.evaluation.cost import CallTime
    from msfp_cli.finetuning.inspect import Inspection

HELP = """Show what fine-tuning learned: the error at each timestep before and after, and the hubs.

A hub is the few LoRAs of a layer, its members; the router uses one of them at each timestep. The
map has a row for each block of layers and a column for each timestep, from noisy to clean. A digit
is the member that most layers of the block use there.

Examples:

    msfp inspect

    msfp inspect --layers 'up_blocks.1*'

    msfp inspect --kernels
"""
_DEPTH = 2  # parts of a layer's name that make a row of the map
# The full-precision model and a call of each of its denoisers, by component, or why there is none.
_Recorded: TypeAlias = tuple[Any, dict[str, Any]] | str
_MOST_WEIGHTS = 2_000_000_000  # of denoisers that are loaded in full precision to be timed


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
            help="Show instead which kernel computes each layer of the latest export, why, and how "
            "long a call takes beside full precision.",
        ),
    ] = False,
    device: DeviceOption = None,
    json_: JsonOption = False,
) -> None:
    """Show what fine-tuning learned, or how an export runs."""
    if kernels:
        _inspect_kernels(run, layers, device, as_json=json_)
    else:
        from msfp_cli.finetuning.inspect import inspect_run

        place = run.directory / "finetune"
        inspections = inspect_run(run, layers)
        _show_hubs(inspections, place, one_by_one=layers is not None, as_json=json_)


def _show_hubs(
    inspections: dict[str, "Inspection"], place: Path, *, one_by_one: bool, as_json: bool
) -> None:
    """Print errors by timestep, and which members serve when."""
    for component, inspection in inspections.items():
        _show_errors(component, inspection)
        _show_map(component, inspection.members, one_by_one=one_by_one)
    data = {component: inspection.to_json() for component, inspection in inspections.items()}
    console.result(str(place), data, as_json=as_json)


def _inspect_kernels(
    run: RunOption, pattern: str | None, device: str | None, *, as_json: bool
) -> None:
    """Print which kernel runs which layers of an export, and why others were passed over.

    Without a pattern of layers, a recorded call is timed, too, if the run has any.
    """
    from msfp_cli.checkpoint.pipeline import kernels_of

    console.quiet_libraries()
    export = run.latest_export()
    recorded = _recorded_calls(run, export)
    calls = {} if isinstance(recorded, str) else recorded[1]
    kernels = kernels_of(export, pattern, device=device, calls=calls)
    for component, layers in kernels.items():
        _show_kernels(component, layers, one_by_one=pattern is not None)
    times = _show_times(recorded, export, device) if pattern is None else {}
    data = {
        component: {
            "layers": {name: layer._asdict() for name, layer in layers.items()},
            "seconds": asdict(times[component]) if component in times else None,
        }
        for component, layers in kernels.items()
    }
    console.result(str(export), data, as_json=as_json)


def _recorded_calls(run: RunOption, export: Path) -> _Recorded:
    """Return full precision and a recorded call of each of its denoisers, or why there is none."""
    from msfp_cli.evaluation.provenance import provenance_of
    from msfp_cli.recording.result import Recording

    try:
        origin = provenance_of(run, export)
        if origin.calibration is None or not run.held_out.exists():
            return "the run has no recorded calls of this export"
        tables = origin.calibration.layers.values()
        choices = chain.from_iterable(table.values() for table in tables)
        if sum(choice.num_weights for choice in choices) > _MOST_WEIGHTS:
            return "full precision may not fit into memory"
        recording = Recording(run.held_out)
        ran = [name for name in origin.tables if recording.num_calls(name)]
        return origin.source, {name: next(iter(recording.calls(name))) for name in ran}
    except MsfpError as error:  # the model or the recording may be gone; kernels can be shown
        return str(error)


def _show_times(recorded: _Recorded, export: Path, device: str | None) -> dict[str, "CallTime"]:
    """Print how long a recorded call takes, as exported and in full precision, and return it."""
    from msfp_cli.evaluation.cost import slowness, time_calls

    if isinstance(recorded, str):
        console.note(f"not timed: {recorded}")
        return {}
    source, calls = recorded
    try:
        times = time_calls(source, str(export), calls, device, console.ConsoleProgress())
    except MsfpError as error:  # the model may be gone; the kernels were shown
        console.note(f"not timed: {error}")
        return {}
    for name, each in times.items():
        console.note(
            f"a recorded call of {name}: {each.quantized:.3g} s, in full precision "
            f"{each.full_precision:.3g} s"
        )
        if line := slowness(each.quantized, each.full_precision, "it"):
            console.note(line)
    return times


def _show_kernels(component: str, layers: dict[str, "LayerKernel"], *, one_by_one: bool) -> None:
    """Print one row per layer, or one per kernel and reason."""
    title = f"{component}: kernels"
    if one_by_one:
        rows = [[name, way.kernel, _reason(way)] for name, way in layers.items()]
        console.table(title, ["layer", "kernel", "why not another"], rows)
        return
    whys = [(way.kernel, way.why) for way in layers.values()]
    rows = [[*pair, str(count)] for pair, count in Counter(whys).most_common()]
    console.table(title, ["kernel", "why not another", "layers"], rows)


def _reason(way: "LayerKernel") -> str:
    """Return why other kernels were passed over, or what each took where that decided."""
    times = [f"{name} {1000 * took:.3g} ms" for name, took in way.seconds.items()]
    return ", ".join(times) or way.why


def _show_errors(component: str, inspection: "Inspection") -> None:
    """Print the held-out error at each timestep and of all, before and after fine-tuning."""
    state = inspection.state
    rows = [_error_row(f"{timestep:g}", *errors) for timestep, *errors in inspection.errors()]
    rows.append(_error_row("all", state.history[0].error, state.best.error))
    title = f"{component}: held-out error, best after {state.best.step} of {state.step} updates"
    console.table(title, ["timestep", "before", "after", "ratio"], rows)


def _error_row(title: str, before: float, after: float) -> list[str]:
    return [title, f"{before:.5f}", f"{after:.5f}", f"{after / (before or 1.0):.2f}"]


def _show_map(component: str, members: dict[str, list[int]], *, one_by_one: bool) -> None:
    """Print one row per layer, or per block of layers."""
    blocks: dict[str, list[list[int]]] = {}
    for name, row in members.items():
        block = name if one_by_one else ".".join(name.split(".")[:_DEPTH])
        blocks.setdefault(block, []).append(row)
    rows = []
    for block, layers in blocks.items():
        commonest = [Counter(column).most_common(1)[0][0] for column in zip(*layers, strict=True)]
        digits = "".join(map(_digit, commonest))
        switching = sum(len(set(row)) > 1 for row in layers)
        rows.append([block, digits, f"{switching} of {len(layers)}"])
    console.table(
        f"{component}: hub member by timestep, noisy to clean",
        ["layers", "member", "switching"],
        rows,
    )


def _digit(member: int) -> str:
    """Return one character for a member."""
    return "0123456789abcdefghijklmnopqrstuvwxyz"[member] if member < 36 else "+"
