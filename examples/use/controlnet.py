"""Put a ControlNet beside a quantized denoiser.

    python examples/use/controlnet.py msfp-run/export --against MODEL

A new ControlNet begins as a copy of the denoiser's first half: of the full-precision one, whose
weights are still there. (Trained ones are loaded with ``ControlNetModel.from_pretrained``.) MODEL
is the directory or hub id that was calibrated; the built-in pipeline is in
``src/msfp_cli/data/fashion``.
"""

import argparse
from pathlib import Path

from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from PIL import Image

import msfp_cli


def main() -> None:
    """Read the options and draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("export", type=Path)
    parser.add_argument("--against", required=True, help="the full-precision model")
    parser.add_argument("--prompt", default="a red dress")
    arguments = parser.parse_args()
    assert msfp_cli.__version__  # its import registers the format with diffusers
    full = DiffusionPipeline.from_pretrained(arguments.against)
    channels = [8] * full.vae_scale_factor.bit_length()  # all but the first halve, as in the VAE
    controlnet = ControlNetModel.from_unet(full.unet, conditioning_embedding_out_channels=channels)
    pipe = DiffusionPipeline.from_pretrained(arguments.export)
    beside = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    beside.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    hint = Image.new("RGB", (side, side), "white")
    picture = beside(arguments.prompt, image=hint, num_inference_steps=4).images[0]
    print(f"picture of {picture.width} x {picture.height}, drawn beside a ControlNet")


if __name__ == "__main__":
    main()
