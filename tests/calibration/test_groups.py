"""Weights in groups through the whole chain: calibrated, fine-tuned, exported, loaded."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import FEW_UPDATES, Chained, finetune
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.errors import CheckpointError
from msfp_cli.files.documents import digest
from msfp_cli.finetuning.student import Student
from msfp_cli.formats.multipliers import largest_multiplier
from msfp_cli.layers.prepare import prepare_
from msfp_cli.layers.quantized import Quantized
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.pipelines.denoiser import replay
from msfp_cli.pipelines.loading import load_pipeline
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def grouped_layers(pipe: DiffusionPipeline) -> dict[str, Quantized]:
    layers = quantized_layers(pipe.unet)
    return {name: layer for name, layer in layers.items() if layer.scheme.weight_groups}


def test_exports_hold_the_multipliers_in_four_bits(tiny_grouped: Chained) -> None:
    tensors = load_file(tiny_grouped.export / WEIGHTS)
    multipliers = tiny_grouped.calibration.multipliers["unet"]
    for name, own in multipliers.items():
        assert tensors[f"{name}.weight_multipliers"].nbytes == (own.numel() + 1) // 2
    holders = {name for name in tensors if name.endswith(".weight_multipliers")}
    assert len(holders) == len(multipliers) > 0


def test_both_loaders_restore_every_integer(tiny_grouped: Chained) -> None:
    expected = grouped_layers(load_calibrated(tiny_grouped.calibration, "cpu"))
    stock = grouped_layers(DiffusionPipeline.from_pretrained(tiny_grouped.export))
    ours = grouped_layers(MSFPPipeline.from_pretrained(tiny_grouped.export, device="cpu").pipe)
    assert expected.keys() == stock.keys() == ours.keys() != set()
    for name, layer in expected.items():
        assert int(layer.integers().abs().max()) > layer.weight_format().largest
        assert torch.equal(stock[name].integers(), layer.integers())
        assert torch.equal(ours[name].integers(), layer.integers())


def test_kernels_agree_bit_for_bit(tiny_grouped: Chained) -> None:
    (call, *_) = Recording(tiny_grouped.run.held_out).calls("unet")
    outputs = []
    for kernel in ("reference", "cpu"):
        pipe = DiffusionPipeline.from_pretrained(tiny_grouped.export)
        prepare_(pipe.unet, kernel)
        outputs.append(replay(pipe.unet, call))
    assert torch.equal(*outputs)


def test_fine_tuned_groups_are_exported_as_they_were_trained(
    tiny_grouped: Chained, tmp_path: Path
) -> None:
    shutil.copytree(tiny_grouped.run.directory, tmp_path / "run")
    tuned = finetune(Run(tmp_path / "run"), FEW_UPDATES)
    exported = grouped_layers(DiffusionPipeline.from_pretrained(tuned.export))
    expected = grouped_layers(load_calibrated(tuned.calibration, "cpu", {"unet": tuned.tuned}))
    assert exported.keys() == tiny_grouped.calibration.multipliers["unet"].keys()
    for name, layer in expected.items():
        for member in range(layer.scheme.hub):
            assert torch.equal(exported[name].integers(member), layer.integers(member))


def test_a_student_computes_what_its_export_will(tiny_grouped: Chained) -> None:
    calibration = tiny_grouped.calibration
    unet = load_pipeline(calibration.source, "cpu").unet
    table = calibration.table("unet")
    multipliers = calibration.multipliers["unet"]
    student = Student(unet, table, calibration.scales["unet"], FEW_UPDATES, multipliers)
    nearest = Calibration(**{**vars(calibration), "codes": {}})
    exported = grouped_layers(load_calibrated(nearest, "cpu"))
    for name, layer in exported.items():
        assert torch.equal(student.layers[name].rounded_weight(0), layer.float_weight()), name


@pytest.mark.parametrize("damage", ["too large", "missing"])
def test_wrong_multipliers_are_refused(tiny_grouped: Chained, tmp_path: Path, damage: str) -> None:
    shutil.copytree(tiny_grouped.export, tmp_path / "export")
    path = tmp_path / "export" / WEIGHTS
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    layers = {
        name: layer.scheme.weight
        for name, layer in tiny_grouped.calibration.layers["unet"].items()
        if layer.scheme.weight_groups
    }
    name = next(name for name, fmt in layers.items() if largest_multiplier(fmt) < 16)
    name = f"{name}.weight_multipliers"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name].fill_(255)  # all are 16
    save_file(tensors, path, {**header, "msfp_digest": digest(tensors)})
    with pytest.raises(CheckpointError, match="multiplier"):
        MSFPPipeline.from_pretrained(tmp_path / "export", device="cpu", check=False)
