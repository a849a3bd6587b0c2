"""What a report says is what the run and the evaluation hold."""

import base64
import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import FEW_UPDATES, Chained, Finetuned, finetune
from msfp_cli.checkpoint.pipeline import read_configs
from msfp_cli.errors import RunError
from msfp_cli.evaluation.evaluate import evaluate_run
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.finetuning.lora import tuned_names
from msfp_cli.finetuning.quantize import member_by_timestep
from msfp_cli.finetuning.result import load_finetunings
from msfp_cli.report.document import gather, write_report
from msfp_cli.run import Run

OPTIONS = EvaluateRecipe(num_images=2, num_trajectories=1, batch_size=2, cost=False)


@pytest.fixture(scope="module")
def evaluated(tiny_tuned: Finetuned, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Evaluate the smallest model's fine-tuned export and its precursors. Not to be changed."""
    place = tmp_path_factory.mktemp("reported") / "evaluation"
    return evaluate_run(tiny_tuned.run, tiny_tuned.export, OPTIONS, directory=place, device="cpu")


@pytest.fixture(scope="module")
def document(tiny_tuned: Finetuned, evaluated: Evaluation) -> dict[str, Any]:
    return gather(tiny_tuned.run, evaluated, 2)


def test_every_picture_is_that_of_the_gallery(
    document: dict[str, Any], evaluated: Evaluation
) -> None:
    assert [model["key"] for model in document["models"]] == [
        "full",
        "signed",
        "calibrated",
        "export",
    ]
    for i, entry in enumerate(document["pictures"]):
        assert entry["seed"] == evaluated.settings["record"]["seed"] + i
        for key, address in entry["images"].items():
            shown = Image.open(
                io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,")))
            )
            assert np.array_equal(
                np.asarray(shown), evaluated.gallery(key).pictures()[i].permute(1, 2, 0).numpy()
            )
        assert entry["psnr"] == {
            model.key: model.per_picture["psnr"][i] for model in evaluated.models[1:]
        }


def test_layers_are_the_exports_with_the_candidates_of_the_calibration(
    document: dict[str, Any], evaluated: Evaluation, tiny_tuned: Finetuned
) -> None:
    layers = {layer["name"]: layer for layer in document["components"]["unet"]["layers"]}
    table = read_configs(tiny_tuned.export)["unet"].table()
    assert layers.keys() == table.keys()
    for name, layer in layers.items():
        choice, grid = tiny_tuned.calibration.layers["unet"][name], table[name].input
        assert grid is not None and len(layer["grid"]) == len(set(grid.format.code_book))
        assert (layer["input_format"], layer["signed"]) == (grid.format.name, grid.format.signed)
        assert [each["format"] for each in layer["candidates"]] == [
            score.format for score in choice.input_scores
        ]
        assert layer["output_error"] == evaluated.models[-1].denoisers["unet"].layers[name]
        assert sum(layer["histogram"]["counts"]) > 0
    assert sum(layer["share"] for layer in layers.values()) == pytest.approx(1.0)


def test_router_is_that_of_the_fine_tuning(document: dict[str, Any], tiny_tuned: Finetuned) -> None:
    tuned = load_finetunings(tiny_tuned.run, tiny_tuned.calibration)["unet"]
    names = tuned_names(tiny_tuned.calibration.table("unet"))
    router = document["components"]["unet"]["router"]
    assert {row["name"]: row["members"] for row in router["rows"]} == member_by_timestep(
        tuned, names
    )
    assert router["timesteps"] == sorted(tuned.timesteps, reverse=True)


def test_fine_tuning_that_the_export_does_not_hold_is_not_reported(
    tiny_chained: Chained, copied: Callable[..., Path], tmp_path: Path
) -> None:
    run = Run(copied(tiny_chained.run.directory))
    shutil.copytree(run.directory / "export", tmp_path / "before")
    found = evaluate_run(
        run, tmp_path / "before", replace(OPTIONS, compare=()), directory=tmp_path / "evaluation"
    )
    finetune(run, FEW_UPDATES)
    later = gather(run, found, 1)
    assert later["components"]["unet"]["router"] is None
    assert not any("finetune" in command for command in later["commands"])


def test_export_of_another_run_is_reported_without_candidates(
    evaluated: Evaluation, prompted_chained: Chained, tmp_path: Path
) -> None:
    for run in (prompted_chained.run, Run(tmp_path / "none")):
        other = gather(run, evaluated, 1)
        part = other["components"]["unet"]
        assert part["router"] is None and part["layers"]
        assert not any("candidates" in layer for layer in part["layers"])
        assert other["commands"][0].startswith(f"msfp evaluate {evaluated.settings['export']} ")


def test_page_and_plots_are_written_whole(
    tiny_tuned: Finetuned, evaluated: Evaluation, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    written = write_report(tiny_tuned.run, evaluated, tmp_path / "report", overwrite=False)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        written.page.name,
        *(path.name for path in written.plots),
    }
    before = written.page.read_bytes()
    with pytest.raises(RunError, match="exists already; use --overwrite"):
        write_report(tiny_tuned.run, evaluated, tmp_path / "report", overwrite=False)
    assert (
        write_report(
            tiny_tuned.run, evaluated, tmp_path / "report", overwrite=True
        ).page.read_bytes()
        == before
    )


def test_distances_of_few_pictures_do_not_name_a_best(document: dict[str, Any]) -> None:
    telling = {column["key"]: column["telling"] for column in document["comparison"]["columns"]}
    assert telling["psnr"] and telling["output"] and not telling["frechet_full"]


def test_layers_are_in_the_order_of_the_model(document: dict[str, Any], tiny_pipe: Any) -> None:  # noqa: ANN401
    names = [layer["name"] for layer in document["components"]["unet"]["layers"]]
    assert names != sorted(names)
    assert names == [name for name, _ in tiny_pipe.unet.named_modules() if name in set(names)]
