"""Measure what the seal costs: load an export of Stable Diffusion 1.5's size, checked and not.

    python benchmarks/seal.py

The weights are random, in 4 bits for the UNet and in float32 for the VAE and the text encoder. The
two ways take turns in one process, and the files are in the page cache. A thread hashes the files
beside those that lay out weights, so it matters whether a thread of torch that waits sleeps, as in
msfp's command line, or spins, as elsewhere: there is a process for each.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from msfp_cli.checkpoint.export import save_pipeline
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.checkpoint.quantizer import MSFPConfig, mark_quantized_
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid
from msfp_cli.layers.replace import find_layers, store_layers_
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.pipelines.loading import built_in_directory

SCHEME = LayerScheme(
    weight=FloatFormat.parse("e2m1"), input=Grid(FloatFormat.parse("e2m1"), scale=0.25)
)
TINY: dict[str, dict[str, Any]] = {
    "unet": {"sample_size": 8, "cross_attention_dim": 32, "block_out_channels": (32,) * 4},
    "vae": {"block_out_channels": (32,) * 4},
    "text": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
}


def make_pipeline(sizes: dict[str, dict[str, Any]]) -> StableDiffusionPipeline:
    """Return Stable Diffusion 1.5 with random weights, and other sizes where they are given."""
    torch.manual_seed(0)
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    }
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    unet = {"sample_size": 64, "cross_attention_dim": 768}
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**{**vae, **sizes.get("vae", {})}),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(**{**text, "num_hidden_layers": 12, **sizes.get("text", {})})
        ),
        tokenizer=CLIPTokenizer.from_pretrained(built_in_directory() / "tokenizer"),
        unet=UNet2DConditionModel(**{**unet, **sizes.get("unet", {})}),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_export(sizes: dict[str, dict[str, Any]], directory: Path) -> None:
    """Write an export; every layer of the UNet but the first and the last has 4 bits."""
    pipe = make_pipeline(sizes)
    layers = find_layers(pipe.unet)
    table = {name: SCHEME for name in layers if name not in ("conv_in", "conv_out")}
    scales = {name: layers[name].weight.detach().flatten(1).abs().amax(1) / 12 for name in table}
    del layers
    store_layers_(pipe.unet, table, scales)
    described = {name: scheme.to_json() for name, scheme in table.items()}
    mark_quantized_(pipe.unet, MSFPConfig(layers=described))
    save_pipeline(pipe, directory)


def seconds_to_load(directory: Path, *, check: bool) -> float:
    """Load the export once."""
    start = time.perf_counter()
    MSFPPipeline.from_pretrained(directory, device="cpu", check=check)
    return time.perf_counter() - start


def measure(directory: Path, loads: int) -> str:
    """Load in turns, and return the medians."""
    quiet_libraries()
    times: dict[bool, list[float]] = {True: [], False: []}
    seconds_to_load(directory, check=True)
    for turn in range(loads):
        for check in (True, False) if turn % 2 else (False, True):
            times[check].append(seconds_to_load(directory, check=check))
    checked = statistics.median(times[True])
    unchecked = statistics.median(times[False])
    return (
        f"not checked: {unchecked:.2f} s ({min(times[False]):.2f} to {max(times[False]):.2f})\n"
        f"checked:     {checked:.2f} s ({min(times[True]):.2f} to {max(times[True]):.2f})\n"
        f"ratio: {checked / unchecked:.3f}"
    )


def measure_with(policy: str, directory: Path, loads: int) -> str:
    """Do as `measure` in a new process whose waiting threads sleep or spin."""
    environment = {**os.environ, **({"OMP_WAIT_POLICY": policy} if policy else {})}
    command = [sys.executable, __file__, "--directory", str(directory), "--loads", str(loads)]
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        raise SystemExit(finished.returncode)
    return finished.stdout.strip()


def main() -> None:
    """Make the export, load it in turns, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny pipeline")
    parser.add_argument("--loads", type=int, default=5, help="loads of each way")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.directory:
        print(measure(arguments.directory, arguments.loads))
        return
    os.environ.pop("OMP_WAIT_POLICY", None)
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work) / "export"
        make_export(TINY if arguments.tiny else {}, directory)
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        print(f"an export of {size / 2**30:.2f} GiB, {torch.get_num_threads()} threads")
        for title, policy in (("torch's default, spin", ""), ("sleep, as in msfp", "passive")):
            print(f"threads that wait: {title}", flush=True)
            print(measure_with(policy, directory, arguments.loads))


if __name__ == "__main__":
    main()
