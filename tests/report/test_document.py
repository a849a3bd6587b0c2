"""The document is plain JSON, and says in one sentence what is quantized."""

import json
import math
from dataclasses import replace
from typing import Any

from conftest import Finetuned
from msfp_cli.checkpoint.pipeline import read_configs
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.report.document import gather


def test_numbers_that_json_does_not_have_are_left_out(
    tiny_tuned: Finetuned, evaluated: Evaluation
) -> None:
    *before, export = evaluated.models
    export = replace(export, per_picture={"psnr": (math.inf, 20.0)})
    document = gather(tiny_tuned.run, replace(evaluated, models=(*before, export)), 2)
    assert [entry["psnr"]["export"] for entry in document["pictures"]] == [None, 20.0]
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_summary_counts_layers_and_unsigned_inputs(
    tiny_tuned: Finetuned, document: dict[str, Any]
) -> None:
    schemes = read_configs(tiny_tuned.export)["unet"].table().values()
    grids = [scheme.input for scheme in schemes if scheme.input is not None]
    unsigned = sum(not grid.format.signed for grid in grids)
    expected = f"{len(schemes)} layers quantized, {unsigned} of {len(grids)} inputs unsigned; "
    assert document["summary"].startswith(expected)
