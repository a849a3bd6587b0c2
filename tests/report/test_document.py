"""The document is plain JSON, and shows of a run only what made the evaluated export."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import FEW_UPDATES, Chained, Finetuned, finetune
from msfp_cli.checkpoint.pipeline import read_configs
from msfp_cli.evaluation.evaluate import evaluate_run
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.report.document import gather
from msfp_cli.run import Run
from report.conftest import OPTIONS


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
    bits = tiny_tuned.calibration.input_bits("unet")
    expected = (
        f"{len(schemes)} layers quantized, {unsigned} of {len(grids)} inputs unsigned, "
        f"inputs have {bits:.1f} bits on average; "
    )
    assert document["summary"].startswith(expected)
    words = tiny_tuned.calibration.floats_in_words("unet")
    assert document["summary"].endswith(f" Of unet, {words}.")


def test_fine_tuning_that_the_export_does_not_hold_is_not_reported(
    tiny_chained: Chained, copied: Callable[..., Path], tmp_path: Path
) -> None:
    run = Run(copied(tiny_chained.run.directory))
    shutil.copytree(run.directory / "export", tmp_path / "before")
    found = evaluate_run(
        run, tmp_path / "before", replace(OPTIONS, compare=()), directory=tmp_path / "evaluation"
    )
    finetune(run, FEW_UPDATES)
    later = gather(run, found, 1)
    assert later["components"]["unet"]["router"] is None
    assert not any("finetune" in command for command in later["commands"])


def test_export_of_another_run_is_reported_without_candidates(
    evaluated: Evaluation, prompted_chained: Chained, tmp_path: Path
) -> None:
    for run in (prompted_chained.run, Run(tmp_path / "none")):
        other = gather(run, evaluated, 1)
        part = other["components"]["unet"]
        assert part["router"] is None and part["layers"]
        assert not any("candidates" in layer for layer in part["layers"])
        assert other["commands"][0].startswith(f"msfp evaluate {evaluated.settings['export']} ")


def test_run_that_moved_is_reported_from_where_it_is(
    tiny_chained: Chained, copied: Callable[..., Path], tmp_path: Path
) -> None:
    run = Run(copied(tiny_chained.run.directory, "here"))
    options = EvaluateRecipe(num_images=1, compare=(), layers=False, cost=False)
    evaluate_run(run, run.export, options, device="cpu")
    shutil.move(run.directory, tmp_path / "there")
    moved = Run(tmp_path / "there")
    evaluation = Evaluation.load(moved.evaluation)
    assert evaluation.export == moved.export
    for other in (moved, Run(tmp_path / "none")):  # whatever run the report is asked of
        assert gather(other, evaluation, 1)["components"].keys() == {"unet"}
