"""What a report says of the models side by side: key figures, pictures, metrics and cost."""

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from msfp_cli.evaluation.metrics.table import Metric, metrics_for
from msfp_cli.evaluation.result import Evaluation, Measurements

_SMALL = 128  # pixels; larger pictures are embedded as JPEG


def key_figures(models: Sequence[Measurements]) -> list[dict[str, str]]:
    """Return the few figures that answer whether quantization worked well.

    Arguments:
        models: full precision first, the export last.
    """
    return [
        {"label": label, "value": value, "note": note}
        for label, value, note in _key_figures(models[0], models[1:-1], models[-1])
    ]


def _key_figures(
    full: Measurements, before: Sequence[Measurements], export: Measurements
) -> Iterator[tuple[str, str, str]]:
    """Yield label, value and note of each figure that was measured.

    Arguments:
        before: models of the steps before the export.
    """
    psnr = export.value("psnr")
    output_error = export.value("output")
    latents_error = export.value("latents")
    if full.denoiser_bytes and export.denoiser_bytes:
        size = f"{full.denoiser_bytes / 2**20:.1f} → {export.denoiser_bytes / 2**20:.1f} MiB"
        change = _change(export.denoiser_bytes / full.denoiser_bytes)
        yield "denoiser's size against 16 bits", change, size
    if psnr is not None:
        yield "PSNR to full precision", f"{psnr:.1f} dB", "same prompts and seeds"
    if output_error is not None:
        yield "error of the denoiser's output", f"{output_error:.4f}", "relative, squared"
    for model in before:
        error = model.value("latents")
        if error and latents_error:
            label = f"final latents' error against {model.title}"
            yield label, _change(latents_error / error), f"{error:.4f} → {latents_error:.4f}"


def _change(ratio: float) -> str:
    """Return a ratio as a change in percent, with a proper minus sign."""
    return f"{ratio - 1:+.0%}".replace("-", "−")


def embedded_pictures(evaluation: Evaluation, count: int) -> list[dict[str, Any]]:
    """Return the first pictures of every model, embedded as data URIs."""
    record = evaluation.settings["record"]
    models = evaluation.models
    pictures = {model.key: evaluation.gallery(model.key).pictures()[:count] for model in models}
    return [
        {
            "prompt": condition,
            "seed": record["seed"] + i,
            "images": _embed_all(pictures, i),
            "psnr": _of_picture(models, "psnr", i),
        }
        for i, condition in enumerate(record["conditions"][:count])
    ]


def _of_picture(models: Sequence[Measurements], key: str, index: int) -> dict[str, float]:
    """Return a metric of one picture, of every model that has it."""
    return {
        model.key: model.per_picture[key][index] for model in models if key in model.per_picture
    }


def _embed_all(pictures: dict[str, Tensor], index: int) -> dict[str, str]:
    """Return one picture of every model as a data URI."""
    return {key: _embed(of_model[index]) for key, of_model in pictures.items()}


def _embed(picture: Tensor) -> str:
    """Return a uint8 picture ``(3, height, width)`` as a data URI."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    if max(image.size) <= _SMALL:
        kind = "png"
        image.save(buffer, kind, optimize=True)
    else:
        kind = "jpeg"
        image.save(buffer, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def metrics_table(models: Sequence[Measurements]) -> dict[str, Any]:
    """Return the metrics that some model has in columns, and the models in rows."""
    metrics = metrics_for(models)
    few = any(_has_few_pictures(model) for model in models)
    return {
        "columns": [_column(metric, few=few) for metric in metrics],
        "rows": [{"title": model.title, "values": _values(model, metrics)} for model in models],
    }


def _column(metric: Metric, *, few: bool) -> dict[str, Any]:
    """Return how a metric is shown; one of few pictures cannot tell which model is best."""
    return {
        "key": metric.key,
        "title": metric.title,
        "help": metric.help,
        "digits": metric.digits,
        "better": metric.better,
        "telling": not (few and metric.kind == "sets"),
    }


def _values(model: Measurements, metrics: Sequence[Metric]) -> dict[str, float | None]:
    """Return a model's value of each metric."""
    return {metric.key: model.value(metric.key) for metric in metrics}


def _has_few_pictures(model: Measurements) -> bool:
    """Whether distances between sets of pictures say too little to rank this model by them."""
    return any(sizes.few for sizes in model.sets.values())


def cost_row(model: Measurements) -> dict[str, Any]:
    """Return the size, time and memory of a model."""
    return {
        "title": model.title,
        "denoiser_bytes": model.denoiser_bytes,
        "seconds_per_picture": None if model.cost is None else model.cost.seconds_per_picture,
        "peak_memory_bytes": None if model.cost is None else model.cost.peak_memory_bytes,
    }
