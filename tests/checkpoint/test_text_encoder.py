"""Text encoders are quantized while transformers loads them, and saved and loaded again."""

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from msfp_cli.checkpoint.quantizer import MSFPConfig
from msfp_cli.checkpoint.text_encoder import SharedTable
from msfp_cli.errors import CheckpointError
from msfp_cli.layers.quantized import QuantEmbedding
from msfp_cli.layers.replace import find_layers, quantized_layers
from tiny_pipelines import CALL_ARGUMENTS

WIDTH = 32
WORDS = 50
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CLIP = CLIPTextConfig(
    **SIZES, projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, max_position_embeddings=16
)
T5 = T5Config(
    vocab_size=WORDS, d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, feed_forward_proj="gated-gelu"
)
QWEN = Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
LOOSE = Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "CLIP": lambda: CLIPTextModel(CLIP),
    "CLIP with projection": lambda: CLIPTextModelWithProjection(CLIP),
    "T5": lambda: T5EncoderModel(T5),
    "Llama": lambda: LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "Qwen, tied": lambda: Qwen2ForCausalLM(QWEN),
    "Qwen": lambda: Qwen2ForCausalLM(LOOSE),
}


@pytest.fixture(params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """Return a text encoder and where it lies."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "full")
    return model, tmp_path / "full"


@torch.no_grad()
def answer(model: nn.Module) -> torch.Tensor:
    output: Any = model(torch.tensor([[3, 4, 40, 7, 1]]), output_hidden_states=True)
    states: torch.Tensor = torch.stack(output.hidden_states)
    return states


def test_what_was_quantized_is_saved_and_loaded_again(
    saved: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    model, directory = saved
    quantized = type(model).from_pretrained(directory, quantization_config=MSFPConfig(weights=6))
    quantized.save_pretrained(tmp_path / "out", max_shard_size="5KB")
    again = type(model).from_pretrained(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert torch.equal(answer(again), answer(quantized))
    error = (answer(again) - answer(model)).norm() / answer(model).norm()
    assert 0 < error < 0.1
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(answer(type(model).from_pretrained(tmp_path / "again")), answer(quantized))


def test_weights_of_linear_layers_and_tables_are_quantized(
    saved: tuple[PreTrainedModel, Path],
) -> None:
    model, directory = saved
    quantized = type(model).from_pretrained(directory, quantization_config=MSFPConfig(weights=6))
    layers = quantized_layers(quantized)
    full = find_layers(model)
    for name, layer in layers.items():
        step = layer.get_buffer("weight_scale")[:, None] * layer.weight_format().largest
        assert ((layer.float_weight() - full[name].weight).abs() <= step / 4).all()
        assert layer.scheme.input is None
    left = full.keys() - layers.keys()
    assert all(
        name.endswith(("relative_attention_bias", "embed_tokens", "lm_head")) for name in left
    )


def test_tied_tables_are_one_and_a_table_tied_to_a_head_stays(tmp_path: Path) -> None:
    models = {}
    for name in ("T5", "Qwen, tied", "Qwen"):
        MODELS[name]().save_pretrained(tmp_path / name)
        kind = T5EncoderModel if name == "T5" else AutoModelForCausalLM
        models[name] = kind.from_pretrained(tmp_path / name, quantization_config=MSFPConfig())
    t5 = models["T5"]
    assert isinstance(t5.shared, QuantEmbedding)
    assert t5.shared.weight_format().bits == 4
    assert isinstance(t5.encoder.embed_tokens, SharedTable)
    assert torch.equal(t5.encoder.embed_tokens.weight, t5.shared.weight)
    tied = models["Qwen, tied"]
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert {"lm_head", "model.embed_tokens"} <= quantized_layers(models["Qwen"]).keys()


def test_model_with_a_shared_table_is_freed_and_copied(tmp_path: Path) -> None:
    MODELS["T5"]().save_pretrained(tmp_path / "full")
    model = T5EncoderModel.from_pretrained(tmp_path / "full", quantization_config=MSFPConfig())
    model.save_pretrained(tmp_path / "quantized")
    for source in (model, T5EncoderModel.from_pretrained(tmp_path / "quantized")):
        model = copy.deepcopy(source)
        shared = model.encoder.embed_tokens
        assert shared.weight.shape == model.shared.weight.shape
        assert shared._table() is model.shared
        weak = weakref.ref(model)
        del model
        assert weak() is None


def test_altered_file_is_refused(tmp_path: Path) -> None:
    MODELS["CLIP"]().save_pretrained(tmp_path / "full")
    model = CLIPTextModel.from_pretrained(tmp_path / "full", quantization_config=MSFPConfig())
    model.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="altered"):
        CLIPTextModel.from_pretrained(tmp_path / "out")


def test_auto_model_of_transformers_takes_the_config(tmp_path: Path) -> None:
    MODELS["Llama"]().save_pretrained(tmp_path)
    config = MSFPConfig(weights=4, keep=("layers.0.*:none",))
    model = AutoModel.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    names = quantized_layers(model).keys()
    assert "embed_tokens" in names
    assert not any(name.startswith("layers.0.") for name in names)
    assert model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model.layers[1].mlp.up_proj.get_buffer("weight_scale").dtype == torch.float32


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline"])
def test_pictures_of_a_whole_pipeline_are_equal_before_and_after(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    parts = ["transformer", "text_encoder", "text_encoder_2"]
    mapping = PipelineQuantizationConfig(quant_mapping={part: MSFPConfig() for part in parts})
    pipe = DiffusionPipeline.from_pretrained(tiny(name), quantization_config=mapping)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    pictures = [
        each(
            **CALL_ARGUMENTS[name], output_type="np", generator=torch.Generator().manual_seed(0)
        ).images
        for each in (pipe, again)
    ]
    assert (pictures[0] == pictures[1]).all()
    with safe_open(tmp_path / "text_encoder_2" / "model.safetensors", "pt") as file:
        assert {"quantization_config", "msfp_digest"} <= file.metadata().keys()
