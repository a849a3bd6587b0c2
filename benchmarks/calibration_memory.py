"""Memory and time of `msfp calibrate`, stage by stage: the whole model loaded, and bounded memory.

    python benchmarks/calibration_memory.py --work DIR [--max-memory 4GiB] [--size sd15]
        [--sample-size N] [--quick] [--num-images N] [--steps N] [--sensitivity-calls N]
        [--only whole|bounded] [--markdown FILE]

The denoiser has the configuration of Stable Diffusion 1.5 (860 million parameters) and random
weights in float32; `--size tiny` tries the script. The other parts of its pipeline are tiny and
random, so it is called with random inputs: latents of 64x64, two rows (one picture with guidance).
`--sample-size 16` calls it on smaller latents, which shortens what grows with the calls and their
memory, and leaves what grows with the weights as it is. `--quick` chooses among two formats and
lifts no layer: the same memory in less time.

Each way runs in a process of its own. Time is that of its threads on a processor, so that others
may use the machine meanwhile. The kernel's count of the largest resident size, mapped files
included, is set back at the start of each stage. The last line says whether both ways chose the
same formats and codes. Linux only.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from execution import SD15
from page import put

from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.memory import peak_bytes, read_size
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.progress import Advance
from msfp_cli.recording.recipe import RecordOptions
from msfp_cli.run import Run

TESTS = Path(__file__).parents[1] / "tests"
QUICK = CalibrateRecipe(formats="e2m1,ue2m2", lift=0.0)
WAYS = ("whole", "bounded")
NOTES = {
    "Recording": "calls",
    "Observing": "calls, at most those of 80 pictures",
    "Searching": "weights",
    "Measuring": "layers x calls, four by default",
    "Compensating": "replays of the observed calls, one for each group of layers; weights",
    "Checking": "calls that are held out",
}


def write_pipeline(directory: Path, size: str, sample_size: int) -> None:
    """Write a text-to-image pipeline whose UNet has the size and whose other parts are tiny."""
    sys.path.append(str(TESTS))
    from tiny_pipelines import TEXT_WIDTH, build_tiny

    pipe = build_tiny("StableDiffusionPipeline")
    if size == "sd15":
        torch.manual_seed(0)
        text = {"encoder_hid_dim": TEXT_WIDTH, "encoder_hid_dim_type": "text_proj"}
        pipe.unet = UNet2DConditionModel(**{**SD15, "sample_size": sample_size}, **text)
    pipe.save_pretrained(directory)


class Stages:
    """A progress that keeps the processor's time and the largest resident size of each task."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []
        self.start = time.process_time()

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """Time a task; between two tasks there is one more, which loads and quantizes."""
        self.close("between")
        print(f"{description}: {total} steps", file=sys.stderr, flush=True)
        yield lambda steps, note="": None
        self.close(description)

    def log(self, line: str) -> None:
        """Print a line."""
        print(line, file=sys.stderr, flush=True)

    def close(self, title: str) -> None:
        """End a stage and set the count of memory back."""
        now = time.process_time()
        self.rows.append((title, now - self.start, peak_bytes()))
        print(f"{title}: {self.rows[-1]}", file=sys.stderr, flush=True)
        Path("/proc/self/clear_refs").write_text("5")
        self.start = now


def measure(arguments: argparse.Namespace, way: str) -> None:
    """Calibrate in this process, and print the stages as JSON."""
    stages = Stages()
    options = RecordOptions(
        num_images=arguments.num_images,
        num_inference_steps=arguments.steps,
        batch_size=1,
        prompts=tuple("a cat" for _ in range(arguments.num_images)),
    )
    calls = {"sensitivity_calls": arguments.sensitivity_calls}
    calibrate_run(
        Run(arguments.work / way),
        ModelSource(model=str(arguments.work / "source")),
        options,
        replace(QUICK, **calls) if arguments.quick else CalibrateRecipe(**calls),
        device="cpu",
        max_memory=read_size(arguments.max_memory) if way == "bounded" else None,
        overwrite=True,
        progress=stages,
    )
    stages.close("between")
    print(json.dumps(stages.rows))


def run(arguments: argparse.Namespace, way: str) -> list[Any]:
    """Calibrate in a fresh process and return its stages."""
    command = [sys.executable, *sys.argv, "--measure", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def table(found: dict[str, list[Any]]) -> str:
    """Return the stages of each way side by side."""
    titles = [f"{way}: {unit}" for way in found for unit in ("processor seconds", "GiB")]
    lines = [" | ".join(["| stage", *titles, "grows with |"])]
    lines.append("|---" * (len(titles) + 2) + "|")
    names = list(dict.fromkeys(row[0] for rows in found.values() for row in rows))
    for name in [*(name for name in names if name != "between"), "between"]:
        cells = list[str]()
        for rows in found.values():
            own = [row for row in rows if row[0] == name]
            cells += [f"{sum(row[1] for row in own):.0f}"]
            cells += [f"{max(row[2] for row in own) / 2**30:.2f}"]
        title = "loading, quantizing" if name == "between" else name
        lines.append(" | ".join([f"| {title}", *cells, f"{NOTES.get(name.split()[0], '')} |"]))
    cells = list[str]()
    for rows in found.values():
        cells += [f"{sum(row[1] for row in rows):.0f}"]
        cells += [f"{max(row[2] for row in rows) / 2**30:.2f}"]
    lines.append(" | ".join(["| all", *cells, " |"]))
    return "\n".join(lines)


def compare(work: Path) -> str:
    """Say whether both ways chose the same."""
    whole, bounded = (Calibration.load(Run(work / way).calibration) for way in WAYS)
    same = whole.identity() == bounded.identity() and whole.layers == bounded.layers
    return f"same formats, scales, codes and errors of layers: {same}"


def main() -> None:
    """Write the pipeline, calibrate it in both ways, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--max-memory", default="4GiB")
    parser.add_argument("--size", choices=("sd15", "tiny"), default="sd15")
    parser.add_argument("--sample-size", type=int, default=64, help="of the latents")
    parser.add_argument("--num-images", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sensitivity-calls", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="two formats, no lift")
    parser.add_argument("--only", choices=WAYS)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments, arguments.measure)
        return
    source = arguments.work / "source"
    if not (source / "model_index.json").exists():
        write_pipeline(source, arguments.size, arguments.sample_size)
    ways = [arguments.only] if arguments.only else WAYS
    lines = [table({way: run(arguments, way) for way in ways})]
    if not arguments.only:
        lines += ["", compare(arguments.work)]
    print("\n".join(lines))
    if arguments.markdown:
        put(arguments.markdown, "calibration_memory.py", "\n".join(lines))


if __name__ == "__main__":
    main()
