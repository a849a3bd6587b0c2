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
included, is set back at the start of each stage. After the table a line says whether both ways
chose the same formats and codes, and the last one what the whole way would take on a GPU, computed
from its operations. Linux only.
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
from msfp_cli.calibration.samples import CHECK_ROWS, MAX_INPUTS, ROWS
from msfp_cli.formats.objective import DAMPINGS
from msfp_cli.memory import peak_bytes, read_size
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.progress import Advance
from msfp_cli.recording.compare import calls_and_rows
from msfp_cli.recording.recipe import RecordOptions
from msfp_cli.run import Run

TESTS = Path(__file__).parents[1] / "tests"
GPU_RATE = 20e12  # float32 operations a second that the computed time of a GPU assumes
BATCH = 2  # rows of a call: a picture with guidance
CHOSEN_ON = 256  # outputs on which one of the dampings is chosen
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
        self.rows: list[tuple[str, float, int, int]] = []
        self.start = time.process_time()

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """Time a task; between two tasks there is one more, which loads and quantizes."""
        self.close("between")
        print(f"{description}: {total} steps", file=sys.stderr, flush=True)
        yield lambda steps, note="": None
        self.close(description, total or 0)

    def log(self, line: str) -> None:
        """Print a line."""
        print(line, file=sys.stderr, flush=True)

    def close(self, title: str, total: int = 0) -> None:
        """End a stage of so many steps, and set the count of memory back."""
        now = time.process_time()
        self.rows.append((title, now - self.start, peak_bytes(), total))
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


def conditions(arguments: argparse.Namespace) -> str:
    """Say what was calibrated, and how."""
    quick = ", two formats, no lift" if arguments.quick else ""
    return (
        f"Size {arguments.size}, latents of {arguments.sample_size}, {arguments.num_images} "
        f"pictures, {arguments.steps} steps{quick}; bounded: --max-memory {arguments.max_memory}; "
        f"torch {torch.__version__}, threads on a CPU: {torch.get_num_threads()}."
    )


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


def compare(work: Path, found: dict[str, list[Any]]) -> str:
    """Say which part of the memory the bounded way takes, and whether both ways chose the same."""
    peaks = {way: max(row[2] for row in rows) for way, rows in found.items()}
    share = peaks["bounded"] / peaks["whole"]
    whole, bounded = (Calibration.load(Run(work / way).calibration) for way in WAYS)
    same = whole.identity() == bounded.identity() and whole.layers == bounded.layers
    return (
        f"peak memory of the bounded way: {share:.2f} of the whole way's\n\n"
        f"same formats, scales, codes and errors of layers: {same}"
    )


def operations(work: Path, rows: list[Any]) -> str:
    """Count the floating-point operations of the whole way, search and observation left out."""
    calibration = Calibration.load(Run(work / "whole").calibration)
    layers = calibration.layers["unet"]
    call = 2 * sum(each.multiply_adds for each in layers.values())
    steps = {row[0].split()[0]: row[3] for row in rows}
    rounded = {name: each for name, each in layers.items() if each.compensation}
    replayed = steps["Compensating"] - len(rounded)
    _, rows_measured = calls_and_rows(sum(each.num_weights for each in layers.values()), 1)
    # On average half of a call comes after the layer, and is repeated for some of its rows.
    measured = steps.get("Measuring", 0) / 2 * min(rows_measured, BATCH) / BATCH
    calls = replayed + steps["Observing"] * 2 + steps["Checking"] + measured
    summed = 0.0
    factored = 0.0
    for name, each in rounded.items():
        outputs = len(calibration.scales["unet"][name])
        inputs = each.num_weights // outputs
        size = part_of(inputs)
        positions = each.multiply_adds / each.num_weights * steps["Observing"]
        summed += 2 * min(positions, ROWS) * inputs * (size / 2 + min(size, 2 * outputs))
        factored += rounding(inputs, outputs)
    total = calls * call + summed + factored
    return (
        f"Counted: {calls:.0f} calls of {call / 1e12:.2f} TFLOP, sums {summed / 1e12:.0f} TFLOP, "
        f"rounding {factored / 1e12:.0f} TFLOP. A GPU with {GPU_RATE / 1e12:.0f} TFLOP/s would "
        f"take {total / GPU_RATE:.0f} s for these (computed, not measured; the search of formats "
        "is not counted)."
    )


def part_of(inputs: int) -> float:
    """Return the inputs of each sum of a layer, on average."""
    return inputs / -(-inputs // MAX_INPUTS)


def rounding(inputs: int, outputs: int) -> float:
    """Return the operations that rounding a weight takes: factors, solutions, products, checks."""
    size = part_of(inputs)
    some = min(outputs, CHOSEN_ON)
    chosen = len(DAMPINGS) * (size**3 / 3 + 3 * size**2 * some + 2 * CHECK_ROWS * size * some)
    whole = inputs / size * (size**3 / 3 + 3 * size**2 * outputs)
    return chosen + whole + 3 * 2 * CHECK_ROWS * inputs * outputs


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
    found = {way: run(arguments, way) for way in ways}
    lines = [conditions(arguments), "", table(found)]
    if not arguments.only:
        lines += ["", compare(arguments.work, found)]
    if "whole" in found:
        lines += ["", operations(arguments.work, found["whole"])]
    print("\n".join(lines))
    if arguments.markdown:
        put(arguments.markdown, "calibration_memory.py", "\n".join(lines))


if __name__ == "__main__":
    main()
