"""Which calibration and fine-tunings an export came from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from conftest import CLEAR_GAIN, Chained, Finetuned, train
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import export_run
from msfp_cli.evaluation.provenance import provenance_of
from msfp_cli.run import Run


def test_fine_tuned_export_came_from_calibration_and_fine_tuning(tiny_tuned: Finetuned) -> None:
    provenance = provenance_of(tiny_tuned.run, tiny_tuned.export)
    assert provenance.calibration is not None
    assert provenance.calibration.identity() == tiny_tuned.calibration.identity()
    assert provenance.is_tuned and provenance.finetunings.keys() == {"unet"}


def test_fine_tuned_export_whose_grids_have_not_moved_says_so(
    tiny_tuned: Finetuned, copied: Callable[..., Path]
) -> None:
    run = Run(copied(tiny_tuned.run.directory))
    recipe = replace(CLEAR_GAIN, input_learning_rate=0.0, hub_size=1)
    assert train(run, recipe, restart=True).best.step > 0
    export_run(run, overwrite=True)
    provenance = provenance_of(run, run.export)
    assert provenance.tables["unet"] == tiny_tuned.calibration.table("unet")
    assert provenance.is_tuned and provenance.finetunings.keys() == {"unet"}


def test_calibrated_export_holds_no_fine_tuning(tiny_chained: Chained) -> None:
    provenance = provenance_of(tiny_chained.run, tiny_chained.export)
    assert provenance.tables["unet"] == tiny_chained.calibration.table("unet")
    assert not provenance.is_tuned and provenance.finetunings == {}


def test_export_of_other_codes_did_not_come_from_the_calibration(
    tiny_chained: Chained, copied: Callable[..., Path]
) -> None:
    run = Run(copied(tiny_chained.run.directory))
    calibration = Calibration.load(run.calibration)
    codes = {name: packed ^ 1 for name, packed in calibration.codes["unet"].items()}
    replace(calibration, codes={"unet": codes}).save(run.calibration, overwrite=True)
    assert provenance_of(run, tiny_chained.export).calibration is None


def test_export_of_another_run_has_no_calibration(
    tiny_tuned: Finetuned, prompted_chained: Chained, other: Chained, tmp_path: Path
) -> None:
    for run in (prompted_chained.run, other.run, Run(tmp_path / "none")):
        provenance = provenance_of(run, tiny_tuned.export)
        assert provenance.calibration is None
        assert not provenance.is_tuned and provenance.finetunings == {}
