"""What `test_guests` tries, with text encoders that are quantized: CLIP and T5."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.hooks import apply_group_offloading
from transformers import CLIPTextModel, T5EncoderModel

from guests import Pipe, is_different, latents, load
from msfp_cli.checkpoint.quantizer import MSFPConfig
from msfp_cli.errors import UsageError
from msfp_cli.layers.quantized import QuantLinear
from msfp_cli.layers.replace import quantized_layers

CPU = torch.device("cpu")
FLOAT, HALF = torch.float32, torch.bfloat16
# By part of the pipeline, its class and layers that adapters are put on.
PARTS: dict[str, tuple[Any, list[str]]] = {
    "text_encoder": (CLIPTextModel, ["q_proj", "fc1"]),
    "text_encoder_2": (T5EncoderModel, ["q", "wo"]),
}
parts = pytest.mark.parametrize("part", PARTS)


@pytest.fixture(scope="module")
def quantized(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Flux pipeline with quantized text encoders."""
    mapping = PipelineQuantizationConfig(quant_mapping=dict.fromkeys(PARTS, MSFPConfig()))
    pipe = DiffusionPipeline.from_pretrained(tiny("FluxPipeline"), quantization_config=mapping)
    place = tmp_path_factory.mktemp("texts")
    pipe.save_pretrained(place)
    return place


def add_lora(pipe: Pipe, part: str, **options: object) -> None:
    config = pytest.importorskip("peft").LoraConfig
    torch.manual_seed(0)
    settings = {"r": 4, "init_lora_weights": False, "target_modules": PARTS[part][1], **options}
    getattr(pipe, part).add_adapter(config(**settings), "a")
    getattr(pipe, part).eval()


@pytest.mark.parametrize(
    ("dora", "is_called", "dtype"), [(False, True, FLOAT), (True, False, HALF)], ids=str
)
@parts
def test_lora_changes_pictures_and_its_removal_restores_them(
    quantized: Path, part: str, dora: bool, is_called: bool, dtype: torch.dtype
) -> None:
    pipe = load(quantized, dtype=dtype)
    before = latents(load(quantized, dtype=dtype))
    if is_called:
        latents(pipe)
    add_lora(pipe, part, use_dora=dora)
    assert is_different(latents(pipe).float(), before.float())
    getattr(pipe, part).delete_adapter("a")
    assert torch.equal(latents(pipe), before)


def test_fusing_is_refused_before_anything_changes(quantized: Path) -> None:
    pipe = load(quantized)
    add_lora(pipe, "text_encoder")
    before = latents(pipe)
    with pytest.raises(UsageError, match="a quantized weight cannot be changed in place; keep a L"):
        pipe.fuse_lora(components=["text_encoder"])
    assert torch.equal(latents(pipe), before)


def test_new_tokens_are_refused_with_what_they_need(quantized: Path) -> None:
    pipe = load(quantized)
    before = latents(pipe)
    with pytest.raises(UsageError, match="need the text encoder in full precision"):
        pipe.text_encoder.resize_token_embeddings(1000)
    assert torch.equal(latents(pipe), before)


@pytest.mark.parametrize(
    ("kind", "place"), [("leaf_level", "disk"), ("block_level", "memory")], ids=str
)
@parts
def test_group_offload_leaves_pictures_as_they_are(
    quantized: Path, part: str, kind: str, place: str, tmp_path: Path
) -> None:
    pipe = load(quantized)
    before = latents(pipe)
    apply_group_offloading(
        getattr(pipe, part),
        onload_device=CPU,
        offload_device=CPU,
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
        offload_to_disk_path=str(tmp_path) if place == "disk" else None,
    )
    for _ in range(2):
        assert torch.equal(latents(pipe), before)


@parts
def test_copy_draws_the_same_pictures(quantized: Path, part: str) -> None:
    pipe = load(quantized)
    before = latents(pipe)
    pipe.register_modules(**{part: copy.deepcopy(getattr(pipe, part))})
    assert torch.equal(latents(pipe), before)


def test_change_of_type_is_that_of_a_load_in_this_type(quantized: Path) -> None:
    pipe = load(quantized)
    latents(pipe)
    pipe.to(dtype=HALF)
    for part in PARTS:
        layers = quantized_layers(getattr(pipe, part)).values()
        assert {layer.weight_scale.dtype for layer in layers} == {FLOAT}
    assert torch.equal(latents(pipe), latents(load(quantized, dtype=HALF)))


def test_edited_bias_counts_at_the_next_call(quantized: Path) -> None:
    pipe, fresh = load(quantized), load(quantized)
    before = latents(pipe)
    for each in (pipe, fresh):
        layers = quantized_layers(each.text_encoder).values()
        last = [layer for layer in layers if isinstance(layer, QuantLinear)][-1]
        last.bias.data[::2] += 1  # a norm would take a common shift away
    assert torch.equal(latents(pipe), latents(fresh))
    assert is_different(latents(pipe), before)


@pytest.mark.parametrize("where", ["whole", "part"])
@parts
def test_device_map_to_the_disk_is_refused(
    quantized: Path, part: str, where: str, tmp_path: Path
) -> None:
    (name, *_) = quantized_layers(getattr(load(quantized), part))
    places = {"whole": {"": "disk"}, "part": {"": "cpu", name: "disk"}}
    with pytest.raises(UsageError, match="cannot leave quantized layers on the disk") as caught:
        PARTS[part][0].from_pretrained(
            quantized / part, device_map=places[where], offload_folder=tmp_path
        )
    assert len(str(caught.value).splitlines()) == 1


@parts
def test_full_precision_is_not_made_of_quantized_weights(quantized: Path, part: str) -> None:
    with pytest.raises(UsageError, match="do not become full precision again; load that model"):
        getattr(load(quantized), part).dequantize()
