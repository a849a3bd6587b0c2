"""Roles of layers are found in a recorded call, whatever the layers are called."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from conftest import record_few
from msfp_cli.calibration.keep import ROLES, usual_role
from msfp_cli.layers.replace import find_layers
from msfp_cli.pipelines.denoiser import DenoiserCall
from msfp_cli.recording.flow import CONDITIONS, FIRST, LAST, trace_roles


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


TIME = torch.tensor([500.0, 500.0])
GRID = torch.cartesian_prod(*(torch.arange(size) for size in (1, 4, 4, 1))).expand(2, -1, -1)
# A tiny denoiser of each family: its class, its settings, and what it is called with.
DENOISERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "WanTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 2,
            "cross_attn_norm": True,
            "rope_max_seq_len": 32,
        },
        {
            "hidden_states": normal(2, 4, 2, 8, 8),
            "timestep": TIME,
            "encoder_hidden_states": normal(2, 6, 16),
        },
    ),
    "ZImageTransformer2DModel": (
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 16,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 1,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        {
            "x": [normal(16, 1, 8, 8), normal(16, 1, 8, 8)],
            "t": TIME / 1000,
            "cap_feats": [normal(8, 16), normal(8, 16)],
        },
    ),
    "QwenImageTransformer2DModel": (
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        {
            "hidden_states": normal(2, 16, 16),
            "encoder_hidden_states": normal(2, 8, 16),
            "encoder_hidden_states_mask": torch.ones(2, 8, dtype=torch.long),
            "timestep": TIME / 1000,
            "img_shapes": [(1, 4, 4)] * 2,
        },
    ),
    "Flux2Transformer2DModel": (
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": [4, 4, 4, 4],
        },
        {
            "hidden_states": normal(2, 16, 4),
            "encoder_hidden_states": normal(2, 16, 32),
            "timestep": TIME / 1000,
            "img_ids": GRID,
            "txt_ids": GRID,
            "guidance": torch.ones(2),
        },
    ),
    "HiDreamImageTransformer2DModel": (
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        {
            "hidden_states": normal(2, 4, 32, 32),
            "timesteps": TIME,
            "encoder_hidden_states_t5": normal(2, 8, 8),
            "encoder_hidden_states_llama3": normal(2, 2, 8, 4),
            "pooled_embeds": normal(2, 8),
        },
    ),
    "LTXVideoTransformer3DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 1,
            "caption_channels": 16,
        },
        {
            "hidden_states": normal(2, 32, 4),
            "encoder_hidden_states": normal(2, 8, 16),
            "timestep": TIME,
            "encoder_attention_mask": torch.ones(2, 8),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
    "Krea2Transformer2DModel": (
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        {
            "hidden_states": normal(2, 16, 16),
            "encoder_hidden_states": normal(2, 8, 3, 16),
            "timestep": TIME / 1000,
            "position_ids": torch.zeros(24, 3),
        },
    ),
}
# By model: the first layer, the last, and the others that have a role; a name that ends in a dot
# stands for all layers below it.
EXPECTED = {
    "WanTransformer3DModel": ("patch_embedding", "proj_out", ("condition_embedder.",)),
    "ZImageTransformer2DModel": (
        "all_x_embedder.2-1",
        "all_final_layer.2-1.linear",
        ("t_embedder.", "cap_embedder.1", "all_final_layer.2-1.adaLN_modulation.1"),
    ),
    "QwenImageTransformer2DModel": (
        "img_in",
        "proj_out",
        ("time_text_embed.", "txt_in", "norm_out.linear"),
    ),
    "Flux2Transformer2DModel": (
        "x_embedder",
        "proj_out",
        (
            "time_guidance_embed.",
            "context_embedder",
            "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.linear",
            "single_stream_modulation.linear",
            "norm_out.linear",
        ),
    ),
    "HiDreamImageTransformer2DModel": (
        "x_embedder.proj",
        "final_layer.linear",
        ("t_embedder.", "p_embedder.", "final_layer.adaLN_modulation.1"),
    ),
    "LTXVideoTransformer3DModel": (
        "proj_in",
        "proj_out",
        ("time_embed.", "caption_projection."),
    ),
    "Krea2Transformer2DModel": (
        "img_in",
        "final_layer.linear",
        ("time_embed.", "time_mod_proj", "text_fusion.projector", "txt_in."),
    ),
}


def call_of(name: str) -> tuple[nn.Module, DenoiserCall]:
    """Build a tiny denoiser, and describe a call of it."""
    settings, arguments = DENOISERS[name]
    torch.manual_seed(0)
    denoiser = getattr(diffusers, name)(**settings).eval()
    time = next(key for key in ("timestep", "timesteps", "t") if key in arguments)
    call = DenoiserCall(
        component="transformer",
        timestep=500.0,
        arguments=arguments,
        output=normal(2, 64, 1, 1, 1),  # of which only the channels count
        time=time,
    )
    return denoiser, call


def usual_roles(denoiser: nn.Module) -> dict[str, str]:
    """Return the roles of layers as the lists of names have them."""
    usual = {name: usual_role(name) for name in find_layers(denoiser)}
    return {name: role for name, role in usual.items() if role is not None}


def names_of(roles: Mapping[str, str], role: str) -> set[str]:
    """Return the layers of a role."""
    return {name for name, each in roles.items() if each == role}


@pytest.mark.parametrize("name", DENOISERS)
def test_layers_of_families_that_no_list_knows_are_found(name: str) -> None:
    denoiser, call = call_of(name)
    roles = trace_roles(denoiser, call)
    first, last, others = EXPECTED[name]
    assert names_of(roles, FIRST) == {first}
    assert names_of(roles, LAST) == {last}
    below = tuple(each for each in others if each.endswith("."))
    layers = find_layers(denoiser)
    conditions = {each for each in layers if each in others or each.startswith(below)}
    assert conditions and names_of(roles, CONDITIONS) == conditions


@pytest.mark.parametrize(
    "name",
    [
        "DDPMPipeline",
        "LDMTextToImagePipeline",
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "DiTPipeline",
        "PixArtSigmaPipeline",
    ],
)
def test_layers_of_families_that_have_usual_names_are_those(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    _, denoiser, calls = record_few(tiny(name), tmp_path, num_images=1)
    assert trace_roles(denoiser, calls[0]) == usual_roles(denoiser)


def test_layers_of_wan_are_those_of_the_usual_names() -> None:
    denoiser, call = call_of("WanTransformer3DModel")
    assert trace_roles(denoiser, call) == usual_roles(denoiser)


def test_roles_are_those_that_rules_may_name() -> None:
    assert (FIRST, LAST, CONDITIONS) == ROLES


class Scrambled(nn.Module):
    """Writes its sample into a buffer, part by part, and reads it as another view."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Linear(4, 4)
        self.inside = nn.ModuleList([nn.Linear(4, 4)])
        self.time = nn.Linear(1, 4)
        self.late = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        """Run the layers."""
        buffer = torch.zeros(x.shape[1], x.shape[0])
        buffer[:2].copy_(x.T[:2])
        hidden = self.early(buffer.T) + self.time(timestep[:, None])
        hidden += self.inside[0](hidden)
        self.idle(hidden)
        return (self.late(input=hidden),)


def test_sample_is_followed_through_views_buffers_and_writes_in_place() -> None:
    x = normal(2, 4)
    call = DenoiserCall(
        component="unet", timestep=500.0, arguments={"x": x, "timestep": TIME}, output=x
    )
    roles = trace_roles(Scrambled(), call)
    assert roles == {"early": FIRST, "time": CONDITIONS, "late": LAST}


def test_sample_counts_where_another_argument_is_the_same_tensor() -> None:
    x = normal(2, 4)
    arguments = {"x": x, "timestep": x[:, 0]}
    call = DenoiserCall(component="unet", timestep=500.0, arguments=arguments, output=x)
    assert trace_roles(Scrambled(), call)["time"] == CONDITIONS
