"""The report's plots as PNG files, for papers and slides.

They need matplotlib, which the extra ``report`` brings.
"""

import logging
from pathlib import Path
from typing import Any, TypeAlias

from msfp_cli.errors import UsageError

_COLOURS = ("#0b62c4", "#b3500b", "#177a51", "#8a3ea8", "#7a6a00")
_GREY = "#8a8f98"

Axes: TypeAlias = Any  # matplotlib's; the package is optional


def draw_plots(document: dict[str, Any], directory: Path) -> list[Path]:
    """Draw a document's sizes, and the timesteps, layers and router of each denoiser.

    Arguments:
        document: what `document.gather` returns.
        directory: where to write the files.

    Raises:
        UsageError: matplotlib is not installed.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of a cache that it cannot write
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("matplotlib is not installed: pip install 'msfp[report]'") from None
    figures: dict[str, Figure] = {}

    def axes(name: str, width: float, height: float) -> Axes:
        figures[name] = Figure(figsize=(width, height), layout="constrained")
        return figures[name].subplots()

    costs = [cost for cost in document["costs"] if cost["denoiser_bytes"]]
    if costs:
        _sizes(axes("sizes", 6, 0.5 + 0.4 * len(costs)), costs)
    for component, part in document["components"].items():
        if len(part["timesteps"]["rows"]) > 1:
            _timesteps(axes(f"{component}-timesteps", 7, 4), part["timesteps"])
        measured = [layer for layer in part["layers"] if layer["output_error"]]
        if measured:
            _layers(axes(f"{component}-layers", 9, 4), measured)
        if part["router"]:
            _router(axes(f"{component}-router", 7, 8), part["router"])
    paths = []
    for name, figure in figures.items():
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=120, metadata={"Software": None})
    return paths


def _sizes(axis: Axes, costs: list[dict[str, Any]]) -> None:
    """Draw one bar a model."""
    names = [cost["title"] for cost in costs]
    sizes = [cost["denoiser_bytes"] / 2**20 for cost in costs]
    bars = axis.barh(names[::-1], sizes[::-1], color=[_COLOURS[0]] * (len(costs) - 1) + [_GREY])
    axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.set_xlabel("denoiser, MiB (full precision: 16 bits a number)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.1)


def _timesteps(axis: Axes, timesteps: dict[str, Any]) -> None:
    """Draw one line a model, from noisy to clean."""
    for colour, series in zip(_COLOURS, timesteps["series"], strict=False):
        rows = [row for row in timesteps["rows"] if row["values"].get(series["key"])]
        errors = [row["values"][series["key"]] for row in rows]
        axis.plot(
            [row["timestep"] for row in rows],
            errors,
            marker="o",
            ms=3,
            color=colour,
            label=series["title"],
        )
    axis.invert_xaxis()
    axis.set_yscale("log")
    axis.set_xlabel("timestep, noisy to clean")
    axis.set_ylabel("relative squared error of the output")
    axis.grid(axis="y", color="#dddddd")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def _layers(axis: Axes, layers: list[dict[str, Any]]) -> None:
    """Draw each layer's error in the order of the model, by the sign of its input's format."""
    for colour, signed, title in (
        (_COLOURS[1], True, "signed input"),
        (_COLOURS[0], False, "unsigned input"),
        (_GREY, None, "input in floating point"),
    ):
        places = [i for i, layer in enumerate(layers) if layer["signed"] is signed]
        if not places:
            continue
        axis.scatter(
            places, [layers[i]["output_error"] for i in places], s=14, color=colour, label=title
        )
    axis.set_yscale("log")
    axis.set_xlabel("layer, in the order of the report")
    axis.set_ylabel("relative squared error of its output")
    axis.grid(axis="y", color="#dddddd")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)


def _router(axis: Axes, router: dict[str, Any]) -> None:
    """Draw which member serves which layer when."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    members = [row["members"] for row in router["rows"]]
    size = router["hub_size"]
    colours = [_COLOURS[k % len(_COLOURS)] for k in range(size)]
    axis.imshow(
        members,
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=size - 0.5,
    )
    ticks = range(0, len(router["timesteps"]), max(1, len(router["timesteps"]) // 8))
    axis.set_xticks(list(ticks), [f"{router['timesteps'][i]:g}" for i in ticks])
    axis.set_xlabel("timestep, noisy to clean")
    axis.set_ylabel("layer, in the order of the model")
    patches = [Patch(color=colour, label=f"member {k}") for k, colour in enumerate(colours)]
    axis.legend(
        handles=patches,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=min(size, 5),
        frameon=False,
    )
