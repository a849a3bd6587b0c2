import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import Chained, Invoke
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.evaluation.provenance import Provenance
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.report.document import gather
from msfp_cli.report.reproduce import commands_of
from msfp_cli.run import Run


@pytest.mark.parametrize(
    "prompts", ["a red cat\na green dog\na cow\n", None], ids=["own-prompts", "built-in"]
)
def test_commands_in_the_report_give_the_same_figures_again(
    prompts: str | None, msfp: Invoke, tiny: Callable[[str], Path]
) -> None:
    own = ("--prompts", "own.txt") if prompts else ()
    Path("own.txt").write_text(prompts or "")
    calibrate = (
        "--num-images",
        3,
        "--steps",
        2,
        "--guidance-scale",
        2.5,
        "--seed",
        3,
        "--lift",
        0,
        "--batch-size",
        2,
    )
    evaluate = (
        "--num-images",
        3,
        "--num-trajectories",
        1,
        "--steps",
        1,
        "--seed",
        17,
        "--no-layers",
        "--no-cost",
    )
    for command in (
        ("calibrate", tiny("StableDiffusionPipeline"), *calibrate),
        ("export",),
        ("evaluate", *evaluate, *own, "--compare", "none"),
    ):
        assert msfp(*command).exit_code == 0
    document = gather(Run(Path("msfp-run")), Evaluation.load(Path("msfp-run/evaluation")), 1)
    shutil.move("msfp-run", "first")
    for command in document["commands"]:
        result = msfp(*shlex.split(command)[1:])
        assert result.exit_code == 0, (command, result.stderr)
    first, again = (Evaluation.load(Path(run, "evaluation")) for run in ("first", "msfp-run"))
    assert again.models == first.models and again.settings == first.settings


SETTINGS = {
    "export": "msfp-run/export",
    "record": {
        "conditions": ["a cat"],
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "seed": 7,
        "batch_size": 8,
    },
    "models": ["full", "calibrated", "export"],
    "num_trajectories": 2,
    "extractor": "fashion",
    "reference": "photos",
    "clip": None,
    "layers": True,
    "cost": False,
}


def test_results_of_earlier_versions_give_what_they_know(tiny_chained: Chained) -> None:
    recipe = CalibrateRecipe(weights=None, keep=("a:8", "b:none"))
    calibration = replace(tiny_chained.calibration, recipe=recipe, options=None)
    evaluation = Evaluation(directory=Path("e"), settings=SETTINGS, machine={}, models=())
    provenance = Provenance(
        run=Run(Path("r")),
        source=calibration.source,
        sampling={},
        tables={},
        calibration=calibration,
    )
    calibrate, export, evaluate, report = commands_of(provenance, evaluation)
    count = len(calibration.record.conditions)
    assert calibrate.startswith(
        f"msfp calibrate {calibration.source.model} --weights none --keep a:8 --keep b:none "
    )
    assert f" --num-images {count}" in calibrate and "--prompts" not in calibrate
    assert evaluate == (
        "msfp evaluate --steps 4 --guidance-scale 3.0 --seed 7 --prompts prompts.txt "
        "--num-images 1 --num-trajectories 2 --extractor fashion --reference photos "
        "--compare calibrated --no-cost"
    )
    assert (export, report) == ("msfp export", "msfp report")
    unknown = replace(provenance, calibration=None)
    assert commands_of(unknown, evaluation)[0].startswith("msfp evaluate msfp-run/export --steps")


def test_results_without_the_key_load(tiny_chained: Chained, tmp_path: Path) -> None:
    place = shutil.copytree(tiny_chained.run.calibration, tmp_path / "calibration")
    document = json.loads((place / "calibration.json").read_text())
    assert document.pop("options") is not None
    assert document.pop("sha256")  # earlier versions had neither
    (place / "calibration.json").write_text(json.dumps(document))
    assert Calibration.load(place).options is None
