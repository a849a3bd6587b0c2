"""Build tiny random-weight stock diffusers pipelines for the tests.

Every pipeline keeps the structure of its full-size relative (attention levels, cross attention,
skip connections, adaptive norms, several text encoders) with a handful of channels, so that it
saves, loads and samples in a moment.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    LDMTextToImagePipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SEED = 20240607
TEXT_WIDTH = 32
CLIP_LENGTH = 77
ZERO_REPLACEMENT_STD = 0.05
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("a", "the", "of", "cat", "dog", "photo")

# What a test passes to the pipeline, besides the generator, for a small picture in two steps. Flux
# gets a size because its own default does not follow the size of the transformer.
CALL_ARGUMENTS: dict[str, dict[str, Any]] = {
    "DDPMPipeline": {"num_inference_steps": 2},
    "DDIMPipeline": {"num_inference_steps": 2},
    "LDMPipeline": {"num_inference_steps": 2},
    "LDMTextToImagePipeline": {"num_inference_steps": 2, "prompt": "a cat", "guidance_scale": 6.0},
    "StableDiffusionPipeline": {"num_inference_steps": 2, "prompt": "a cat"},
    "StableDiffusionXLPipeline": {"num_inference_steps": 2, "prompt": "a cat"},
    "StableDiffusion3Pipeline": {"num_inference_steps": 2, "prompt": "a cat"},
    "FluxPipeline": {"num_inference_steps": 2, "prompt": "a cat", "height": 32, "width": 32},
    "DiTPipeline": {"num_inference_steps": 2, "class_labels": [1]},
    # Cleaning captions takes a package that is no dependency of this project.
    "PixArtSigmaPipeline": {"num_inference_steps": 2, "prompt": "a cat", "clean_caption": False},
}


def _clip_tokenizer() -> CLIPTokenizer:
    """Make a byte-level BPE tokenizer that knows every byte and one merged word."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>")]
    tokens = (
        alphabet + [f"{symbol}</w>" for symbol in alphabet] + ["".join(pair) for pair in merges]
    )
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def _t5_tokenizer() -> T5Tokenizer:
    """Make a unigram tokenizer of whole words that falls back to letters."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(f"▁{word}", -3.0) for word in WORDS]
    vocabulary += [(letter, -6.0) for letter in LETTERS]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def _bert_tokenizer() -> BertTokenizer:
    """Make a word-piece tokenizer of whole words that falls back to letters."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys((*WORDS, *LETTERS))]
    tokens += [f"##{letter}" for letter in LETTERS]
    return BertTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, model_max_length=CLIP_LENGTH
    )


def _clip_config(tokenizer: CLIPTokenizer, **changes: object) -> CLIPTextConfig:
    """Describe a two-layer CLIP text encoder for a tokenizer."""
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "projection_dim": TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CLIP_LENGTH,
        # The pooled embedding is read at the end token, which the default ids of the full-size
        # vocabulary would miss.
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**(settings | changes))


def _t5_encoder(tokenizer: T5Tokenizer, width: int = TEXT_WIDTH) -> T5EncoderModel:
    """Make a one-layer T5 encoder with the gated feed-forward of version 1.1."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def _vae(levels: int = 2, **changes: object) -> AutoencoderKL:
    """Make a variational autoencoder; every level after the first halves the picture."""
    settings: dict[str, Any] = {
        "block_out_channels": (8,) * (levels - 1) + (16,),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return AutoencoderKL(**(settings | changes))


def _flow_vae() -> AutoencoderKL:
    """Make a flow-matching pipeline's autoencoder: shifted latents, no quantization convs."""
    return _vae(
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.36
    )


def _unconditional_unet(channels: int = 3) -> UNet2DModel:
    """Make an unconditional UNet with attention on its lower level."""
    return UNet2DModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
    )


def _conditional_unet(**changes: object) -> UNet2DConditionModel:
    """Make a text-conditional UNet with cross attention on its upper level and its middle."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return UNet2DConditionModel(**(settings | changes))


def _latent_ddim_scheduler() -> DDIMScheduler:
    """Make the noise schedule of the latent diffusion models."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _replace_zero_weights(model: nn.Module) -> None:
    """Give small random values to weights that are all zeros: they would hide a layer's effect."""
    for parameter in model.parameters():
        if parameter.ndim >= 2 and not parameter.any():
            nn.init.normal_(parameter, std=ZERO_REPLACEMENT_STD)


def _finish(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Bring the models of a pipeline to the state that a loaded trained pipeline has."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            _replace_zero_weights(component)
            component.eval()
    return pipeline


def build_ddpm() -> DiffusionPipeline:
    """Build a pixel-space pipeline with the DDPM sampler."""
    return _finish(DDPMPipeline(unet=_unconditional_unet(), scheduler=DDPMScheduler()))


def build_ddim() -> DiffusionPipeline:
    """Build a pixel-space pipeline with the DDIM sampler."""
    return _finish(DDIMPipeline(unet=_unconditional_unet(), scheduler=DDIMScheduler()))


def build_ldm() -> DiffusionPipeline:
    """Build an unconditional latent pipeline with a vector-quantized autoencoder."""
    vqvae = VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=4,
    )
    return _finish(
        LDMPipeline(vqvae=vqvae, unet=_unconditional_unet(), scheduler=_latent_ddim_scheduler())
    )


def build_ldm_text_to_image() -> DiffusionPipeline:
    """Build a text-conditional pipeline with the BERT encoder of the original latent diffusion."""
    tokenizer = _bert_tokenizer()
    config = LDMBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CLIP_LENGTH,
        encoder_layers=1,
        encoder_ffn_dim=2 * TEXT_WIDTH,
        encoder_attention_heads=2,
        head_dim=16,
        d_model=TEXT_WIDTH,
    )
    pipeline = LDMTextToImagePipeline(
        # This pipeline counts on an autoencoder that divides the picture size by 8.
        vqvae=_vae(levels=4),
        bert=LDMBertModel(config),
        tokenizer=tokenizer,
        unet=_conditional_unet(sample_size=8),
        scheduler=_latent_ddim_scheduler(),
    )
    return _finish(pipeline)


def build_stable_diffusion() -> DiffusionPipeline:
    """Build a Stable Diffusion 1 pipeline without its safety checker."""
    return _stable_diffusion(_conditional_unet, _vae, text_layers=2)


def build_smallest() -> DiffusionPipeline:
    """Build a Stable Diffusion 1 pipeline with one level, which loads in a tenth of a second."""
    unet = partial(
        _conditional_unet,
        sample_size=8,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )
    return _stable_diffusion(unet, partial(_vae, levels=1), text_layers=1)


def _stable_diffusion(
    unet: Callable[..., UNet2DConditionModel], vae: Callable[..., AutoencoderKL], text_layers: int
) -> DiffusionPipeline:
    """Build the parts in this order, on which their random weights depend."""
    tokenizer = _clip_tokenizer()
    text_config = _clip_config(tokenizer, num_hidden_layers=text_layers)
    pipeline = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=_latent_ddim_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _finish(pipeline)


def build_stable_diffusion_xl() -> DiffusionPipeline:
    """Build an SDXL pipeline with its two text encoders and its added size conditions."""
    tokenizer = _clip_tokenizer()
    tokenizer_2 = _clip_tokenizer()
    unet = _conditional_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        # The hidden states of the two text encoders are put side by side.
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        # Six embedded sizes and crop corners, and the pooled embedding of the second text encoder.
        projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer_2, hidden_act="gelu")),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )
    return _finish(pipeline)


def build_stable_diffusion_3() -> DiffusionPipeline:
    """Build an SD3 pipeline: joint and, in its first block, dual attention; three text encoders."""
    tokenizer = _clip_tokenizer()
    tokenizer_2 = _clip_tokenizer()
    # A saved pipeline without the third encoder does not load by itself: its class does not list it
    # as optional.
    tokenizer_3 = _t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        # The hidden states of the two CLIP encoders are put side by side, as are their pooled
        # embeddings; those of T5, as wide as both, follow as further tokens.
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_vae(),
        text_encoder=CLIPTextModelWithProjection(_clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer_2, hidden_act="gelu")),
        tokenizer_2=tokenizer_2,
        text_encoder_3=_t5_encoder(tokenizer_3, width=2 * TEXT_WIDTH),
        tokenizer_3=tokenizer_3,
    )
    return _finish(pipeline)


def build_flux() -> DiffusionPipeline:
    """Build a Flux pipeline with guidance embeddings and one block of each kind."""
    tokenizer = _clip_tokenizer()
    tokenizer_2 = _t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        # Four latent channels, packed in patches of two by two.
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_flow_vae(),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=_t5_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    return _finish(pipeline)


def build_dit() -> DiffusionPipeline:
    """Build a class-conditional DiT pipeline that names its first classes."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        # Twice the input: the second half is the learned variance, which the pipeline drops.
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        # The pipeline asks for class 1000 where it means no class.
        num_embeds_ada_norm=1000,
        norm_num_groups=8,
    )
    id2label = {"0": "cat, house cat", "1": "dog", "2": "photo"}
    pipeline = DiTPipeline(
        transformer=transformer, vae=_vae(), scheduler=_latent_ddim_scheduler(), id2label=id2label
    )
    # The class itself does not write its labels, unlike the published pipelines.
    pipeline.register_to_config(id2label=id2label)
    return _finish(pipeline)


def build_pixart_sigma() -> DiffusionPipeline:
    """Build a PixArt-Sigma pipeline with a T5 encoder."""
    tokenizer = _t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        norm_num_groups=8,
        # The smallest size, with an autoencoder that divides by 8, of which the pipeline knows the
        # aspect ratios.
        sample_size=32,
        patch_size=2,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5_encoder(tokenizer),
        vae=_vae(levels=4, scaling_factor=0.13025),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
    return _finish(pipeline)


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "DDPMPipeline": build_ddpm,
    "DDIMPipeline": build_ddim,
    "LDMPipeline": build_ldm,
    "LDMTextToImagePipeline": build_ldm_text_to_image,
    "StableDiffusionPipeline": build_stable_diffusion,
    "StableDiffusionXLPipeline": build_stable_diffusion_xl,
    "StableDiffusion3Pipeline": build_stable_diffusion_3,
    "FluxPipeline": build_flux,
    "DiTPipeline": build_dit,
    "PixArtSigmaPipeline": build_pixart_sigma,
}


def build_tiny(name: str) -> DiffusionPipeline:
    """Build a pipeline with the same weights each time, leaving the global random state alone."""
    return _same_each_time(BUILDERS[name])


def _same_each_time(build: Callable[[], DiffusionPipeline]) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build()


def with_controlnet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Return a Stable Diffusion pipeline with a ControlNet beside its UNet."""
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16))
    _replace_zero_weights(net)
    parts = {name: pipe.components[name] for name in ("vae", "unet", "scheduler")}
    texts = {name: pipe.components[name] for name in ("text_encoder", "tokenizer")}
    others = dict.fromkeys(("safety_checker", "feature_extractor"))
    return StableDiffusionControlNetPipeline(
        **parts, **texts, **others, controlnet=net, requires_safety_checker=False
    )


def save_tiny(name: str, directory: str | Path) -> None:
    """Build a pipeline and save it as safetensors in a directory."""
    build_tiny(name).save_pretrained(str(directory), safe_serialization=True)


def save_smallest(directory: str | Path) -> None:
    """Save the pipeline that loads fastest, for tests that load it thousands of times."""
    _same_each_time(build_smallest).save_pretrained(str(directory), safe_serialization=True)


def write_old_names(directory: Path) -> None:
    """Give the attention of a saved DDIM pipeline the names of earlier versions of diffusers."""
    file = directory / "unet" / "diffusion_pytorch_model.safetensors"
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    names = {
        f"mid_block.attentions.0.{now}.{kind}": f"mid_block.attentions.0.{then}.{kind}"
        for now, then in former.items()
        for kind in ("weight", "bias")
    }
    state = load_file(file)
    assert names.keys() <= state.keys()
    save_file({names.get(name, name): value for name, value in state.items()}, file)
