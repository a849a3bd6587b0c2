"""Draw with an export whose layers lie in the CPU's memory until they run.

python examples/use/offload.py msfp-run/export
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
    parser.add_argument("--device", default="cpu", help="where layers run, such as cuda")
    parser.add_argument("--prompt", default="a red dress")
    arguments = parser.parse_args()
    assert msfp_cli.__version__  # its import registers the format with diffusers
    pipe = DiffusionPipeline.from_pretrained(arguments.export)
    pipe.set_progress_bar_config(disable=True)
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(torch.device(arguments.device), cpu, offload_type="leaf_level")
    for part in (pipe.text_encoder, pipe.vae):
        part.to(arguments.device)
    picture = pipe(arguments.prompt, num_inference_steps=4).images[0]
    print(
        f"picture of {picture.width} x {picture.height}, one layer on {arguments.device} at a time"
    )


if __name__ == "__main__":
    main()
