"""Files that an older msfp wrote still load, and lead to the same exports.

`tests/data/README.md` says what they are.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import export_run, sort_header_
from msfp_cli.checkpoint.in_memory import mark_calibrated_
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.files.seal import MARK
from msfp_cli.finetuning.finetune import finetune_run
from msfp_cli.finetuning.result import FinetuneState
from msfp_cli.pipelines.denoiser import find_denoisers, replay
from msfp_cli.pipelines.loading import load_pipeline
from msfp_cli.recording.compare import output_error
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.recording.record import record_calls
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run
from msfp_cli.status import status_of

OLD = Path(__file__).parent / "data" / "old_run"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a copy of the old run, in the directory that its model's path is relative to."""
    shutil.copytree(OLD, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Run(Path("run"))


def digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file; the version of diffusers is not ours to keep.

    Earlier versions had no seal.
    """
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MARK:
            version = rb'"_diffusers_version": "[^"]*"'
            data = re.sub(version, b'"_diffusers_version": ""', path.read_bytes())
            found[str(path.relative_to(directory))] = hashlib.sha256(data).hexdigest()
    return found


def _forget_model(path: Path) -> None:
    """Take the model's config out of the header, where earlier versions had none."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header.pop("model_config")
    save_file(load_file(path), path, header)
    sort_header_(path)


@pytest.mark.parametrize(
    ("name", "with_finetuning"), [("export", True), ("calibrated", False)], ids=str
)
def test_old_calibration_and_fine_tuning_are_exported_to_the_same_bytes(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, with_finetuning: bool
) -> None:
    config = json.loads((run.export / "unet" / "config.json").read_text())
    version = config["quantization_config"]["tool_version"]
    monkeypatch.setattr("msfp_cli.checkpoint.in_memory.__version__", version)
    # Today an export says whether it is fine-tuned, and the members of hubs are folded, which it
    # says, too.
    monkeypatch.setattr(
        "msfp_cli.checkpoint.export.mark_calibrated_",
        lambda *arguments, is_tuned: mark_calibrated_(*arguments),
    )
    monkeypatch.setattr("msfp_cli.checkpoint.in_memory.schema_of", lambda schemes: 1)
    export_run(run, Path("new"), with_finetuning=with_finetuning, device="cpu")
    _forget_model(Path("new/unet/diffusion_pytorch_model.safetensors"))
    assert digests(Path("new")) == json.loads((OLD / "digests.json").read_text())[name]


def test_old_recording_is_reused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration.load(run.calibration)
    before = digests(run.recording)
    monkeypatch.setattr(
        "msfp_cli.recording.record.call_pipeline",
        lambda *args, **kwargs: pytest.fail("it was recorded again"),
    )
    pipe = load_pipeline(calibration.source, "cpu")
    record_calls(pipe, calibration.source, calibration.record, run.recording)
    assert digests(run.recording) == before


def test_old_recording_is_of_the_model(run: Run) -> None:
    calibration = Calibration.load(run.calibration)
    unet = find_denoisers(load_pipeline(calibration.source, "cpu"))["unet"]
    recording = Recording(run.recording)
    assert RecordRecipe.from_json(recording.recipe["record"]) == calibration.record
    assert [call.timestep for call in recording.calls()] == [666.0, 333.0, 0.0]
    for call in recording.calls("unet"):
        torch.testing.assert_close(replay(unet, call), call.output)


def test_old_fine_tuning_goes_on(run: Run) -> None:
    state = FinetuneState.load(run.finetuned("unet"))
    assert (state.step, state.finished) == (12, False)
    (report,) = finetune_run(run, state.recipe, device="cpu")
    assert (report.step, report.finished) == (16, True)
    history = FinetuneState.load(run.finetuned("unet")).history
    assert history[: len(state.history)] == state.history
    assert [measurement.step for measurement in history] == [0, 4, 8, 12, 16]


def test_old_export_runs_as_it_was_evaluated(run: Run) -> None:
    evaluation = Evaluation.load(run.evaluation)
    assert [model.key for model in evaluation.models] == ["full", "export"]
    unet = find_denoisers(MSFPPipeline.from_pretrained(run.export, device="cpu").pipe)["unet"]
    state = FinetuneState.load(run.finetuned("unet"))
    error = output_error(unet, Recording(run.held_out).calls()).relative()
    assert error == pytest.approx(state.best.error, rel=1e-3)


def test_status_of_an_old_run_names_all_that_is_there(run: Run) -> None:
    stages = status_of(run).stages
    assert stages["export"] == "run/export"
    assert stages["evaluation"] == "run/evaluation"
    assert "12 of 16" in stages["finetune"]
    assert "none" not in {stages[key] for key in ("recording", "held-out", "calibration")}
