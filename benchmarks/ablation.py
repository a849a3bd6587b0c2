"""The ladder: what each part of the method adds, on the built-in pipeline, W4A4.

    python benchmarks/ablation.py --work DIR [--jobs 2] [--updates 400] [--seeds 3] [--markdown
    FILE]

Four rungs: signed formats + LoRA; mixed signs + LoRA; mixed signs + TALoRA (a hub of two); the same
+ DFA. All have the default recipe but one call per update, so that two trainings share two cores;
the same number of updates; and the learning rate that does best on the run's own held-out calls for
seed 0 (the search is the same for every rung). A rung is trained with several seeds (first values
and order of the data) and tested on 200 pictures of prompts that neither calibration nor training
has seen, 110 of them and most of these twice: relative squared error of the denoiser's output along
the full-precision trajectories, of the final latents, and PSNR of the pictures, each against full
precision from equal noise. The calibrated models before training are there to compare.

With --variants the last rung is trained again with one setting changed at a time, to see what each
is worth.

Everything that was measured is kept in --work, so the script resumes, and adds only what is
missing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from material import UNSEEN
from safetensors.torch import load_file, save_file

from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.files import replace_file, write_text
from msfp_cli.finetuning.finetune import finetune_run
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.result import load_finetunings
from msfp_cli.pipelines.denoiser import find_denoisers
from msfp_cli.pipelines.loading import (
    BUILT_IN,
    BUILT_IN_GUIDANCE,
    BUILT_IN_STEPS,
    default_prompts,
    load_pipeline,
    quiet_libraries,
)
from msfp_cli.pipelines.sampling import call_pipeline
from msfp_cli.pipelines.source import ModelSource, Sampling
from msfp_cli.recording.compare import output_error
from msfp_cli.recording.recipe import RecordOptions, RecordRecipe
from msfp_cli.recording.record import record_calls
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

SOURCE = ModelSource(model=BUILT_IN)
NUM_TESTS, TEST_SEED = 200, 9_000_000
KNOWN = tuple(prompt for prompt in default_prompts(BUILT_IN) if prompt not in UNSEEN)
RECORD = RecordOptions(prompts=KNOWN, num_images=400)
RATES = (4e-2, 2e-2)
RUNGS = {
    "signed, LoRA": ("signed", {"hub_size": 1, "loss": "plain"}),
    "mixed, LoRA": ("mixed", {"hub_size": 1, "loss": "plain"}),
    "mixed, TALoRA": ("mixed", {"hub_size": 2, "loss": "plain"}),
    "mixed, TALoRA, DFA": ("mixed", {"hub_size": 2, "loss": "dfa"}),
}
FULL = "mixed, TALoRA, DFA"
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"hub_size": 1},
    {"hub_size": 4},
    {"rank": 16},
    {"init": "svd"},
    {"router_learning_rate": 1e-3},
    {"input_learning_rate": 0.0},
    {"loss_power": 1.0},
    {"timesteps": "uniform"},
)
FIGURES = ("output", "latents", "psnr")


@dataclass(frozen=True)
class Job:
    """One training: a rung (or a variant of its own), a learning rate, a seed."""

    rung: str
    rate: float
    seed: int
    updates: int
    settings: str = "{}"  # JSON of further fields of the recipe

    @property
    def name(self) -> str:
        """A directory's name."""
        more = "".join(
            f"-{key}={value}" for key, value in sorted(json.loads(self.settings).items())
        )
        return f"{self.rung.replace(', ', '-')}-{self.updates}-{self.rate:g}-{self.seed}{more}"

    def recipe(self) -> FinetuneRecipe:
        """Return what is trained."""
        changes: dict[str, Any] = {**RUNGS[self.rung][1], **json.loads(self.settings)}
        every = max(1, self.updates // 2)
        changes |= {
            "steps": self.updates,
            "learning_rate": self.rate,
            "seed": self.seed,
            "evaluate_every": every,
        }
        return replace(FinetuneRecipe(calls_per_update=1), **changes)


def calibrated(work: Path, formats: str) -> Run:
    """Calibrate with some formats, once; all from one recording."""
    run = Run(work / f"calibrated-{formats}")
    if not run.calibration.exists():
        if formats != "mixed":
            share(calibrated(work, "mixed"), run, "recording", "held-out")
        calibrate_run(run, SOURCE, RECORD, CalibrateRecipe(formats=formats), device="cpu")
    return run


def share(base: Run, run: Run, *places: str) -> None:
    """Let a run have what another one holds."""
    run.directory.mkdir(parents=True, exist_ok=True)
    for place in places:
        if not (run.directory / place).exists():
            (run.directory / place).symlink_to((base.directory / place).resolve())


def references(work: Path) -> Recording:
    """Record the full-precision trajectories of the tests, and keep their final latents and pictures, once."""
    conditions = test_prompts()
    recipe = RecordRecipe(
        conditions=conditions,
        num_inference_steps=BUILT_IN_STEPS,
        guidance_scale=BUILT_IN_GUIDANCE,
        seed=TEST_SEED,
        batch_size=20,
    )
    pipe = load_pipeline(SOURCE, "cpu")
    recording = record_calls(pipe, SOURCE, recipe, work / "tests")
    if not (work / "full-precision.safetensors").exists():
        latents, pictures = sample(pipe)
        with replace_file(work / "full-precision.safetensors") as temporary:
            save_file({"latents": latents, "pictures": pictures}, temporary)
    return recording


def test_prompts() -> tuple[str, ...]:
    """Return 200 prompts: those that calibration does not use, over again with other noise."""
    return tuple(UNSEEN[i % len(UNSEEN)] for i in range(NUM_TESTS))


@torch.no_grad()
def sample(pipe: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401 (a diffusers pipeline)
    """Return the final latents and the pictures (0..1) of all tests."""
    prompts, latents, pictures = test_prompts(), [], []
    sampling = Sampling(
        num_inference_steps=BUILT_IN_STEPS, guidance_scale=BUILT_IN_GUIDANCE, seed=TEST_SEED
    )
    for first in range(0, NUM_TESTS, 20):
        batch = call_pipeline(
            pipe, prompts[first : first + 20], sampling, first=first, output_type="latent"
        )
        latents.append(batch)
        decoded = pipe.vae.decode(batch / pipe.vae.config.scaling_factor).sample
        pictures.append(pipe.image_processor.postprocess(decoded, output_type="pt"))
    return torch.cat(latents), torch.cat(pictures)


def measure(work: Path, pipe: Any) -> dict[str, float]:  # noqa: ANN401 (a diffusers pipeline)
    """Return the test figures of a quantized pipeline."""
    latents, pictures = sample(pipe)
    wanted = load_file(work / "full-precision.safetensors")
    error = (pictures - wanted["pictures"]).square().flatten(1).mean(dim=1)
    return {
        "output": output_error(
            find_denoisers(pipe)["unet"], Recording(work / "tests").calls("unet")
        ).relative(),
        "latents": float(
            (latents - wanted["latents"]).square().sum() / wanted["latents"].square().sum()
        ),
        "psnr": float((-10 * error.clamp_min(1e-10).log10()).mean()),
    }


def train(work: Path, job: Job) -> None:
    """Train a job, or go on with it."""
    base, run = calibrated(work, RUNGS[job.rung][0]), Run(work / "jobs" / job.name)
    share(base, run, "recording", "held-out", "calibration")
    finetune_run(run, job.recipe(), device="cpu")


def held_out_error(work: Path, job: Job) -> float:
    """Return the lowest error of a trained job on the run's own held-out calls."""
    run = Run(work / "jobs" / job.name)
    return load_finetunings(run, Calibration.load(run.calibration))["unet"].best.error


def test(work: Path, job: Job) -> None:
    """Measure a trained job, once."""
    result = work / "results" / f"{job.name}.json"
    if result.exists():
        return
    run = Run(work / "jobs" / job.name)
    calibration = Calibration.load(run.calibration)
    pipe = load_calibrated(calibration, "cpu", load_finetunings(run, calibration))
    write_text(result, json.dumps(measure(work, pipe)))


def test_calibrated(work: Path, formats: str) -> None:
    """Measure a calibrated pipeline before training, once."""
    result = work / "results" / f"calibrated-{formats}.json"
    if not result.exists():
        write_text(
            result,
            json.dumps(
                measure(
                    work,
                    load_calibrated(Calibration.load(calibrated(work, formats).calibration), "cpu"),
                )
            ),
        )


def in_processes(arguments: argparse.Namespace, tasks: Sequence[list[str]]) -> None:
    """Run this script once per task, a few at a time, each with its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def run(task: list[str]) -> None:
        command = [sys.executable, __file__, "--work", str(arguments.work), *task]
        subprocess.run(command, env=environment, check=True)
        print("done:", *task, file=sys.stderr, flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(run, tasks))


def task(action: str, job: Job) -> list[str]:
    """Return the arguments that make another process do a job."""
    return [f"--{action}", job.rung, f"{job.rate}", f"{job.seed}", f"{job.updates}", job.settings]


def ladder(arguments: argparse.Namespace) -> str:
    """Search the learning rates, train all seeds, test, and return the table."""
    work, updates = arguments.work, arguments.updates
    for formats in ("signed", "mixed"):
        calibrated(work, formats)
    references(work)
    grid = {rung: [Job(rung, rate, 0, updates) for rate in RATES] for rung in RUNGS}
    in_processes(
        arguments,
        [task("train", job) for jobs in zip(*grid.values(), strict=True) for job in reversed(jobs)],
    )
    best = {
        rung: min(jobs, key=lambda job: held_out_error(work, job)) for rung, jobs in grid.items()
    }
    seeded = {
        rung: [replace(best[rung], seed=seed) for seed in range(arguments.seeds)] for rung in RUNGS
    }
    jobs = [job for same in zip(*seeded.values(), strict=True) for job in same]
    in_processes(arguments, [task("train", job) for job in jobs])
    befores = [["--test-calibrated", formats] for formats in ("signed", "mixed")]
    in_processes(arguments, befores + [task("test", job) for job in jobs])
    lines = [
        "| | learning rate | output error | final latents' error | PSNR, dB |",
        "|---|---|---|---|---|",
    ]
    for formats in ("signed", "mixed"):
        lines.append(f"| {formats}, calibrated only | | {row(work, [f'calibrated-{formats}'])} |")
    for rung in RUNGS:
        lines.append(
            f"| {rung} | {best[rung].rate:g} | {row(work, [job.name for job in seeded[rung]])} |"
        )
    return "\n".join(lines)


def variants(arguments: argparse.Namespace) -> str:
    """Change one setting of the full recipe at a time, one seed each, and return the table."""
    work = arguments.work
    rate = min(RATES, key=lambda rate: held_out_error(work, Job(FULL, rate, 0, arguments.updates)))
    jobs = [Job(FULL, rate, 0, arguments.updates, json.dumps(changes)) for changes in VARIANTS]
    in_processes(arguments, [task("train", job) for job in jobs])
    in_processes(arguments, [task("test", job) for job in jobs])
    lines = ["| change | output error | final latents' error | PSNR, dB |", "|---|---|---|---|"]
    for changes, job in zip(VARIANTS, jobs, strict=True):
        text = ", ".join(f"{name} {value}" for name, value in changes.items()) or "none"
        lines.append(f"| {text} | {row(work, [job.name])} |")
    return "\n".join(lines)


def row(work: Path, names: Sequence[str]) -> str:
    """Return the figures of some results: mean, and spread (standard deviation) where there are several."""
    results = [json.loads((work / "results" / f"{name}.json").read_text()) for name in names]
    cells = []
    for figure in FIGURES:
        values, digits = [result[figure] for result in results], 2 if figure == "psnr" else 5
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
    return " | ".join(cells)


def main() -> None:
    """Do one job, or the whole ladder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--variants", action="store_true", help="then change one setting of the last rung at a time"
    )
    parser.add_argument("--markdown", type=Path, help="write the table to this file as well")
    for action in ("--train", "--test"):
        parser.add_argument(
            action, nargs=5, metavar=("RUNG", "RATE", "SEED", "UPDATES", "SETTINGS")
        )
    parser.add_argument("--test-calibrated", metavar="FORMATS")
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.test_calibrated:
        return test_calibrated(arguments.work, arguments.test_calibrated)
    if given := arguments.train or arguments.test:
        job = Job(given[0], float(given[1]), int(given[2]), int(given[3]), given[4])
        return train(arguments.work, job) if arguments.train else test(arguments.work, job)
    table = ladder(arguments)
    if arguments.variants:
        table += f"\n\n{FULL}, one change at a time, seed 0:\n\n{variants(arguments)}"
    print(table)
    if arguments.markdown:
        head = f"{arguments.updates} updates, {arguments.seeds} seeds, {NUM_TESTS} tests; torch {torch.__version__}, CPU."
        arguments.markdown.write_text(f"{head}\n\n{table}\n")
    return None


if __name__ == "__main__":
    main()
