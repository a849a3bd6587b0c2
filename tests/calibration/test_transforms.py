"""Rotated inputs and token scales through the whole chain, from calibration to what is loaded."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from conftest import CLEAR_GAIN, Chained, Invoke, train
from msfp_cli.calibration.layer_search import (
    is_mostly_linear,
    search_layer,
    transforms_of,
    views_of,
)
from msfp_cli.calibration.observe import LayerObservation
from msfp_cli.calibration.quantize import move_weights_
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.calibration.sensitivity import quantize_input
from msfp_cli.checkpoint.export import export_run, load_calibrated
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.errors import CheckpointError, UsageError
from msfp_cli.finetuning.student import Student
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid
from msfp_cli.formats.transform import InputTransform
from msfp_cli.layers.prepare import prepare_
from msfp_cli.layers.quantized import Quantized
from msfp_cli.layers.replace import find_layers, quantized_layers
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.pipelines.loading import load_pipeline
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

BOTH = CalibrateRecipe(rotate="hadamard", input_scales="token")
CONFIG = Path("unet") / "config.json"


def transformed(pipe: DiffusionPipeline) -> dict[str, Quantized]:
    layers = quantized_layers(pipe.unet)
    return {name: each for name, each in layers.items() if not each.scheme.transform.is_identity}


def held_out(chained: Chained) -> list[DenoiserCall]:
    return list(Recording(chained.run.held_out).calls("unet"))


@pytest.mark.parametrize(
    ("recipe", "layer", "expected"),
    [
        (CalibrateRecipe(), nn.Linear(192, 4), [(0, False)]),
        (replace(BOTH, input_scales="tensor"), nn.Linear(192, 4), [(0, False), (64, False)]),
        (replace(BOTH, rotate="none"), nn.Linear(192, 4), [(0, False), (0, True)]),
        (BOTH, nn.Linear(192, 4), [(0, False), (64, False), (0, True), (64, True)]),
        (BOTH, nn.Linear(100, 4), [(0, False), (0, True)]),
        (BOTH, nn.Conv2d(64, 4, 1), [(0, False)]),
    ],
    ids=["not settled", "rotation", "token scales", "both", "odd width", "convolution"],
)
def test_recipe_says_what_may_be_done_to_an_input(
    recipe: CalibrateRecipe, layer: nn.Module, expected: list[tuple[int, bool]]
) -> None:
    found = transforms_of(layer, recipe)
    assert [(each.rotation, each.token_scales) for each in found] == expected
    x = torch.randn(2, 3, 5, layer.weight.shape[1])
    assert len(views_of(layer, x, recipe)) == (1 if len(expected) == 1 else 4)


@pytest.mark.parametrize(
    ("recipe", "is_transformed"),
    [
        (CalibrateRecipe(), True),
        (CalibrateRecipe(activations=6), True),
        (CalibrateRecipe(activations=8), False),
        (CalibrateRecipe(activations=None), False),
        (CalibrateRecipe(weights=None), False),
        (CalibrateRecipe(**CalibrateRecipe.PRESETS["paper"]), False),
    ],
    ids=["default", "6 bits", "8 bits", "floating point", "only inputs", "paper"],
)
def test_inputs_of_few_bits_are_transformed_by_default_where_layers_are_linear(
    recipe: CalibrateRecipe, is_transformed: bool
) -> None:
    mostly, hardly = (recipe.settled(mostly_linear=each) for each in (True, False))
    expected = ("hadamard", "token") if is_transformed else ("none", "tensor")
    assert (mostly.rotate, mostly.input_scales) == expected
    assert (hardly.rotate, hardly.input_scales) == ("none", "tensor")


def test_what_is_asked_for_stays_whatever_the_layers_are() -> None:
    asked = CalibrateRecipe(activations=8, rotate="hadamard", input_scales="token")
    assert asked.settled(mostly_linear=False) == asked
    refused = CalibrateRecipe(rotate="none", input_scales="tensor")
    assert refused.settled(mostly_linear=True) == refused


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([nn.Linear(8, 9), nn.Conv2d(8, 1, 3)], False),  # 72 weights of both kinds
        ([nn.Linear(8, 10), nn.Conv2d(8, 1, 3)], True),
        ([nn.Embedding(9, 9)], False),
    ],
)
def test_model_is_mostly_linear_where_more_than_half_of_its_weights_are(
    layers: list[nn.Module], expected: bool
) -> None:
    assert is_mostly_linear(layers) == expected


@pytest.mark.parametrize("change", [{"weights": None}, {"activations": None}])
@pytest.mark.parametrize("option", [{"rotate": "hadamard"}, {"input_scales": "token"}])
def test_inputs_are_not_transformed_in_floating_point(
    change: dict[str, None], option: dict[str, str]
) -> None:
    message = f"{next(iter(option.values()))} is for layers whose weights and inputs are quantized"
    with pytest.raises(UsageError, match=message):
        CalibrateRecipe(**change, **option)
    CalibrateRecipe(**change)  # as the message says
    CalibrateRecipe(**option)


def test_linear_layers_are_transformed_and_others_are_not(
    prompted_transformed: Chained,
) -> None:
    calibration = prompted_transformed.calibration
    layers = calibration.layers["unet"].values()
    for each in layers:
        can_be = each.kind == "linear" and each.scheme.input is not None
        assert each.scheme.transform.is_identity != can_be
    words = calibration.transforms_in_words("unet")
    rotated = sum(each.scheme.transform.rotation > 0 for each in layers)
    assert words.startswith(f"{rotated} inputs are rotated")


def outliers(x: Tensor) -> Tensor:
    return x * torch.where(torch.arange(x.shape[-1]) % 8 == 5, 10.0, 1.0)


def spread(x: Tensor) -> Tensor:
    return x * torch.logspace(-1, 1, len(x))[:, None]


def test_input_of_float16_does_not_overflow_while_a_layer_is_quantized_alone() -> None:
    fmt = FloatFormat.parse("e2m1")
    transform = InputTransform(rotation=64, token_scales=True)
    scheme = LayerScheme(weight=fmt, input=Grid(fmt, 1 / 12), transform=transform)
    x = torch.full((2, 64), 3e4).half()
    (rounded,), _ = quantize_input(scheme, nn.Linear(64, 4), (x,), {})
    torch.testing.assert_close(rounded, x)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (lambda x: x, (0, False)),
        (spread, (0, True)),
        (lambda x: outliers(spread(x)), (128, True)),
    ],
    ids=["alike", "tokens of many sizes", "outliers as well"],
)
def test_what_lowers_the_error_of_the_input_is_chosen(
    inputs: Callable[[Tensor], Tensor], expected: tuple[int, bool]
) -> None:
    layer = nn.Linear(1024, 4)
    x = inputs(torch.randn(40, 1024, generator=torch.Generator().manual_seed(0)))
    views = views_of(layer, x, BOTH).flatten(1)
    bounds = {"minimum": float(x.min()), "maximum": float(x.max())}
    observation = LayerObservation(num_calls=1, samples=[views], **bounds)
    recipe = replace(BOTH, formats="signed")
    found = search_layer("layer", layer, observation, recipe).choice.scheme.transform
    assert (found.rotation, found.token_scales) == expected


def test_calibration_comes_back_from_disk(prompted_transformed: Chained, tmp_path: Path) -> None:
    calibration = prompted_transformed.calibration
    calibration.save(tmp_path / "calibration")
    loaded = Calibration.load(tmp_path / "calibration")
    assert loaded.table("unet") == calibration.table("unet")
    assert loaded.identity() == calibration.identity()


@pytest.mark.parametrize("kernel", ["reference", "cpu", "simulated"])
def test_both_loaders_run_as_calibrated(prompted_transformed: Chained, kernel: str) -> None:
    calls = held_out(prompted_transformed)
    outputs: list[list[Tensor]] = []
    for pipe in (
        load_calibrated(prompted_transformed.calibration, "cpu"),
        DiffusionPipeline.from_pretrained(prompted_transformed.export),
        MSFPPipeline.from_pretrained(prompted_transformed.export, device="cpu").pipe,
    ):
        assert transformed(pipe)
        prepare_(pipe.unet, kernel)
        outputs.append([replay(copy.deepcopy(pipe.unet), call) for call in calls])
    for expected, *loaded in zip(*outputs, strict=True):
        assert all(torch.equal(output, expected) for output in loaded)


def test_kernels_agree_bit_for_bit(prompted_transformed: Chained) -> None:
    (call, *_) = held_out(prompted_transformed)
    outputs = []
    for kernel in ("reference", "cpu"):
        pipe = DiffusionPipeline.from_pretrained(prompted_transformed.export)
        prepare_(pipe.unet, kernel)
        outputs.append(replay(pipe.unet, call))
    assert torch.equal(*outputs)


def test_weights_read_in_their_own_basis(prompted_transformed: Chained) -> None:
    """They are as near to the float weights as codes of their bits are."""
    floats = find_layers(load_pipeline(prompted_transformed.calibration.source, "cpu").unet)
    layers = transformed(DiffusionPipeline.from_pretrained(prompted_transformed.export))
    for name, layer in layers.items():
        exact = floats[name].weight.detach()
        error = float((layer.weight - exact).square().sum() / exact.square().sum())
        assert error < 0.1, name


def test_codes_are_those_of_the_calibration(prompted_transformed: Chained) -> None:
    calibration = prompted_transformed.calibration
    layers = transformed(DiffusionPipeline.from_pretrained(prompted_transformed.export))
    compensated = calibration.codes["unet"].keys() & layers.keys()
    assert compensated
    for name in compensated:
        assert torch.equal(layers[name].packed_codes()[0], calibration.codes["unet"][name]), name


def test_training_begins_at_what_the_calibration_computes(prompted_transformed: Chained) -> None:
    calibration = prompted_transformed.calibration
    quantized = load_calibrated(calibration, "cpu").unet
    prepare_(quantized, "simulated")
    unet = load_pipeline(calibration.source, "cpu").unet
    move_weights_(unet, calibration, "unet")
    student = Student(unet, calibration.table("unet"), calibration.scales["unet"], CLEAR_GAIN)
    for call in held_out(prompted_transformed):
        with torch.no_grad(), student.at([call.timestep]):
            output = student(call)
        torch.testing.assert_close(output, replay(quantized, call), rtol=1e-4, atol=1e-4)


def test_fine_tuning_gains_and_goes_on_where_it_was_stopped(
    prompted_transformed: Chained, tmp_path: Path
) -> None:
    run = Run(shutil.copytree(prompted_transformed.run.directory, tmp_path / "run"))
    # A few updates gain enough to be told from noise where weights are rounded to the nearest.
    calibration = replace(prompted_transformed.calibration, codes={})
    calibration.save(run.calibration, overwrite=True)
    recipe = replace(CLEAR_GAIN, learning_rate=0.02)
    assert not train(run, recipe, stop=lambda: True).finished
    tuned = train(run, recipe)
    assert tuned.finished and tuned.best.error < tuned.history[0].error
    export = Path(export_run(run, overwrite=True).directory)
    expected = transformed(load_calibrated(calibration, "cpu", {"unet": tuned}))
    exported = transformed(DiffusionPipeline.from_pretrained(export))
    assert exported.keys() == expected.keys()
    for name, layer in expected.items():
        assert torch.equal(exported[name].packed_codes(), layer.packed_codes()), name


def test_earlier_versions_refuse_the_export(
    prompted_transformed: Chained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msfp_cli.checkpoint.quantizer.NEWEST_SCHEMA", 2)
    with pytest.raises(CheckpointError, match="layout 3, this msfp reads up to 2"):
        DiffusionPipeline.from_pretrained(prompted_transformed.export)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotation": 128}, "is of another kind"),
        ({"rotation": 24}, "blocks of 24 channels cannot be rotated"),
        ({"input": None}, "can be transformed"),
    ],
    ids=["too wide", "not a power of two", "input in floating point"],
)
def test_damaged_transforms_are_refused(
    prompted_transformed: Chained, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    shutil.copytree(prompted_transformed.export, tmp_path / "export")
    path = tmp_path / "export" / CONFIG
    document = json.loads(path.read_text())
    layers = document["quantization_config"]["layers"]
    name = next(name for name, entry in layers.items() if "rotation" in entry)
    layers[name].update(change)
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        MSFPPipeline.from_pretrained(tmp_path / "export", device="cpu", check=False)


def test_rotation_of_a_convolution_is_refused(
    prompted_transformed: Chained, tmp_path: Path
) -> None:
    calibration = prompted_transformed.calibration
    layers = dict(calibration.layers["unet"])
    name = next(
        name for name, each in layers.items() if each.kind == "conv2d" and each.scheme.input
    )
    scheme = replace(layers[name].scheme, transform=InputTransform(token_scales=True))
    layers[name] = replace(layers[name], scheme=scheme)
    with pytest.raises(CheckpointError, match=f"layer {name!r} is of another kind"):
        load_calibrated(replace(calibration, layers={"unet": layers}), "cpu")


def test_command_says_what_is_transformed(
    msfp: Invoke, quick: None, prompted_transformed: Chained
) -> None:
    result = msfp("calibrate", "--rotate", "hadamard", "--input-scales", "token")
    assert result.exit_code == 0, result.stderr
    assert "inputs are rotated" in result.stderr
    assert "inputs are rotated" in msfp("status").stdout


def test_transformer_is_transformed_by_default(fresh_run: Callable[..., Run]) -> None:
    calibration = Calibration.load(fresh_run("StableDiffusion3Pipeline").calibration)
    assert calibration.recipe.rotate == calibration.recipe.input_scales == "auto"
    transforms = [each.scheme.transform for each in calibration.layers["transformer"].values()]
    assert any(each.rotation for each in transforms)
    assert any(each.token_scales for each in transforms)


def test_unet_of_convolutions_is_not_transformed_by_default(prompted_chained: Chained) -> None:
    layers = prompted_chained.calibration.layers["unet"].values()
    assert all(each.scheme.transform.is_identity for each in layers)
