"""Which models an evaluation puts side by side, and that each is what its title says."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import CHEAP, TWO_PICTURES, Chained, Finetuned
from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import export_, load_calibrated
from msfp_cli.errors import ModelError, RunError, UsageError
from msfp_cli.evaluation.identity import identity_of
from msfp_cli.evaluation.models import EvaluatedModel, models_to_evaluate
from msfp_cli.evaluation.provenance import provenance_of
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.run import Run

Copied = Callable[..., Path]


def models_of(
    run: Run,
    export: Path,
    compare: tuple[str, ...] | None = None,
    *,
    work: Path = Path("nowhere"),
    against: ModelSource | None = None,
) -> dict[str, EvaluatedModel]:
    provenance = provenance_of(run, export)
    source = against or provenance.source
    models = models_to_evaluate(
        provenance, export, EvaluateRecipe(compare=compare), source, work=work, device="cpu"
    )
    assert len({model.key for model in models}) == len(models)
    return {model.key: model for model in models}


def titles(models: dict[str, EvaluatedModel]) -> dict[str, str]:
    return {key: model.title for key, model in models.items()}


def test_calibrated_export_stands_beside_full_precision_and_signed_formats(
    tiny_chained: Chained,
) -> None:
    models = models_of(tiny_chained.run, tiny_chained.export)
    assert list(titles(models).items()) == [
        ("full", "full precision"),
        ("signed", "signed FP4"),
        ("export", "MSFP"),
    ]
    assert models["full"].source == tiny_chained.calibration.source
    assert models["signed"].source is None
    assert models["export"].source == ModelSource(model=str(tiny_chained.export))


def test_fine_tuned_export_stands_beside_what_it_began_from_as_well(tiny_tuned: Finetuned) -> None:
    assert list(titles(models_of(tiny_tuned.run, tiny_tuned.export)).items()) == [
        ("full", "full precision"),
        ("signed", "signed FP4"),
        ("calibrated", "MSFP"),
        ("export", "MSFP, fine-tuned"),
    ]


@pytest.mark.parametrize(
    ("compare", "keys"),
    [
        ((), ["full", "export"]),
        (("signed",), ["full", "signed", "export"]),
        (("calibrated", "signed"), ["full", "signed", "calibrated", "export"]),
    ],
    ids=lambda value: ",".join(value) or "none",
)
def test_steps_before_can_be_chosen(
    compare: tuple[str, ...], keys: list[str], tiny_tuned: Finetuned
) -> None:
    assert list(models_of(tiny_tuned.run, tiny_tuned.export, compare)) == keys


def test_export_of_no_run_stands_beside_full_precision_alone(
    tiny_chained: Chained, tmp_path: Path
) -> None:
    run = Run(tmp_path / "none")
    assert list(titles(models_of(run, tiny_chained.export)).items()) == [
        ("full", "full precision"),
        ("export", "MSFP"),
    ]
    assert list(models_of(run, tiny_chained.export, ())) == ["full", "export"]
    with pytest.raises(
        UsageError, match=r"was not made by the run .*none; use --compare none, or give its --run"
    ):
        models_of(run, tiny_chained.export, ("signed",))


def test_export_of_another_pipeline_is_not_of_this_run(
    tiny_chained: Chained, prompted_chained: Chained
) -> None:
    assert list(models_of(tiny_chained.run, prompted_chained.export)) == ["full", "export"]
    with pytest.raises(UsageError, match="was not made by the run"):
        models_of(tiny_chained.run, prompted_chained.export, ("signed",))


def test_export_of_another_model_with_the_same_formats_is_not_of_this_run(
    other: Chained, calibrated: Callable[[str], Run]
) -> None:
    run = calibrated("DDIMPipeline")
    assert Calibration.load(run.calibration).recipe.formats == other.calibration.recipe.formats
    assert "signed" not in models_of(run, other.export)


def test_run_without_its_recording_does_not_know_how_to_make_signed_formats(
    tiny_chained: Chained, copied: Copied, tmp_path: Path
) -> None:
    run = Run(copied(tiny_chained.run.directory))
    shutil.rmtree(run.recording)
    assert list(models_of(run, run.directory / "export")) == ["full", "export"]
    with pytest.raises((RunError, UsageError)):
        models_of(run, run.directory / "export", ("signed",), work=tmp_path / "work")[
            "signed"
        ].load()


@pytest.mark.parametrize("name", ["recording", "held-out"])
def test_signed_formats_are_not_searched_on_calls_of_another_model(
    name: str, tiny_chained: Chained, other: Chained, copied: Copied
) -> None:
    run = Run(copied(tiny_chained.run.directory))
    shutil.rmtree(run.directory / name)
    shutil.copytree(other.run.directory / name, run.directory / name)
    with pytest.raises(RunError, match=f"{name} is not the recording that the calibration was"):
        models_of(run, run.directory / "export")
    assert list(models_of(run, run.directory / "export", ())) == ["full", "export"]


def test_another_full_precision_model_can_be_given(tiny_chained: Chained, copied: Copied) -> None:
    source = ModelSource(model=str(copied(Path(tiny_chained.calibration.source.model))))
    model = models_of(tiny_chained.run, tiny_chained.export, against=source)["full"]
    assert model.source == source
    assert identity_of(model.load()) == identity_of(
        load_pipeline(tiny_chained.calibration.source, "cpu")
    )


def test_directory_that_is_no_export_is_refused(tiny_chained: Chained, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not an exported pipeline: it has no model_index.json"):
        models_of(tiny_chained.run, tmp_path)
    with pytest.raises(ModelError, match="msfp did not export it"):
        models_of(tiny_chained.run, Path(tiny_chained.calibration.source.model))


def test_signed_formats_are_signed_everywhere_and_lift_nothing(
    tiny_chained: Chained, tmp_path: Path
) -> None:
    pipe = models_of(tiny_chained.run, tiny_chained.export, work=tmp_path)["signed"].load()
    calibration, layers = tiny_chained.calibration, quantized_layers(pipe.unet)
    assert layers.keys() == calibration.table("unet").keys()
    assert any(choice.reason == "lifted" for choice in calibration.layers["unet"].values())
    for name, layer in layers.items():
        choice = calibration.layers["unet"][name]
        scheme = layer.scheme
        assert scheme.weight is not None and scheme.input is not None
        assert scheme.weight.signed and scheme.input.format.signed and scheme.input.zero_point == 0
        bits = 4 if choice.reason != "kept" else choice.scheme.weight.bits
        assert scheme.weight.bits == scheme.input.format.bits == bits


def test_signed_formats_are_searched_once_and_again_for_another_calibration(
    tiny_chained: Chained, copied: Copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(copied(tiny_chained.run.directory))
    work = tmp_path / "work"
    first = identity_of(models_of(run, tiny_chained.export, work=work)["signed"].load())
    with monkeypatch.context() as patch:
        patch.setattr(
            "msfp_cli.calibration.calibrate.calibrate_denoisers_",
            lambda *arguments: pytest.fail("it was searched again"),
        )
        assert identity_of(models_of(run, tiny_chained.export, work=work)["signed"].load()) == first
    calibration = Calibration.load(run.calibration)
    replace(calibration, recipe=replace(calibration.recipe, weights=6)).save(
        run.calibration, overwrite=True
    )
    assert identity_of(models_of(run, tiny_chained.export, work=work)["signed"].load()) != first


def test_calibrated_is_the_state_before_fine_tuning(tiny_tuned: Finetuned) -> None:
    models = models_of(tiny_tuned.run, tiny_tuned.export)
    found = identity_of(models["calibrated"].load())
    assert found == identity_of(load_calibrated(tiny_tuned.calibration, "cpu"))
    assert found != identity_of(models["export"].load())


def test_export_of_an_earlier_calibration_is_not_of_this_run(
    calibrated: Callable[[str], Run], copied: Copied, tmp_path: Path
) -> None:
    run = Run(copied(calibrated("DDIMPipeline").directory))
    export_(Calibration.load(run.calibration), tmp_path / "export")
    assert "signed" in models_of(run, tmp_path / "export")
    calibration = Calibration.load(run.calibration)
    options = replace(TWO_PICTURES, num_images=2)
    calibrate_run(
        run, calibration.source, options, replace(CHEAP, weights=6), device="cpu", overwrite=True
    )
    assert "signed" not in models_of(run, tmp_path / "export")
