"""Quantize a transformer of the size of Flux, kill it on the way, and load the result.

    python benchmarks/larger_than_memory.py --work DIR [--billions 12] [--kills 3]

The script writes a random sharded transformer with Flux's layers, as many as make the number of
parameters, in bfloat16. Then it runs `msfp quantize`, kills it at random moments, runs it again
until it ends, and loads the result with stock diffusers. It prints the peak memory of every
process as the kernel counts it, mapped files among it, and the part that is not mapped files. It
takes 36 GB of disk for 12 billion parameters; what exists in --work is used again.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn

HEADS = 24
BLOCK = 1 << 24  # random numbers that are drawn; tensors begin somewhere among them
LOAD = """
import sys, msfp_cli, torch
from diffusers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], subfolder="transformer", dtype=torch.bfloat16)
print(f"{type(model).__name__}, {len(model.config.quantization_config.layers)} quantized layers")
"""


@dataclass(frozen=True)
class Ended:
    """A process that ended: after how long, how, and its peaks of memory in GiB."""

    seconds: float
    code: int
    peak: float
    peak_anonymous: float


def run(command: list[str], *, kill_after: float | None = None) -> Ended:
    """Run a command and watch its memory."""
    start = time.monotonic()
    process = subprocess.Popen(command)
    peaks = {"VmHWM": 0, "RssAnon": 0}
    while process.poll() is None:
        for line in read_status(process.pid):
            name, _, rest = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(rest.split()[0]))
        if kill_after is not None and time.monotonic() - start > kill_after:
            process.kill()
        time.sleep(0.05)
    seconds = time.monotonic() - start
    return Ended(seconds, process.returncode, peaks["VmHWM"] / 2**20, peaks["RssAnon"] / 2**20)


def read_status(process: int) -> list[str]:
    """Return the lines of /proc/PID/status."""
    try:
        return Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return []


def empty_transformer(billions: float, width: int) -> nn.Module:
    """Return a transformer without values that has about as many parameters, in bfloat16."""
    single = max(1, round(billions / 12 * 38))
    torch.set_default_dtype(torch.bfloat16)
    with init_empty_weights():
        return FluxTransformer2DModel(
            num_layers=max(1, single // 2),
            num_single_layers=single,
            num_attention_heads=HEADS,
            attention_head_dim=width,
            joint_attention_dim=4096 * width // 128,
            axes_dims_rope=(width // 8, width * 7 // 16, width * 7 // 16),
        )


def write_pipeline(model: nn.Module, directory: Path, shard_size: str) -> int:
    """Write a pipeline of a transformer with random weights and a scheduler; return parameters."""
    torch.manual_seed(0)
    noise = torch.randn(BLOCK, dtype=torch.float32).mul_(0.02).bfloat16()
    state = model.state_dict()
    split = split_torch_state_dict_into_shards(
        state,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    transformer = directory / "transformer"
    model.save_config(transformer)
    for filename, names in split.filename_to_tensors.items():
        save_file({name: draw(noise, state[name].shape) for name in names}, transformer / filename)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    FlowMatchEulerDiscreteScheduler().save_pretrained(directory / "scheduler")
    empty = {
        name: [None, None]
        for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    }
    parts = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
    }
    (directory / "model_index.json").write_text(json.dumps({**parts, **empty}))
    return sum(tensor.numel() for tensor in state.values())


def draw(noise: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return noise of this shape."""
    first = int(torch.randint(BLOCK // 2, ()))
    repeats = -(-(first + shape.numel()) // BLOCK)
    return noise.repeat(repeats)[first : first + shape.numel()].view(shape).clone()


def size_of(directory: Path) -> float:
    """Return the size of all files, in GiB."""
    return sum(path.stat().st_size for path in directory.rglob("*")) / 2**30


def main() -> None:
    """Write, quantize, kill, load."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--billions", type=float, default=12)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--longest", type=float, default=60, help="seconds before a kill, at most")
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--shard-size", default="4GB")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = arguments.work / "source"
    model = empty_transformer(arguments.billions, arguments.width)
    count = sum(parameter.numel() for parameter in model.parameters())
    if not (source / "model_index.json").exists():
        write_pipeline(model, source, arguments.shard_size)
    print(f"source: {count / 1e9:.2f} billion parameters, {size_of(source):.2f} GiB", flush=True)
    out = arguments.work / "quantized"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "msfp_cli", "quantize", str(source), "--out", str(out)]
    chance = random.Random(arguments.seed)
    for _ in range(arguments.kills):
        report("killed", run(command, kill_after=chance.uniform(4, arguments.longest)))
    ended = run(command)
    report("quantized", ended)
    if ended.code:
        sys.exit("msfp quantize failed")
    print(f"result: {size_of(out):.2f} GiB", flush=True)
    report("loaded with stock diffusers", run([sys.executable, "-c", LOAD, str(out)]))


def report(title: str, ended: Ended) -> None:
    """Print what a process took."""
    print(
        f"{title} after {ended.seconds:.0f} s: exit code {ended.code}, peak memory "
        f"{ended.peak:.2f} GiB, {ended.peak_anonymous:.2f} of it not mapped files",
        flush=True,
    )


if __name__ == "__main__":
    main()
