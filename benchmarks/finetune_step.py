"""Compare one update of `msfp finetune` with one of an ordinary LoRA fine-tune by peft: time and memory.

    python benchmarks/finetune_step.py [--threads N] [--rounds N] [--updates N] [--markdown FILE]

The built-in pipeline's UNet, the same layers and rank, the same number of calls and rows per
update, AdamW, mean squared error. peft trains on the full-precision base; msfp trains inside the
quantizers, with a hub of two and the router, from the beginning of a run with the default recipe.
Each measurement is the mean over some updates in a process of its own (in some the router learns,
in most it does not), the two take turns, and the medians are compared. Linux only (peak memory).
"""

import argparse
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
from material import RECORD

from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.finetuning.batches import Batches
from msfp_cli.finetuning.finetune import timestep_weights
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.student import Student
from msfp_cli.finetuning.trainer import Trainer
from msfp_cli.pipelines.denoiser import call_with, find_denoisers
from msfp_cli.pipelines.loading import BUILT_IN, load_pipeline, quiet_libraries
from msfp_cli.pipelines.source import ModelSource
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

SOURCE = ModelSource(model=BUILT_IN)
WARM_UP = 3


class Clock:
    """Notes how long updates take and what memory they need.

    Arguments:
        updates: how many to time, after a few to warm up.
    """

    def __init__(self, updates: int) -> None:
        self.updates, self.asked = updates, 0
        self.start = self.seconds = self.peak = 0.0

    def done(self) -> bool:
        """Whether all updates are timed; asked between updates."""
        self.asked += 1
        if self.asked == WARM_UP + 1:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
            self.start = time.perf_counter()
        if self.asked == WARM_UP + self.updates + 1:
            self.seconds = (time.perf_counter() - self.start) / self.updates
            status = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
            )
            self.peak = int(status["VmHWM"].split()[0]) / 1024  # MiB
        return self.asked > WARM_UP + self.updates


def train_msfp(
    run: Run, calibration: Calibration, recording: Recording, batches: Batches, clock: Clock
) -> None:
    """Train as `msfp finetune` does with the default recipe until the clock stops it."""
    recipe = FinetuneRecipe()
    unet = find_denoisers(load_pipeline(SOURCE, "cpu"))["unet"]
    student = Student(unet, calibration.table("unet"), calibration.scales["unet"], recipe, 1.0)
    weights = timestep_weights(batches.timesteps, recording.factors(), recipe, 1.0)
    held_out = list(Recording(run.held_out).calls("unet"))
    with tempfile.TemporaryDirectory() as kept:
        path = Path(kept) / "unet.safetensors"
        Trainer(student, batches, weights, held_out, recipe, path, "", Accelerator(cpu=True)).train(
            stop=clock.done
        )


def train_peft(calibration: Calibration, batches: Batches, clock: Clock) -> None:
    """Fine-tune the full-precision UNet by ordinary LoRA until the clock stops it."""
    from peft import LoraConfig

    recipe = FinetuneRecipe()
    unet = find_denoisers(load_pipeline(SOURCE, "cpu"))["unet"].requires_grad_(False)
    layers = [
        name for name, scheme in calibration.table("unet").items() if scheme.weight is not None
    ]
    unet.add_adapter(LoraConfig(r=recipe.rank, target_modules=layers))
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for step in itertools.count():
        if clock.done():
            return
        for call in (
            call for lane in range(recipe.calls_per_update) for call in batches.batch(step, lane)
        ):
            loss = (
                call_with(unet, call.arguments, call.output) - call.output
            ).square().mean() / recipe.calls_per_update
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def measure(which: str, work: Path, updates: int) -> None:
    """Time some updates in this process and print seconds per update and peak memory in MiB as JSON."""
    quiet_libraries()
    run = Run(work)
    recording, calibration = Recording(run.recording), Calibration.load(run.calibration)
    recipe, clock = FinetuneRecipe(), Clock(updates)
    batches = Batches(
        recording,
        "unet",
        batch_size=recipe.batch_size,
        lanes=recipe.calls_per_update,
        seed=recipe.seed,
    )
    if which == "msfp":
        train_msfp(run, calibration, recording, batches, clock)
    else:
        train_peft(calibration, batches, clock)
    print(json.dumps({"seconds": clock.seconds, "peak": clock.peak}))


def compare(work: Path, rounds: int, updates: int, threads: int) -> str:
    """Let the two take turns, and return a table of medians."""
    seen: dict[str, list[dict[str, float]]] = {"peft": [], "msfp": []}
    for _ in range(rounds):
        for which, results in seen.items():
            command = [
                sys.executable,
                __file__,
                "--one",
                which,
                "--work",
                str(work),
                "--updates",
                str(updates),
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            answer = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            ).stdout
            results.append(json.loads(answer))
            print(which, answer.strip(), file=sys.stderr)
    lines = ["| update of | seconds | peak memory, MiB |", "|---|---|---|"]
    median = {
        w: {k: statistics.median(r[k] for r in results) for k in results[0]}
        for w, results in seen.items()
    }
    for which, name in (
        ("peft", "LoRA by peft, full precision"),
        ("msfp", "msfp, W4A4, hub of two"),
    ):
        lines.append(f"| {name} | {median[which]['seconds']:.3f} | {median[which]['peak']:.0f} |")
    ratios = [f"{median['msfp'][key] / median['peft'][key]:.2f}" for key in ("seconds", "peak")]
    return "\n".join([*lines, f"| ratio | {ratios[0]} | {ratios[1]} |"])


def main() -> None:
    """Calibrate once, then compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--updates", type=int, default=16, help="timed in each turn")
    parser.add_argument("--work", type=Path, help="keep the calibrated run here")
    parser.add_argument("--markdown", type=Path, help="write the table to this file as well")
    parser.add_argument("--one", choices=("msfp", "peft"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return measure(arguments.one, arguments.work, arguments.updates)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary) / "run"
        if not Run(work).calibration.exists():
            calibrate_run(Run(work), SOURCE, RECORD, CalibrateRecipe())
        table = compare(work, arguments.rounds, arguments.updates, arguments.threads)
    print(table)
    if arguments.markdown:
        arguments.markdown.write_text(
            f"torch {torch.__version__}, {arguments.threads} threads of a CPU.\n\n{table}\n"
        )
    return None


if __name__ == "__main__":
    main()
