"""Layers and router of a report are those of the export and its run."""

from typing import Any

import pytest

from conftest import Finetuned
from msfp_cli.checkpoint.pipeline import read_configs
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.finetuning.lora import tuned_names
from msfp_cli.finetuning.quantize import member_by_timestep
from msfp_cli.finetuning.result import load_finetunings


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


def test_layers_are_in_the_order_of_the_model(document: dict[str, Any], tiny_pipe: Any) -> None:  # noqa: ANN401
    names = [layer["name"] for layer in document["components"]["unet"]["layers"]]
    assert names != sorted(names)
    assert names == [name for name, _ in tiny_pipe.unet.named_modules() if name in set(names)]


def test_router_is_that_of_the_fine_tuning(document: dict[str, Any], tiny_tuned: Finetuned) -> None:
    tuned = load_finetunings(tiny_tuned.run, tiny_tuned.calibration)["unet"]
    names = tuned_names(tiny_tuned.calibration.table("unet"))
    router = document["components"]["unet"]["router"]
    assert {row["name"]: row["members"] for row in router["rows"]} == member_by_timestep(
        tuned, names
    )
    assert router["timesteps"] == sorted(tuned.timesteps, reverse=True)
