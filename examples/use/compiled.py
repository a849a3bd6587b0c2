"""Compile an export's denoiser once for all sizes of pictures.

python examples/use/compiled.py msfp-run/export
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import msfp_cli


def main() -> None:
    """Read the options and draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("export", type=Path)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--prompt", default="a red dress")
    arguments = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(arguments.export)
    pipe.set_progress_bar_config(disable=True)
    # Kernels are chosen before the graph is made. On a GPU they are measured in a first call.
    if torch.cuda.is_available():
        pipe.to("cuda")(arguments.prompt, num_inference_steps=1)
    msfp_cli.prepare_(pipe.unet)
    pipe.unet = torch.compile(pipe.unet, dynamic=True, backend=arguments.backend)
    side = pipe.vae_scale_factor * 8
    for width in (2 * side, 3 * side):
        picture = pipe(arguments.prompt, num_inference_steps=2, height=side, width=width).images[0]
        print(f"picture of {picture.width} x {picture.height}")


if __name__ == "__main__":
    main()
