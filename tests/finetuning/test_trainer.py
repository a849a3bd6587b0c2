"""A run of updates: how it stops and resumes, how processes share it; every setting counts."""

import itertools
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from conftest import FEW_UPDATES, Finetuned, Invoke, train
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.errors import RunError, TrainingError
from msfp_cli.finetuning.batches import Batches
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.result import FinetuneState
from msfp_cli.finetuning.student import Student
from msfp_cli.finetuning.task import TrainingTask
from msfp_cli.finetuning.trainer import SAVE_EVERY, Trainer
from msfp_cli.layers.clock import TRAINING_CLOCK
from msfp_cli.layers.prepare import prepare_
from msfp_cli.pipelines.denoiser import call_with, find_denoisers
from msfp_cli.pipelines.loading import load_pipeline
from msfp_cli.progress import NoProgress
from msfp_cli.recording.compare import OutputError, output_error
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

FreshRun = Callable[..., Run]

# Another value for each setting.
OTHERS: dict[str, object] = {
    "steps": 5,
    "batch_size": 1,
    "calls_per_update": 2,
    "hub_size": 1,
    "rank": 3,
    "init": "svd",
    "learning_rate": 0.02,
    "router_learning_rate": 0.02,
    "input_learning_rate": 0.0,
    "loss": "plain",
    "loss_power": 0.5,
    "timesteps": "uniform",
    "mixed_precision": "bf16",
    "seed": 1,
    "evaluate_every": 2,
}


def words_of(recipe: FinetuneRecipe) -> list[str]:
    """Return a recipe as it is typed for one process."""
    return [*recipe.words(), "--device", "cpu"]


def assert_same(one: FinetuneState, other: FinetuneState) -> None:
    """Compare two saved states bit for bit."""
    assert one.tensors.keys() == other.tensors.keys()
    assert [
        name for name, tensor in one.tensors.items() if not torch.equal(tensor, other.tensors[name])
    ] == []
    assert replace(one, tensors={}) == replace(other, tensors={})


def after(updates: int) -> Callable[[], bool]:
    """Return a function that asks to stop in the update of that number."""
    count = itertools.count(1)
    return lambda: next(count) >= updates


def saved_step(file: Path) -> int:
    """Return how far a saved state is, -1 if there is none."""
    return FinetuneState.load(file).step if file.exists() else -1


@pytest.fixture(scope="module")
def uninterrupted(
    calibrated: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory
) -> FinetuneState:
    """Fine-tune the class-conditional transformer in one go."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    for name in ("recording", "held-out", "calibration"):
        (directory / name).symlink_to(calibrated("DiTPipeline").directory / name)
    return train(Run(directory))


def test_first_measurement_is_of_the_calibrated_model_whatever_the_beginning(
    fresh_run: FreshRun,
) -> None:
    run = fresh_run()
    recipe = replace(FEW_UPDATES, steps=1, learning_rate=1e-6, init="svd")
    tuned = train(run, recipe)
    (error,) = Calibration.load(run.calibration).held_out_error.values()
    assert tuned.history[0].error == pytest.approx(error, rel=1e-3)
    best = tuned.tensors_of("best" if tuned.best.step == 0 else "now")
    updates = [tensor for name, tensor in best.items() if ".lora_b." in name]
    assert any(tensor.any() for tensor in updates) == (tuned.best.step > 0)


def test_every_kind_of_state_is_kept(uninterrupted: FinetuneState) -> None:
    names = uninterrupted.tensors_of("now").keys()
    for part in (
        "lora_a.2",
        "lora_b.2",
        "input_shift.2",
        "router.logits.weight",
        "router.hidden.bias",
    ):
        assert any(name.endswith(part) for name in names)
    assert uninterrupted.tensors_of("best").keys() == names
    chosen = uninterrupted.tensors_of("step").keys()
    assert chosen < names  # a member that no timestep has chosen has no moments yet
    for kind in ("exp_avg", "exp_avg_sq"):
        assert uninterrupted.tensors_of(kind).keys() == chosen
        assert all(
            tensor.any()
            for name, tensor in uninterrupted.tensors_of(kind).items()
            if "lora_b" in name
        )


@pytest.mark.parametrize("updates", [1, 3, 5])
def test_stopped_run_goes_on_to_where_an_uninterrupted_one_ends(
    updates: int, uninterrupted: FinetuneState, fresh_run: FreshRun
) -> None:
    run = fresh_run()
    stopped = train(run, stop=after(updates))
    assert (stopped.step, stopped.finished) == (updates, False)
    assert_same(train(run), uninterrupted)


def test_crashed_run_goes_on_from_what_it_saved_last(
    uninterrupted: FinetuneState, fresh_run: FreshRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, backward, count = fresh_run(), Trainer._backward, itertools.count()

    def crash_in_the_sixth(trainer: Trainer, call: object) -> float:
        if next(count) == 5:
            raise ValueError("pulled the plug")
        return backward(trainer, call)

    monkeypatch.setattr("msfp_cli.finetuning.trainer.SAVE_EVERY", 2)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="pulled the plug"):
        patch.setattr(Trainer, "_backward", crash_in_the_sixth)
        train(run)
    assert saved_step(run.finetuned("transformer")) == 4
    assert_same(train(run), uninterrupted)


class NobodyReads(NoProgress):
    """A pipe whose reader leaves when something is said of an update."""

    def log(self, line: str) -> None:
        if line.startswith("update"):
            raise BrokenPipeError


def test_measurement_is_saved_before_somebody_has_to_read_of_it(
    uninterrupted: FinetuneState, fresh_run: FreshRun
) -> None:
    run = fresh_run()
    with pytest.raises(BrokenPipeError):
        train(run, progress=NobodyReads())
    assert saved_step(run.finetuned("transformer")) == uninterrupted.history[1].step
    assert_same(train(run), uninterrupted)


def test_killed_process_goes_on_to_where_an_uninterrupted_run_ends(
    fresh_run: FreshRun, msfp: Invoke
) -> None:
    recipe = replace(FEW_UPDATES, steps=SAVE_EVERY + 20, evaluate_every=35, rank=1, batch_size=1)
    run = fresh_run()
    file = run.finetuned("transformer")
    process = subprocess.Popen([sys.executable, "-m", "msfp_cli", "finetune", *words_of(recipe)])
    while saved_step(file) < SAVE_EVERY:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert saved_step(file) == SAVE_EVERY
    assert msfp("finetune", "--device", "cpu").exit_code == 0
    assert_same(FinetuneState.load(file), train(fresh_run(name="whole"), recipe))


def test_two_processes_do_what_one_does_with_accumulation(
    fresh_run: FreshRun, calibrated: Callable[[str], Run], msfp: Invoke
) -> None:
    assert Recording(calibrated("DDIMPipeline").recording).num_shards >= 2
    two, one = fresh_run("DDIMPipeline"), fresh_run("DDIMPipeline", "one")
    recipe = replace(FEW_UPDATES, steps=4, evaluate_every=2, calls_per_update=2)
    words = [*words_of(recipe), "--num-processes", "2"]
    if not torch.accelerator.is_available():  # then nobody says on which device
        words.remove("--device")
        words.remove("cpu")
    command = [sys.executable, "-m", "msfp_cli", "finetune", "--run", "msfp-run", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "msfp-run/finetune\n"), done.stderr
    assert done.stderr.count("before held-out error") == 1
    assert msfp("finetune", "--run", "one", *words_of(recipe)).exit_code == 0
    shared, alone = (FinetuneState.load(run.finetuned("unet")) for run in (two, one))
    assert shared.recipe == alone.recipe == recipe
    for name, tensor in alone.tensors.items():
        torch.testing.assert_close(shared.tensors[name], tensor, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(alone.history, shared.history, strict=True):
        assert theirs.error == pytest.approx(ours.error, rel=1e-5)
        assert theirs.loss == (ours.loss and pytest.approx(ours.loss, rel=1e-5))


def test_accelerate_launches_the_command(
    uninterrupted: FinetuneState, fresh_run: FreshRun, msfp: Invoke
) -> None:
    run = fresh_run()
    launcher = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--cpu",
        "--num_processes",
        "1",
    ]
    command = [*launcher, "-m", "msfp_cli", "finetune", *words_of(FEW_UPDATES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "msfp-run/finetune\n"), done.stderr
    tuned = FinetuneState.load(run.finetuned("transformer"))
    for name, tensor in uninterrupted.tensors.items():
        torch.testing.assert_close(tuned.tensors[name], tensor, rtol=1e-4, atol=1e-6)


def test_every_setting_has_another_value_to_try() -> None:
    assert OTHERS.keys() == {field.name for field in fields(FinetuneRecipe)}


@pytest.mark.parametrize("name", OTHERS)
def test_every_setting_changes_the_result(
    name: str, uninterrupted: FinetuneState, fresh_run: FreshRun
) -> None:
    assert getattr(FEW_UPDATES, name) != OTHERS[name]
    tuned = train(fresh_run(), replace(FEW_UPDATES, **{name: OTHERS[name]}))
    assert all(tensor.isfinite().all() for tensor in tuned.tensors.values())
    if (
        name == "evaluate_every"
    ):  # measuring more often changes what is known, and not what is learned
        assert [evaluation.step for evaluation in tuned.history] == [0, 2, 4, 6]
        before, now = uninterrupted.tensors_of("now"), tuned.tensors_of("now")
        assert all(torch.equal(before[n], tensor) for n, tensor in now.items())
        return
    assert tuned.history[-1].error != uninterrupted.history[-1].error
    assert tuned.history[-1].loss != uninterrupted.history[-1].loss


def test_half_precision_trains_alike(fresh_run: FreshRun) -> None:
    # With a large rate two trainings part, however small the difference that they begin with.
    recipe = replace(FEW_UPDATES, learning_rate=0.01)
    plain = train(fresh_run(name="plain"), recipe)
    tuned = train(fresh_run(), replace(recipe, mixed_precision="bf16"))
    assert tuned.history[0] == plain.history[0]  # measured in full precision
    assert tuned.history[-1] != plain.history[-1]
    for ours, theirs in zip(plain.history[1:], tuned.history[1:], strict=True):
        assert theirs.loss == pytest.approx(ours.loss, rel=0.1)
        assert theirs.error == pytest.approx(ours.error, rel=0.05)


def test_gradient_checkpointing_changes_nothing_but_memory(
    fresh_run: FreshRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, seen = replace(FEW_UPDATES, steps=2, evaluate_every=2), []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "torch.utils.checkpoint.checkpoint",
        lambda *a, **k: (seen.append(a), checkpoint(*a, **k))[1],
    )
    plain = train(fresh_run("DDIMPipeline", "plain"), recipe)
    assert seen == []
    assert_same(train(fresh_run("DDIMPipeline"), recipe, gradient_checkpointing=True), plain)
    assert seen


def test_training_begins_at_the_calibrated_model(tiny_tuned: Finetuned) -> None:
    denoiser, calls = (
        load_calibrated(tiny_tuned.calibration, "cpu").unet,
        Recording(tiny_tuned.run.held_out),
    )
    error = output_error(denoiser, calls.calls("unet")).relative()
    assert error == pytest.approx(tiny_tuned.calibration.held_out_error["unet"])
    prepare_(denoiser, "simulated")  # training computes in floating point
    assert (
        tiny_tuned.tuned.history[0].error == output_error(denoiser, calls.calls("unet")).relative()
    )


def test_training_lowers_the_held_out_error(tiny_tuned: Finetuned) -> None:
    assert tiny_tuned.tuned.best.step > 0
    assert tiny_tuned.tuned.best.error < 0.99 * tiny_tuned.tuned.history[0].error


def test_only_hubs_inputs_and_router_learn(calibrated: Callable[[str], Run]) -> None:
    calibration = Calibration.load(calibrated("DiTPipeline").calibration)
    (denoiser,) = find_denoisers(load_pipeline(calibration.source, "cpu")).values()
    table, scales = calibration.table("transformer"), calibration.scales["transformer"]
    student = Student(denoiser, table, scales, FEW_UPDATES)
    learning = {id(p) for parameters in student.trainable().values() for p in parameters.values()}
    assert learning == {id(p) for p in student.parameters() if p.requires_grad}
    multiplying = [name for name in scales if not table[name].lookup]
    assert 0 < len(multiplying) < len(scales)  # its table of classes stays as calibrated
    assert len(student.trainable()["lora"]) == 2 * FEW_UPDATES.hub_size * len(multiplying)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_diverging_training_says_what_to_change_and_keeps_the_saved_state(
    poison: str, fresh_run: FreshRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, backward = fresh_run(), Trainer._backward
    kept = train(run, stop=after(2))

    def poisoned(trainer: Trainer, call: object) -> float:
        loss = backward(trainer, call)
        if poison == "loss":
            return float("nan")
        next(iter(trainer.parameters.values())).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(Trainer, "_backward", poisoned)
    with pytest.raises(
        TrainingError, match="diverged.* at update 3; .*a third of this one, and --restart"
    ) as caught:
        train(run)
    assert len(str(caught.value).splitlines()) == 1
    assert_same(FinetuneState.load(run.finetuned("transformer")), kept)


def test_best_state_is_on_disk_when_training_diverges(
    fresh_run: FreshRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far the next of the regular saves is."""
    run, errors = fresh_run(), iter((0.5, 0.3, 0.2))
    monkeypatch.setattr(OutputError, "relative", lambda error: next(errors))
    backward, count = Trainer._backward, itertools.count(1)
    monkeypatch.setattr(
        Trainer, "_backward", lambda t, call: backward(t, call) if next(count) < 6 else math.nan
    )
    with pytest.raises(TrainingError, match="diverged.* at update 6; what was best so far is kept"):
        train(run, replace(FEW_UPDATES, steps=20, evaluate_every=2))
    kept = FinetuneState.load(run.finetuned("transformer"))
    assert (kept.step, kept.best.step, kept.best.error) == (4, 4, 0.2)
    assert any(tensor.any() for name, tensor in kept.tensors_of("best").items() if "lora_b" in name)


def call_in_float16(
    denoiser: nn.Module, arguments: dict[str, Any], recorded: torch.Tensor
) -> torch.Tensor:
    """Call a denoiser with arguments of another type than was recorded."""
    halved = {
        k: v.half() if k != "timestep" and torch.is_tensor(v) else v for k, v in arguments.items()
    }
    return call_with(denoiser, halved, recorded)


def test_gradients_that_float16_cannot_hold_are_not_lost(
    calibrated: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each element of a large output has a small part of the loss."""
    run = calibrated("StableDiffusionPipeline")
    calibration = Calibration.load(run.calibration)
    recipe = replace(FEW_UPDATES, hub_size=1)
    gradients = []
    monkeypatch.setattr("msfp_cli.finetuning.student.call_with", call_in_float16)
    for part in (1, 1 / 64**2):
        denoiser = load_pipeline(replace(calibration.source, dtype="float16"), "cpu").unet
        student = Student(denoiser, calibration.table("unet"), calibration.scales["unet"], recipe)
        batches = Batches(
            Recording(run.recording), "unet", batch_size=2, calls_per_update=1, seed=0
        )
        task = TrainingTask(
            recipe=recipe,
            calibration="",
            clock=TRAINING_CLOCK,
            batches=batches,
            weights=dict.fromkeys(batches.timesteps, part),
            held_out=[],
        )
        trainer = Trainer(student, task, Path("state"), Accelerator(cpu=True))
        trainer.optimizer.step = trainer.optimizer.zero_grad = lambda: None
        trainer.update()
        gradients.append(
            torch.cat(
                [p.grad.flatten() for name, p in trainer.parameters.items() if ".lora_b." in name]
            )
        )
    torch.testing.assert_close(
        gradients[1] / part, gradients[0], rtol=0.05, atol=0.01 * float(gradients[0].abs().max())
    )


def test_evaluation_that_is_no_number_is_not_saved(
    fresh_run: FreshRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh_run()
    monkeypatch.setattr(OutputError, "relative", lambda error: float("nan"))
    with pytest.raises(
        TrainingError,
        match="held-out error is nan after 0 updates; calibrate again with --dtype float32",
    ):
        train(run)
    with pytest.raises(RunError, match="no fine-tuning in .*; run `msfp finetune` first"):
        FinetuneState.load(run.finetuned("transformer"))
