"""Compare one update of `msfp finetune` with one of an ordinary LoRA fine-tune by peft: time and memory.

    python benchmarks/finetune_step.py [--threads N] [--rounds N] [--updates N] [--markdown FILE]

The built-in pipeline's UNet, the same layers, rank 16, the same calls per update (two, as by default), AdamW,
mean squared error. peft trains on the full-precision base; msfp trains inside the quantizers, with a hub of two and the
router. Each measurement is the mean over some updates in a process of its own (in some the router learns, in most it
does not), the two take turns, and the medians are compared. Linux only (peak memory).
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
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from material import RECORD

from msfp_cli.batches import Batches
from msfp_cli.calibration import Calibration
from msfp_cli.chain import calibrate_run
from msfp_cli.denoiser import call_with, find_denoisers
from msfp_cli.finetune import timestep_weights
from msfp_cli.loading import BUILT_IN, load_pipeline, quiet_libraries
from msfp_cli.recipe import CalibrateRecipe, FinetuneRecipe, ModelSource
from msfp_cli.recording import Recording
from msfp_cli.run import Run
from msfp_cli.student import Student
from msfp_cli.training import Trainer

SOURCE = ModelSource(model=BUILT_IN)
WARM_UP = 3


def msfp_update(calibration: Calibration, batches: Batches, recording: Recording) -> Callable[[], object]:
    """Return one update of msfp with the default recipe."""
    recipe = FinetuneRecipe()
    unet = find_denoisers(load_pipeline(SOURCE, "cpu"))["unet"]
    student = Student(unet, calibration.table("unet"), calibration.scales["unet"], recipe, 1.0)
    weights = timestep_weights(batches.timesteps, recording.factors(), recipe, 1.0)
    return Trainer(student, batches, weights, [], recipe, Path(os.devnull), "", Accelerator(cpu=True)).update


def peft_update(calibration: Calibration, batches: Batches) -> Callable[[], object]:
    """Return one update of an ordinary LoRA fine-tune of the full-precision UNet."""
    from peft import LoraConfig

    unet = find_denoisers(load_pipeline(SOURCE, "cpu"))["unet"].requires_grad_(False)
    layers = [name for name, parameters in calibration.table("unet").items() if parameters.weight is not None]
    unet.add_adapter(LoraConfig(r=FinetuneRecipe().rank, target_modules=layers))
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer, step = torch.optim.AdamW(trained, lr=1e-4), itertools.count()

    def update() -> None:
        now, lanes = next(step), FinetuneRecipe().lanes
        for call in (call for lane in range(lanes) for call in batches.batch(now, lane)):
            loss = (call_with(unet, call.arguments) - call.output).square().mean() / lanes
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def measure(which: str, work: Path, updates: int) -> None:
    """Time some updates in this process and print seconds per update and peak memory in MiB as JSON."""
    quiet_libraries()
    run = Run(work)
    recording, calibration = Recording(run.recording), run.load_calibration()
    recipe = FinetuneRecipe()
    batches = Batches(recording, "unet", batch_size=recipe.batch_size, lanes=recipe.lanes, seed=recipe.seed)
    update = msfp_update(calibration, batches, recording) if which == "msfp" else peft_update(calibration, batches)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    seconds = []
    for _ in range(WARM_UP + updates):
        start = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - start)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024
    print(json.dumps({"seconds": statistics.mean(seconds[WARM_UP:]), "peak": peak}))


def compare(work: Path, rounds: int, updates: int, threads: int) -> str:
    """Let the two take turns, and return a table of medians."""
    seen: dict[str, list[dict[str, float]]] = {"peft": [], "msfp": []}
    for _ in range(rounds):
        for which, results in seen.items():
            command = [sys.executable, __file__, "--one", which, "--work", str(work), "--updates", str(updates)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            results.append(json.loads(answer))
            print(which, answer.strip(), file=sys.stderr)
    lines = ["| update of | seconds | peak memory, MiB |", "|---|---|---|"]
    median = {w: {k: statistics.median(r[k] for r in results) for k in results[0]} for w, results in seen.items()}
    for which, name in (("peft", "LoRA by peft, full precision"), ("msfp", "msfp, W4A4, hub of two")):
        lines.append(f"| {name} | {median[which]['seconds']:.3f} | {median[which]['peak']:.0f} |")
    ratios = [f"{median['msfp'][key] / median['peft'][key]:.2f}" for key in ("seconds", "peak")]
    return "\n".join([*lines, f"| ratio | {ratios[0]} | {ratios[1]} |"])


def main() -> None:
    """Calibrate once, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        arguments.markdown.write_text(f"torch {torch.__version__}, {arguments.threads} threads of a CPU.\n\n{table}\n")
    return None


if __name__ == "__main__":
    main()
