"""Let an export draw over a picture, and repaint a part of one.

python examples/use/img2img.py msfp-run/export --image photo.png
"""

import argparse
from pathlib import Path

from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from PIL import Image

import msfp_cli


def main() -> None:
    """Read the options and draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("export", type=Path)
    parser.add_argument("--image", type=Path, help="picture; a grey one by default")
    parser.add_argument("--prompt", default="a red dress")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures")
    arguments = parser.parse_args()
    assert msfp_cli.__version__  # its import registers the format with diffusers
    pipe = DiffusionPipeline.from_pretrained(arguments.export)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    image = Image.open(arguments.image) if arguments.image else Image.new("L", (side, side), 128)
    image = image.convert("RGB").resize((side, side))
    mask = Image.new("L", (side, side))
    mask.paste(255, (0, side // 2, side, side))  # the lower half is repainted
    calls = {
        "img2img": (AutoPipelineForImage2Image, {"strength": 0.7}),
        "inpaint": (AutoPipelineForInpainting, {"mask_image": mask, "strength": 0.99}),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, (auto, options) in calls.items():
        other = auto.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        made = other(arguments.prompt, image=image, num_inference_steps=10, **options).images[0]
        made.save(arguments.out / f"{name}.png")
        print(f"{arguments.out / name}.png written")


if __name__ == "__main__":
    main()
