"""The whole chain on every kind of pipeline: calibrate, export, reload, sample."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import CONDITIONS, QUICK, TWO_PICTURES, Chained, chain
from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.errors import ModelError, RunError, UsageError
from msfp_cli.layers.quantized import QuantConv2d, QuantEmbedding, QuantLinear
from msfp_cli.pipelines.conditions import conditioning_of, expand_conditions, read_prompts
from msfp_cli.pipelines.denoiser import find_denoisers
from msfp_cli.pipelines.loading import (
    BUILT_IN,
    BUILT_IN_GUIDANCE,
    ModelSource,
    default_prompts,
    load_pipeline,
)
from msfp_cli.pipelines.sampling import Sampling, call_pipeline
from msfp_cli.recording.recipe import RecordOptions
from msfp_cli.recording.record import record_recipes
from msfp_cli.run import Run
from tiny_pipelines import BUILDERS


@dataclass(frozen=True)
class Reloaded:
    """One chained model and the picture that each way of loading it draws from the same seed."""

    name: str
    chained: Chained
    float_pipe: DiffusionPipeline
    stock: DiffusionPipeline
    pictures: dict[str, np.ndarray]


def draw(pipe: DiffusionPipeline) -> np.ndarray:
    """Draw one picture in two steps."""
    return np.asarray(
        call_pipeline(
            pipe, CONDITIONS[conditioning_of(pipe)], Sampling(num_inference_steps=2, seed=7)
        )[0]
    )


@pytest.fixture(scope="module", params=BUILDERS)
def reloaded(
    request: pytest.FixtureRequest,
    tiny: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Reloaded:
    """Chain one kind of pipeline and reload it in every way."""
    chained = chain(tiny(request.param), tmp_path_factory.mktemp("chain") / "run")
    pipes = {
        "float": load_pipeline(chained.calibration.source, "cpu"),
        "memory": load_calibrated(chained.calibration, "cpu"),
        "stock": DiffusionPipeline.from_pretrained(chained.export),
        "wrapper": MSFPPipeline.from_pretrained(chained.export, device="cpu").pipe,
    }
    pictures = {way: draw(pipe) for way, pipe in pipes.items()}
    return Reloaded(request.param, chained, pipes["float"], pipes["stock"], pictures)


@pytest.mark.parametrize("way", ["stock", "wrapper"])
def test_reloaded_export_draws_the_in_memory_picture_bit_for_bit(
    reloaded: Reloaded, way: str
) -> None:
    assert np.array_equal(reloaded.pictures[way], reloaded.pictures["memory"])


def test_quantized_picture_is_another_than_the_float_one(reloaded: Reloaded) -> None:
    assert reloaded.pictures["memory"].shape == reloaded.pictures["float"].shape
    assert not np.array_equal(reloaded.pictures["memory"], reloaded.pictures["float"])


def test_export_is_a_stock_pipeline_of_the_same_class(reloaded: Reloaded) -> None:
    assert type(reloaded.stock) is type(reloaded.float_pipe)
    assert type(reloaded.stock).__name__ == reloaded.name


def test_denoiser_is_found_under_its_component_name(reloaded: Reloaded) -> None:
    expected = "unet" if hasattr(reloaded.float_pipe, "unet") else "transformer"
    assert list(reloaded.chained.calibration.layers) == [expected]


def test_every_layer_of_the_calibration_is_quantized_after_reloading(reloaded: Reloaded) -> None:
    for component, denoiser in find_denoisers(reloaded.stock).items():
        table = reloaded.chained.calibration.table(component)
        modules = dict(denoiser.named_modules())
        quantized = {
            n: m.scheme
            for n, m in modules.items()
            if isinstance(m, QuantLinear | QuantConv2d | QuantEmbedding)
        }
        assert quantized == table
        original = find_denoisers(reloaded.float_pipe)[component]
        assert set(table) == {
            n
            for n, m in original.named_modules()
            if type(m) in (nn.Linear, nn.Conv2d, nn.Embedding)
        }


def test_quantization_moves_the_denoisers_output_a_little(reloaded: Reloaded) -> None:
    for error in reloaded.chained.calibration.held_out_error.values():
        assert 0 < error < 0.2


NAN, INFINITY = float("nan"), float("inf")
UNET = ("DDIMPipeline", "unet", "down_blocks.0.resnets.0.conv1.weight")
TRANSFORMER = ("FluxPipeline", "transformer", "transformer_blocks.0.attn.to_q.weight")
BIAS = ("FluxPipeline", "transformer", "single_transformer_blocks.0.proj_out.bias")
VAE = ("FluxPipeline", "vae", "decoder.conv_in.weight")
CLIP = ("FluxPipeline", "text_encoder", "encoder.layers.0.self_attn.q_proj.weight")
T5 = ("FluxPipeline", "text_encoder_2", "encoder.block.0.layer.1.DenseReluDense.wo.weight")


def damage(directory: Path, name: str, value: float | None) -> None:
    """Give the first number of a tensor another value, or take the tensor out of its file."""
    for path in directory.glob("*.safetensors"):
        state = load_file(path)
        if name in state and value is None:
            del state[name]
        elif name in state:
            state[name].view(-1)[0] = value
        save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize("max_memory", [None, 2**30], ids=["in memory", "in its files"])
@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (UNET, NAN),
        (UNET, None),
        (TRANSFORMER, -INFINITY),
        (TRANSFORMER, None),
        (BIAS, NAN),
        (BIAS, None),
        (VAE, INFINITY),
        (VAE, None),
        (CLIP, NAN),
        (CLIP, None),
        (T5, INFINITY),
        (T5, None),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else str(value),
)
def test_broken_model_is_told_by_tensor_before_anything_is_recorded(
    tiny: Callable[[str], Path],
    copied: Callable[..., Path],
    tmp_path: Path,
    place: tuple[str, str, str],
    value: float | None,
    is_sharded: bool,
    max_memory: int | None,
) -> None:
    model, component, name = place
    broken = copied(tiny(model), "broken")
    if is_sharded:
        part = getattr(load_pipeline(ModelSource(model=str(broken)), "cpu"), component)
        shutil.rmtree(broken / component)
        part.save_pretrained(broken / component, max_shard_size="20KB")
        assert len(list((broken / component).glob("*.safetensors"))) > 1
    damage(broken / component, name, value)
    told = (
        f"the files of .*/{component} lack the tensor {re.escape(name)};"
        if value is None
        else f"the tensor {re.escape(name)} in the files of {component} holds a NaN or infinity"
    )
    source = ModelSource(model=str(broken))
    with pytest.raises(ModelError, match=told) as caught:
        calibrate_run(Run(tmp_path / "run"), source, TWO_PICTURES, QUICK, max_memory=max_memory)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run" / "recording").exists()


def test_existing_calibration_is_refused_before_the_model_is_loaded(tiny_chained: Chained) -> None:
    with pytest.raises(RunError, match="exists already; use --overwrite"):
        calibrate_run(tiny_chained.run, ModelSource(model="/no/such/model"), TWO_PICTURES, QUICK)


def test_calibration_stores_what_was_asked_for(
    tiny_chained: Chained, tiny_source: ModelSource
) -> None:
    calibration = tiny_chained.calibration
    assert calibration.source == tiny_source
    assert calibration.recipe == QUICK
    assert calibration.record.num_inference_steps == 2
    assert calibration.record.conditions == (None,)


def test_prompts_are_read_one_a_line_without_empty_ones(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red dress\n\n  a blå bag \r\n", "utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ("a red dress", "a blå bag")


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"\xef\xbb\xbfa cat\r\na dog\r\n", ("a cat", "a dog")),
        ("a\u2028b\nc\x0cd".encode(), ("a\u2028b", "c\x0cd")),
    ],
)
def test_prompts_are_plain_text_as_editors_write_it(
    tmp_path: Path, content: bytes, prompts: tuple[str, ...]
) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    assert read_prompts(tmp_path / "prompts.txt") == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read prompts"),
        (b"\n \n", "no prompts"),
        (b"\xff\xfe\x00", "save it as UTF-8"),
        ("a cat\na dog\n".encode("utf-16-le"), "it is in UTF-16; save it as UTF-8"),
    ],
)
def test_useless_prompt_files_are_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_prompts(path)


def test_each_prompt_is_repeated_for_its_pictures() -> None:
    assert expand_conditions(["a", "b"], 2, "prompt") == ("a", "a", "b", "b")
    assert expand_conditions([], 3, "none") == (None, None, None)


def test_recorded_conditions_follow_from_the_pipeline(tiny: Callable[[str], Path]) -> None:
    def conditions(name: str, options: RecordOptions) -> tuple[str | None, ...]:
        source = ModelSource(model=str(tiny(name)))
        chosen, held_out = record_recipes(load_pipeline(source, "cpu"), source, options)
        return (*chosen.conditions, *held_out.conditions)

    options = RecordOptions(num_images=4)
    assert conditions("DDIMPipeline", options) == (None,) * 4
    # Labels are spread over all 1000 classes.
    assert conditions("DiTPipeline", options) == ("0", "250", "500", "750")
    assert conditions("StableDiffusionPipeline", options) == default_prompts("any")[:4]
    given = RecordOptions(prompts=("a", "b", "c"))
    assert conditions("StableDiffusionPipeline", given) == ("a", "b", "c")
    assert conditions("StableDiffusionPipeline", replace(given, num_images=5)) == (
        "a",
        "b",
        "a",
        "b",
        "c",
    )
    assert conditions("StableDiffusionPipeline", replace(given, num_images=2)) == ("a", "b")


@pytest.mark.parametrize(
    ("large", "num_images"), [(False, 800), (True, 200)], ids=["small", "large"]
)
def test_pictures_that_nobody_counted_are_many_and_leave_prompts_to_evaluate_on(
    large: bool, num_images: int, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr("msfp_cli.recording.record.LARGE", 1000)
    source = ModelSource(model=BUILT_IN)
    for name, num_conditions in (
        ("StableDiffusionPipeline", 200),
        ("DiTPipeline", 200),
        ("DDIMPipeline", 1),
    ):
        pipe = load_pipeline(ModelSource(model=str(tiny(name))), "cpu")
        chosen, held_out = record_recipes(pipe, source, RecordOptions())
        assert len(chosen.conditions) + len(held_out.conditions) == num_images
        assert len({*chosen.conditions, *held_out.conditions}) == num_conditions
        assert name == "DDIMPipeline" or not {*chosen.conditions} & {*held_out.conditions}


@pytest.mark.parametrize("asked", [None, 0.0, 2.0])
def test_guidance_is_what_was_asked_for_else_the_models_own(
    tiny: Callable[[str], Path], asked: float | None
) -> None:
    pipe = load_pipeline(ModelSource(model=str(tiny("StableDiffusionPipeline"))), "cpu")
    options = RecordOptions(num_images=2, guidance_scale=asked)
    for model, default in ((BUILT_IN, BUILT_IN_GUIDANCE), ("any", 7.5)):
        recipes = record_recipes(pipe, ModelSource(model=model), options)
        assert {recipe.guidance_scale for recipe in recipes} == {
            default if asked is None else asked
        }


def test_chain_reuses_the_recording_of_an_interrupted_calibration(
    tiny_chained: Chained, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    calibrate_run(run, tiny_chained.calibration.source, TWO_PICTURES, QUICK)
    before = (run.recording / "00000.safetensors").stat()
    for path in sorted(run.calibration.iterdir()):
        path.unlink()
    run.calibration.rmdir()
    calibrate_run(run, tiny_chained.calibration.source, TWO_PICTURES, QUICK)
    assert (run.recording / "00000.safetensors").stat().st_ino == before.st_ino
