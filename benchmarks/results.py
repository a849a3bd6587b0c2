"""What each step of a calibration is worth on a pipeline, from plain FP4 on, beside more bits.

    python benchmarks/results.py MODEL --work DIR [--num-images 64] [--reference NPZ]
        [--markdown FILE]

MODEL is a pipeline's directory, or msfp:fashion for the built-in one. Every row is calibrated from
the same recording, exported, and evaluated as `msfp evaluate` does, on the same prompts and seeds,
which calibration does not use. Fine-tuning is in `ablation.py`. Everything is kept in --work, so
the script resumes. Distances between sets of pictures are left out where the pictures are too few
for them.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from material import NUM_IMAGES, UNSEEN
from page import put
from PIL import Image

from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.checkpoint.export import export_run
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.evaluation.evaluate import evaluate_run
from msfp_cli.evaluation.metrics.table import Metric, metrics_for
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.evaluation.result import Evaluation, Measurements
from msfp_cli.files.directories import EVALUATION, claim
from msfp_cli.pipelines.loading import BUILT_IN, ModelSource
from msfp_cli.recording.recipe import RecordOptions
from msfp_cli.run import Run
from msfp_cli.sample import contact_sheet

ROWS = {
    "W4A4, signed formats": CalibrateRecipe(formats="signed", lift=0.0, rounding="nearest"),
    "+ unsigned formats": CalibrateRecipe(lift=0.0, rounding="nearest"),
    "+ the worst layers at 8 bits": CalibrateRecipe(rounding="nearest"),
    "+ compensated rounding": CalibrateRecipe(),
    "+ 8-bit inputs at 20 % of the steps": CalibrateRecipe(input_lift=0.2),
    "W4A8": CalibrateRecipe(activations=8),
    "W6A6": CalibrateRecipe(weights=6, activations=6),
    "W8A8": CalibrateRecipe(weights=8, activations=8),
}
_LEFT_OUT = ("seconds", "memory")  # of another benchmark
_SHOWN = 8


def link(place: Path, target: Path) -> None:
    """Let a directory be found under another name as well."""
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target.resolve())


def calibrated(
    work: Path, source: ModelSource, recipe: CalibrateRecipe, arguments: argparse.Namespace
) -> Run:
    """Calibrate with a recipe, once; all recipes share a recording."""
    run = Run(work / ("".join(recipe.words()).strip("-") or "default"))
    shared = work / "recordings"
    if not run.calibration.exists():
        run.directory.mkdir(parents=True, exist_ok=True)
        for place in (run.recording, run.held_out):
            (shared / place.name).mkdir(parents=True, exist_ok=True)
            link(place, shared / place.name)
        options = RecordOptions(
            num_images=arguments.num_recorded, num_inference_steps=arguments.steps
        )
        calibrate_run(run, source, options, recipe, device=arguments.device)
    return run


def evaluated(
    work: Path, source: ModelSource, name: str, arguments: argparse.Namespace
) -> Evaluation:
    """Export and evaluate a row, once; full precision's pictures and trajectories are shared."""
    run = calibrated(work, source, ROWS[name], arguments)
    if not run.export.exists():
        export_run(run, device=arguments.device)
    claim(run.evaluation, EVALUATION)
    _copy_full_precision(work / "full-precision", run.evaluation)
    prompts = UNSEEN if source.model == BUILT_IN else None
    options = EvaluateRecipe(
        prompts=prompts,
        num_images=arguments.num_images,
        num_trajectories=arguments.num_images // 4,
        reference=arguments.reference,
        compare=(),
        layers=False,
        cost=False,
    )
    evaluation = evaluate_run(run, run.export, options, device=arguments.device)
    _copy_full_precision(run.evaluation, work / "full-precision")
    return evaluation


def _copy_full_precision(source: Path, target: Path) -> None:
    """Give one evaluation what another has drawn and recorded of full precision."""
    for part in ("pictures/full", "trajectories"):
        if (source / part).exists() and not (target / part).exists():
            shutil.copytree(source / part, target / part)


def line(title: str, model: Measurements, shown: Sequence[Metric]) -> str:
    """Return a row of the table."""
    cells = [metric.text(model.value(metric.key)) for metric in shown]
    return f"| {title} | {' | '.join(cells)} |"


def table(evaluations: dict[str, Evaluation]) -> str:
    """Return all rows, full precision first, with the metrics that some row has."""
    models = [model for evaluation in evaluations.values() for model in evaluation.models]
    few = any("full" in model.sets and model.sets["full"].few for model in models)
    shown = [
        metric
        for metric in metrics_for(models)
        if metric.key not in _LEFT_OUT and not (few and metric.kind == "sets")
    ]
    full = next(iter(evaluations.values())).models[0]
    lines = [
        f"| | {' | '.join(metric.title for metric in shown)} |",
        "|---" * (len(shown) + 1) + "|",
    ]
    lines.append(line(full.title, full, shown))
    lines += [line(name, evaluation.models[-1], shown) for name, evaluation in evaluations.items()]
    return "\n".join(lines)


def head(evaluation: Evaluation, arguments: argparse.Namespace) -> str:
    """Say under which conditions the table holds."""
    record, machine = evaluation.settings["record"], evaluation.machine
    num_trajectories = evaluation.settings["num_trajectories"]
    pictures = f"{len(record['conditions'])} pictures a row"
    return "; ".join(
        (
            f"{pictures} from the same prompts and seeds ({record['seed']} on), "
            f"{record['num_inference_steps']} steps, guidance {record['guidance_scale']}",
            f"{arguments.num_recorded} pictures recorded, seed 0",
            f"output error over the first {num_trajectories} pictures' calls",
            f"{machine['device']}, {torch.get_num_threads()} of {machine['cores']} cores, "
            f"torch {machine['torch']}, diffusers {machine['diffusers']}.",
        )
    )


def sheet(evaluations: dict[str, Evaluation], path: Path) -> None:
    """Lay the first pictures of every row out, full precision's above."""
    first = next(iter(evaluations.values()))
    shown = {first.models[0].title: first.gallery("full")}
    shown |= {name: evaluation.gallery("export") for name, evaluation in evaluations.items()}
    rows = [gallery.pictures()[:_SHOWN] for gallery in shown.values()]
    pictures = [
        [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in row] for row in rows
    ]
    contact_sheet(pictures, titles=list(shown), min_side=64).save(path, optimize=True)


def main() -> None:
    """Make, evaluate and print all rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a pipeline's directory, or msfp:fashion")
    parser.add_argument("--work", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="rows whose name contains this; repeatable",
    )
    parser.add_argument("--num-recorded", type=int, default=NUM_IMAGES, help="pictures to record")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument(
        "--reference", type=Path, help="real pictures, see `msfp evaluate --reference`"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--markdown", type=Path, help="put the table into this page, as the part named after MODEL"
    )
    parser.add_argument(
        "--sheet",
        type=Path,
        help=f"write the first {_SHOWN} pictures of every row to this PNG file",
    )
    arguments = parser.parse_args()
    quiet_libraries()
    model = arguments.model if arguments.model == BUILT_IN else os.path.abspath(arguments.model)
    source = ModelSource(model=model)
    only = arguments.only or [""]
    evaluations = {}
    for name in ROWS:
        if any(text in name for text in only):
            evaluations[name] = evaluated(arguments.work, source, name, arguments)
            print(f"{name}: done", file=sys.stderr, flush=True)
    text = f"{head(next(iter(evaluations.values())), arguments)}\n\n{table(evaluations)}\n"
    print(text)
    if arguments.markdown:
        put(arguments.markdown, f"results.py {os.path.basename(model)}", text)
    if arguments.sheet:
        sheet(evaluations, arguments.sheet)


if __name__ == "__main__":
    main()
