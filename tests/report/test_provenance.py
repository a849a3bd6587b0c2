"""A report shows of a run only what the evaluated export was made with."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from conftest import FEW_UPDATES, Chained, finetune
from msfp_cli.evaluation.evaluate import evaluate_run
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.report.document import gather
from msfp_cli.run import Run
from report.conftest import OPTIONS


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
