"""The workflow and the command: what they measure and refuse, repetition, and resuming."""

import functools
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from conftest import Chained, Finetuned, Invoke, files_of, only_error, only_line
from msfp_cli import __version__
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import export_, load_calibrated
from msfp_cli.checkpoint.reseal import reseal
from msfp_cli.errors import RunError, UsageError
from msfp_cli.evaluation.cost import Cost
from msfp_cli.evaluation.evaluate import _like, evaluate_run
from msfp_cli.evaluation.features.extractors import load_extractor
from msfp_cli.evaluation.features.fashion import agreement, load_classifier
from msfp_cli.evaluation.features.reference import (
    BUILT_IN_REFERENCE,
    built_in_reference,
    load_reference,
)
from msfp_cli.evaluation.features.squeezenet import deep_distance, load_squeezenet
from msfp_cli.evaluation.metrics.compute import MOST_PSNR
from msfp_cli.evaluation.metrics.distances import frechet_distance, kernel_distance
from msfp_cli.evaluation.metrics.evidence import Evidence, PictureSet
from msfp_cli.evaluation.metrics.table import METRICS, compute_metrics
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.evaluation.result import Evaluation, Measurements, SetSizes
from msfp_cli.evaluation.resume import begin
from msfp_cli.pipelines import media
from msfp_cli.pipelines.loading import BUILT_IN, ModelSource, default_prompts, load_pipeline
from msfp_cli.pipelines.sampling import Sampling
from msfp_cli.recording.compare import layer_errors, output_error
from msfp_cli.recording.result import Recording
from msfp_cli.report.report import write_report
from msfp_cli.run import Run
from tiny_pipelines import BUILDERS

Copied = Callable[..., Path]
THREE = EvaluateRecipe(num_images=3, num_trajectories=2, batch_size=2, cost=False)
QUICKLY = ("--num-images", 2, "--num-trajectories", 1, "--no-cost", "--device", "cpu")
ALONE = (*QUICKLY, "--compare", "none")


@pytest.fixture(scope="module")
def evaluated(tiny_chained: Chained, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Evaluate the smallest model's export beside signed FP4. Not to be changed."""
    directory = tmp_path_factory.mktemp("evaluated") / "evaluation"
    return evaluate_run(
        tiny_chained.run, tiny_chained.export, THREE, directory=directory, device="cpu"
    )


def again(
    chained: Chained | Finetuned,
    directory: Path,
    options: EvaluateRecipe = THREE,
    **rest: Any,  # noqa: ANN401
) -> Evaluation:
    return evaluate_run(
        chained.run, chained.export, options, directory=directory, device="cpu", **rest
    )


def result_of(directory: Path) -> bytes:
    return (directory / "evaluation.json").read_bytes()


# What is measured


def test_models_stand_side_by_side_with_full_precision_first(evaluated: Evaluation) -> None:
    assert [model.key for model in evaluated.models] == ["full", "signed", "export"]
    full, *quantized = evaluated.models
    assert full.values.keys() == {"size"}
    assert (full.per_picture, full.sets, full.denoisers) == ({}, {}, {})
    for model in quantized:
        assert {key: len(values) for key, values in model.per_picture.items()} == {
            "psnr": 3,
            "ssim": 3,
            "deep": 3,
        }
        assert model.values.keys() == {"output", "latents", "frechet_full", "kernel_full", "size"}
        assert model.denoisers.keys() == {"unet"} and model.sets.keys() == {"full"}
    assert all(model.cost is None for model in evaluated.models)
    signed, export = quantized
    assert export.denoisers["unet"].error < signed.denoisers["unet"].error
    assert full.denoiser_bytes is not None and export.denoiser_bytes is not None
    assert export.denoiser_bytes < full.denoiser_bytes


def test_what_is_returned_is_what_is_written(evaluated: Evaluation) -> None:
    assert Evaluation.load(evaluated.directory) == evaluated
    written = {path.name for path in evaluated.directory.iterdir()}
    assert written == {
        "asked.json",
        "msfp.json",
        "trajectories",
        "pictures",
        "measured",
        "signed",
        "evaluation.json",
    }
    settings = json.loads((evaluated.directory / "asked.json").read_text())
    assert settings.pop("sha256")
    assert settings == evaluated.settings


def test_it_says_what_was_asked(evaluated: Evaluation, tiny_chained: Chained) -> None:
    assert evaluated.settings == {
        "version": __version__,
        "export": str(tiny_chained.export),
        "against": tiny_chained.calibration.source.to_json(),
        "record": {
            "conditions": [None, None, None],
            "num_inference_steps": tiny_chained.calibration.record.num_inference_steps,
            "guidance_scale": tiny_chained.calibration.record.guidance_scale,
            "seed": EvaluateRecipe().seed,
            "batch_size": 2,
        },
        "models": ["full", "signed", "export"],
        "num_trajectories": 2,
        "extractor": "squeezenet",
        "reference": None,
        "clip": None,
        "layers": True,
        "cost": False,
    }
    assert evaluated.machine["device"] == "cpu" and evaluated.machine["torch"] == torch.__version__


def test_seed_steps_guidance_extractor_and_reference_are_those_of_the_options(
    prompted_chained: Chained, tmp_path: Path
) -> None:
    for i in range(2):
        Image.new("RGB", (32, 32), (90 * i, 0, 0)).save(tmp_path / f"{i}.png")
    options = EvaluateRecipe(
        prompts=("a cat", "a dog"),
        num_images=3,
        num_trajectories=1,
        num_inference_steps=1,
        guidance_scale=2.5,
        seed=17,
        batch_size=1,
        extractor="fashion",
        reference=tmp_path,
        compare=(),
        layers=False,
        cost=False,
    )
    found = again(prompted_chained, tmp_path / "evaluation", options)
    record = found.settings["record"]
    assert record == {
        "conditions": ["a cat", "a dog", "a cat"],
        "num_inference_steps": 1,
        "guidance_scale": 2.5,
        "seed": 17,
        "batch_size": 1,
    }
    assert (found.settings["extractor"], found.settings["reference"]) == ("fashion", str(tmp_path))
    assert (found.settings["models"], found.settings["layers"]) == (["full", "export"], False)
    pictures = found.gallery("full").pictures()
    assert not torch.equal(pictures[0], pictures[2])  # the same prompt from another seed
    assert (
        len(found.models[-1].denoisers["unet"].by_timestep) == 1
        and found.models[-1].denoisers["unet"].layers == {}
    )
    reference = load_reference(tmp_path, load_extractor("fashion"), (32, 32))
    for model in found.models:
        features = load_extractor("fashion").features(found.gallery(model.key).pictures())
        assert model.sets["reference"].num_pictures == (3, 2)
        assert model.values["frechet"] == frechet_distance(features, reference.features)
        assert model.values["kernel"] == kernel_distance(features, reference.features)


def test_pictures_are_measured_one_by_one(evaluated: Evaluation) -> None:
    full, network = evaluated.gallery("full").pictures() / 255, load_squeezenet()
    for model in evaluated.models[1:]:
        pictures = evaluated.gallery(model.key).pictures() / 255
        for i in range(3):
            pair = pictures[i : i + 1], full[i : i + 1]
            _, everywhere = structural_similarity_index_measure(
                *pair, data_range=1.0, return_full_image=True
            )
            assert model.per_picture["psnr"][i] == pytest.approx(
                float(peak_signal_noise_ratio(*pair, data_range=1.0)), abs=1e-4
            )
            assert model.per_picture["ssim"][i] == pytest.approx(
                float(everywhere[..., 5:-5, 5:-5].mean()), abs=1e-4
            )
            assert model.per_picture["deep"][i] == pytest.approx(
                float(deep_distance(network, *pair)), rel=1e-4
            )


def test_latents_and_distances_are_those_of_the_galleries(evaluated: Evaluation) -> None:
    full, extractor = evaluated.gallery("full"), load_extractor("squeezenet")
    reference = extractor.features(full.pictures())
    for model in evaluated.models[1:]:
        gallery = evaluated.gallery(model.key)
        wanted = full.latents().double()
        error = (gallery.latents().double() - wanted).square().sum() / wanted.square().sum()
        assert model.values["latents"] == pytest.approx(float(error), rel=1e-9)
        assert model.sets == {"full": SetSizes(num_pictures=(3, 3), few=True)}
        features = extractor.features(gallery.pictures())
        assert model.values["frechet_full"] == frechet_distance(features, reference)
        assert model.values["kernel_full"] == kernel_distance(features, reference)
        assert not {"precision_full", "recall_full"} & model.values.keys()


def test_output_error_is_that_of_replayed_trajectories(
    evaluated: Evaluation, tiny_chained: Chained
) -> None:
    recording = Recording(evaluated.directory / "trajectories")
    calls = list(recording.calls("unet"))
    assert sum(len(call.output) for call in calls) == 2 * 2  # pictures times steps
    quantized = load_calibrated(tiny_chained.calibration, "cpu").unet
    full = load_pipeline(tiny_chained.calibration.source, "cpu").unet
    measured = evaluated.models[-1].denoisers["unet"]
    error = output_error(quantized, calls)
    assert (measured.error, list(measured.by_timestep)) == (error.relative(), error.by_timestep())
    layers = layer_errors(quantized, full, tiny_chained.calibration.table("unet"), calls)
    assert measured.layers == pytest.approx(layers, rel=1e-9)
    assert measured.inputs.keys() == measured.layers.keys()
    assert not evaluated.models[1].denoisers["unet"].layers  # of the export alone


def test_full_precision_is_perfect_beside_itself(
    evaluated: Evaluation, tiny_chained: Chained
) -> None:
    gallery, extractor = evaluated.gallery("full"), load_extractor("squeezenet")
    drawn = PictureSet(pictures=gallery.pictures(), latents=gallery.latents())
    features = extractor.features(drawn.pictures)
    values, per_picture = compute_metrics(
        Evidence(
            own=drawn,
            full=drawn,
            features=features,
            feature_sets={"full": features.flip(0)},
            extractor="squeezenet",
            denoiser_bytes=1,
        )
    )
    assert per_picture["psnr"] == (MOST_PSNR,) * 3 and per_picture["deep"] == (0.0,) * 3
    assert per_picture["ssim"] == pytest.approx((1.0,) * 3, abs=1e-9)
    assert values["latents"] == 0
    assert values["frechet_full"] < 1e-4 * evaluated.models[1].values["frechet_full"]
    calls = Recording(evaluated.directory / "trajectories").calls("unet")
    assert (
        output_error(load_pipeline(tiny_chained.calibration.source, "cpu").unet, calls).relative()
        == 0
    )


def test_too_few_pictures_are_noted(evaluated: Evaluation) -> None:
    (note,) = evaluated.notes
    assert note.startswith("3 pictures are too few for a Fréchet distance by 'squeezenet'")


def test_single_picture_has_no_distance_and_needs_no_note(
    tiny_chained: Chained, tmp_path: Path
) -> None:
    found = again(tiny_chained, tmp_path / "one", replace(THREE, num_images=1, compare=()))
    assert found.models[-1].sets == {} and "frechet_full" not in found.models[-1].values
    assert len(found.models[-1].per_picture["psnr"]) == 1
    assert found.notes == ()
    assert Evaluation.load(found.directory) == found


def test_figures_of_pixels_are_left_out_where_the_model_makes_sound(
    tiny_chained: Chained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works_of = media.works_of

    def sounds_of(result: object) -> list[np.ndarray]:
        return [np.asarray(work, np.float32).ravel() / 255 for work in works_of(result)]

    monkeypatch.setattr(media, "works_of", sounds_of)
    found = again(tiny_chained, tmp_path / "sound", replace(THREE, compare=()))
    (note,) = found.notes
    assert note.startswith("the model makes sound or embeddings, which are drawn here; what")
    export = found.models[-1]
    assert export.per_picture == {} and "frechet_full" not in export.values
    assert 0 < export.values["latents"] and 0 < export.values["output"]
    assert write_report(tiny_chained.run, found, tmp_path / "page", overwrite=False)


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline", "DiTPipeline"])
def test_every_kind_of_pipeline_is_evaluated(
    name: str, calibrated: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = FluxPipeline.__call__

    @functools.wraps(call)
    def call_small(pipe: FluxPipeline, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (diffusers' signature)
        return call(pipe, *args, height=32, width=32, **kwargs)

    monkeypatch.setattr(
        FluxPipeline, "__call__", call_small
    )  # its own default does not follow its transformer
    run, export = calibrated(name), tmp_path / "export"
    calibration = Calibration.load(run.calibration)
    export_(calibration, export)
    options = replace(THREE, num_images=2, compare=None if name == "DiTPipeline" else ())
    found = evaluate_run(run, export, options, directory=tmp_path / "evaluation", device="cpu")
    (component,) = calibration.layers
    assert (
        found.gallery("full").pictures().shape
        == found.gallery("export").pictures().shape
        == (2, 3, 32, 32)
    )
    for model in found.models[1:]:
        denoiser = model.denoisers[component]
        assert denoiser.error > 0
        assert all(math.isfinite(error) for _, error in denoiser.by_timestep)
        assert 0 < model.values["latents"] < 10
        psnr, ssim, deep = (model.per_picture[key] for key in ("psnr", "ssim", "deep"))
        assert len(psnr) == len(ssim) == len(deep) == 2
        assert 0 < min(psnr) and max(psnr) < 100 and 0 < min(deep)
        assert -1 < min(ssim) and max(ssim) < 1
    assert (
        found.models[-1].denoisers[component].layers.keys() == calibration.table(component).keys()
    )
    recorded = calibration.record.conditions
    fresh = [prompt for prompt in default_prompts(name) if prompt not in recorded]
    wanted = ["0", "500"] if name == "DiTPipeline" else fresh[:2]
    assert found.settings["record"]["conditions"] == wanted


def test_fine_tuned_export_is_measured_beside_what_it_began_from(
    tiny_tuned: Finetuned, tmp_path: Path
) -> None:
    found = again(
        tiny_tuned, tmp_path / "evaluation", replace(THREE, num_images=2, num_trajectories=1)
    )
    assert [model.title for model in found.models] == [
        "full precision",
        "signed FP4",
        "MSFP",
        "MSFP, fine-tuned",
    ]
    calls = list(Recording(found.directory / "trajectories").calls("unet"))
    before = output_error(load_calibrated(tiny_tuned.calibration, "cpu").unet, calls).relative()
    after = load_pipeline(ModelSource(model=str(tiny_tuned.export)), "cpu").unet
    errors = [model.denoisers["unet"].error for model in found.models[2:]]
    assert errors == [before, output_error(after, calls).relative()]


def test_built_in_pipeline_is_compared_with_real_pictures_and_asked_prompts(
    prompted_chained: Chained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(
        prompted_chained.calibration.source.model
    )  # in the place of the built-in one, which takes longer
    monkeypatch.setattr("msfp_cli.pipelines.loading.built_in_directory", lambda: model)
    options = EvaluateRecipe(num_images=5, num_trajectories=1, compare=(), layers=False, cost=False)
    found = again(
        prompted_chained, tmp_path / "evaluation", options, against=ModelSource(model=BUILT_IN)
    )
    assert (found.settings["extractor"], found.settings["reference"]) == (
        "fashion",
        BUILT_IN_REFERENCE,
    )
    prompts = found.settings["record"]["conditions"]
    assert tuple(prompts) == default_prompts(BUILT_IN)[:5]
    classifier = load_classifier()
    for measured in found.models:
        pictures = found.gallery(measured.key).pictures()
        shares = agreement(classifier, pictures / 255, prompts)
        assert [measured.values["garment"], measured.values["colour"]] == [
            100 * share for share in shares if share is not None
        ]
        features = classifier.embed(pictures / 255)
        assert measured.sets["reference"].num_pictures == (5, 2000)
        assert measured.values["frechet"] == frechet_distance(
            features, built_in_reference().features
        )
        assert {"precision", "recall"} <= measured.values.keys()


# That it repeats and goes on


def test_two_evaluations_agree_to_the_last_digit(
    evaluated: Evaluation, tiny_chained: Chained, tmp_path: Path
) -> None:
    torch.rand(7)  # the global random state is nobody's business
    found = again(tiny_chained, tmp_path / "again")
    assert found.models == evaluated.models
    assert result_of(found.directory) == result_of(evaluated.directory)


def test_another_seed_gives_other_values(
    evaluated: Evaluation, tiny_chained: Chained, tmp_path: Path
) -> None:
    found = again(tiny_chained, tmp_path / "other", replace(THREE, seed=1, compare=()))
    assert found.models[-1].per_picture != evaluated.models[-1].per_picture


def without_cost(model: Measurements) -> Measurements:
    values = {key: value for key, value in model.values.items() if key not in ("seconds", "memory")}
    return replace(model, values=values, cost=None)


def test_cost_alone_differs_between_evaluations(
    evaluated: Evaluation, tiny_chained: Chained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []

    def measure(
        source: ModelSource,
        conditions: object,
        sampling: Sampling,
        *,
        device: str | None,
        kernel: str | None,
    ) -> Cost:
        assert kernel == ("auto" if source.model == str(tiny_chained.export) else None)
        calls.append((source.model, conditions, sampling.arguments(), device))
        return Cost(load_seconds=1.0, seconds_per_picture=float(len(calls)), peak_memory_bytes=5)

    monkeypatch.setattr("msfp_cli.evaluation.measure.measure_cost", measure)
    found = again(tiny_chained, tmp_path / "cost", replace(THREE, cost=True))
    assert [without_cost(model) for model in found.models] == list(evaluated.models)
    rest = ((None, None), {"num_inference_steps": 2, "guidance_scale": None}, "cpu")
    assert calls == [
        (tiny_chained.calibration.source.model, *rest),
        (str(tiny_chained.export), *rest),
    ]
    costs = [
        None if model.cost is None else model.cost.seconds_per_picture for model in found.models
    ]
    assert costs == [1.0, None, 2.0]  # what exists in memory only has no process of its own
    few, slow = found.notes
    assert (few,) == evaluated.notes
    assert slow.startswith("a picture takes 2.00 times as long as in full precision on this mac")
    before = result_of(found.directory)
    again(tiny_chained, found.directory, replace(THREE, cost=True))
    assert (
        len(calls) == 2 and result_of(found.directory) == before
    )  # what is measured is not measured again


def test_evaluation_killed_at_every_write_equals_an_uninterrupted_one(
    evaluated: Evaluation, tiny_chained: Chained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rename, left = tmp_path / "parts", os.replace, [0]

    def stop(source: Path, target: Path) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        rename(source, target)

    def kept() -> set[str]:
        return {name for name in files_of(place) if not name.endswith(".msfp-tmp")}

    monkeypatch.setattr(os, "replace", stop)
    for attempt in itertools.count():
        before = kept()
        left[0] = (
            1 if attempt == 0 else 2
        )  # the settings, which each command writes, and what comes next
        try:
            again(tiny_chained, place)
            break
        except KeyboardInterrupt:
            assert before <= kept() and (attempt == 0 or before < kept())
    assert attempt > 10
    assert result_of(place) == result_of(evaluated.directory)


@pytest.mark.parametrize(
    "lost",
    [
        ("evaluation.json", "measured/full.json"),
        ("evaluation.json", "pictures/export", "measured/export.json"),
        ("evaluation.json", "pictures/full/00001.safetensors", "pictures/signed/00000.safetensors"),
        (
            "evaluation.json",
            "trajectories/00000.safetensors",
            "signed",
            "measured/signed.json",
            "measured/export.json",
        ),
    ],
    ids=lambda lost: " ".join(lost[1:]) or "result",
)
def test_what_is_missing_is_made_again(
    lost: tuple[str, ...], evaluated: Evaluation, tiny_chained: Chained, copied: Copied
) -> None:
    place = copied(evaluated.directory)
    for name in lost:
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = files_of(place)
    again(tiny_chained, place)
    assert result_of(place) == result_of(evaluated.directory)
    assert {name: data for name, data in files_of(place).items() if name in kept} == kept


def test_finished_evaluation_is_read_and_not_drawn_again(
    evaluated: Evaluation, tiny_chained: Chained, copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = copied(evaluated.directory)
    for name in (
        "msfp_cli.evaluation.gallery.draw_stills",
        "msfp_cli.recording.record.call_pipeline",
        "msfp_cli.evaluation.metrics.denoisers.output_error",
    ):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("it was done again"))
    assert again(tiny_chained, place).models == evaluated.models
    assert files_of(place) == files_of(evaluated.directory)


@pytest.mark.parametrize(
    "leftover",
    [".asked.json.msfp-tmp", ".evaluation.json.msfp-tmp", ".signed.msfp-tmp/scales.safetensors"],
)
def test_leftovers_of_a_killed_process_do_not_stop_it(
    leftover: str, evaluated: Evaluation, tiny_chained: Chained, copied: Copied
) -> None:
    place = copied(evaluated.directory)
    (place / "evaluation.json").unlink()
    (place / leftover).parent.mkdir(exist_ok=True)
    (place / leftover).write_text("{")
    again(tiny_chained, place)
    assert result_of(place) == result_of(evaluated.directory)


def test_overwrite_begins_again(
    evaluated: Evaluation, tiny_chained: Chained, copied: Copied
) -> None:
    place = copied(evaluated.directory)
    found = again(tiny_chained, place, replace(THREE, num_images=1, compare=()), overwrite=True)
    assert [model.key for model in found.models] == ["full", "export"]
    assert sorted(path.name for path in (place / "pictures").iterdir()) == ["export", "full"]
    assert sorted(path.name for path in (place / "measured").iterdir()) == [
        "export.json",
        "full.json",
    ]


def test_export_that_was_made_again_is_another_model(
    calibrated: Callable[[str], Run], tmp_path: Path
) -> None:
    run, options = (
        calibrated("DDIMPipeline"),
        replace(THREE, num_images=1, num_trajectories=1, compare=()),
    )
    calibration, export = Calibration.load(run.calibration), tmp_path / "export"

    def evaluate_again() -> Evaluation:
        return evaluate_run(run, export, options, directory=tmp_path / "evaluation", device="cpu")

    export_(calibration, export)
    before = evaluate_again()
    layers = {
        name: replace(choice, scheme=replace(choice.scheme, input=None))
        for name, choice in calibration.layers["unet"].items()
    }
    export_(replace(calibration, layers={"unet": layers}), export, overwrite=True)
    with pytest.raises(RunError, match="of another model; use --overwrite"):
        evaluate_again()
    assert Evaluation.load(before.directory) == before


def test_export_that_is_replaced_while_it_is_evaluated_is_refused(
    calibrated: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Titles and the steps before are those of the first one; with --out, the run is not locked."""
    run = calibrated("DDIMPipeline")
    options = replace(THREE, num_images=1, num_trajectories=1, layers=False, compare=())
    calibration, export = Calibration.load(run.calibration), tmp_path / "export"
    export_(calibration, export)
    layers = {
        name: replace(choice, scheme=replace(choice.scheme, input=None))
        for name, choice in calibration.layers["unet"].items()
    }

    def begin_late(*arguments: Any, **rest: Any) -> None:  # noqa: ANN401
        export_(replace(calibration, layers={"unet": layers}), export, overwrite=True)
        begin(*arguments, **rest)

    monkeypatch.setattr("msfp_cli.evaluation.evaluate.begin", begin_late)
    place = tmp_path / "evaluation"
    with pytest.raises(RunError, match=f"^{export} was replaced while it was evaluated; give the"):
        evaluate_run(run, export, options, directory=place, device="cpu")
    monkeypatch.undo()
    evaluate_run(run, export, options, directory=place, device="cpu", overwrite=True)


def test_export_whose_scheduler_was_changed_on_purpose_is_another_model(
    evaluated: Evaluation, tiny_chained: Chained, copied: Copied
) -> None:
    place, export = copied(evaluated.directory), copied(tiny_chained.export, "export")
    config = export / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.02", "0.03"))
    reseal(export)
    with pytest.raises(RunError, match="of another model; use --overwrite"):
        evaluate_run(tiny_chained.run, export, THREE, directory=place, device="cpu")


# The command line


@pytest.fixture
def here(msfp: Invoke, tiny_chained: Chained, copied: Copied) -> Path:
    """Put the smallest model's run where the command looks for it."""
    return copied(tiny_chained.run.directory, "msfp-run")


def test_command_prints_metrics_and_what_is_next(here: Path, msfp: Invoke) -> None:
    result = msfp("evaluate", *QUICKLY)
    assert (result.exit_code, result.stdout) == (0, "msfp-run/evaluation/evaluation.json\n"), (
        result.stderr
    )
    found = Evaluation.load(Path("msfp-run/evaluation"))
    assert "2 pictures from the same seeds; distances by 'squeezenet' features" in result.stderr
    for title in ("full precision", "signed FP4", "MSFP"):
        assert title in result.stderr
    rows = [
        [cell.strip() for cell in re.split("[│┃|]", line)[1:-1]]
        for line in result.stderr.splitlines()
    ]
    shown = {row[0]: row[1:] for row in rows if row and row[0]}
    for metric in METRICS:
        texts = [metric.text(model.value(metric.key)) for model in found.models]
        is_shown = any(texts) and not metric.json_only
        assert shown.get(metric.title) == (texts if is_shown else None)
    assert f"note: {found.notes[0]}" in result.stderr
    assert result.stderr.splitlines()[-1] == "next: msfp report"


def test_json_is_what_the_file_holds(here: Path, msfp: Invoke) -> None:
    result = msfp("evaluate", *ALONE, "--json")
    document = json.loads(Path("msfp-run/evaluation/evaluation.json").read_text())
    assert document.pop("sha256")
    assert json.loads(result.stdout) == document
    found = json.loads(result.stdout)
    assert [model["key"] for model in found["models"]] == ["full", "export"]


def test_options_reach_the_evaluation(here: Path, msfp: Invoke) -> None:
    sampling = "--num-images 3 --num-trajectories 2 --steps 1 --seed 9 --batch-size 2"
    options = (
        "--extractor squeezenet --compare signed --no-layers --no-cost --out elsewhere --device cpu"
    )
    result = msfp("evaluate", "msfp-run/export", *sampling.split(), *options.split())
    assert (result.exit_code, result.stdout) == (0, "elsewhere/evaluation.json\n"), result.stderr
    assert not Path("msfp-run/evaluation").exists()
    asked = Evaluation.load(Path("elsewhere")).settings
    assert asked["record"] == {
        "conditions": [None] * 3,
        "num_inference_steps": 1,
        "guidance_scale": None,
        "seed": 9,
        "batch_size": 2,
    }
    assert (asked["models"], asked["num_trajectories"], asked["layers"]) == (
        ["full", "signed", "export"],
        2,
        False,
    )
    assert result.stderr.splitlines()[-1] == "next: msfp report elsewhere"


@pytest.mark.parametrize(
    ("run", "out"),
    [("my runs", None), ("msfp-run", "my evaluation")],
    ids=["another-run", "another-place"],
)
def test_next_command_finds_the_evaluation(
    run: str, out: str | None, msfp: Invoke, tiny_chained: Chained, copied: Copied
) -> None:
    copied(tiny_chained.run.directory, run)
    result = msfp("evaluate", *ALONE, "--run", run, *(() if out is None else ("--out", out)))
    (following,) = re.findall(r"^next: msfp (.+)$", result.stderr, re.MULTILINE)
    shown = msfp(*shlex.split(following))
    assert shown.exit_code == 0, shown.stderr


def test_prompts_file_and_clip_score(
    prompted_chained: Chained, copied: Copied, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(prompted_chained.run.directory, "msfp-run")
    Path("prompts.txt").write_text("a cat\n\na dog\n")
    seen: list[tuple[Any, ...]] = []

    def score(*arguments: object) -> float:
        seen.append(arguments)
        return 20.0 + len(seen)

    monkeypatch.setattr("msfp_cli.evaluation.metrics.compute.clip_score", score)
    result = msfp("evaluate", *ALONE, "--prompts", "prompts.txt", "--clip", "some/clip")
    assert result.exit_code == 0, result.stderr
    found = Evaluation.load(Path("msfp-run/evaluation"))
    assert (
        found.settings["record"]["conditions"] == ["a cat", "a dog"]
        and found.settings["clip"] == "some/clip"
    )
    assert [model.values["clip"] for model in found.models] == [21.0, 22.0]
    for (model, pictures, prompts, device), key in zip(seen, ("full", "export"), strict=True):
        assert (model, prompts, device) == ("some/clip", ("a cat", "a dog"), "cpu")
        assert torch.equal(pictures, found.gallery(key).pictures())


def test_extractor_of_the_users_own_is_used(
    here: Path, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("user_features.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert msfp("evaluate", *ALONE, "--extractor", "user_features:make").exit_code == 0
    found = Evaluation.load(Path("msfp-run/evaluation"))
    assert found.settings["extractor"] == "user_features:make"
    features = [
        (found.gallery(key).pictures() / 255).mean(dim=(2, 3)) for key in ("export", "full")
    ]
    distance = frechet_distance(*features)
    assert found.models[-1].values["frechet_full"] == pytest.approx(distance, abs=1e-9)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(here: Path, msfp: Invoke) -> None:
    options = (*QUICKLY, "--num-images", 5, "--batch-size", 1)
    assert msfp("evaluate", *options, "--out", "one").exit_code == 0
    if not torch.accelerator.is_available():  # then nobody says on which device
        options = tuple(option for option in options if option not in ("--device", "cpu"))
    command = [sys.executable, "-m", "msfp_cli", "evaluate", *map(str, options), "--out", "two"]
    done = subprocess.run(
        [*command, "--num-processes", "2"], capture_output=True, text=True, timeout=250
    )
    assert (done.returncode, done.stdout) == (0, "two/evaluation.json\n"), done.stderr
    assert done.stderr.splitlines()[-1] == "next: msfp report two"
    assert result_of(Path("two")) == result_of(Path("one"))
    assert files_of(Path("two/signed")) == files_of(Path("one/signed"))


# What is refused


def reference_of(*sizes: tuple[int, int], text: str | None = None) -> None:
    Path("photos").mkdir()
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(f"photos/{i}.png")
    if text is not None:
        Path("photos/a.png").write_text(text)


def array_of(**arrays: np.ndarray) -> None:
    np.savez("photos.npz", **arrays)


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (
            lambda: reference_of(),
            "--reference photos",
            "photos holds 0 pictures; a reference needs at least two",
        ),
        (lambda: reference_of((16, 16)), "--reference photos", "photos holds 1 pictures"),
        (
            lambda: reference_of((20, 30), (20, 30)),
            "--reference photos",
            "photos holds pictures of 20 by 30, the pipeline makes 16 by 16; resize the reference",
        ),
        (
            lambda: reference_of((16, 16), (16, 17)),
            "--reference photos",
            "1.png has another size than 0.png",
        ),
        (
            lambda: reference_of((16, 16), text="cat"),
            "--reference photos",
            "a.png is not a readable picture",
        ),
        (
            lambda: array_of(pictures=np.zeros((2, 16, 16, 3), np.uint8)),
            "--reference photos.npz",
            "cannot read 'images' from photos.npz",
        ),
        (
            lambda: None,
            "--reference nowhere",
            "no reference in nowhere; give a directory of pictures, or an npz file",
        ),
        (
            lambda: None,
            "--extractor resnet",
            "unknown extractor 'resnet'; choose squeezenet, fashion, inception",
        ),
        (
            lambda: None,
            "--extractor no_such_module:make",
            "cannot make extractor 'no_such_module:make'",
        ),
        (
            lambda: None,
            "--extractor fashion",
            "the classifier takes pictures of 32 by 32, not (16, 16)",
        ),
        (
            lambda: None,
            "--compare plain",
            "unknown --compare 'plain'; choose one of signed, calibrated, or none",
        ),
        (lambda: None, "--compare signed,full", "unknown --compare 'full'"),
        (lambda: None, "--num-images 0", "--num-images must be at least 1, got 0"),
        (lambda: None, "--num-images -3", "--num-images must be at least 1, got -3"),
        (lambda: None, "--num-trajectories 0", "--num-trajectories must be at least 1, got 0"),
        (
            lambda: Path("p.txt").write_text(" \n"),
            "--prompts p.txt",
            "p.txt holds no prompts; write one a line",
        ),
        (lambda: None, "--prompts p.txt", "cannot read prompts from p.txt: No such file"),
        (
            lambda: Path("p.txt").write_text("a cat\n"),
            "--prompts p.txt",
            "DDIMPipeline takes no prompts",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("--") else "",
)
def test_wrong_input_is_one_helpful_line(
    prepare: Callable[[], object], options: str, message: str, here: Path, msfp: Invoke
) -> None:
    prepare()
    compare = () if "--compare" in options else ("--compare", "none")
    assert message in only_line(msfp("evaluate", *QUICKLY, *compare, *options.split()), 2)
    assert not Path("msfp-run/evaluation/evaluation.json").exists()


@pytest.mark.parametrize(
    "option", ["--batch-size 0", "--steps 0", "--num-processes 0", "--num-images many"]
)
def test_wrong_number_is_a_wrong_command_line(option: str, here: Path, msfp: Invoke) -> None:
    result = msfp("evaluate", *option.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert option.split()[0] in result.stderr


@pytest.mark.parametrize(
    "wrong",
    [("--reference", "nowhere"), ("--clip", "./nowhere"), ("--against", "OTHER")],
    ids=lambda wrong: wrong[0],
)
def test_mistake_that_is_put_right_needs_no_overwrite(
    wrong: tuple[str, str],
    prompted_chained: Chained,
    copied: Copied,
    msfp: Invoke,
    tiny: Callable[[str], Path],
) -> None:
    copied(prompted_chained.run.directory, "msfp-run")
    option, value = wrong[0], wrong[1].replace("OTHER", str(tiny("DDIMPipeline")))
    assert msfp("evaluate", *ALONE, option, value).exit_code in (1, 2)
    result = msfp("evaluate", *ALONE)
    assert result.exit_code == 0, result.stderr


def test_run_without_an_export_says_what_to_type(msfp: Invoke, here: Path) -> None:
    assert "no run directory nowhere here" in only_line(
        msfp("evaluate", *QUICKLY, "--run", "nowhere"), 1
    )
    shutil.rmtree(here / "export")
    message = only_line(msfp("evaluate", *QUICKLY), 1)
    assert message == "msfp-run holds no export yet; run `msfp export` first"


def test_directory_that_is_no_export_is_named(
    msfp: Invoke, here: Path, tiny_chained: Chained
) -> None:
    Path("empty").mkdir()
    for place in ("empty", "nowhere"):
        message = only_line(msfp("evaluate", place, *QUICKLY), 1)
        assert message.startswith(
            f"{place} is not an exported pipeline: it has no model_index.json"
        )
    message = only_line(msfp("evaluate", tiny_chained.calibration.source.model, *QUICKLY), 1)
    assert "msfp did not export it" in message
    assert not Path("msfp-run/evaluation").exists()


def test_damaged_export_is_named(msfp: Invoke, here: Path) -> None:
    (path,) = (here / "export" / "unet").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    message = only_error(msfp("evaluate", *ALONE), 1)
    assert path.name in message or "altered" in message


def test_export_of_no_run_is_evaluated_but_not_beside_the_steps_before(
    msfp: Invoke, tiny_chained: Chained
) -> None:
    message = only_line(msfp("evaluate", tiny_chained.export, *QUICKLY, "--compare", "signed"), 2)
    assert message == (
        f"{tiny_chained.export} was not made by the run msfp-run; "
        "use --compare none, or give its --run"
    )
    result = msfp("evaluate", tiny_chained.export, *QUICKLY)
    assert (result.exit_code, result.stdout) == (0, "msfp-run/evaluation/evaluation.json\n"), (
        result.stderr
    )
    assert [model.key for model in Evaluation.load(Path("msfp-run/evaluation")).models] == [
        "full",
        "export",
    ]


@pytest.mark.parametrize(
    "kind", ["another-architecture", "other-weights", "another-pipeline", "missing"]
)
def test_wrong_full_precision_model_is_named(
    kind: str, here: Path, msfp: Invoke, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    if kind == "other-weights":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            BUILDERS["DDIMPipeline"]().save_pretrained(model)
    elif kind != "missing":
        model = tiny(
            {"another-architecture": "DiTPipeline", "another-pipeline": "LDMPipeline"}[kind]
        )
    message = only_error(msfp("evaluate", *ALONE, "--against", model), 1)
    if kind == "missing":
        assert message == f"'{model}' is neither a directory nor a hub id (owner/name)"
    else:
        assert message.startswith("the export is of another model: ") and message.endswith(
            "give it with --against"
        )


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ("--seed 4", "seed"),
        ("--num-images 3", "conditions"),
        ("--steps 3", "num_inference_steps"),
        ("--batch-size 1", "batch_size"),
        ("--num-trajectories 2", "num_trajectories"),
        ("--extractor module:make", "extractor"),
        ("--reference photos", "reference"),
        ("--clip openai/clip", "clip"),
        ("--compare signed", "models"),
        ("--kernel reference", "kernel"),
        ("--no-layers", "layers"),
        ("--cost", "cost"),
    ],
)
def test_other_settings_are_refused_by_name(
    options: str,
    field: str,
    here: Path,
    msfp: Invoke,
    evaluated: Evaluation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(evaluated.directory, here / "evaluation")
    asked = evaluated.settings | {
        "export": "msfp-run/export",
        "models": ["full", "export"],
        "num_trajectories": 1,
    }
    asked["record"] = asked["record"] | {"conditions": [None, None], "batch_size": 8}
    (here / "evaluation/asked.json").write_text(json.dumps(asked))
    monkeypatch.setattr(
        "msfp_cli.evaluation.plan.load_extractor",
        lambda name: replace(load_extractor("squeezenet"), name=name),
    )
    before = files_of(here)
    message = only_line(msfp("evaluate", *ALONE, "--extractor", "squeezenet", *options.split()), 1)
    assert message.startswith("msfp-run/evaluation holds an evaluation with other settings (")
    assert f"'{field}' differs" in message and message.endswith("use --overwrite")
    assert files_of(here) == before


def test_settings_that_an_evaluation_was_begun_with_cannot_be_left_out(
    here: Path, msfp: Invoke
) -> None:
    begun = msfp("evaluate", *ALONE, "--kernel", "reference")
    assert begun.exit_code == 0, begun.stderr
    before = files_of(here)
    assert "('kernel' differs)" in only_line(msfp("evaluate", *ALONE), 1)
    assert files_of(here) == before


def test_export_of_an_evaluation_is_found_from_anywhere(
    here: Path, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = msfp("evaluate", *ALONE, "--out", "figures")
    assert done.exit_code == 0, done.stderr
    (here.parent / "elsewhere").mkdir()
    monkeypatch.chdir(here.parent / "elsewhere")
    assert Evaluation.load(here.parent / "figures").export == here / "export"


def test_model_to_compare_with_has_the_class_and_type_of_the_calibrated_one() -> None:
    source = ModelSource(model="a", dtype="bfloat16", pipeline="B", revision="c")
    assert _like(ModelSource(model="d"), source) == replace(source, model="d", revision=None)
    own = ModelSource(model="d", dtype="float32", pipeline="E")
    assert _like(own, source) == own


@pytest.mark.parametrize(
    "content", [{"thesis.txt": "years"}, {"asked.json": "{}", "thesis.txt": "years"}], ids=len
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_directory_of_somebody_else_is_left_alone(
    content: dict[str, str], overwrite: bool, here: Path, msfp: Invoke
) -> None:
    Path("mine").mkdir()
    for name, text in content.items():
        (Path("mine") / name).write_text(text)
    before = files_of(Path("mine"))
    options = ("--overwrite",) if overwrite else ()
    message = only_line(msfp("evaluate", *ALONE, "--out", "mine", *options), 1)
    assert re.fullmatch(
        r"mine/(asked.json|thesis.txt) was not written by msfp and is not replaced; move it away, "
        "or choose another path",
        message,
    )
    assert files_of(Path("mine")) == before


def test_file_in_the_place_of_the_directory_is_left_alone(here: Path, msfp: Invoke) -> None:
    Path("mine.txt").write_text("years")
    message = only_line(msfp("evaluate", *ALONE, "--out", "mine.txt"), 1)
    assert message.startswith("mine.txt was not written by msfp")
    assert Path("mine.txt").read_text() == "years"


@pytest.mark.parametrize("name", ["asked.json", "measured/full.json", "pictures/full/gallery.json"])
def test_damaged_file_says_to_overwrite_and_that_helps(
    name: str, here: Path, msfp: Invoke, evaluated: Evaluation
) -> None:
    place = shutil.copytree(evaluated.directory, here / "evaluation")
    asked = evaluated.settings | {"export": "msfp-run/export", "models": ["full", "export"]}
    (place / "asked.json").write_text(json.dumps(asked))
    options = ("--num-images", 3, "--num-trajectories", 2, "--batch-size", 2)
    for text in ("", "{", "[]", "3", "{}"):
        (place / name).write_text(text)
        message = only_error(msfp("evaluate", *ALONE, *options), 1)
        assert "msfp-run/evaluation" in message and "--overwrite" in message, message
    assert msfp("evaluate", *ALONE, "--num-images", 1, "--overwrite").exit_code == 0


def test_damaged_result_is_written_again(
    evaluated: Evaluation, tiny_chained: Chained, copied: Copied
) -> None:
    place = copied(evaluated.directory)
    (place / "evaluation.json").write_text("{")
    again(tiny_chained, place)
    assert result_of(place) == result_of(evaluated.directory)


def test_interrupted_command_says_how_to_go_on(
    here: Path, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def stop(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("msfp_cli.evaluation.measure.compute_metrics", stop)
        message = only_error(msfp("evaluate", *ALONE), 1)
    assert message == "stopped; what was finished is kept, run the same command to go on"
    assert msfp("evaluate", *ALONE).exit_code == 0


def test_options_are_checked_when_they_are_made() -> None:
    for odd in ({"num_images": 0}, {"num_trajectories": -1}):
        with pytest.raises(UsageError, match="must be at least 1"):
            EvaluateRecipe(**odd)
