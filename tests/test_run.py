"""The run directory: what it remembers, and what it says is next."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import FEW_UPDATES, Chained, Finetuned, train
from msfp_cli.errors import CheckpointError, RunError
from msfp_cli.run import Run


def test_missing_run_directory_says_how_to_make_one(tmp_path: Path) -> None:
    run = Run(tmp_path / "nowhere")
    for ask in (run.require, run.status, run.next_command, run.latest_export, run.load_calibration):
        with pytest.raises(
            RunError, match="no run directory .*nowhere here; `msfp calibrate` makes one"
        ):
            ask()
    assert not run.directory.exists()


def test_run_without_an_export_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no export yet; run `msfp export` first"):
        Run(tmp_path).latest_export()


def test_run_directory_can_be_moved(
    tiny_chained: Chained, copied: Callable[..., Path], tmp_path: Path
) -> None:
    moved = Run(copied(tiny_chained.run.directory).rename(tmp_path / "elsewhere"))
    assert moved.latest_export().resolve() == (tmp_path / "elsewhere" / "export").resolve()


def test_export_outside_of_the_run_is_found_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dresses-fp4").mkdir()
    Path("run").mkdir()
    Run(Path("run")).remember("export", Path("dresses-fp4"))
    monkeypatch.chdir(tmp_path / "run")
    assert Run(Path(".")).latest_export().samefile(tmp_path / "dresses-fp4")


def test_latest_export_replaces_the_one_before_and_other_keys_stay(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for key, name in (("export", "first"), ("other", "kept"), ("export", "second")):
        (tmp_path / name).mkdir()
        run.remember(key, tmp_path / name)
    assert run.latest_export() == tmp_path / "second"
    assert '"other": "kept"' in (tmp_path / "run.json").read_text()


def test_deleted_export_counts_as_none(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "export").mkdir()
    run.remember("export", tmp_path / "export")
    (tmp_path / "export").rmdir()
    with pytest.raises(RunError, match="holds no export yet"):
        run.latest_export()


@pytest.mark.parametrize("content", ["{", "[1, 2]", "3", '{"export": 3}'])
def test_memory_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match="run.json is damaged .*; delete it and export again"):
        Run(tmp_path).latest_export()


def test_samples_are_numbered_on(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.next_samples() == tmp_path / "samples" / "001"
    for name in ("001", "007", "mine", "100 best"):
        (tmp_path / "samples" / name).mkdir(parents=True)
    assert run.next_samples().name == "008"


def test_samples_are_numbered_beyond_three_digits(tmp_path: Path) -> None:
    for name in ("999", "1000"):
        (tmp_path / "samples" / name).mkdir(parents=True)
    assert Run(tmp_path).next_samples().name == "1001"


def test_status_tells_each_stage_and_the_next_command(
    tiny_chained: Chained, copied: Callable[..., Path], tmp_path: Path
) -> None:
    full, run = copied(tiny_chained.run.directory, "full"), Run(tmp_path / "run")
    model = tiny_chained.calibration.source.model
    run.directory.mkdir()
    stages = ("recording", "held-out", "calibration", "finetune", "export", "evaluation", "report")
    nothing = dict.fromkeys(stages, "none")
    assert dict(run.status()) == nothing
    assert run.next_command().startswith("msfp calibrate")

    shutil.move(full / "recording", run.recording)
    (run.recording / "00000.safetensors").rename(tmp_path / "shard")
    assert dict(run.status()) == nothing | {"recording": f"0 of 1 shards of {model}"}
    (tmp_path / "shard").rename(run.recording / "00000.safetensors")
    shutil.move(full / "held-out", run.held_out)
    assert (
        dict(run.status())["recording"]
        == dict(run.status())["held-out"]
        == f"1 of 1 shards of {model}"
    )
    assert run.next_command().startswith("msfp calibrate")

    shutil.move(full / "calibration", run.calibration)
    error = tiny_chained.calibration.held_out_error["unet"]
    count = len(tiny_chained.calibration.layers["unet"])
    assert (
        dict(run.status())["calibration"]
        == f"W4A4 mixed, {count} layers, held-out error {error:.4f}"
    )
    assert run.next_command().startswith("msfp finetune")

    shutil.move(full / "export", run.directory / "export")
    run.remember("export", run.directory / "export")
    assert dict(run.status())["export"] == str(run.directory / "export")
    assert run.next_command().startswith("msfp sample")


@pytest.fixture
def tuned_run(tiny_tuned: Finetuned, copied: Callable[..., Path]) -> Run:
    """Copy a fine-tuned and exported run."""
    return Run(copied(tiny_tuned.run.directory, "tuned"))


def test_status_tells_how_far_fine_tuning_got_and_what_it_won(
    tuned_run: Run, tiny_tuned: Finetuned
) -> None:
    before, after = tiny_tuned.tuned.history[0].error, tiny_tuned.tuned.best.error
    assert (
        dict(tuned_run.status())["finetune"]
        == f"unet: 6 of 6 steps, held-out error {before:.4f} -> {after:.4f}"
    )


def test_fine_tuning_that_was_stopped_is_next(fresh_run: Callable[..., Run]) -> None:
    run = fresh_run()
    assert run.next_command() == f"msfp finetune --run {run.directory}"
    train(run, stop=lambda: True)
    assert dict(run.status())["finetune"].startswith("transformer: 1 of 6 steps, ")
    assert run.next_command() == f"msfp finetune --run {run.directory}"
    train(run)
    assert run.next_command() == f"msfp export --run {run.directory}"


def test_export_older_than_the_fine_tuning_is_to_be_replaced(tuned_run: Run) -> None:
    assert tuned_run.next_command().startswith("msfp sample")
    exported = tuned_run.latest_export().stat().st_mtime
    os.utime(tuned_run.finetuned("unet"), (exported + 1, exported + 1))
    assert tuned_run.next_command() == f"msfp export --overwrite --run {tuned_run.directory}"


def test_after_the_export_come_pictures_then_figures_then_the_page(tuned_run: Run) -> None:
    option, when = f" --run {tuned_run.directory}", tuned_run.latest_export().stat().st_mtime
    figures, page = tuned_run.evaluation / "evaluation.json", tuned_run.report / "report.html"

    def make(path: Path, seconds: float) -> None:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (when + seconds, when + seconds))

    assert tuned_run.next_command().startswith("msfp sample")
    tuned_run.next_samples().mkdir(parents=True)
    assert tuned_run.next_command() == f"msfp evaluate{option}"
    make(figures, 1)
    assert tuned_run.next_command() == f"msfp report{option}"
    shutil.rmtree(tuned_run.directory / "samples")
    assert tuned_run.next_command() == f"msfp report{option}"
    assert dict(tuned_run.status())["evaluation"] == str(tuned_run.evaluation)
    make(page, 2)
    assert tuned_run.next_command().startswith("msfp sample")
    assert dict(tuned_run.status())["report"] == str(tuned_run.report)


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
    assert tuned_run.next_command() == f"msfp report --overwrite{option}"
    os.utime(export, (written + 2, written + 2))
    assert tuned_run.next_command() == f"msfp evaluate --overwrite{option}"


def test_fine_tuning_of_another_calibration_is_named_and_begun_again(
    tuned_run: Run, tiny_tuned: Finetuned
) -> None:
    replace(tiny_tuned.tuned, calibration="0" * 64).save(tuned_run.finetuned("unet"))
    assert "began with another calibration" in dict(tuned_run.status())["finetune"]
    assert tuned_run.next_command() == f"msfp finetune --restart --run {tuned_run.directory}"
    with pytest.raises(
        RunError, match="began with another calibration; run `msfp finetune --restart`"
    ):
        tuned_run.load_tuned(tiny_tuned.calibration)


def test_fine_tuning_of_an_equal_calibration_is_loaded(
    tuned_run: Run, tiny_tuned: Finetuned
) -> None:
    calibration = tuned_run.load_calibration()
    assert (
        calibration.identity() == tiny_tuned.calibration.identity() == tiny_tuned.tuned.calibration
    )
    assert tuned_run.load_tuned(calibration)["unet"].recipe == FEW_UPDATES
    assert Run(tuned_run.directory / "empty").load_tuned(calibration) == {}
