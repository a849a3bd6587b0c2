"""Which models an evaluation puts side by side, and that each is what its title says."""

import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from conftest import CHEAP, TWO_PICTURES, Chained, Finetuned, chain
from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import export_, load_calibrated
from msfp_cli.errors import ModelError, RunError, UsageError
from msfp_cli.evaluation.models import (
    Subject,
    denoiser_bytes,
    find_subjects,
    identity_of,
    refuse_other_model,
)
from msfp_cli.files import digest
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.pipelines.denoiser import find_denoisers
from msfp_cli.pipelines.loading import load_pipeline
from msfp_cli.pipelines.source import ModelSource
from msfp_cli.run import Run
from tiny_pipelines import BUILDERS

Copied = Callable[..., Path]


def subjects_of(
    run: Run,
    export: Path,
    compare: tuple[str, ...] | None = None,
    *,
    work: Path = Path("nowhere"),
    against: ModelSource | None = None,
) -> dict[str, Subject]:
    found = find_subjects(run, export, compare, work=work, against=against, device="cpu")
    assert len({subject.key for subject in found}) == len(found)
    return {subject.key: subject for subject in found}


def titles(subjects: dict[str, Subject]) -> dict[str, str]:
    return {key: subject.title for key, subject in subjects.items()}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Chained:
    """Calibrate and export a model of the smallest one's architecture with other weights."""
    directory = tmp_path_factory.mktemp("other")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        BUILDERS["DDIMPipeline"]().save_pretrained(directory / "model")
    return chain(
        directory / "model", directory / "run", TWO_PICTURES, replace(CHEAP, formats="e2m1,ue2m2")
    )


def test_calibrated_export_stands_beside_full_precision_and_signed_formats(
    tiny_chained: Chained,
) -> None:
    subjects = subjects_of(tiny_chained.run, tiny_chained.export)
    assert list(titles(subjects).items()) == [
        ("full", "full precision"),
        ("signed", "signed FP4"),
        ("export", "MSFP"),
    ]
    assert subjects["full"].source == tiny_chained.calibration.source
    assert subjects["signed"].source is None
    assert subjects["export"].source == ModelSource(model=str(tiny_chained.export))


def test_fine_tuned_export_stands_beside_what_it_began_from_as_well(tiny_tuned: Finetuned) -> None:
    assert list(titles(subjects_of(tiny_tuned.run, tiny_tuned.export)).items()) == [
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
    assert list(subjects_of(tiny_tuned.run, tiny_tuned.export, compare)) == keys


def test_export_of_no_run_stands_beside_full_precision_alone(
    tiny_chained: Chained, tmp_path: Path
) -> None:
    run = Run(tmp_path / "none")
    assert list(titles(subjects_of(run, tiny_chained.export)).items()) == [
        ("full", "full precision"),
        ("export", "MSFP"),
    ]
    assert list(subjects_of(run, tiny_chained.export, ())) == ["full", "export"]
    with pytest.raises(
        UsageError, match=r"was not made by the run .*none; use --compare none, or give its --run"
    ):
        subjects_of(run, tiny_chained.export, ("signed",))


def test_export_of_another_pipeline_is_not_of_this_run(
    tiny_chained: Chained, prompted_chained: Chained
) -> None:
    assert list(subjects_of(tiny_chained.run, prompted_chained.export)) == ["full", "export"]
    with pytest.raises(UsageError, match="was not made by the run"):
        subjects_of(tiny_chained.run, prompted_chained.export, ("signed",))


def test_export_of_another_model_with_the_same_formats_is_not_of_this_run(
    other: Chained, calibrated: Callable[[str], Run]
) -> None:
    run = calibrated("DDIMPipeline")
    assert Calibration.load(run.calibration).recipe.formats == other.calibration.recipe.formats
    assert "signed" not in subjects_of(run, other.export)


def test_run_without_its_recording_does_not_know_how_to_make_signed_formats(
    tiny_chained: Chained, copied: Copied, tmp_path: Path
) -> None:
    run = Run(copied(tiny_chained.run.directory))
    shutil.rmtree(run.recording)
    assert list(subjects_of(run, run.directory / "export")) == ["full", "export"]
    with pytest.raises((RunError, UsageError)):
        subjects_of(run, run.directory / "export", ("signed",), work=tmp_path / "work")[
            "signed"
        ].load()


def test_another_full_precision_model_can_be_given(tiny_chained: Chained, copied: Copied) -> None:
    source = ModelSource(model=str(copied(Path(tiny_chained.calibration.source.model))))
    subject = subjects_of(tiny_chained.run, tiny_chained.export, against=source)["full"]
    assert subject.source == source
    assert identity_of(subject.load()) == identity_of(
        load_pipeline(tiny_chained.calibration.source, "cpu")
    )


def test_directory_that_is_no_export_is_refused(tiny_chained: Chained, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not an exported pipeline: it has no model_index.json"):
        subjects_of(tiny_chained.run, tmp_path)
    with pytest.raises(ModelError, match="msfp did not export it"):
        subjects_of(tiny_chained.run, Path(tiny_chained.calibration.source.model))


def test_signed_formats_are_signed_everywhere_and_lift_nothing(
    tiny_chained: Chained, tmp_path: Path
) -> None:
    pipe = subjects_of(tiny_chained.run, tiny_chained.export, work=tmp_path)["signed"].load()
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
    first = identity_of(subjects_of(run, tiny_chained.export, work=work)["signed"].load())
    with monkeypatch.context() as patch:
        patch.setattr(
            "msfp_cli.evaluation.models.calibrate_",
            lambda *arguments: pytest.fail("it was searched again"),
        )
        assert (
            identity_of(subjects_of(run, tiny_chained.export, work=work)["signed"].load()) == first
        )
    calibration = Calibration.load(run.calibration)
    replace(calibration, recipe=replace(calibration.recipe, weights=6)).save(
        run.calibration, overwrite=True
    )
    assert identity_of(subjects_of(run, tiny_chained.export, work=work)["signed"].load()) != first


def test_calibrated_is_the_state_before_fine_tuning(tiny_tuned: Finetuned) -> None:
    subjects = subjects_of(tiny_tuned.run, tiny_tuned.export)
    found = identity_of(subjects["calibrated"].load())
    assert found == identity_of(load_calibrated(tiny_tuned.calibration, "cpu"))
    assert found != identity_of(subjects["export"].load())


def test_every_model_has_an_identity_of_its_own(
    tiny_tuned: Finetuned, tmp_path: Path, other: Chained
) -> None:
    subjects = subjects_of(tiny_tuned.run, tiny_tuned.export, work=tmp_path)
    prints = [identity_of(subject.load())["unet"] for subject in subjects.values()]
    prints += [
        identity_of(load_pipeline(each, "cpu"))["unet"] for each in (other.calibration.source,)
    ]
    assert len(set(prints)) == len(prints) == 5
    assert prints == [
        *(identity_of(subject.load())["unet"] for subject in subjects.values()),
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


def test_size_is_what_the_export_holds_and_sixteen_bits_of_full_precision(
    tiny_chained: Chained, tiny_pipe: DiffusionPipeline
) -> None:
    exported = load_pipeline(ModelSource(model=str(tiny_chained.export)), "cpu")
    (path,) = (tiny_chained.export / "unet").glob("*.safetensors")
    assert denoiser_bytes(exported) == sum(tensor.nbytes for tensor in load_file(path).values())
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert path.stat().st_size == 8 + header + denoiser_bytes(exported)
    assert denoiser_bytes(tiny_pipe) == 2 * sum(
        parameter.numel() for parameter in tiny_pipe.unet.parameters()
    )
    assert denoiser_bytes(exported) < 0.5 * denoiser_bytes(tiny_pipe)
    assert digest(find_denoisers(exported)["unet"].state_dict()) == digest(load_file(path))


def test_export_of_an_earlier_calibration_is_not_of_this_run(
    calibrated: Callable[[str], Run], copied: Copied, tmp_path: Path
) -> None:
    run = Run(copied(calibrated("DDIMPipeline").directory))
    export_(Calibration.load(run.calibration), tmp_path / "export")
    assert "signed" in subjects_of(run, tmp_path / "export")
    calibration = Calibration.load(run.calibration)
    options = replace(TWO_PICTURES, num_images=2)
    calibrate_run(
        run, calibration.source, options, replace(CHEAP, weights=6), device="cpu", overwrite=True
    )
    assert "signed" not in subjects_of(run, tmp_path / "export")
