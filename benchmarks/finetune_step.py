"""Compare an update of `msfp finetune` with one of ordinary LoRA by peft: time and memory.

    python benchmarks/finetune_step.py [--threads N] [--rounds N] [--updates N] [--markdown FILE]

Both train the built-in pipeline's UNet: the same layers and rank, the same number of calls and rows
per update, AdamW, mean squared error. peft trains on the full-precision base; msfp trains inside
the quantizers, with a hub of two and the router, as a run with the default recipe begins. Each
measurement is the mean over some updates in a process of its own (the router learns in some of
them, not in most). The two take turns, and the medians are compared. If peft is not installed, its
row is left out. Linux only (peak memory).
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from material import add_size_options, record_options, source_of

from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.calibration.quantize import move_weights_
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.finetuning.batches import Batches
from msfp_cli.finetuning.load import Material
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.student import Student
from msfp_cli.finetuning.task import TrainingTask, training_task
from msfp_cli.finetuning.trainer import Trainer
from msfp_cli.pipelines.denoiser import call_with, find_denoisers
from msfp_cli.pipelines.loading import load_pipeline
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

WARM_UP = 3
TITLES = {"peft": "LoRA by peft, full precision", "msfp": "msfp, W4A4, hub of two"}


class Clock:
    """Measures how long updates take and what memory they need.

    Arguments:
        updates: how many to time, after a few to warm up.
    """

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.count = 0
        self.start = 0.0
        self.seconds = 0.0
        self.peak = 0.0

    def done(self) -> bool:
        """Whether all updates are timed; asked between updates."""
        self.count += 1
        if self.count == WARM_UP + 1:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
            self.start = time.perf_counter()
        if self.count == WARM_UP + self.updates + 1:
            self.seconds = (time.perf_counter() - self.start) / self.updates
            lines = Path("/proc/self/status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines)
            self.peak = int(status["VmHWM"].split()[0]) / 1024  # MiB
        return self.count > WARM_UP + self.updates


def train_msfp(calibration: Calibration, task: TrainingTask, clock: Clock) -> None:
    """Train as `msfp finetune` does with the default recipe until the clock stops it."""
    unet = find_denoisers(load_pipeline(calibration.source, "cpu"))["unet"]
    move_weights_(unet, calibration, "unet")
    student = Student(unet, calibration.table("unet"), calibration.scales["unet"], task.recipe)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "unet.safetensors"
        Trainer(student, task, path, Accelerator(cpu=True)).train(stop=clock.done)


def train_peft(calibration: Calibration, batches: Batches, clock: Clock) -> None:
    """Fine-tune the full-precision UNet by ordinary LoRA until the clock stops it."""
    from peft import LoraConfig

    recipe = FinetuneRecipe()
    unet = find_denoisers(load_pipeline(calibration.source, "cpu"))["unet"].requires_grad_(False)
    layers = [
        name for name, scheme in calibration.table("unet").items() if scheme.weight is not None
    ]
    unet.add_adapter(LoraConfig(r=recipe.rank, target_modules=layers))
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for step in itertools.count():
        if clock.done():
            return
        for lane in range(recipe.calls_per_update):
            for call in batches.batch(step, lane):
                error = call_with(unet, call.arguments, call.output) - call.output
                loss = error.square().mean() / recipe.calls_per_update
                loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def measure(which: str, work: Path, updates: int) -> None:
    """Time some updates in this process; print seconds per update and peak MiB as JSON."""
    run = Run(work)
    calibration = Calibration.load(run.calibration)
    material = Material(
        calibration=calibration,
        recording=Recording(run.recording),
        held_out=Recording(run.held_out),
        states={},
    )
    task = training_task(material, "unet", FinetuneRecipe())
    clock = Clock(updates)
    if which == "msfp":
        train_msfp(calibration, task, clock)
    else:
        train_peft(calibration, task.batches, clock)
    print(json.dumps({"seconds": clock.seconds, "peak": clock.peak}))


def take_turns(work: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Let the two take turns, each time in a process of its own, and return their medians."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    names = [name for name in TITLES if name != "peft" or importlib.util.find_spec("peft")]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            command = [sys.executable, *sys.argv, "--work", str(work), "--one", name]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
            results[name].append(json.loads(done.stdout))
            print(name, results[name][-1], file=sys.stderr)
    return {name: medians(figures) for name, figures in results.items()}


def medians(figures: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {key: statistics.median(each[key] for each in figures) for key in figures[0]}


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the table, with ratios where both were measured."""
    lines = ["| update of | seconds | peak memory, MiB |", "|---|---|---|"]
    for name, figures in results.items():
        lines.append(f"| {TITLES[name]} | {figures['seconds']:.3f} | {figures['peak']:.0f} |")
    if "peft" in results:
        base = results["peft"]
        ratios = [f"{results['msfp'][key] / base[key]:.2f}" for key in ("seconds", "peak")]
        lines.append(f"| ratio | {' | '.join(ratios)} |")
    else:
        lines.append(f"| {TITLES['peft']} | peft is not installed | |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--updates", type=int, default=16, help="timed in each turn")
    parser.add_argument("--work", type=Path, help="keep the calibrated run here")
    parser.add_argument("--markdown", type=Path, help="write the table to this file as well")
    parser.add_argument("--one", choices=tuple(TITLES), help=argparse.SUPPRESS)
    add_size_options(parser)
    return parser.parse_args()


def main() -> None:
    """Calibrate once, then compare."""
    arguments = parse()
    quiet_libraries()
    if arguments.one:
        measure(arguments.one, arguments.work, arguments.updates)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary) / "run"
        if not Run(work).calibration.exists():
            options = record_options(arguments)
            calibrate_run(Run(work), source_of(arguments), options, CalibrateRecipe())
        text = table(take_turns(work, arguments))
    print(text)
    if arguments.markdown:
        head = f"torch {torch.__version__}, {arguments.threads} threads of a CPU."
        arguments.markdown.write_text(f"{head}\n\n{text}\n")


if __name__ == "__main__":
    main()
