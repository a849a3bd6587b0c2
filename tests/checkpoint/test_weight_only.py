"""Models are quantized while they load, and saved and loaded as any export."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import Chained
from msfp_cli import CalibrateRecipe, MSFPConfig, prepare_, quantize_
from msfp_cli.errors import CheckpointError, RunError, UsageError
from msfp_cli.formats.rounding import Grid, dequantize, per_channel
from msfp_cli.layers.replace import find_layers, quantized_layers
from tiny_pipelines import CALL_ARGUMENTS

DENOISERS = {
    "FluxPipeline": "transformer",
    "DDIMPipeline": "unet",
    "StableDiffusionPipeline": "unet",
    "DiTPipeline": "transformer",
}


@pytest.mark.parametrize("name", DENOISERS)
def test_weights_are_the_codes_of_those_that_were_read(
    name: str, tiny: Callable[[str], Path]
) -> None:
    place = {"pretrained_model_or_path": str(tiny(name)), "subfolder": DENOISERS[name]}
    full = find_layers(AutoModel.from_pretrained(**place))
    model = AutoModel.from_pretrained(**place, quantization_config=MSFPConfig(weights=6))
    layers = quantized_layers(model)
    assert layers
    for layer_name, layer in layers.items():
        scale = per_channel(layer.get_buffer("weight_scale"), layer.weight.ndim)
        values = dequantize(layer.codes(), Grid(layer.weight_format(), scale))
        exact = full[layer_name].weight
        reach = scale * layer.weight_format().largest
        assert ((values - exact).abs() <= torch.maximum(exact.abs() - reach, reach / 4)).all()
        assert layer.scheme.input is None


@pytest.mark.parametrize("name", DENOISERS)
def test_what_was_quantized_is_saved_and_loaded_again(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    mapping = PipelineQuantizationConfig(quant_mapping={DENOISERS[name]: MSFPConfig()})
    pipe = DiffusionPipeline.from_pretrained(tiny(name), quantization_config=mapping)
    pipe.save_pretrained(tmp_path, max_shard_size="30KB")
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert len(list((tmp_path / DENOISERS[name]).glob("*.safetensors"))) > 1
    pictures = [
        each(
            **CALL_ARGUMENTS[name], output_type="np", generator=torch.Generator().manual_seed(0)
        ).images
        for each in (pipe, again)
    ]
    assert (pictures[0] == pictures[1]).all()


def test_one_config_serves_several_models(tiny: Callable[[str], Path]) -> None:
    config = MSFPConfig(weights=5, keep=("*attn*:none",))
    for name in ("FluxPipeline", "DiTPipeline"):
        model = AutoModel.from_pretrained(
            str(tiny(name)), subfolder="transformer", quantization_config=config
        )
        assert not any("attn" in layer for layer in quantized_layers(model))
    assert config == MSFPConfig(weights=5, keep=("*attn*:none",))


def test_types_are_those_that_were_asked_for(tiny: Callable[[str], Path]) -> None:
    model = AutoModel.from_pretrained(
        str(tiny("FluxPipeline")),
        subfolder="transformer",
        quantization_config=MSFPConfig(),
        torch_dtype=torch.bfloat16,
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    layer = next(iter(quantized_layers(model).values()))
    assert layer.weight.dtype == torch.bfloat16
    assert layer.get_buffer("weight_scale").dtype == torch.float32


def damage(directory: Path, copied: Callable[..., Path], **changes: torch.Tensor | None) -> Path:
    """Copy a denoiser and change tensors in its file; None removes one."""
    denoiser = copied(directory / "unet")
    (path,) = denoiser.glob("*.safetensors")
    tensors = {**load_file(path), **changes}
    save_file({name: each for name, each in tensors.items() if each is not None}, path)
    return denoiser


WEIGHT = "mid_block.resnets.0.conv1.weight"


def test_weight_that_is_missing_is_named(
    tiny: Callable[[str], Path], copied: Callable[..., Path]
) -> None:
    denoiser = damage(tiny("DDIMPipeline"), copied, **{WEIGHT: None})
    with pytest.raises(CheckpointError, match=f"lack {WEIGHT}"):
        AutoModel.from_pretrained(str(denoiser), quantization_config=MSFPConfig())


@pytest.mark.parametrize("name", [WEIGHT, WEIGHT.replace("weight", "bias")])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tensor_that_is_not_finite_is_named(
    value: float, name: str, tiny: Callable[[str], Path], copied: Callable[..., Path]
) -> None:
    (path,) = (tiny("DDIMPipeline") / "unet").glob("*.safetensors")
    tensor = load_file(path)[name]
    tensor.view(-1)[-1] = value
    denoiser = damage(tiny("DDIMPipeline"), copied, **{name: tensor})
    with pytest.raises(CheckpointError, match=f"{name} holds a NaN"):
        AutoModel.from_pretrained(str(denoiser), quantization_config=MSFPConfig())


def test_rules_that_leave_no_layer_are_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="no layer to quantize"):
        AutoModel.from_pretrained(
            str(tiny("DDIMPipeline") / "unet"), quantization_config=MSFPConfig(keep=("*:none",))
        )


def test_model_in_memory_becomes_what_is_quantized_while_it_loads(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    name = "FluxPipeline"
    parts = ("transformer", "text_encoder", "text_encoder_2")
    pipe = DiffusionPipeline.from_pretrained(tiny(name))
    for part in parts:
        assert quantize_(getattr(pipe, part), MSFPConfig()) is getattr(pipe, part)
    mapping = PipelineQuantizationConfig(quant_mapping={part: MSFPConfig() for part in parts})
    loaded = DiffusionPipeline.from_pretrained(tiny(name), quantization_config=mapping)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    for part in parts:
        expected = getattr(loaded, part).state_dict()
        for each in (pipe, again):
            state = getattr(each, part).state_dict()
            assert state.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())


def test_module_of_torch_is_quantized_and_twice_is_refused() -> None:
    module = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    quantize_(module, MSFPConfig(weights=8, keep=("0:none",)))
    assert quantized_layers(module).keys() == {"2"}
    with pytest.raises(UsageError, match="quantized already"):
        quantize_(module, MSFPConfig())
    with pytest.raises(UsageError):
        quantize_(nn.Linear(8, 8), MSFPConfig())  # which could not be replaced in itself


@pytest.mark.parametrize("act", [prepare_, partial(quantize_, how=MSFPConfig())])
def test_pipeline_in_the_place_of_a_network_is_refused(
    tiny: Callable[[str], Path], act: Callable[[Any], object]
) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny("DDIMPipeline"))
    with pytest.raises(UsageError, match=r"DDIMPipeline is not a network; .* pipe\.unet$"):
        act(pipe)
    with pytest.raises(UsageError, match=r"dict is not a network; .* pipe\.transformer$"):
        act({})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            MSFPConfig(weights="4"),
            r"MSFPConfig\(weights='4'\) does not say a number of bits; give one",
        ),
        (
            MSFPConfig(weights=4.0),
            r"MSFPConfig\(weights=4.0\) does not say a number of bits; give one",
        ),
        (
            MSFPConfig(weights=None),
            r"MSFPConfig\(weights=None\) does not say a number of bits; give one",
        ),
        (MSFPConfig(weights=1), "must be at least 2, got 1"),
        (
            MSFPConfig(keep="*attn*:8"),
            r"MSFPConfig\(keep='\*attn\*:8'\) is not a list of rules; give",
        ),
        (MSFPConfig(keep=None), r"MSFPConfig\(keep=None\) is not a list of rules; give"),
        (MSFPConfig(keep=[4]), r"MSFPConfig\(keep=\[4\]\) is not a list of rules; give"),
        ({"weights": 4}, r"a dict does not say how to quantize; give MSFPConfig\(weights=4\)"),
        (CalibrateRecipe(), "a CalibrateRecipe does not say how to quantize; give MSFPConfig"),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_wrong_way_to_quantize_is_one_helpful_line(
    how: object, message: str, part: str, tiny: Callable[[str], Path]
) -> None:
    model = AutoModel.from_pretrained(str(tiny("StableDiffusionPipeline")), subfolder=part)
    with pytest.raises(UsageError, match=message):
        quantize_(model, how)
    assert not quantized_layers(model)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_rule_that_matches_no_layer_is_warned_of(part: str, tiny: Callable[[str], Path]) -> None:
    keep = ["*nowhere*:8", "*fc1*:8", "*attn1*:8"]
    place = {"subfolder": part, "quantization_config": MSFPConfig(keep=keep)}
    with pytest.warns(UserWarning, match="keep matches no layer of") as said:
        model = AutoModel.from_pretrained(str(tiny("StableDiffusionPipeline")), **place)
    assert quantized_layers(model)
    idle = {"unet": ["*nowhere*:8", "*fc1*:8"], "text_encoder": ["*nowhere*:8", "*attn1*:8"]}[part]
    assert [str(each.message).split(": ")[1] for each in said] == list(map(repr, idle))


def test_calibrated_model_in_memory_is_saved_and_loaded_again(
    tiny_chained: Chained, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    calibration = tiny_chained.calibration
    pipe = DiffusionPipeline.from_pretrained(tiny("DDIMPipeline"))
    with pytest.raises(UsageError, match="no component 'transformer'; give one of 'unet'"):
        quantize_(pipe.unet, calibration, "transformer")
    assert quantize_(pipe.unet, calibration, "unet") is pipe.unet
    with pytest.raises(UsageError, match="quantized already"):
        quantize_(pipe.unet, calibration, "unet")
    pipe.save_pretrained(tmp_path)
    expected = DiffusionPipeline.from_pretrained(tiny_chained.export).unet.state_dict()
    state = DiffusionPipeline.from_pretrained(tmp_path).unet.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())


def test_model_of_other_weights_than_the_calibrated_is_refused(
    tiny_chained: Chained, tiny: Callable[[str], Path]
) -> None:
    unet = DiffusionPipeline.from_pretrained(tiny("DDIMPipeline")).unet
    unet.conv_in.weight.data += 1
    with pytest.raises(RunError, match="its unet is another one"):
        quantize_(unet, tiny_chained.calibration, "unet")
