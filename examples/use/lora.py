"""Train a LoRA on top of a quantized export, without data: red becomes blue, and blue red.

    python examples/use/lora.py msfp-run/export --against MODEL

The export's codes stay as they are; only the LoRA learns. The teacher is the export itself with the
other colour in the prompt. The LoRA is saved, and loaded on a full-precision pipeline as well.
Needs peft.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig

import msfp_cli

Pipeline: TypeAlias = Any  # a Stable Diffusion pipeline of diffusers
SWAPPED = {"red": "blue", "blue": "red"}
THINGS = ("dress", "bag", "shirt", "coat")
FILE = "pytorch_lora_weights.safetensors"


def embed(pipe: Pipeline, color: str) -> torch.Tensor:
    """Return embeddings of prompts with a colour, one for each thing."""
    prompts = [f"a {color} {thing}" for thing in THINGS]
    return pipe.encode_prompt(prompts, pipe.device, 1, do_classifier_free_guidance=False)[0]


def train(pipe: Pipeline, steps: int, rate: float) -> None:
    """Let a LoRA answer to a colour as the quantized denoiser does to the other one."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(config, "swap")
    trained = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, rate)
    texts = {color: embed(pipe, color).detach() for color in SWAPPED}
    size = pipe.unet.config.sample_size
    for step in range(steps):
        color = list(SWAPPED)[step % 2]
        sample = torch.randn(len(THINGS), 4, size, size, generator=generator)
        timestep = torch.randint(1000, (1,), generator=generator)[0]
        pipe.unet.disable_adapters()
        with torch.no_grad():
            wanted = pipe.unet(sample, timestep, texts[SWAPPED[color]]).sample
        pipe.unet.enable_adapters()
        loss = (pipe.unet(sample, timestep, texts[color]).sample - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"{step}: loss {float(loss.detach()):.5f}", flush=True)


def redness(pipe: Pipeline) -> float:
    """Return how much more red than blue is in pictures of red things, on average."""
    prompts = [f"a red {thing}" for thing in THINGS]
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    pictures = pipe(prompts, num_inference_steps=10, generator=generators, output_type="np").images
    return float((pictures[..., 0] - pictures[..., 2]).mean())


def load(place: str | Path) -> Pipeline:
    """Load a pipeline, quantized or not."""
    pipe = DiffusionPipeline.from_pretrained(place)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    """Read the options, train, and show what was learned."""
    parser = argparse.ArgumentParser()
    parser.add_argument("export", type=Path)
    parser.add_argument("--against", help="full-precision model, as directory or hub id")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    assert msfp_cli.__version__  # its import registers the format with diffusers
    pipe = load(arguments.export)
    print(f"red above blue before: {redness(pipe):+.3f}")
    train(pipe, arguments.steps, arguments.rate)
    print(f"red above blue after: {redness(pipe):+.3f}")
    with tempfile.TemporaryDirectory() as place:
        pipe.unet.save_lora_adapter(place, "swap")
        for name in filter(None, (arguments.export, arguments.against)):
            again = load(name)
            again.unet.load_lora_adapter(place, prefix=None, weight_name=FILE)
            print(f"red above blue, loaded again on {name}: {redness(again):+.3f}")


if __name__ == "__main__":
    main()
