"""The ladder: what each part of the method adds.

    python benchmarks/ablation.py --work DIR [--preset paper] [--bits 4] [--jobs 2] [--updates 400]
        [--seeds 3] [--extractor NAME] [--variants] [--model MODEL] [--markdown FILE]

There are four rungs: signed formats + LoRA; mixed signs + LoRA; mixed signs + TALoRA (a hub of
two); the same + DFA. All have the default recipe, or the paper's conditions with --preset paper,
but one call per update, so that two trainings share two cores; the same number of updates; and the
learning rate that does best on the run's own held-out calls for seed 0 (the search is the same for
every rung). A rung is trained with several seeds (first values and order of the data) and tested on
200 pictures of 110 prompts that neither calibration nor training uses: see `test_set.py` for what
is measured, with --extractor fashion the Fréchet distance of the pictures from full precision's,
too, by the features of that extractor. The calibrated models before training are there to compare.

With --variants the last rung is trained again with one setting changed at a time, to see what each
is worth.

Everything that was measured is kept in --work, so the script resumes, and adds only what is
missing; with another number of tests, what was trained is tested again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from material import add_size_options, known_prompts, part_of_page, record_options, source_of
from page import put
from test_set import MAX_TESTS, TestSet

from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.files.atomic import write_text
from msfp_cli.finetuning.finetune import finetune_run
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.result import load_finetunings
from msfp_cli.pipelines.loading import Pipeline
from msfp_cli.run import Run

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
COLUMNS = {  # titles, and the digits after the point
    "output": ("output error", 5),
    "latents": ("final latents' error", 5),
    "psnr": ("PSNR, dB", 2),
    "frechet": ("Fréchet distance", 3),
}


@dataclass(frozen=True)
class Job:
    """One training: a rung (or a variant of it), a learning rate, a seed."""

    rung: str
    rate: float
    seed: int
    updates: int
    settings: str = "{}"  # JSON of further fields of the recipe

    @property
    def formats(self) -> str:
        """The set of formats that the rung is calibrated with."""
        return RUNGS[self.rung][0]

    @property
    def changes(self) -> dict[str, Any]:
        """What the variant changes."""
        return dict(json.loads(self.settings))

    @property
    def name(self) -> str:
        """A directory's name."""
        more = "".join(f"-{key}={value}" for key, value in sorted(self.changes.items()))
        return f"{self.rung.replace(', ', '-')}-{self.updates}-{self.rate:g}-{self.seed}{more}"

    def recipe(self, preset: Mapping[str, Any]) -> FinetuneRecipe:
        """Return what is trained.

        Arguments:
            preset: the settings that the rung begins with.
        """
        settings: dict[str, Any] = {
            **preset,
            **RUNGS[self.rung][1],
            **self.changes,
            "steps": self.updates,
            "learning_rate": self.rate,
            "seed": self.seed,
            "evaluate_every": max(1, self.updates // 2),
        }
        return replace(FinetuneRecipe(calls_per_update=1), **settings)

    def task(self, action: str) -> list[str]:
        """Return the options that make another process train or test it."""
        return [f"--{action}", self.rung, *map(str, (self.rate, self.seed)), self.settings]


# What is measured.


def test_set(arguments: argparse.Namespace) -> TestSet:
    """Return what all models are tested on."""
    return TestSet(
        source=source_of(arguments),
        directory=arguments.work / f"tests-{arguments.num_tests}",
        num_tests=arguments.num_tests,
        steps=arguments.steps,
        extractor=arguments.extractor,
    )


def columns_of(arguments: argparse.Namespace) -> dict[str, tuple[str, int]]:
    """Return what is measured: titles and digits."""
    return {key: each for key, each in COLUMNS.items() if key != "frechet" or arguments.extractor}


def heading(arguments: argparse.Namespace, *titles: str) -> list[str]:
    """Return the first two lines of a table."""
    names = [*titles, *(title for title, _ in columns_of(arguments).values())]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def setting_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return what all rungs share, in words."""
    preset = (arguments.preset,) if arguments.preset else ()
    return (f"W{arguments.bits}A{arguments.bits}", *preset)


def place_of(arguments: argparse.Namespace) -> Path:
    """Return where everything is kept but the recording and the tests, which all settings share."""
    return arguments.work / "-".join(setting_of(arguments))


def calibrated(arguments: argparse.Namespace, formats: str) -> Run:
    """Calibrate with some formats, once; all from one recording."""
    run = Run(place_of(arguments) / f"calibrated-{formats}")
    if not run.calibration.exists():
        share(Run(arguments.work / "recorded"), run, "recording", "held-out")
        options = replace(record_options(arguments), prompts=known_prompts(arguments))
        settings = preset_of(CalibrateRecipe, arguments)
        bits = {"weights": arguments.bits, "activations": arguments.bits}
        recipe = replace(CalibrateRecipe(**bits, formats=formats), **settings)
        calibrate_run(run, source_of(arguments), options, recipe, device="cpu")
    return run


def preset_of(
    recipe: type[CalibrateRecipe] | type[FinetuneRecipe], arguments: argparse.Namespace
) -> Mapping[str, Any]:
    """Return the settings that a recipe begins with."""
    return recipe.PRESETS[arguments.preset] if arguments.preset else {}


def share(base: Run, run: Run, *places: str) -> None:
    """Let a run use what another run has or will have."""
    run.directory.mkdir(parents=True, exist_ok=True)
    for place in places:
        target = (base.directory / place).resolve()
        target.mkdir(parents=True, exist_ok=True)
        if not (run.directory / place).exists():
            (run.directory / place).symlink_to(target)


def trained(arguments: argparse.Namespace, job: Job) -> Run:
    """Return the run directory of a job."""
    return Run(place_of(arguments) / "jobs" / job.name)


def train(arguments: argparse.Namespace, job: Job) -> None:
    """Train a job, or go on with it."""
    run = trained(arguments, job)
    share(calibrated(arguments, job.formats), run, "recording", "held-out", "calibration")
    finetune_run(run, job.recipe(preset_of(FinetuneRecipe, arguments)), device="cpu")


def held_out_error(arguments: argparse.Namespace, job: Job) -> float:
    """Return the lowest error of a trained job on the run's own held-out calls."""
    run = trained(arguments, job)
    (finetuning,) = load_finetunings(run, Calibration.load(run.calibration)).values()
    return finetuning.best.error


def test(arguments: argparse.Namespace, job: Job) -> None:
    """Measure a trained job, once."""
    run = trained(arguments, job)
    calibration = Calibration.load(run.calibration)
    pipe = load_calibrated(calibration, "cpu", load_finetunings(run, calibration))
    keep_result(arguments, job.name, pipe)


def test_calibrated(arguments: argparse.Namespace, formats: str) -> None:
    """Measure a calibrated pipeline before training, once."""
    calibration = Calibration.load(calibrated(arguments, formats).calibration)
    keep_result(arguments, f"calibrated-{formats}", load_calibrated(calibration, "cpu"))


def keep_result(arguments: argparse.Namespace, name: str, pipe: Pipeline) -> None:
    """Measure a pipeline and write its result, unless it is there."""
    result = result_of(arguments, name)
    if not result.exists():
        write_text(result, json.dumps(test_set(arguments).measure(pipe)))


def result_of(arguments: argparse.Namespace, name: str) -> Path:
    """Return where the result of a model on these tests is kept."""
    tests = "-".join([str(arguments.num_tests), *filter(None, [arguments.extractor])])
    return place_of(arguments) / f"results-{tests}" / f"{name}.json"


# The processes and the tables.


def in_processes(arguments: argparse.Namespace, tasks: Iterable[list[str]]) -> None:
    """Run this script once per task, a few at a time, each with its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def run(task: list[str]) -> None:
        subprocess.run([sys.executable, *sys.argv, *task], env=environment, check=True)
        print("done:", *task, file=sys.stderr, flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(run, tasks))


def best_rate(arguments: argparse.Namespace, rung: str) -> float:
    """Return the learning rate that did best for seed 0 on the held-out calls."""

    def error(rate: float) -> float:
        return held_out_error(arguments, Job(rung, rate, 0, arguments.updates))

    return min(arguments.rates, key=error)


def ladder(arguments: argparse.Namespace) -> str:
    """Search the learning rates, train all seeds, test, and return the table."""
    updates = arguments.updates
    rungs = [rung for rung in RUNGS if arguments.only in rung]
    formats = dict.fromkeys(RUNGS[rung][0] for rung in rungs)
    for name in formats:
        calibrated(arguments, name)
    test_set(arguments).prepare()
    grid = [Job(rung, rate, 0, updates) for rate in arguments.rates for rung in rungs]
    in_processes(arguments, [job.task("train") for job in grid])
    rates = {rung: best_rate(arguments, rung) for rung in rungs}
    seeds = range(arguments.seeds)
    jobs = [Job(rung, rates[rung], seed, updates) for seed in seeds for rung in rungs]
    in_processes(arguments, [job.task("train") for job in jobs if job not in grid])
    in_processes(arguments, [["--test-calibrated", name] for name in formats])
    in_processes(arguments, [job.task("test") for job in jobs])
    lines = heading(arguments, "", "learning rate")
    for name in formats:
        lines.append(f"| {name}, calibrated only | | {row(arguments, [f'calibrated-{name}'])} |")
    for rung in rungs:
        names = [job.name for job in jobs if job.rung == rung]
        lines.append(f"| {rung} | {rates[rung]:g} | {row(arguments, names)} |")
    return "\n".join(lines)


def variants(arguments: argparse.Namespace) -> str:
    """Change one setting of the full recipe at a time, one seed each, and return the table."""
    rate = best_rate(arguments, FULL)
    jobs = [Job(FULL, rate, 0, arguments.updates, json.dumps(changes)) for changes in VARIANTS]
    in_processes(arguments, [job.task("train") for job in jobs])
    in_processes(arguments, [job.task("test") for job in jobs])
    lines = heading(arguments, "change")
    for job in jobs:
        text = ", ".join(f"{name} {value}" for name, value in job.changes.items()) or "none"
        lines.append(f"| {text} | {row(arguments, [job.name])} |")
    return "\n".join(lines)


def row(arguments: argparse.Namespace, names: Sequence[str]) -> str:
    """Return the figures of some results: their mean and, of several, the standard deviation."""
    figures = [json.loads(result_of(arguments, name).read_text()) for name in names]
    cells = []
    for key, (_, digits) in columns_of(arguments).items():
        values = [result[key] for result in figures]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
    return " | ".join(cells)


def numbers(text: str) -> list[float]:
    """Return the numbers of a list that commas separate."""
    return [float(number) for number in text.split(",")]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=numbers, default=[4e-2, 2e-2], help="learning rates to try")
    parser.add_argument("--preset", choices=("paper",), help="default: the default recipes")
    parser.add_argument("--bits", type=int, default=4, help="of weights and inputs")
    parser.add_argument("--only", default="", help="rungs whose name contains this")
    parser.add_argument(
        "--variants", action="store_true", help="then change one setting of the last rung at a time"
    )
    parser.add_argument("--num-tests", type=int, default=MAX_TESTS, help="pictures to test on")
    parser.add_argument("--extractor", default="", help="for Fréchet distances, such as fashion")
    parser.add_argument("--markdown", type=Path, help="put the table into this page")
    add_size_options(parser, num_images=400)
    for action in ("--train", "--test"):
        parser.add_argument(action, nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--test-calibrated", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Do one task, or the whole ladder."""
    arguments = parse()
    quiet_libraries()
    if arguments.test_calibrated:
        test_calibrated(arguments, arguments.test_calibrated)
    elif task := arguments.train or arguments.test:
        rung, rate, seed, settings = task
        job = Job(rung, float(rate), int(seed), arguments.updates, settings)
        (train if arguments.train else test)(arguments, job)
    else:
        print_tables(arguments)


def print_tables(arguments: argparse.Namespace) -> None:
    """Make the ladder, and the variants where they are asked for."""
    table = ladder(arguments)
    if arguments.variants:
        table += f"\n\n{FULL}, one change at a time, seed 0:\n\n{variants(arguments)}"
    print(table)
    if arguments.markdown:
        part = " ".join([part_of_page("ablation.py", arguments), *setting_of(arguments)])
        put(arguments.markdown, part, f"{conditions(arguments)}\n\n{table}")


def conditions(arguments: argparse.Namespace) -> str:
    """Say what the table holds, and under which conditions."""
    whose = "the paper's conditions" if arguments.preset else "the default recipes"
    return (
        f"{setting_of(arguments)[0]}, {whose}: {arguments.num_images} pictures recorded, "
        f"{arguments.updates} updates of one call, {arguments.seeds} seeds (mean ± standard "
        f"deviation), {arguments.num_tests} tests; torch {torch.__version__}, CPU."
    )


if __name__ == "__main__":
    main()
