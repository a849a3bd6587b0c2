"""Inputs of 8 bits at some timesteps, through the whole chain."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import FEW_UPDATES, Chained, Invoke, finetune
from msfp_cli.calibration.quantize import move_weights_
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.errors import CheckpointError
from msfp_cli.files.documents import digest
from msfp_cli.finetuning.router import Router
from msfp_cli.finetuning.student import Student
from msfp_cli.layers.input_lift import InputLift, choose_timesteps
from msfp_cli.layers.prepare import prepare_
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.layers.routing import ROUTER, TABLE_SIZE, table_index
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.recording.compare import relative_error
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def lift_of(chained: Chained) -> InputLift:
    return chained.calibration.input_lifts["unet"]


def held_out(chained: Chained) -> list[DenoiserCall]:
    return list(Recording(chained.run.held_out).calls("unet"))


def lifting(schemes: dict[str, LayerScheme]) -> dict[str, LayerScheme]:
    return {name: each for name, each in schemes.items() if each.lifted_input is not None}


def test_timesteps_of_greatest_gain_are_chosen_within_the_budget() -> None:
    gains = {900.0: 3.0, 500.0: 1.0, 100.0: 5.0, 1.0: -1.0}
    assert choose_timesteps(gains, 0.0) == choose_timesteps(gains, 0.24) == []
    assert choose_timesteps(gains, 0.25) == [100.0]
    assert choose_timesteps(gains, 0.74) == [100.0, 900.0]
    assert choose_timesteps(gains, 1.0) == [100.0, 900.0, 500.0]  # no loss is chosen


def test_rows_between_timesteps_do_as_the_nearest() -> None:
    lift = InputLift(
        timesteps=(900.0, 500.0, 100.0), lifted=(True, False, True), gains=(0.4, 0.2, 0.4)
    )
    rows = lift.rows()
    assert len(rows) == TABLE_SIZE
    assert rows[:301].all() and rows[701:].all()  # 300 and 700 lie in the middle: the lower one
    assert not rows[301:701].any()
    assert [lift.at(timestep) for timestep in (0.0, 450.0, 1000.0)] == [True, False, True]


def test_one_of_three_timesteps_is_lifted_in_layers_of_the_default_bits(
    tiny_lifting: Chained,
) -> None:
    calibration = tiny_lifting.calibration
    lift = lift_of(tiny_lifting)
    assert lift.lifted.count(True) == 1
    assert lift.gains[lift.lifted.index(True)] == max(lift.gains)
    assert sum(lift.gains) == pytest.approx(1)
    for layer in calibration.layers["unet"].values():
        lifted = layer.scheme.lifted_input
        assert (lifted is not None) == (layer.reason == "default" and layer.kind != "embedding")
        if lifted is not None and layer.scheme.input is not None:
            assert lifted.format.bits == 8
            assert lifted.format.signed == layer.scheme.input.format.signed
    plain = replace(calibration, input_lifts={})
    assert 4 < plain.input_bits("unet") < calibration.input_bits("unet") < 8
    assert plain.identity() != calibration.identity()


def test_lifted_timesteps_have_less_error(tiny_lifting: Chained) -> None:
    calibration = tiny_lifting.calibration
    lift = lift_of(tiny_lifting)
    without = replace(lift, lifted=(False,) * len(lift.lifted))
    errors = []
    for each in (lift, without):
        unet = load_calibrated(replace(calibration, input_lifts={"unet": each}), "cpu").unet
        prepare_(unet, "reference")
        outputs = [replay(unet, call) for call in held_out(tiny_lifting)]
        errors.append(
            [
                relative_error(output, call.output)
                for output, call in zip(outputs, held_out(tiny_lifting), strict=True)
            ]
        )
    for with_lift, plain, call in zip(*errors, held_out(tiny_lifting), strict=True):
        if lift.at(call.timestep):
            assert with_lift < 0.8 * plain
        else:
            assert with_lift == plain


def test_calibration_comes_back_from_disk(tiny_lifting: Chained, tmp_path: Path) -> None:
    tiny_lifting.calibration.save(tmp_path / "calibration")
    loaded = Calibration.load(tmp_path / "calibration")
    assert loaded.input_lifts == tiny_lifting.calibration.input_lifts
    assert loaded.identity() == tiny_lifting.calibration.identity()


@pytest.mark.parametrize("kernel", ["reference", "cpu", "simulated"])
def test_both_loaders_run_as_calibrated(tiny_lifting: Chained, kernel: str) -> None:
    calls = held_out(tiny_lifting)
    outputs: list[list[Tensor]] = []
    for pipe in (
        load_calibrated(tiny_lifting.calibration, "cpu"),
        DiffusionPipeline.from_pretrained(tiny_lifting.export),
        MSFPPipeline.from_pretrained(tiny_lifting.export, device="cpu").pipe,
    ):
        prepare_(pipe.unet, kernel)
        outputs.append([replay(pipe.unet, call) for call in calls])
    for expected, *loaded in zip(*outputs, strict=True):
        assert all(torch.equal(output, expected) for output in loaded)


def test_table_takes_a_row_for_each_stretch_on_disk(tiny_lifting: Chained) -> None:
    tensors = load_file(tiny_lifting.export / WEIGHTS)
    table, starts = tensors[f"{ROUTER}.table"], tensors[f"{ROUTER}.starts"]
    rows = lift_of(tiny_lifting).rows()
    assert len(table) == len(starts) == 1 + int((rows[1:] != rows[:-1]).sum())
    unet = DiffusionPipeline.from_pretrained(tiny_lifting.export).unet
    whole = unet.get_submodule(ROUTER).get_buffer("table")
    assert torch.equal(whole, rows[:, None].expand_as(whole).to(torch.uint8))


@pytest.mark.parametrize("damage", ["not from 0", "not ascending", "beyond the table", "variant"])
def test_damaged_tables_are_refused(tiny_lifting: Chained, tmp_path: Path, damage: str) -> None:
    shutil.copytree(tiny_lifting.export, tmp_path / "export")
    path = tmp_path / "export" / WEIGHTS
    tensors = load_file(path)
    starts = tensors[f"{ROUTER}.starts"]
    if damage == "variant":
        tensors[f"{ROUTER}.table"][0, 0] = 2
    elif damage == "not from 0":
        starts[0] = 1
    else:
        starts[-1] = 0 if damage == "not ascending" else TABLE_SIZE
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(tensors, path, {**header, "msfp_digest": digest(tensors)})
    with pytest.raises(CheckpointError, match="damaged"):
        DiffusionPipeline.from_pretrained(tmp_path / "export")


def test_fine_tuned_layers_are_lifted_at_the_same_timesteps(
    tiny_lifting: Chained, tmp_path: Path
) -> None:
    shutil.copytree(tiny_lifting.run.directory, tmp_path / "run")
    tuned = finetune(Run(tmp_path / "run"), FEW_UPDATES)
    unet = DiffusionPipeline.from_pretrained(tuned.export).unet
    lift = lift_of(tiny_lifting)
    schemes = {name: layer.scheme for name, layer in quantized_layers(unet).items()}
    assert lifting(schemes).keys() == lifting(tuned.calibration.table("unet")).keys()
    table = unet.get_submodule(ROUTER).get_buffer("table")
    switching = [name for name in sorted(schemes) if schemes[name].variants > 1]
    for timestep in lift.timesteps:
        row = table[table_index(timestep)].tolist()
        for name, variant in zip(switching, row, strict=True):
            scheme = schemes[name]
            is_lifted = lift.at(timestep) and scheme.lifted_input is not None
            assert (variant >= scheme.hub) == is_lifted


def test_training_begins_at_what_the_calibration_computes(tiny_lifting: Chained) -> None:
    calibration = tiny_lifting.calibration
    quantized = load_calibrated(calibration, "cpu").unet
    prepare_(quantized, "simulated")
    unet = load_pipeline(calibration.source, "cpu").unet
    move_weights_(unet, calibration, "unet")
    lift = lift_of(tiny_lifting)
    table, scales = calibration.table("unet"), calibration.scales["unet"]
    student = Student(unet, table, scales, FEW_UPDATES, is_lifted_at=lift.at)
    for call in held_out(tiny_lifting):
        with torch.no_grad(), student.at([call.timestep]):
            output = student(call)
        torch.testing.assert_close(output, replay(quantized, call), rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_are_lifted_one_by_one(tiny_lifting: Chained) -> None:
    """Rows of several timesteps are trained together."""
    lift = lift_of(tiny_lifting)
    router = Router(2, 1, torch.Generator())
    lifted = [lift.at(timestep) for timestep in lift.timesteps]
    for choices in router(lift.timesteps, lifted=lifted):
        assert len(choices) == 2
        for choice in choices:
            assert {lifted[row] for row in choice.rows} == {choice.is_lifted}


def test_budget_of_less_than_a_step_is_said(
    msfp: Invoke, tiny_source: ModelSource, tmp_path: Path
) -> None:
    sizes = ("--num-images", 3, "--steps", 2, "--lift", 0, "--rounding", "nearest")
    run = tmp_path / "run"
    result = msfp("calibrate", tiny_source.model, "--run", run, *sizes, "--input-lift", 0.1)
    assert result.exit_code == 0
    assert "--input-lift 0.1 is less than one of 2 steps" in result.stderr
    assert not Calibration.load(run / "calibration").input_lifts
