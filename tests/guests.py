"""Guests of loaded exports, such as adapters, and the families of pipelines that have them."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from torch import Tensor, nn

from conftest import FEW_UPDATES, train
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import export_run
from msfp_cli.finetuning.result import FinetuneState
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.run import Run

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SIZE = 32  # of pictures, in pixels
EMBEDDING = 24  # numbers that an IP-Adapter is given
LORA_FILE = "pytorch_lora_weights.safetensors"
Pipe = Any
Denoiser = Any


def load(directory: Path, **options: object) -> Pipe:
    """Load an export as any user of diffusers does."""
    pipe = DiffusionPipeline.from_pretrained(directory, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser_of(pipe: Pipe) -> Denoiser:
    """Return the UNet or the transformer."""
    return pipe.components.get("unet") or pipe.components["transformer"]


def latents(pipe: Pipe, **options: object) -> Tensor:
    """Draw a picture in two steps, and return it before it is decoded."""
    arguments = {"num_inference_steps": 2, "height": SIZE, "width": SIZE, **options}
    generator = torch.Generator().manual_seed(0)
    drawn: Tensor = pipe("a cat", generator=generator, output_type="latent", **arguments).images
    return drawn


def add_lora(pipe: Pipe, name: str = "a", seed: int = 0, **options: object) -> None:
    """Add an adapter with random numbers to the denoiser."""
    config = pytest.importorskip("peft").LoraConfig
    torch.manual_seed(seed)
    settings = {"r": 4, "init_lora_weights": False, "target_modules": list(ATTENTION), **options}
    denoiser_of(pipe).add_adapter(config(**settings), name)


def is_different(one: Any, other: Any) -> bool:  # noqa: ANN401 (arrays or tensors)
    """Whether two pictures differ by more than a rounding."""
    return bool(abs(one - other).max() > 1e-3)


@dataclass(frozen=True)
class IPAdapter:
    """An IP-Adapter: what diffusers' loader takes, and what a pipeline's call with it takes."""

    weights: Any
    options: dict[str, Any]


def unet_ip_adapter(denoiser: Denoiser) -> IPAdapter:
    """Return an IP-Adapter for a UNet, in its file's names."""
    torch.manual_seed(0)
    width = denoiser.config.cross_attention_dim
    weights = dict[str, Tensor]()
    crossing = [name for name in denoiser.attn_processors if "attn2" in name]
    for number, name in enumerate(crossing):
        out = denoiser.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * number + 1}.{part}.weight"] = torch.randn(out, width)
    options = {"ip_adapter_image_embeds": [torch.randn(2, 1, EMBEDDING)]}
    return IPAdapter([{"image_proj": _projection(width), "ip_adapter": weights}], options)


def flux_ip_adapter(denoiser: Denoiser) -> IPAdapter:
    """Return an IP-Adapter for Flux, in its file's names."""
    torch.manual_seed(0)
    width, inner = denoiser.config.joint_attention_dim, denoiser.inner_dim
    weights = dict[str, Tensor]()
    for number in range(denoiser.config.num_layers):
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{number}.{part}.weight"] = torch.randn(inner, width)
            weights[f"{number}.{part}.bias"] = torch.randn(inner)
    embeddings = [torch.randn(1, 1, EMBEDDING)]
    options = {
        "ip_adapter_image_embeds": embeddings,
        "negative_ip_adapter_image_embeds": embeddings,
    }
    return IPAdapter([{"image_proj": _projection(width), "ip_adapter": weights}], options)


def sd3_ip_adapter(denoiser: Denoiser) -> IPAdapter:
    """Return an IP-Adapter for SD 3."""
    torch.manual_seed(0)
    inner, head = denoiser.inner_dim, denoiser.config.attention_head_dim
    projection = IPAdapterTimeImageProjection(
        embed_dim=EMBEDDING,
        output_dim=inner,
        hidden_dim=64,
        heads=1,
        num_queries=4,
        timestep_in_dim=32,
    )
    weights = dict[str, Tensor]()
    for number in range(len(denoiser.attn_processors)):
        processor = SD3IPAdapterJointAttnProcessor2_0(inner, inner, head, timesteps_emb_dim=64)
        state = processor.state_dict().items()
        weights |= {f"{number}.{name}": torch.randn_like(tensor) for name, tensor in state}
    options = {"ip_adapter_image_embeds": torch.randn(2, 3, EMBEDDING)}
    return IPAdapter({"image_proj": projection.state_dict(), "ip_adapter": weights}, options)


def _projection(width: int) -> dict[str, Tensor]:
    return {
        "proj.weight": torch.randn(4 * width, EMBEDDING),
        "proj.bias": torch.randn(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


def edit_biases_(pipe: Pipe) -> set[type]:
    """Change a bias of the first quantized layer of each class; return the classes."""
    edited = set[type]()
    for layer in quantized_layers(denoiser_of(pipe)).values():
        if layer.bias is not None and type(layer) not in edited:
            layer.bias.data.add_(0.5)
            edited.add(type(layer))
    return edited


def round_like_(denoiser: Denoiser, cast: Denoiser) -> None:
    """Round those parameters of a denoiser that another one holds in a smaller type."""
    own = dict(denoiser.named_parameters())
    for name, parameter in cast.named_parameters():
        if parameter.dtype != own[name].dtype:
            own[name].data = own[name].data.to(parameter.dtype).to(own[name].dtype)


# Names of layers in a file of kohya's trainer, and those in diffusers of which each is made.
Names = dict[str, list[str]]


@dataclass(frozen=True)
class Family:
    """A family of pipelines, and what is different about its guests.

    Arguments:
        pipeline: a class of diffusers, one of `tiny_pipelines.BUILDERS`.
        others: layers that adapters are put on beside two of attention.
        ip_adapter: makes an IP-Adapter for a denoiser.
        kohya: by a name of their spelling, layers of the tiny model in LoRAs of kohya's trainer.
        scheduler: a change of the scheduler's config that changes pictures.
    """

    pipeline: str
    others: tuple[str, ...]
    ip_adapter: Callable[[Denoiser], IPAdapter]
    kohya: dict[str, Names] = field(default_factory=dict)
    scheduler: dict[str, object] = field(default_factory=lambda: {"shift": 1.0})

    @property
    def targets(self) -> list[str]:
        """Layers that adapters are put on."""
        return ["to_q", "to_out.0", *self.others]


_SDXL_DOWN = "down_blocks.1.attentions.0"
_SDXL_MIDDLE = "mid_block.attentions.0.transformer_blocks.1"
SDXL = {
    # The trainer's own UNet has the names of Stability's code; other trainers have diffusers'.
    "sgm": {
        "input_blocks_0_0": ["conv_in"],
        "input_blocks_2_0_op": ["down_blocks.0.downsamplers.0.conv"],
        "input_blocks_3_0_in_layers_2": ["down_blocks.1.resnets.0.conv1"],
        "input_blocks_3_1_proj_in": [f"{_SDXL_DOWN}.proj_in"],
        "input_blocks_3_1_transformer_blocks_0_attn1_to_q": [
            f"{_SDXL_DOWN}.transformer_blocks.0.attn1.to_q"
        ],
        "middle_block_1_transformer_blocks_1_attn2_to_k": [f"{_SDXL_MIDDLE}.attn2.to_k"],
        "output_blocks_1_1_transformer_blocks_0_ff_net_2": [
            "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2"
        ],
    },
    "diffusers": {
        "down_blocks_1_resnets_0_conv1": ["down_blocks.1.resnets.0.conv1"],
        "mid_block_attentions_0_transformer_blocks_1_attn2_to_v": [f"{_SDXL_MIDDLE}.attn2.to_v"],
    },
}
_FLUX = "transformer_blocks.0"
FLUX = {
    # Attention's three layers are one in the trainer's model.
    "fused": {
        "double_blocks_0_img_attn_qkv": [f"{_FLUX}.attn.to_{part}" for part in "qkv"],
        "double_blocks_0_txt_attn_qkv": [f"{_FLUX}.attn.add_{part}_proj" for part in "qkv"],
        "double_blocks_0_img_attn_proj": [f"{_FLUX}.attn.to_out.0"],
        "double_blocks_0_txt_mlp_0": [f"{_FLUX}.ff_context.net.0.proj"],
        "double_blocks_0_img_mod_lin": [f"{_FLUX}.norm1.linear"],
        "single_blocks_0_linear2": ["single_transformer_blocks.0.proj_out"],
    },
}
FAMILIES = {
    "SDXL": Family(
        pipeline="StableDiffusionXLPipeline",
        others=("ff.net.2", "conv1", "proj_in", "time_emb_proj"),
        ip_adapter=unet_ip_adapter,
        kohya=SDXL,
        scheduler={"timestep_spacing": "linspace"},
    ),
    "SD3": Family(
        pipeline="StableDiffusion3Pipeline",
        others=("ff.net.2", "norm1.linear", "pos_embed.proj"),
        ip_adapter=sd3_ip_adapter,
    ),
    "Flux": Family(
        pipeline="FluxPipeline",
        others=("ff.net.2", "norm1.linear", "proj_mlp", "x_embedder"),
        ip_adapter=flux_ip_adapter,
        kohya=FLUX,
        scheduler={"use_dynamic_shifting": False, "shift": 5.0},
    ),
}


def in_both_names(
    denoiser: Denoiser, names: Names, component: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a random LoRA in the names of kohya's trainer and, the same, in diffusers'."""
    torch.manual_seed(0)
    rank, alpha = 4, 2.0
    kohya, diffusers = dict[str, Tensor](), dict[str, Tensor]()
    for name, layers in names.items():
        shapes = [denoiser.get_submodule(layer).weight.shape for layer in layers]
        down = 0.2 * torch.randn(rank, *shapes[0][1:])
        ups = [torch.randn(shape[0], rank, *[1] * (len(shape) - 2)) for shape in shapes]
        kohya |= {
            f"lora_unet_{name}.lora_down.weight": down,
            f"lora_unet_{name}.lora_up.weight": torch.cat(ups),
            f"lora_unet_{name}.alpha": torch.tensor(alpha),
        }
        for layer, up in zip(layers, ups, strict=True):
            diffusers[f"{component}.{layer}.lora_A.weight"] = down * alpha / rank
            diffusers[f"{component}.{layer}.lora_B.weight"] = up
    return kohya, diffusers


@dataclass(frozen=True)
class House:
    """An export of a family, and what it draws without guests."""

    family: Family
    directory: Path
    _drawn: dict[object, Tensor] = field(default_factory=dict)

    def load(self, dtype: torch.dtype = torch.float32, *, is_called: bool = False) -> Pipe:
        """Load it anew, and let it draw once or not."""
        pipe = load(self.directory, dtype=dtype)
        if is_called:
            latents(pipe)
        return pipe

    def before(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return what it draws."""
        if dtype not in self._drawn:
            self._drawn[dtype] = latents(self.load(dtype))
        return self._drawn[dtype]

    def calls(self, pipe: Pipe, **options: object) -> list[dict[str, Any]]:
        """Return the arguments of the denoiser's calls for a picture."""
        denoiser, seen = denoiser_of(pipe), list[dict[str, Any]]()

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = ("sample", "timestep")[: len(args)]  # what pipelines give by position
            seen.append({**dict(zip(names, args, strict=True)), **kwargs, "return_dict": False})

        handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
        latents(pipe, **options)
        handle.remove()
        return seen


def switching(state: FinetuneState) -> FinetuneState:
    """Return a state whose members differ, and whose router chooses others at each timestep."""
    generator = torch.Generator().manual_seed(0)

    def changed(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            if name.startswith("best/") and ".lora_b." in name:
                yield name, 0.05 * torch.randn(tensor.shape, generator=generator)
            if name == "best/router.logits.weight":
                yield name, 1000 * torch.randn(tensor.shape, generator=generator)

    return dataclasses.replace(state, tensors=state.tensors | dict(changed(state.tensors)))


def build(run: Run, family: Family, *, hub: int) -> House:
    """Export a calibrated run, with layers that switch or without."""
    if hub > 1:
        recipe = dataclasses.replace(FEW_UPDATES, steps=1, evaluate_every=1, hub_size=hub)
        tuned = switching(train(run, recipe, restart=True))
        (component,) = Calibration.load(run.calibration).layers
        tuned.save(run.finetuned(component))
    return House(family, Path(export_run(run, overwrite=True).directory))
