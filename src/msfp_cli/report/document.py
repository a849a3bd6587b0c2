"""Gather what a run knows about its export into one document, and write it as a page."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from msfp_cli.calibration.result import Calibration, LayerChoice
from msfp_cli.checkpoint.pipeline import read_configs
from msfp_cli.errors import UsageError
from msfp_cli.evaluation.identity import calibration_of
from msfp_cli.evaluation.metrics.table import metrics_for
from msfp_cli.evaluation.result import DenoiserError, Evaluation, Measurements
from msfp_cli.files import Json, refuse_existing, replace_directory
from msfp_cli.finetuning.lora import tuned_names
from msfp_cli.finetuning.quantize import member_by_timestep
from msfp_cli.finetuning.result import FinetuneState, load_finetunings
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.report.page import render
from msfp_cli.report.plots import draw_plots
from msfp_cli.report.reproduce import commands_of, settings_of
from msfp_cli.run import Run
from msfp_cli.version import __version__

_SMALL = 128  # pixels; larger pictures are embedded as JPEG
PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written.

    Arguments:
        page: the HTML file.
        plots: PNG files beside it; none where matplotlib is missing.
        notes: what the user should know.
    """

    page: Path
    plots: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """Return plain JSON values."""
        return {"page": str(self.page), "plots": [str(plot) for plot in self.plots]}


def report_run(
    run: Run,
    evaluation: Path | None = None,
    directory: Path | None = None,
    *,
    pictures: int = 8,
    overwrite: bool = False,
) -> Report:
    """Write the report of an evaluation.

    Arguments:
        evaluation: its directory; None for the run's own.
        directory: where to write; None for the run's own report directory.
        pictures: prompts to show.

    Raises:
        RunError: there is no evaluation, or the directory exists and `overwrite` is not set.
    """
    if evaluation is None:
        run.require()
    result = Evaluation.load(evaluation or run.evaluation)
    return write_report(
        run, result, directory or run.report, pictures=pictures, overwrite=overwrite
    )


def write_report(
    run: Run, evaluation: Evaluation, directory: Path, *, pictures: int = 8, overwrite: bool
) -> Report:
    """Write the page and its plots.

    Arguments:
        run: gives the per-layer candidates and the router, where the export is its own.
        pictures: prompts to show.

    Raises:
        RunError: the directory exists and `overwrite` is not set.
    """
    refuse_existing(directory, overwrite=overwrite)
    document, notes = gather(run, evaluation, pictures), []
    with replace_directory(directory, overwrite=overwrite) as temporary:
        (temporary / PAGE).write_text(render(document), "utf-8")
        try:
            plots = tuple(directory / path.name for path in draw_plots(document, temporary))
        except UsageError as error:
            plots = ()
            notes.append(f"no PNG plots beside the page: {error}")
    return Report(page=directory / PAGE, plots=plots, notes=tuple(notes))


def gather(run: Run, evaluation: Evaluation, pictures: int) -> dict[str, Any]:
    """Return the document that `report_page.render` takes, as plain JSON values."""
    export = Path(evaluation.settings["export"])
    configs = read_configs(export)
    tables = {component: config.table() for component, config in configs.items()}
    calibration = calibration_of(run, export, configs)
    tuned = {} if calibration is None else _tuned(run, calibration, tables)
    document = {
        "title": "msfp report",
        "model": evaluation.settings["against"]["model"],
        "version": __version__,
        "summary": _summary(evaluation, tables),
        "headline": _headline(evaluation),
        "models": [{"key": model.key, "title": model.title} for model in evaluation.models],
        "pictures": _pictures(evaluation, pictures),
        "comparison": _comparison(evaluation.models),
        "components": {
            component: {
                "timesteps": _timesteps(evaluation.models, component),
                "layers": _layers(
                    table, calibration, component, evaluation.models[-1].denoisers.get(component)
                ),
                "router": _router(calibration, component, tuned.get(component)),
            }
            for component, table in tables.items()
        },
        "costs": [_cost(model) for model in evaluation.models],
        "commands": commands_of(calibration, tuned, evaluation),
        "settings": settings_of(calibration, tuned, evaluation),
        "notes": list(evaluation.notes),
    }
    return _finite(document)  # type: ignore[no-any-return]


def _tuned(
    run: Run, calibration: Calibration, tables: dict[str, dict[str, LayerScheme]]
) -> dict[str, FinetuneState]:
    """Return the fine-tunings that the export holds: a calibrated one holds none."""
    if all(table == calibration.table(component) for component, table in tables.items()):
        return {}
    return load_finetunings(run, calibration)


def _summary(evaluation: Evaluation, tables: dict[str, dict[str, LayerScheme]]) -> str:
    layers = [scheme for table in tables.values() for scheme in table.values()]
    inputs = [scheme.input for scheme in layers if scheme.input is not None]
    unsigned = sum(not grid.format.signed for grid in inputs)
    count = len(evaluation.settings["record"]["conditions"])
    return (
        f"{len(layers)} layers quantized, {unsigned} of {len(inputs)} inputs unsigned; "
        f"{count} pictures of each model from the same prompts and seeds."
    )


def _headline(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return the few figures that answer whether it helped."""
    full, after = evaluation.models[0], evaluation.models[-1]
    psnr = after.value("psnr")
    output_error = after.value("output")
    latents_error = after.value("latents")
    tiles = []
    if full.denoiser_bytes and after.denoiser_bytes:
        ratio = after.denoiser_bytes / full.denoiser_bytes
        size = f"{full.denoiser_bytes / 2**20:.1f} → {after.denoiser_bytes / 2**20:.1f} MiB"
        tiles.append(
            {"label": "denoiser's size against 16 bits", "value": _change(ratio), "note": size}
        )
    if psnr is not None:
        tiles.append(
            {
                "label": "PSNR to full precision",
                "value": f"{psnr:.1f} dB",
                "note": "same prompts and seeds",
            }
        )
    if output_error is not None:
        tiles.append(
            {
                "label": "error of the denoiser's output",
                "value": f"{output_error:.4f}",
                "note": "relative, squared",
            }
        )
    for model in evaluation.models[1:-1]:
        error = model.value("latents")
        if error and latents_error:
            tiles.append(
                {
                    "label": f"final latents' error against {model.title}",
                    "value": _change(latents_error / error),
                    "note": f"{error:.4f} → {latents_error:.4f}",
                }
            )
    return tiles


def _change(ratio: float) -> str:
    return f"{ratio - 1:+.0%}".replace("-", "−")


def _pictures(evaluation: Evaluation, count: int) -> list[dict[str, Any]]:
    """Return the first pictures of every model, embedded."""
    record = evaluation.settings["record"]
    drawn = {
        model.key: evaluation.gallery(model.key).pictures()[:count] for model in evaluation.models
    }
    return [
        {
            "prompt": condition,
            "seed": record["seed"] + i,
            "images": {key: _embed(pictures[i]) for key, pictures in drawn.items()},
            "psnr": _of_picture(evaluation.models, "psnr", i),
        }
        for i, condition in enumerate(record["conditions"][:count])
    ]


def _of_picture(models: Sequence[Measurements], key: str, index: int) -> dict[str, float]:
    """Return a metric of one picture, of every model that has it."""
    return {
        model.key: model.per_picture[key][index] for model in models if key in model.per_picture
    }


def _embed(picture: torch.Tensor) -> str:
    """Return a uint8 picture ``(3, height, width)`` as a data URI."""
    image, buffer = Image.fromarray(picture.permute(1, 2, 0).numpy()), io.BytesIO()
    kind = "png" if max(image.size) <= _SMALL else "jpeg"
    image.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _comparison(models: Sequence[Measurements]) -> dict[str, Any]:
    """Return the metrics that some model has, models in rows."""
    metrics = metrics_for(models)
    few = any(_has_few_pictures(model) for model in models)
    return {
        "columns": [
            {
                "key": metric.key,
                "title": metric.title,
                "help": metric.help,
                "digits": metric.digits,
                "better": metric.better,
                "telling": not (few and metric.kind == "sets"),
            }
            for metric in metrics
        ],
        "rows": [
            {"title": model.title, "values": {m.key: model.value(m.key) for m in metrics}}
            for model in models
        ],
    }


def _has_few_pictures(model: Measurements) -> bool:
    """Whether distances between sets of pictures say too little to rank this model by them."""
    return any(sizes.few for sizes in model.sets.values())


def _timesteps(models: Sequence[Measurements], component: str) -> dict[str, Any]:
    """Return the error of the output by timestep, one series for each quantized model."""
    series = [model for model in models if component in model.denoisers]
    rows: dict[float, dict[str, float]] = {}
    for model in series:
        for timestep, error in model.denoisers[component].by_timestep:
            rows.setdefault(timestep, {})[model.key] = error
    return {
        "series": [{"key": model.key, "title": model.title} for model in series],
        "rows": [
            {"timestep": timestep, "values": rows[timestep]}
            for timestep in sorted(rows, reverse=True)
        ],
    }


def _layers(
    table: dict[str, LayerScheme],
    calibration: Calibration | None,
    component: str,
    errors: DenoiserError | None,
) -> list[dict[str, Any]]:
    """Return what is known of each quantized layer."""
    choices = {} if calibration is None else calibration.layers[component]
    total = sum(choice.multiply_adds for choice in choices.values()) or 1.0
    names = [name for name in choices if name in table] or list(
        table
    )  # a config sorts them, a calibration does not
    return [_layer(name, table[name], choices.get(name), errors, total) for name in names]


def _layer(
    name: str,
    scheme: LayerScheme,
    choice: LayerChoice | None,
    errors: DenoiserError | None,
    total: float,
) -> dict[str, Any]:
    grid = scheme.input
    histogram = None if errors is None else errors.inputs.get(name)
    layer: dict[str, Any] = {
        "name": name,
        "weight_format": None if scheme.weight is None else scheme.weight.name,
        "input_format": None if grid is None else grid.format.name,
        "signed": None if grid is None else grid.format.signed,
        "output_error": None if errors is None else errors.layers.get(name),
        "histogram": None
        if histogram is None
        else {
            "minimum": histogram.minimum,
            "maximum": histogram.maximum,
            "counts": list(histogram.counts),
        },
        "grid": None
        if grid is None
        else sorted(
            float(grid.scale) * value + grid.zero_point for value in set(grid.format.code_book)
        ),
    }
    if choice is not None:
        layer |= {
            "kind": choice.kind,
            "reason": choice.reason,
            "weight_error": choice.weight_error,
            "input_error": choice.input_error,
            "sensitivity": choice.sensitivity,
            "share": choice.multiply_adds / total,
            "candidates": [
                {
                    "format": s.format,
                    "error": s.error,
                    "max_value": s.max_value,
                    "zero_point": s.zero_point,
                }
                for s in choice.input_scores
            ],
        }
    return layer


def _router(
    calibration: Calibration | None, component: str, tuned: FinetuneState | None
) -> dict[str, Any] | None:
    """Return which member of its hub serves each layer when, None where nothing switches."""
    if calibration is None or tuned is None or tuned.recipe.hub_size == 1:
        return None
    members = member_by_timestep(tuned, tuned_names(calibration.table(component)))
    return {
        "timesteps": sorted(tuned.timesteps, reverse=True),
        "hub_size": tuned.recipe.hub_size,
        "rows": [{"name": name, "members": row} for name, row in members.items()],
    }


def _cost(model: Measurements) -> dict[str, Any]:
    return {
        "title": model.title,
        "denoiser_bytes": model.denoiser_bytes,
        "seconds_per_picture": None if model.cost is None else model.cost.seconds_per_picture,
        "peak_memory_bytes": None if model.cost is None else model.cost.peak_memory_bytes,
    }


def _finite(value: Any) -> Any:  # noqa: ANN401 (a JSON tree)
    """Replace what JSON cannot say (infinities, NaN) by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
