"""A pipeline whose weights stay in its files: the same pictures, in hardly any memory."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from msfp_cli.errors import ModelError
from msfp_cli.layers.replace import find_layers
from msfp_cli.pipelines.denoiser import find_denoisers, fingerprint
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.streaming.quantize import quantize_pipeline
from msfp_cli.streaming.recipe import QuantizeRecipe
from tiny_pipelines import CALL_ARGUMENTS, write_old_names

NAMES = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "DiTPipeline",
    "PixArtSigmaPipeline",
    "LDMTextToImagePipeline",
)


def draw(pipe: DiffusionPipeline, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(**CALL_ARGUMENTS[name], output_type="pt", generator=generator).images


def in_memory(pipe: DiffusionPipeline) -> int:
    """Return the bytes of the weights of a pipeline's denoisers."""
    layers = [each for part in find_denoisers(pipe).values() for each in find_layers(part).values()]
    return sum(layer.weight.untyped_storage().nbytes() for layer in layers)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_and_fingerprints_are_those_of_the_whole_model(
    name: str, tiny: Callable[[str], Path]
) -> None:
    source = ModelSource(model=str(tiny(name)))
    whole = load_pipeline(source, "cpu")
    streamed = load_pipeline(source, "cpu", streamed=True)
    assert in_memory(streamed) * 20 < in_memory(whole)
    for component, denoiser in find_denoisers(whole).items():
        assert fingerprint(getattr(streamed, component)) == fingerprint(denoiser)
    assert torch.equal(draw(streamed, name), draw(whole, name))
    assert in_memory(streamed) * 20 < in_memory(whole)


def test_weights_with_names_of_earlier_versions_of_diffusers_stay_in_their_files(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    old = Path(shutil.copytree(tiny("DDIMPipeline"), tmp_path / "old"))
    write_old_names(old)
    today = load_pipeline(ModelSource(model=str(tiny("DDIMPipeline"))), "cpu", streamed=True)
    streamed = load_pipeline(ModelSource(model=str(old)), "cpu", streamed=True)
    assert in_memory(streamed) == in_memory(today)
    # Tensors that lie at other places of a file may be summed in another order.
    torch.testing.assert_close(draw(streamed, "DDIMPipeline"), draw(today, "DDIMPipeline"))


def test_files_that_stock_loading_does_not_take_are_left_alone(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny("DDIMPipeline"), tmp_path / "model"))
    tensors = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    doubled = {name: 2 * tensor for name, tensor in tensors.items()}
    for name in ("diffusion_pytorch_model_ema", "pytorch_lora_weights"):
        save_file(doubled, model / "unet" / f"{name}.safetensors")
    (model / "unet_onnx").mkdir()
    (model / "unet_onnx" / "config.json").write_text("{}")
    source = ModelSource(model=str(model))
    streamed = load_pipeline(source, "cpu", streamed=True)
    assert torch.equal(
        draw(streamed, "DDIMPipeline"), draw(load_pipeline(source, "cpu"), "DDIMPipeline")
    )
    quantize_pipeline(source, tmp_path / "with", QuantizeRecipe())
    plain = ModelSource(model=str(tiny("DDIMPipeline")))
    quantize_pipeline(plain, tmp_path / "without", QuantizeRecipe())
    place = Path("unet") / "diffusion_pytorch_model.safetensors"
    one, other = load_file(tmp_path / "with" / place), load_file(tmp_path / "without" / place)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_text_encoders_have_the_types_of_stock_loading(
    dtype: torch.dtype, tiny: Callable[[str], Path]
) -> None:
    source = ModelSource(model=str(tiny("StableDiffusion3Pipeline")), dtype=str(dtype)[6:])
    whole, streamed = load_pipeline(source, "cpu"), load_pipeline(source, "cpu", streamed=True)
    types = {key: each.dtype for key, each in whole.text_encoder_3.named_parameters()}
    others = {key: each.dtype for key, each in streamed.text_encoder_3.named_parameters()}
    both = types.keys() & others.keys()  # a table that two parts share may have two names
    assert len(both) > 10 and all(types[key] == others[key] for key in both)
    assert len(set(types.values())) == (2 if dtype == torch.float16 else 1)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_files_in_half_precision_are_computed_in_the_type_that_was_asked_for(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    DiffusionPipeline.from_pretrained(tiny(name), dtype=torch.bfloat16).save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        source = ModelSource(model=str(tmp_path), dtype=dtype)
        streamed = load_pipeline(source, "cpu", streamed=True)
        whole = load_pipeline(source, "cpu")
        for component, denoiser in find_denoisers(whole).items():
            types = {key: each.dtype for key, each in denoiser.state_dict().items()}
            others = getattr(streamed, component).state_dict()
            assert {key: each.dtype for key, each in others.items()} == types
        assert torch.equal(draw(streamed, name), draw(whole, name))


def test_pickled_weights_are_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny("DDIMPipeline"))
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ModelError, match="has no safetensors files"):
        load_pipeline(ModelSource(model=str(tmp_path)), "cpu", streamed=True)
