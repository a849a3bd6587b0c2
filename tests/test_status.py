"""What a run holds and what comes next, from an empty directory to the report."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import Chained, Finetuned, train
from msfp_cli.errors import RunError
from msfp_cli.finetuning.result import load_finetunings
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run
from msfp_cli.status import next_command, status_of


def test_status_tells_each_stage_and_the_next_command(
    tiny_chained: Chained, copied: Callable[..., Path], tmp_path: Path
) -> None:
    full, run = copied(tiny_chained.run.directory, "full"), Run(tmp_path / "run")
    model = tiny_chained.calibration.source.model
    run.directory.mkdir()
    stages = ("recording", "held-out", "calibration", "finetune", "export", "components")
    nothing = dict.fromkeys((*stages, "floats", "evaluation", "report"), "none")
    assert status_of(run).stages == nothing
    assert next_command(run).startswith("msfp calibrate")

    shutil.move(full / "recording", run.recording)
    (run.recording / "00000.safetensors").rename(tmp_path / "shard")
    assert status_of(run).stages == nothing | {"recording": f"0 of 1 shards of {model}"}
    (tmp_path / "shard").rename(run.recording / "00000.safetensors")
    shutil.move(full / "held-out", run.held_out)
    assert (
        status_of(run).stages["recording"]
        == status_of(run).stages["held-out"]
        == f"1 of 1 shards of {model}"
    )
    assert next_command(run).startswith("msfp calibrate")

    shutil.move(full / "calibration", run.calibration)
    error = tiny_chained.calibration.held_out_error["unet"]
    count = len(tiny_chained.calibration.layers["unet"])
    assert (
        status_of(run).stages["calibration"] == f"W4A4 mixed, {count} layers, inputs of "
        f"{tiny_chained.calibration.input_bits('unet'):.1f} bits on average, "
        f"held-out error {error:.5f}"
    )
    words = tiny_chained.calibration.floats_in_words("unet")
    assert status_of(run).stages["floats"] == f"unet: {words}"
    assert next_command(run).startswith("msfp finetune")

    shutil.move(full / "export", run.directory / "export")
    run.remember_export(run.export)
    assert status_of(run).stages["export"] == str(run.directory / "export")
    size = (run.export / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert f"unet {size / 2**20:.2f} MiB" in status_of(run).stages["components"]
    assert next_command(run).startswith("msfp sample")


@pytest.fixture
def tuned_run(tiny_tuned: Finetuned, copied: Callable[..., Path]) -> Run:
    """Copy a fine-tuned and exported run."""
    return Run(copied(tiny_tuned.run.directory, "tuned"))


def test_recording_that_does_not_name_its_model_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    Recording.create(run.recording, {}, 2)
    assert status_of(run).stages["recording"] == "0 of 2 shards of an unnamed model"


def test_status_tells_how_far_fine_tuning_got_and_what_it_won(
    tuned_run: Run, tiny_tuned: Finetuned
) -> None:
    before, after = tiny_tuned.tuned.history[0].error, tiny_tuned.tuned.best.error
    assert (
        status_of(tuned_run).stages["finetune"]
        == f"unet: 6 of 6 updates, held-out error {before:.5f} -> {after:.5f}"
    )


def test_fine_tuning_that_was_stopped_is_next(fresh_run: Callable[..., Run]) -> None:
    run = fresh_run()
    assert next_command(run) == f"msfp finetune --run {run.directory}"
    train(run, stop=lambda: True)
    assert status_of(run).stages["finetune"].startswith("transformer: 1 of 6 updates, ")
    assert next_command(run) == f"msfp finetune --run {run.directory}"
    train(run)
    assert next_command(run) == f"msfp export --run {run.directory}"


def test_export_older_than_the_fine_tuning_is_to_be_replaced(tuned_run: Run) -> None:
    assert next_command(tuned_run).startswith("msfp sample")
    exported = tuned_run.latest_export().stat().st_mtime
    os.utime(tuned_run.finetuned("unet"), (exported + 1, exported + 1))
    assert next_command(tuned_run) == f"msfp export --overwrite --run {tuned_run.directory}"


def test_export_of_an_earlier_calibration_is_to_be_replaced(
    tuned_run: Run, tiny_chained: Chained, copied: Callable[..., Path]
) -> None:
    for run, following in (
        (tuned_run, "msfp export --overwrite"),
        (Run(copied(tiny_chained.run.directory, "calibrated")), "msfp finetune"),
    ):
        assert next_command(run).startswith("msfp sample")
        assert run.say_outdated() == ""
        exported = run.latest_export().stat().st_mtime
        os.utime(run.calibration / "calibration.json", (exported + 1, exported + 1))
        assert next_command(run) == f"{following} --run {run.directory}"
        assert run.say_outdated().startswith(f"{run.export} is of an earlier calibration")


def test_after_the_export_come_pictures_then_figures_then_the_page(tuned_run: Run) -> None:
    option, when = f" --run {tuned_run.directory}", tuned_run.latest_export().stat().st_mtime
    figures, page = tuned_run.evaluation / "evaluation.json", tuned_run.report / "report.html"

    def make(path: Path, seconds: float) -> None:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (when + seconds, when + seconds))

    assert next_command(tuned_run).startswith("msfp sample")
    (tuned_run.samples / "001").mkdir(parents=True)
    assert next_command(tuned_run) == f"msfp evaluate{option}"
    make(figures, 1)
    assert next_command(tuned_run) == f"msfp report{option}"
    shutil.rmtree(tuned_run.directory / "samples")
    assert next_command(tuned_run) == f"msfp report{option}"
    assert status_of(tuned_run).stages["evaluation"] == str(tuned_run.evaluation)
    make(page, 2)
    assert next_command(tuned_run).startswith("msfp sample")
    assert status_of(tuned_run).stages["report"] == str(tuned_run.report)


def test_figures_of_an_earlier_export_and_a_page_of_earlier_figures_are_to_be_replaced(
    tuned_run: Run,
) -> None:
    option, export = f" --run {tuned_run.directory}", tuned_run.latest_export()
    figures, page = tuned_run.evaluation / "evaluation.json", tuned_run.report / "report.html"
    for path in (figures, page):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    written = page.stat().st_mtime
    os.utime(figures, (written + 1, written + 1))
    assert next_command(tuned_run) == f"msfp report --overwrite{option}"
    os.utime(export, (written + 2, written + 2))
    assert next_command(tuned_run) == f"msfp evaluate --overwrite{option}"


def test_fine_tuning_of_another_calibration_is_named_and_begun_again(
    tuned_run: Run, tiny_tuned: Finetuned
) -> None:
    replace(tiny_tuned.tuned, calibration="0" * 64).save(tuned_run.finetuned("unet"))
    assert "began with another calibration" in status_of(tuned_run).stages["finetune"]
    assert next_command(tuned_run) == f"msfp finetune --restart --run {tuned_run.directory}"
    with pytest.raises(
        RunError, match="began with another calibration; run `msfp finetune --restart`"
    ):
        load_finetunings(tuned_run, tiny_tuned.calibration)
