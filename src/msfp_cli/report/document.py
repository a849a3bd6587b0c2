"""Gather what a run knows about its export into one document of plain JSON values.

`page` and `plots` draw the document. They need neither the run nor the evaluation.
"""

import math
from typing import Any

from msfp_cli.evaluation.provenance import Provenance, provenance_of
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.files.documents import Json
from msfp_cli.report.comparison import cost_row, embedded_pictures, key_figures, metrics_table
from msfp_cli.report.components import describe_component
from msfp_cli.report.reproduce import commands_of, settings_of
from msfp_cli.run import Run, describe_sizes
from msfp_cli.version import __version__


def gather(run: Run, evaluation: Evaluation, pictures: int) -> dict[str, Any]:
    """Return the document of an evaluation.

    Arguments:
        run: gives the per-layer candidates and the router, where the export is its own.
        pictures: prompts to show.
    """
    models = evaluation.models
    provenance = provenance_of(run, evaluation.export)
    document = {
        "title": "msfp report",
        "model": evaluation.settings["against"]["model"],
        "version": __version__,
        "summary": _summary(provenance, evaluation),
        "headline": key_figures(models),
        "models": [{"key": model.key, "title": model.title} for model in models],
        "pictures": embedded_pictures(evaluation, pictures),
        "comparison": metrics_table(models),
        "components": {
            component: describe_component(provenance, models, component)
            for component in provenance.tables
        },
        "costs": [cost_row(model) for model in models],
        "commands": commands_of(provenance, evaluation),
        "settings": settings_of(provenance, evaluation),
        "notes": [*evaluation.notes, *say_changed(evaluation)],
    }
    return {key: _finite(value) for key, value in document.items()}


def say_changed(evaluation: Evaluation) -> tuple[str, ...]:
    """Say that the export is not what was evaluated, where that is known."""
    if evaluation.gallery("export").is_of(evaluation.export):
        return ()
    return (
        f"{evaluation.export} was changed since it was evaluated, and the figures and pictures are "
        "of what it was; `msfp evaluate --overwrite` measures it as it is",
    )


def _summary(provenance: Provenance, evaluation: Evaluation) -> str:
    """Return one sentence on what is quantized and what was drawn."""
    layers = 0
    signs = list[bool]()
    for table in provenance.tables.values():
        layers += len(table)
        inputs = [scheme.input for scheme in table.values()]
        signs += [grid.format.signed for grid in inputs if grid is not None]
    count = len(evaluation.settings["record"]["conditions"])
    inputs_ = f"{signs.count(False)} of {len(signs)} inputs unsigned{_bits_of_inputs(provenance)}"
    return (
        f"{layers} layers quantized, {inputs_ if signs else 'inputs stay in floating point'}; "
        f"{count} pictures of each model from the same prompts and seeds. Weights on disk: "
        f"{describe_sizes(evaluation.export)}.{_floats(provenance)}"
    )


def _floats(provenance: Provenance) -> str:
    """Say what stays in floating point, where the calibration is known."""
    calibration = provenance.calibration
    if calibration is None:
        return ""
    lines = {name: calibration.floats_in_words(name) for name in calibration.layers}
    return "".join(f" Of {name}, {line}." for name, line in lines.items() if line)


def _bits_of_inputs(provenance: Provenance) -> str:
    """Say how many bits an input has on average, where the calibration is known."""
    calibration = provenance.calibration
    if calibration is None:
        return ""
    bits = [f"{calibration.input_bits(component):.1f}" for component in calibration.layers]
    return f", inputs have {' and '.join(bits)} bits on average"


def _finite(value: Json) -> Json:
    """Replace the numbers that JSON does not have (infinities, NaN) by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
