"""The run directory: where things are, and what it remembers."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import CHEAP, SIX_PICTURES, Chained, Invoke, only_line
from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.checkpoint.export import export_run
from msfp_cli.errors import CheckpointError, RunError
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.run import Run, refuse_stage
from msfp_cli.status import next_command, status_of


def export_at(directory: Path) -> None:
    directory.mkdir()
    (directory / "model_index.json").touch()


def test_missing_run_directory_says_how_to_make_one(tmp_path: Path) -> None:
    run = Run(tmp_path / "nowhere")
    for use in (Run.require, Run.latest_export, status_of, next_command, export_run):
        with pytest.raises(
            RunError, match="no run directory .*nowhere here; `msfp calibrate` makes one"
        ):
            use(run)
    assert not run.directory.exists()


@pytest.mark.parametrize("stage", ["recording", "calibration", "report"])
def test_place_of_another_stage_is_no_output(tmp_path: Path, stage: str) -> None:
    run = tmp_path / "run"
    refuse_stage(run / stage)  # there is no run yet
    Run(run).remember_calibration(["msfp", "calibrate"])
    refuse_stage(run / stage, stage)
    refuse_stage(run / "other")
    with pytest.raises(RunError, match=f"{stage} is where a run keeps its {stage}; choose another"):
        refuse_stage(run / "." / stage, "export")


@pytest.mark.parametrize("command", ["export", "sample --prompt a", "quantize {model}"])
def test_commands_do_not_replace_what_they_read(
    command: str, tiny_chained: Chained, msfp: Invoke, tmp_path: Path
) -> None:
    run = shutil.copytree(tiny_chained.run.directory, tmp_path / "copy")
    before = sorted(path.name for path in (run / "calibration").iterdir())
    words = command.format(model=tiny_chained.calibration.source.model).split()
    where = [] if words[0] == "quantize" else ["--run", str(run)]
    done = msfp(*words, *where, "--out", str(run / "calibration"), "--overwrite")
    assert "is where a run keeps its calibration" in only_line(done, 1)
    assert sorted(path.name for path in (run / "calibration").iterdir()) == before


def test_run_without_an_export_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no export yet; run `msfp export` first"):
        Run(tmp_path).latest_export()


def test_commands_that_a_line_says_to_type_name_the_run() -> None:
    line = "altered; `msfp export --overwrite` writes it, `msfp export --reseal DIR` takes it"
    assert Run(Path("msfp-run")).in_commands(line) == line
    named = Run(Path("my run")).in_commands(line)
    assert named == line.replace("`msfp export --o", "`msfp export --run 'my run' --o")
    assert Run(Path("other")).in_commands("`msfp --debug ...` and `msfp-run`") == (
        "`msfp --debug ...` and `msfp-run`"
    )


def test_run_directory_can_be_moved(
    tiny_chained: Chained, copied: Callable[..., Path], tmp_path: Path
) -> None:
    moved = Run(copied(tiny_chained.run.directory).rename(tmp_path / "elsewhere"))
    assert moved.latest_export().resolve() == (tmp_path / "elsewhere" / "export").resolve()


def test_export_outside_of_the_run_is_found_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export_at(Path("dresses-fp4"))
    Path("run").mkdir()
    Run(Path("run")).remember_export(Path("dresses-fp4"))
    monkeypatch.chdir(tmp_path / "run")
    assert Run(Path(".")).latest_export().samefile(tmp_path / "dresses-fp4")


def test_latest_export_replaces_the_one_before_and_other_keys_stay(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "run.json").write_text('{"samples": "samples/001"}')
    for name in ("first", "second"):
        export_at(tmp_path / name)
        run.remember_export(tmp_path / name)
    assert run.latest_export() == tmp_path / "second"
    assert '"samples": "samples/001"' in (tmp_path / "run.json").read_text()


def test_deleted_export_counts_as_none(tmp_path: Path) -> None:
    run = Run(tmp_path)
    export_at(tmp_path / "export")
    run.remember_export(tmp_path / "export")
    (tmp_path / "export" / "model_index.json").unlink()
    with pytest.raises(RunError, match="holds no export yet"):
        run.latest_export()


@pytest.mark.parametrize("content", ["{", "[1, 2]", "3", '{"export": 3}'])
def test_memory_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(
        CheckpointError, match="run.json is damaged .*; delete it; `msfp export --overwrite` writes"
    ):
        Run(tmp_path).latest_export()


def test_calibration_that_is_refused_is_not_remembered(
    fresh_run: Callable[..., Run], tiny: Callable[[str], Path]
) -> None:
    run = fresh_run("DDIMPipeline")
    shutil.rmtree(run.calibration)
    command = run.calibration_command()
    assert "--batch-size 2" in command
    source = ModelSource(model=str(tiny("DDIMPipeline")))
    with pytest.raises(RunError, match="recorded with other settings"):
        calibrate_run(run, source, replace(SIX_PICTURES, seed=5), CHEAP, device="cpu")
    assert run.calibration_command() == command


def test_command_of_the_calibration_is_remembered(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert next_command(run) == f"msfp calibrate --run {tmp_path}"
    run.remember_calibration(["msfp", "calibrate", "a model", "--steps", "3"])
    assert next_command(run) == f"msfp calibrate 'a model' --steps 3 --run {tmp_path}"
    run.remember_calibration(["msfp", "calibrate", "model"], device="cuda:1", max_memory=8 << 30)
    command = "msfp calibrate model --device cuda:1 --max-memory 8GiB"
    assert next_command(run) == f"{command} --run {tmp_path}"


def test_pictures_of_the_calibration_are_remembered_while_they_are_there(tmp_path: Path) -> None:
    run, photos = Run(tmp_path / "run"), tmp_path / "photos"
    run.directory.mkdir()
    photos.mkdir()
    assert run.sampling() == {}
    run.remember_calibration(["msfp", "calibrate", "model", "--images", "photos"], photos)
    assert run.sampling() == {"images": photos}
    assert run.say_lost_images() == ""
    photos.rename(tmp_path / "away")
    assert run.sampling() == {}
    assert run.say_lost_images().startswith(f"{photos}, the --images of the calibration, is not")
    (tmp_path / "away").rename(photos)
    run.remember_calibration(["msfp", "calibrate", "model"])
    assert run.sampling() == {}
    assert run.say_lost_images() == ""


def test_export_without_run_json_is_found(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model_index.json").touch()
    assert Run(tmp_path).latest_export() == tmp_path / "export"


def test_lock_cleans_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.recording.mkdir(parents=True)
    (run.directory / ".export.msfp-tmp").mkdir()
    (run.recording / ".00001.safetensors.msfp-tmp").touch()
    (run.directory / ".notes.tmp").touch()
    with run.lock():
        assert sorted(path.name for path in run.directory.iterdir()) == [
            ".msfp-lock",
            ".notes.tmp",
            "recording",
        ]
    assert sorted(path.name for path in run.directory.rglob("*")) == [".notes.tmp", "recording"]


def test_run_that_nothing_came_into_is_not_made(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.lock(create=True):
        assert run.directory.is_dir()
    assert not run.directory.exists()
