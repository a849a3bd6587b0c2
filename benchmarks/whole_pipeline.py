"""Quantize a Flux-like pipeline with text encoders, save it, reload it, and compare pictures.

    python benchmarks/whole_pipeline.py --work DIR [--billions 2]

All parts are random. The transformer has two thirds of the parameters, its second text encoder (T5)
one third, and the rest is tiny. A picture is drawn with the pipeline that was quantized while it
loaded, and with stock `from_pretrained` of what that one saved. The script prints the bytes of each
component, and whether the pictures are equal, bit for bit.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, PipelineQuantizationConfig
from transformers import T5Config, T5EncoderModel

from msfp_cli import MSFPConfig
from msfp_cli.run import describe_sizes

TESTS = Path(__file__).parents[1] / "tests"
PICTURE = {"num_inference_steps": 2, "prompt": "a cat", "height": 32, "width": 32}
PARTS = ("transformer", "text_encoder", "text_encoder_2")
HEAD = 128


def write_pipeline(directory: Path, billions: float) -> int:
    """Write the pipeline in bfloat16 and return its parameters."""
    sys.path.append(str(TESTS))  # which have a tiny pipeline with tokenizers
    from tiny_pipelines import build_flux

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    heads = 16 if billions >= 1 else 1
    width = heads * HEAD
    blocks = billions * 1e9 / width**2 / 3
    pipe = build_flux()
    tokens = pipe.tokenizer_2
    pipe.text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokens),
            d_model=width,
            d_kv=HEAD,
            d_ff=width * 5 // 2,
            num_layers=max(1, round(blocks / 11.5)),
            num_heads=heads,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokens.pad_token_id,
            eos_token_id=tokens.eos_token_id,
        )
    )
    pipe.transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=max(1, round(blocks / 36)),
        num_single_layers=max(1, round(blocks / 15)),
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        joint_attention_dim=width,
        pooled_projection_dim=pipe.text_encoder.config.hidden_size,
        guidance_embeds=True,
        axes_dims_rope=(HEAD // 4, HEAD * 3 // 8, HEAD * 3 // 8),
    )
    torch.set_default_dtype(torch.float32)
    pipe.to(torch.bfloat16).save_pretrained(directory)
    return sum(part.numel() for name in PARTS for part in getattr(pipe, name).parameters())


def draw(pipe: DiffusionPipeline) -> torch.Tensor:
    """Draw a picture of two steps."""
    start = time.monotonic()
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(**PICTURE, output_type="pt", generator=generator).images
    print(f"drawn in {time.monotonic() - start:.0f} s", flush=True)
    return picture


def main() -> None:
    """Write, quantize, save, reload, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--billions", type=float, default=2)
    arguments = parser.parse_args()
    source = arguments.work / "source"
    shutil.rmtree(arguments.work, ignore_errors=True)
    count = write_pipeline(source, arguments.billions)
    print(f"{count / 1e9:.2f} billion parameters: {describe_sizes(source)}", flush=True)
    start = time.monotonic()
    mapping = PipelineQuantizationConfig(quant_mapping={part: MSFPConfig() for part in PARTS})
    options = {"dtype": torch.bfloat16}
    pipe = DiffusionPipeline.from_pretrained(source, quantization_config=mapping, **options)
    print(f"quantized while loading in {time.monotonic() - start:.0f} s", flush=True)
    before = draw(pipe)
    pipe.save_pretrained(arguments.work / "quantized")
    del pipe
    print(f"quantized: {describe_sizes(arguments.work / 'quantized')}", flush=True)
    after = draw(DiffusionPipeline.from_pretrained(arguments.work / "quantized", **options))
    full = draw(DiffusionPipeline.from_pretrained(source, **options))
    print(f"equal before and after: {torch.equal(before, after)}")
    print(f"mean difference from full precision: {(before - full).abs().float().mean():.4f}")


if __name__ == "__main__":
    main()
