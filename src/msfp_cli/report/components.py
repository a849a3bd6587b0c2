"""What a report says of one denoiser: its errors by timestep, its layers, and its router."""

from collections.abc import Mapping, Sequence
from typing import Any

from msfp_cli.calibration.result import LayerChoice, Score
from msfp_cli.evaluation.provenance import Provenance
from msfp_cli.evaluation.result import DenoiserError, Histogram, Measurements
from msfp_cli.finetuning.lora import tuned_names
from msfp_cli.finetuning.quantize import member_by_timestep
from msfp_cli.formats.rounding import Grid
from msfp_cli.layers.scheme import LayerScheme


def describe_component(
    provenance: Provenance, models: Sequence[Measurements], component: str
) -> dict[str, Any]:
    """Return the part of the document about one denoiser.

    Arguments:
        models: of the evaluation, the export last.
    """
    return {
        "timesteps": _timesteps(models, component),
        "layers": _layers(provenance, component, models[-1].denoisers.get(component)),
        "router": _router(provenance, component),
    }


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
    provenance: Provenance, component: str, errors: DenoiserError | None
) -> list[dict[str, Any]]:
    """Return what is known of each quantized layer, in the order of the model where known."""
    table = provenance.tables[component]
    calibration = provenance.calibration
    choices = {} if calibration is None else calibration.layers[component]
    total = sum(choice.multiply_adds for choice in choices.values()) or 1.0
    layers = list[dict[str, Any]]()
    for name in _in_order(table, choices):
        layer = _exported(name, table[name]) | _measured(name, errors)
        if name in choices:
            layer |= _calibrated(choices[name], total)
        layers.append(layer)
    return layers


def _in_order(table: Mapping[str, LayerScheme], choices: Mapping[str, LayerChoice]) -> list[str]:
    """Return the names of the layers; a calibration has the model's order, an export sorts them."""
    return [name for name in choices if name in table] or list(table)


def _exported(name: str, scheme: LayerScheme) -> dict[str, Any]:
    """Return the formats of a layer, and the values that its input is rounded to.

    Those of an input that is transformed first are not values of the input, and are left out.
    """
    grid = scheme.input
    is_plain = scheme.transform.is_identity
    return {
        "name": name,
        "weight_format": None if scheme.weight is None else scheme.weight.name,
        "input_format": None if grid is None else grid.format.name,
        "signed": None if grid is None else grid.format.signed,
        "grid": _values(grid) if grid is not None and is_plain else None,
        "transform": None if is_plain else str(scheme.transform),
    }


def _values(grid: Grid) -> list[float]:
    """Return the values of an input's grid, in ascending order."""
    code_book = set(grid.format.code_book)
    return sorted(float(grid.scale) * value + grid.zero_point for value in code_book)


def _measured(name: str, errors: DenoiserError | None) -> dict[str, Any]:
    """Return the error of a layer's output, and the distribution of its input."""
    if errors is None:
        return {"output_error": None, "histogram": None}
    histogram = errors.inputs.get(name)
    return {
        "output_error": errors.layers.get(name),
        "histogram": None if histogram is None else _bins(histogram),
    }


def _bins(histogram: Histogram) -> dict[str, Any]:
    """Return a histogram as JSON values."""
    return {
        "minimum": histogram.minimum,
        "maximum": histogram.maximum,
        "counts": list(histogram.counts),
    }


def _calibrated(choice: LayerChoice, total: float) -> dict[str, Any]:
    """Return what the calibration measured of a layer and why it chose the formats.

    Arguments:
        total: multiply-adds of all layers together.
    """
    return {
        "kind": choice.kind,
        "reason": choice.reason,
        "weight_error": choice.weight_error,
        "input_error": choice.input_error,
        "sensitivity": choice.sensitivity,
        "share": choice.multiply_adds / total,
        "candidates": [_candidate(score) for score in choice.input_scores],
    }


def _candidate(score: Score) -> dict[str, Any]:
    """Return a format that the calibration tried for an input."""
    return {
        "format": score.format,
        "error": score.error,
        "max_value": score.max_value,
        "zero_point": score.zero_point,
    }


def _router(provenance: Provenance, component: str) -> dict[str, Any] | None:
    """Return which member of its hub each layer uses when; None if no layer switches."""
    calibration = provenance.calibration
    tuned = provenance.finetunings.get(component)
    if calibration is None or tuned is None or tuned.recipe.hub_size == 1:
        return None
    members = member_by_timestep(tuned, tuned_names(calibration.table(component)))
    return {
        "timesteps": sorted(tuned.timesteps, reverse=True),
        "hub_size": tuned.recipe.hub_size,
        "rows": [{"name": name, "members": row} for name, row in members.items()],
    }
