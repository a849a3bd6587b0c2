"""Let two threads draw with one export, whose weights are in memory once.

    python examples/use/threads.py msfp-run/export

Each thread has a pipeline with a scheduler of its own, because a scheduler counts its steps; the
networks are shared. The prompt is encoded once before: a tokenizer keeps its padding as state,
which threads would change under each other.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

import msfp_cli


def draw(pipe: StableDiffusionPipeline, texts: dict[str, torch.Tensor], seed: int) -> np.ndarray:
    """Draw a picture with a scheduler of its own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    own = type(pipe)(**{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    steps = 4 + seed  # different timesteps at the same time
    generator = torch.Generator().manual_seed(seed)
    return own(**texts, num_inference_steps=steps, generator=generator, output_type="np").images


def main() -> None:
    """Read the options and draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("export", type=Path)
    arguments = parser.parse_args()
    assert msfp_cli.__version__  # its import registers the format with diffusers
    pipe = DiffusionPipeline.from_pretrained(arguments.export)
    embeddings = pipe.encode_prompt("a red dress", pipe.device, 1, do_classifier_free_guidance=True)
    texts = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeddings, strict=True))
    alone = [draw(pipe, texts, seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(partial(draw, pipe, texts), range(2)))
    equal = all(map(np.array_equal, alone, together))
    print(f"two threads drew {'the same pictures as one' if equal else 'other pictures'}")


if __name__ == "__main__":
    main()
