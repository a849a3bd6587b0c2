"""What a calibration says before it begins."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import QUICK
from msfp_cli.calibration.denoiser_search import calls_to_measure
from msfp_cli.calibration.estimate import Estimate, check_layers, estimate
from msfp_cli.errors import UsageError
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.progress import SILENT
from msfp_cli.recording import compare
from msfp_cli.recording.recipe import RecordOptions
from msfp_cli.recording.record import record_recipes
from tiny_pipelines import build_tiny, with_controlnet

OPTIONS = RecordOptions(num_images=20, num_inference_steps=3, batch_size=2)


def estimated(source: ModelSource, **settings: object) -> Estimate:
    pipe = load_pipeline(source, "cpu")
    return estimate(pipe, *record_recipes(pipe, source, OPTIONS), replace(QUICK, **settings), None)


def test_stages_that_are_left_out_take_no_time(tiny_source: ModelSource) -> None:
    every = estimated(tiny_source, input_lift=0.5).seconds
    without = estimated(tiny_source, lift=0.0, rounding="nearest").seconds
    assert all(seconds > 0 for seconds in every.values())
    left_out = {stage for stage, seconds in without.items() if seconds == 0}
    assert left_out == {"measuring layers alone", "measuring timesteps", "rounding"}


def test_layers_of_a_controlnet_take_no_time(tiny: Callable[[str], Path]) -> None:
    source = ModelSource(model=str(tiny("StableDiffusionPipeline")))
    pipe = load_pipeline(source, "cpu")
    options = replace(OPTIONS, num_images=2)
    seconds = [
        estimate(each, *record_recipes(each, source, options), QUICK, None).seconds["searching"]
        for each in (pipe, with_controlnet(pipe))
    ]
    assert seconds[0] == seconds[1]


def test_layers_of_large_models_are_measured_on_one_call_of_one_row(
    tiny_source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = load_pipeline(tiny_source, "cpu").unet
    recipe = replace(QUICK, sensitivity_calls=4)
    small = calls_to_measure(recipe, unet, rows=4)
    monkeypatch.setattr(compare, "LARGE", 1)
    assert small == 16 * calls_to_measure(recipe, unet, rows=4)


def test_recordings_take_their_samples_and_outputs_on_disk(tiny_source: ModelSource) -> None:
    pipe = load_pipeline(tiny_source, "cpu")
    shape = (pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
    floats = 20 * 3 * 2 * math.prod(shape)
    assert estimated(tiny_source).disk == pytest.approx(4 * floats, rel=0.05)


@pytest.mark.parametrize(
    ("longest", "advice"),
    [
        ("recording", "--num-images"),
        ("measuring layers alone", "--lift 0"),
        ("rounding", "nearest"),
    ],
)
def test_a_long_one_names_the_option_that_lowers_it(longest: str, advice: str) -> None:
    seconds = {"recording": 60.0, "measuring layers alone": 60.0, "rounding": 60.0, longest: 8000.0}
    found = Estimate(seconds=seconds, disk=2**31, memory=2**34, max_memory=None)
    total, most, sizes = found.lines()
    assert total.startswith("this will take about 2.3 h: ")
    assert most.startswith(f"most of it is {longest}: ") and advice in most
    assert sizes == (
        "recordings take about 2.0 GiB on disk; memory 16.0 GiB; --max-memory bounds it"
    )


@pytest.mark.parametrize("seconds", [1.0, 8000.0])
def test_what_a_bound_cannot_hold_is_said(seconds: float) -> None:
    options = {"seconds": {"recording": seconds}, "disk": 1, "memory": 2**31}
    first, *_ = Estimate(**options, max_memory=500_000_000).lines()
    assert first == (
        "--max-memory 500000000 is too little: calling the model and rounding one layer at a time "
        "takes about 2.0 GiB"
    )
    assert not any("too little" in line for line in Estimate(**options, max_memory=2**31).lines())


def test_a_short_one_says_nothing() -> None:
    found = Estimate(seconds={"recording": 100.0}, disk=1, memory=1, max_memory=None)
    assert list(found.lines()) == []


@pytest.mark.parametrize("how", ["in place", "disabled", "fused"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("model", "part", "ending"),
    [
        ("StableDiffusionXLPipeline", "unet", "attn2.to_q"),
        ("StableDiffusionXLPipeline", "text_encoder_2", "self_attn.q_proj"),
        ("FluxPipeline", "transformer", "attn.to_q"),
        ("FluxPipeline", "text_encoder", "self_attn.q_proj"),
    ],
)
def test_adapters_of_any_part_are_refused_until_they_are_fused_and_gone(
    model: str, part: str, ending: str, dora: bool, how: str
) -> None:
    peft = pytest.importorskip("peft")
    pipe = build_tiny(model)
    check_layers(pipe, QUICK, SILENT)
    network = getattr(pipe, part)
    name = next(name for name, _ in network.named_modules() if name.endswith(ending))
    before = network.get_submodule(name).weight.detach().clone()
    config = peft.LoraConfig(target_modules=[name], init_lora_weights=False, use_dora=dora)
    network.add_adapter(config, "style")
    if how == "disabled":
        pipe.disable_lora()
    if how == "fused":
        pipe.fuse_lora(components=[part])
    told = rf"^{part} has adapters \(style\); call `pipe.fuse_lora\(\)` and `pipe.unload_lora_w"
    with pytest.raises(UsageError, match=told):
        check_layers(pipe, QUICK, SILENT)
    pipe.unload_lora_weights()
    check_layers(pipe, QUICK, SILENT)
    is_fused = not torch.equal(network.get_submodule(name).weight, before)
    assert is_fused == (how == "fused")
