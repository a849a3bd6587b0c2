"""What tells a model from others, and which export came from which."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from conftest import Chained, Finetuned
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.errors import ModelError
from msfp_cli.evaluation.identity import identity_of, refuse_other_model
from msfp_cli.evaluation.models import models_to_evaluate
from msfp_cli.evaluation.provenance import provenance_of
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.pipelines.loading import ModelSource, load_pipeline


def test_every_model_has_an_identity_of_its_own(
    tiny_tuned: Finetuned, tmp_path: Path, other: Chained
) -> None:
    export = tiny_tuned.export
    provenance = provenance_of(tiny_tuned.run, export)
    models = models_to_evaluate(
        provenance, export, EvaluateRecipe(), provenance.source, work=tmp_path, device="cpu"
    )
    prints = [identity_of(model.load())["unet"] for model in models]
    prints += [
        identity_of(load_pipeline(each, "cpu"))["unet"] for each in (other.calibration.source,)
    ]
    assert len(set(prints)) == len(prints) == 5
    assert prints == [
        *(identity_of(model.load())["unet"] for model in models),
        prints[-1],
    ]


def test_identity_sees_a_single_code(tiny_chained: Chained) -> None:
    pipe = load_calibrated(tiny_chained.calibration, "cpu")
    before = identity_of(pipe)
    codes = next(iter(quantized_layers(pipe.unet).values())).get_buffer("weight_codes")
    codes.view(-1)[0] ^= 1
    assert identity_of(pipe).keys() == before.keys() and identity_of(pipe) != before


def test_identity_sees_the_grid_of_an_input(tiny_chained: Chained) -> None:
    calibration = tiny_chained.calibration
    layers = dict(calibration.layers["unet"])
    choice = layers["conv_out"]
    assert choice.scheme.input is not None
    wider = replace(choice.scheme.input, scale=2 * choice.scheme.input.scale)
    layers["conv_out"] = replace(choice, scheme=replace(choice.scheme, input=wider))
    other = load_calibrated(replace(calibration, layers={"unet": layers}), "cpu")
    assert identity_of(other) != identity_of(load_calibrated(calibration, "cpu"))


@pytest.mark.parametrize(
    "chained", ["tiny_chained", "tiny_tuned", "prompted_chained", "prompted_tuned"]
)
def test_the_models_own_export_is_accepted(chained: str, request: pytest.FixtureRequest) -> None:
    made: Chained | Finetuned = request.getfixturevalue(chained)
    full = load_pipeline(made.calibration.source, "cpu")
    refuse_other_model(full, load_pipeline(ModelSource(model=str(made.export)), "cpu"))
    shorter = load_pipeline(replace(made.calibration.source, dtype="bfloat16"), "cpu")
    refuse_other_model(shorter, load_pipeline(ModelSource(model=str(made.export)), "cpu"))


def test_another_models_export_is_refused(
    tiny_chained: Chained, prompted_chained: Chained, other: Chained, tiny: Callable[[str], Path]
) -> None:
    full = load_pipeline(tiny_chained.calibration.source, "cpu")
    for export in (prompted_chained.export, other.export):
        with pytest.raises(
            ModelError,
            match=r"the export is of another model: its .*'.*' differs; give it with --against",
        ):
            refuse_other_model(full, load_pipeline(ModelSource(model=str(export)), "cpu"))
    transformer = load_pipeline(ModelSource(model=str(tiny("DiTPipeline"))), "cpu")
    with pytest.raises(
        ModelError,
        match="the export is of another model: 'unet' is missing; give it with --against",
    ):
        refuse_other_model(
            transformer, load_pipeline(ModelSource(model=str(tiny_chained.export)), "cpu")
        )


@pytest.mark.parametrize("name", ["conv_in.bias", "mid_block.resnets.0.norm1.weight"])
def test_one_other_value_is_named(
    name: str, tiny_pipe: DiffusionPipeline, tiny_chained: Chained
) -> None:
    tiny_pipe.unet.get_parameter(name).data[0] += 0.1
    with pytest.raises(ModelError, match=f"its '{name}' differs"):
        refuse_other_model(
            tiny_pipe, load_pipeline(ModelSource(model=str(tiny_chained.export)), "cpu")
        )
