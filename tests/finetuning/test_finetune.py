"""The workflow and the command: what it says, what it refuses, and how it is interrupted."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from conftest import CHEAP, FEW_UPDATES, TWO_PICTURES, Invoke, only_error, only_line, train
from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.calibration.result import Calibration
from msfp_cli.commands import launch
from msfp_cli.commands.console import stop_on_interrupt
from msfp_cli.files.documents import write_json
from msfp_cli.finetuning.load import settings_of, shared_evenly
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.result import FinetuneState, load_finetunings
from msfp_cli.finetuning.trainer import Trainer
from msfp_cli.options import Options
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.pipelines.rows import join_rows
from msfp_cli.recording.compare import OutputError
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

FreshRun = Callable[..., Run]
OPTIONS = (
    "--steps",
    4,
    "--batch-size",
    2,
    "--calls-per-update",
    1,
    "--rank",
    2,
    "--evaluate-every",
    2,
)
OPTIONS += ("--device", "cpu")


def state(run: Run) -> Path:
    """Return the state file of the class-conditional transformer."""
    return run.finetuned("transformer")


def stop_after(updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C once in the update of that number."""
    backward, count = Trainer._backward, [0]

    def interrupted(trainer: Trainer, call: object) -> float:
        count[0] += 1
        if count[0] == updates:
            signal.raise_signal(signal.SIGINT)
        return backward(trainer, call)

    monkeypatch.setattr(Trainer, "_backward", interrupted)


def test_command_tells_what_was_won_and_what_is_next(fresh_run: FreshRun, msfp: Invoke) -> None:
    run = fresh_run()
    result = msfp("finetune", *OPTIONS)
    assert (result.exit_code, result.stdout) == (0, "msfp-run/finetune\n"), result.stderr
    tuned = FinetuneState.load(state(run))
    for evaluation in tuned.history:
        assert f"held-out error {evaluation.error:.5f}" in result.stderr
    before, after = tuned.history[0].error, tuned.best.error
    assert (
        f"transformer: held-out error {before:.5f} -> {after:.5f} ({after / before:.2f} of the"
        in result.stderr
    )
    assert f"best after {tuned.best.step} updates" in result.stderr
    assert result.stderr.splitlines()[-1] == "next: msfp export"
    assert "\nfinetune     transformer: 4 of 4 updates" in msfp("status").stdout


def test_json_holds_the_figures(fresh_run: FreshRun, msfp: Invoke) -> None:
    run = fresh_run()
    report = json.loads(msfp("finetune", *OPTIONS, "--json").stdout)["transformer"]
    tuned = FinetuneState.load(state(run))
    assert report == {
        "component": "transformer",
        "file": "msfp-run/finetune/transformer.safetensors",
        "step": 4,
        "steps": 4,
        "before": tuned.history[0].error,
        "after": tuned.best.error,
        "best_step": tuned.best.step,
        "finished": True,
    }


def test_without_options_it_goes_on_with_the_saved_settings(
    fresh_run: FreshRun, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh_run()
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        result = msfp(
            "finetune", *OPTIONS, "--hub-size", 3, "--loss", "plain", "--calls-per-update", 2
        )
    assert (result.exit_code, FinetuneState.load(state(run)).finished) == (1, False)
    recipe = FinetuneState.load(state(run)).recipe
    assert (recipe.steps, recipe.hub_size, recipe.loss, recipe.calls_per_update) == (
        4,
        3,
        "plain",
        2,
    )
    assert msfp("finetune", "--device", "cpu").exit_code == 0
    assert (FinetuneState.load(state(run)).recipe, FinetuneState.load(state(run)).step) == (
        recipe,
        4,
    )


def test_finished_run_says_so_and_does_nothing(fresh_run: FreshRun, msfp: Invoke) -> None:
    run = fresh_run()
    assert msfp("finetune", *OPTIONS).exit_code == 0
    before = state(run).read_bytes(), state(run).stat().st_mtime_ns
    result = msfp("finetune", "--device", "cpu")
    assert result.exit_code == 0
    assert "all 4 updates were done before; --restart begins again" in result.stderr
    assert "loss" not in result.stderr
    assert (state(run).read_bytes(), state(run).stat().st_mtime_ns) == before


def test_restart_begins_again_with_other_settings(fresh_run: FreshRun, msfp: Invoke) -> None:
    run = fresh_run()
    assert msfp("finetune", *OPTIONS).exit_code == 0
    result = msfp("finetune", "--restart", "--steps", 2, "--rank", 3, "--device", "cpu")
    assert result.exit_code == 0
    assert "before held-out error" in result.stderr
    recipe = FinetuneState.load(state(run)).recipe
    default = FinetuneRecipe()  # what is not given has it again
    assert (recipe.steps, recipe.rank, recipe.batch_size) == (2, 3, default.batch_size)


def test_training_that_does_not_help_is_said_to_be_left_out(
    fresh_run: FreshRun, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, errors = fresh_run(), iter((0.25, 0.5, 0.75))
    monkeypatch.setattr(OutputError, "relative", lambda error: next(errors))
    result = msfp("finetune", *OPTIONS)
    assert result.exit_code == 0
    assert (
        "training did not lower the held-out error of 0.25000; the calibrated state is kept"
        in result.stderr
    )
    assert "Try a lower --learning-rate with --restart" in result.stderr
    tuned = FinetuneState.load(state(run))
    assert tuned.best.step == 0
    assert tuned.summary() == (
        f"{tuned.step} of {tuned.step} updates, held-out error 0.25000 as calibrated, which "
        "training has not lowered"
    )
    assert not any(
        tensor.any() for name, tensor in tuned.tensors_of("best").items() if "lora_b" in name
    )
    assert any(tensor.any() for name, tensor in tuned.tensors_of("now").items() if "lora_b" in name)


@pytest.mark.parametrize(
    ("command", "message", "exit_code"),
    [
        ("--steps 0", "--steps must be at least 1, got 0", 2),
        ("--batch-size 0", "--batch-size must be at least 1, got 0", 2),
        ("--rank 0", "--rank must be at least 1, got 0", 2),
        ("--hub-size 0", "--hub-size must be at least 1, got 0", 2),
        ("--hub-size 256", "--hub-size must be at most 255, got 256", 2),
        ("--evaluate-every 0", "--evaluate-every must be at least 1, got 0", 2),
        ("--learning-rate 0", "--learning-rate must be positive, got 0", 2),
        ("--learning-rate nan", "--learning-rate must be positive, got nan", 2),
        ("--router-learning-rate -1", "--router-learning-rate must be positive, got -1", 2),
        ("--input-learning-rate -1", "--input-learning-rate must be at least 0, got -1", 2),
        ("--loss mse", "unknown --loss 'mse'; choose one of dfa, plain", 2),
        ("--init ones", "unknown --init 'ones'; choose one of zero, svd", 2),
        ("--timesteps all", "unknown --timesteps 'all'; choose one of error, uniform", 2),
        ("--mixed-precision fp8", "unknown --mixed-precision 'fp8'; choose one of no, bf16", 2),
        ("--resume", "msfp-run holds no fine-tuning to go on with; leave --resume out to begin", 1),
        (
            "--run nowhere",
            "no run directory nowhere here; `msfp calibrate --run nowhere` makes one",
            1,
        ),
        (
            "--run empty",
            "no calibration in empty/calibration; run `msfp calibrate --run empty` first",
            1,
        ),
        ("--device abacus", "device 'abacus' cannot be used here", 1),
    ],
)
def test_wrong_input_is_one_helpful_line(
    command: str, message: str, exit_code: int, fresh_run: FreshRun, msfp: Invoke
) -> None:
    run = fresh_run()
    Path("empty").mkdir()
    assert message in only_line(msfp("finetune", *command.split()), exit_code)
    assert not state(run).exists()


@pytest.mark.parametrize(
    ("usual", "processes", "calls"),
    [(1, 1, 1), (2, 1, 2), (2, 2, 2), (1, 3, 3), (2, 3, 3), (4, 3, 6), (4, 2, 4)],
)
def test_calls_of_an_update_are_as_many_as_usual_or_just_enough_for_equal_shares(
    usual: int, processes: int, calls: int
) -> None:
    recipe = FinetuneRecipe(calls_per_update=usual)
    assert shared_evenly(recipe, processes) == FinetuneRecipe(calls_per_update=calls)


@pytest.mark.parametrize(
    ("options", "launched"),
    [
        (("--calls-per-update", 2), [2]),
        ((), []),
        (("--calls-per-update", 2, "--num-processes", 1), []),
    ],
    ids=["two calls", "one call", "one process asked for"],
)
def test_processes_share_the_calls_of_an_update_on_a_cpu(
    options: tuple[object, ...],
    launched: list[int],
    fresh_run: FreshRun,
    msfp: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, seen = fresh_run(), list[int]()
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(launch, "_cores", lambda: 2)
    monkeypatch.setattr(launch, "_launch", lambda count: seen.append(count) or 0)
    assert msfp("finetune", *OPTIONS, *options).exit_code == 0
    assert seen == launched
    assert state(run).exists() == (not launched)


def test_nothing_is_launched_where_all_updates_are_done(
    fresh_run: FreshRun, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh_run()
    options = (*OPTIONS, "--calls-per-update", 2)
    assert msfp("finetune", *options).exit_code == 0
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(launch, "_cores", lambda: 2)
    monkeypatch.setattr(launch, "_launch", lambda count: pytest.fail("launched"))
    assert "all 4 updates were done before" in msfp("finetune", *options).stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--num-processes", 0), ("--calls-per-update", 0), ("--seed", -1), ("--seed", 10**20)],
)
def test_numbers_out_of_range_are_a_wrong_command_line(
    option: str, value: int, msfp: Invoke
) -> None:
    result = msfp("finetune", option, value)
    assert (result.exit_code, result.stdout) == (2, "")
    assert option in result.stderr


def test_recording_of_another_model_is_refused(
    tiny: Callable[[str], Path], copied: Callable[..., Path], tmp_path: Path, msfp: Invoke
) -> None:
    model = copied(tiny("DiTPipeline"), "model")
    calibrate_run(
        Run(tmp_path / "msfp-run"), ModelSource(model=str(model)), TWO_PICTURES, CHEAP, device="cpu"
    )
    (weights,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["proj_out_2.weight"][0, 0] += 1
    save_file(tensors, weights, {"format": "pt"})
    message = only_line(msfp("finetune", *OPTIONS), 1)
    assert message.startswith(f"msfp-run/recording is of another model than {model} is now")
    assert message.endswith("run the same `msfp calibrate` again, with --overwrite")
    again = msfp(
        "calibrate", model, "--overwrite", "--num-images", 2, "--steps", 2, "--device", "cpu"
    )
    assert again.exit_code == 0, again.stderr
    assert msfp("finetune", *OPTIONS).exit_code == 0


def test_denoiser_whose_rows_cannot_be_told_is_refused(
    fresh_run: FreshRun, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh_run()
    monkeypatch.setattr(
        "msfp_cli.finetuning.batches.join_rows",
        lambda picked: [
            replace(joined, output=joined.output.roll(1, 0)) for joined in join_rows(picked)
        ],
    )
    message = only_line(msfp("finetune", *OPTIONS), 1)
    assert message.startswith(
        "replaying recorded rows in a new batch changes the output of transformer"
    )
    assert not state(run).exists()


def test_model_of_another_kind_is_refused(
    tiny: Callable[[str], Path], copied: Callable[..., Path], tmp_path: Path, msfp: Invoke
) -> None:
    model = copied(tiny("DiTPipeline"), "model")
    calibrate_run(
        Run(tmp_path / "msfp-run"), ModelSource(model=str(model)), TWO_PICTURES, CHEAP, device="cpu"
    )
    shutil.rmtree(model)
    shutil.copytree(tiny("DDIMPipeline"), model)
    assert "is of another model than" in only_line(msfp("finetune", *OPTIONS), 1)
    assert "its transformer is another one" in only_line(msfp("export"), 1)


def test_calibration_without_quantized_weights_has_nothing_to_train(
    tiny: Callable[[str], Path], msfp: Invoke
) -> None:
    options = ("--num-images", 2, "--steps", 2, "--device", "cpu", "--weights", "none")
    result = msfp("calibrate", tiny("DDIMPipeline"), *options)
    assert result.stderr.splitlines()[-1] == "next: msfp export", result.stderr
    message = only_line(msfp("finetune", *OPTIONS), 1)
    assert (
        message
        == "no layer has a quantized weight, so there is nothing to train; run `msfp export`"
    )
    assert msfp("export", "--device", "cpu").exit_code == 0


def test_model_is_loaded_in_the_type_it_was_recorded_in(
    tiny: Callable[[str], Path], tmp_path: Path, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the device of fine-tuning would make of it."""
    source = ModelSource(model=str(tiny("DDIMPipeline")))
    with monkeypatch.context() as patch:
        patch.setattr(
            "msfp_cli.pipelines.loading.choose_dtype", lambda dtype, device: torch.float16
        )
        calibrate_run(Run(tmp_path / "msfp-run"), source, TWO_PICTURES, CHEAP, device="cpu")
    result = msfp("finetune", *OPTIONS)
    assert result.exit_code == 0, result.stderr


def test_recording_that_is_not_the_calibrations_is_refused(
    fresh_run: FreshRun, msfp: Invoke
) -> None:
    run = fresh_run()
    shutil.rmtree(run.recording)
    shutil.copytree(run.held_out, run.recording)
    assert "is not the recording that the calibration was made from" in only_line(
        msfp("finetune", *OPTIONS), 1
    )


def test_calls_to_measure_on_that_are_another_models_are_refused(
    fresh_run: FreshRun, msfp: Invoke
) -> None:
    run = fresh_run()
    manifest = run.held_out / "recording.json"
    document = json.loads(manifest.read_text())
    del document["sha256"]
    document["recipe"]["fingerprint"] = {"transformer": "of other weights"}
    write_json(manifest, document)
    message = only_line(msfp("finetune", *OPTIONS), 1)
    assert message.startswith("msfp-run/held-out is not the recording that the calibration was")


def test_restart_that_is_refused_leaves_the_state_as_it_is(
    fresh_run: FreshRun, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh_run()
    assert msfp("finetune", *OPTIONS).exit_code == 0
    before = state(run).read_bytes()
    processes = SimpleNamespace(
        num_processes=2, process_index=0, is_main_process=True, device=torch.device("cpu")
    )
    monkeypatch.setattr("msfp_cli.finetuning.finetune.Accelerator", lambda cpu: processes)
    message = only_line(msfp("finetune", *OPTIONS, "--restart"), 2)
    assert message.startswith("2 processes cannot share 1 calls per update evenly")
    assert state(run).read_bytes() == before


@pytest.mark.parametrize("name", ["recording", "held-out"])
def test_incomplete_recording_is_refused(name: str, fresh_run: FreshRun, msfp: Invoke) -> None:
    (fresh_run().directory / name / "00000.safetensors").unlink()
    message = only_line(msfp("finetune", *OPTIONS), 1)
    assert re.fullmatch(
        rf"msfp-run/{name} lacks 1 of \d shards; run the same `msfp calibrate` again, .*", message
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--rank", 3),
            "begun with --rank 2, not 3; give --rank 2 to go on, or --restart to begin again",
        ),
        (("--steps", 9), "begun with --steps 4, not 9"),
        (("--mixed-precision", "bf16"), "begun with --mixed-precision no, not bf16"),
        (("--calls-per-update", 2), "begun with --calls-per-update 1, not 2"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_going_on_with_other_settings_names_the_difference(
    options: tuple[object, ...],
    message: str,
    fresh_run: FreshRun,
    msfp: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = fresh_run()
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        msfp("finetune", *OPTIONS)
    before = state(run).read_bytes()
    for resume in ((), ("--resume",)):
        assert message in only_line(msfp("finetune", *options, *resume), 1)
    assert state(run).read_bytes() == before


def test_processes_that_go_on_keep_the_number_of_calls(fresh_run: FreshRun) -> None:
    run = fresh_run()
    assert settings_of(run, Options({}).over, resume=None, processes=3) == (
        FinetuneRecipe(calls_per_update=3),
        False,
    )
    train(run, replace(FEW_UPDATES, steps=1, calls_per_update=2))
    assert settings_of(run, Options({}).over, resume=None, processes=3)[0].calls_per_update == 2
    assert settings_of(run, Options({}).over, resume=False, processes=3)[0].calls_per_update == 3


def test_fine_tuning_of_another_recording_is_refused(
    tiny: Callable[[str], Path], msfp: Invoke
) -> None:
    """Even where the formats do not depend on it."""
    options = (
        "--num-images",
        2,
        "--steps",
        2,
        "--activations",
        "none",
        "--lift",
        0,
        "--device",
        "cpu",
    )
    for seed in (0, 1):
        assert (
            msfp(
                "calibrate", tiny("DDIMPipeline"), *options, "--overwrite", "--seed", seed
            ).exit_code
            == 0
        )
        if not seed:
            assert msfp("finetune", *OPTIONS).exit_code == 0
    assert "began with another calibration" in only_line(msfp("finetune", *OPTIONS), 1)


def test_fine_tuning_of_another_calibration_is_explained_everywhere(
    fresh_run: FreshRun, msfp: Invoke
) -> None:
    run = fresh_run()
    train(run, replace(FEW_UPDATES, steps=1))
    calibration = Calibration.load(run.calibration)
    options = (
        "--num-images",
        6,
        "--steps",
        3,
        "--batch-size",
        2,
        "--formats",
        "signed",
        "--device",
        "cpu",
    )
    result = msfp("calibrate", calibration.source.model, *options, "--overwrite")
    assert (result.exit_code, result.stdout) == (0, "msfp-run/calibration\n"), result.stderr
    assert result.stderr.splitlines()[-1] == "next: msfp finetune --restart"
    for command in (("finetune",), ("finetune", "--resume"), ("export",)):
        message = only_line(msfp(*command), 1)
        assert message.endswith("began with another calibration; run `msfp finetune --restart`")
    assert "began with another calibration" in msfp("status").stdout
    assert msfp("export", "--calibrated").exit_code == 0
    assert msfp("finetune", "--restart", *OPTIONS).exit_code == 0
    assert (
        FinetuneState.load(state(run)).calibration
        == Calibration.load(run.calibration).identity()
        != calibration.identity()
    )


def test_rank_that_no_weight_has_is_said(fresh_run: FreshRun, msfp: Invoke) -> None:
    run = fresh_run()
    result = msfp("finetune", *OPTIONS, "--rank", 100_000)
    assert result.exit_code == 0
    tensors = FinetuneState.load(state(run)).tensors
    largest = max(
        len(tensor) for name, tensor in tensors.items() if "lora_a" in name and tensor.ndim
    )
    said = f"no weight has a rank of 100000; {largest} is the largest that is trained"
    assert said in result.stderr


def test_diverging_training_says_what_to_change(fresh_run: FreshRun, msfp: Invoke) -> None:
    run = fresh_run()
    message = only_error(msfp("finetune", *OPTIONS, "--learning-rate", 1e30), 1)
    assert "training diverged" in message
    assert "Give a --learning-rate a third of this one, and --restart" in message
    kept = FinetuneState.load(state(run))
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())
    assert msfp("export", "--device", "cpu").exit_code == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_names_the_options_that_help(
    error: Exception, fresh_run: FreshRun, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(trainer: Trainer, call: object) -> float:
        raise error

    fresh_run()
    monkeypatch.setattr(Trainer, "_backward", fail)
    message = only_error(msfp("finetune", *OPTIONS), 1)
    assert message == (
        "out of memory; give --gradient-checkpointing, "
        "or --restart with half --batch-size and twice "
        "--calls-per-update"
    )


def test_model_that_cannot_checkpoint_gradients_says_so(
    fresh_run: FreshRun, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh_run()
    monkeypatch.setattr(DiTTransformer2DModel, "_supports_gradient_checkpointing", False)
    message = only_line(msfp("finetune", *OPTIONS, "--gradient-checkpointing"), 2)
    assert (
        message
        == "DiTTransformer2DModel cannot checkpoint gradients; leave --gradient-checkpointing out"
    )
    assert not state(run).exists()


def test_loss_is_plain_where_the_denoising_factor_is_not_known(
    fresh_run: FreshRun, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh_run()
    monkeypatch.setattr(Recording, "factors", lambda recording, component: None)
    refused = only_line(msfp("finetune", *OPTIONS, "--loss", "dfa"), 1)
    assert refused.endswith("is not known; use --loss plain")
    done = msfp("finetune", *OPTIONS)
    assert done.exit_code == 0
    assert "so all timesteps weigh alike in the loss" in done.stderr
    (tuned,) = load_finetunings(run, Calibration.load(run.calibration)).values()
    assert tuned.recipe.loss == "plain"


def test_interrupted_command_says_how_far_it_got_and_how_to_go_on(
    fresh_run: FreshRun, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh_run()
    stop_after(2, monkeypatch)
    result = msfp("finetune", *OPTIONS)
    assert (result.exit_code, result.stdout) == (1, "msfp-run/finetune\n")
    stopped = FinetuneState.load(state(run)).step
    assert stopped in (2, 3)  # the wish is asked for before an update, and arrives in one
    assert f"transformer: stopped after {stopped} of 4 updates; all is kept" in result.stderr
    assert result.stderr.splitlines()[-1] == "next: msfp finetune"


def test_interrupted_process_keeps_its_state(fresh_run: FreshRun, tmp_path: Path) -> None:
    run = fresh_run()
    options = (
        "--steps",
        "100000",
        "--batch-size",
        "1",
        "--rank",
        "1",
        "--evaluate-every",
        "100000",
        "--device",
        "cpu",
    )
    command = [sys.executable, "-m", "msfp_cli", "finetune", *options]
    process = subprocess.Popen(
        command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("before held-out error") for line in lines)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=100)
    finally:
        process.kill()
        process.wait()
    step = FinetuneState.load(state(run)).step
    assert (process.returncode, output) == (1, "msfp-run/finetune\n"), errors
    assert 1 <= step < 100000
    assert (
        errors == f"transformer: stopped after {step} of 100000 updates; all is kept\n"
        "next: msfp finetune\n"
    )


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_first_interrupt_is_remembered_and_the_second_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_interrupt() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_handlers_are_restored_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="odd"), stop_on_interrupt():
        raise ValueError("odd")
    assert signal.getsignal(signal.SIGINT) == before


def test_one_of_several_processes_only_remembers_interrupts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with stop_on_interrupt() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert stop()


def test_other_threads_leave_signals_alone() -> None:
    seen, before = [], signal.getsignal(signal.SIGINT)

    def listen() -> None:
        with stop_on_interrupt() as stop:
            seen.append((stop(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
