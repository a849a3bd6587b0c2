import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from conftest import Chained
from msfp_cli.errors import CheckpointError, RunError
from msfp_cli.evaluation.gallery import Gallery, watch_samples
from msfp_cli.evaluation.identity import sealed_files
from msfp_cli.files.atomic import write_text
from msfp_cli.files.documents import write_json
from msfp_cli.files.seal import MARK, Seal
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.pipelines.sampling import Sampling, call_pipeline
from msfp_cli.processes import Processes
from msfp_cli.recording.recipe import RecordRecipe
from tiny_pipelines import BUILDERS

THREE = RecordRecipe(conditions=(None,) * 3, num_inference_steps=2, seed=4, batch_size=2)
MODEL = {"name": "tiny"}
KINDS = {
    "StableDiffusionPipeline": "a cat",
    "FluxPipeline": "a cat",
    "DiTPipeline": "1",
    "DDIMPipeline": None,
}


def files_of(gallery: Gallery) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(gallery.directory.iterdir())}


def test_pictures_and_latents_are_the_pipelines_own(
    tiny_pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    gallery = Gallery.create(tmp_path / "gallery", THREE, MODEL)
    gallery.fill(tiny_pipe, title="tiny")
    sampling = Sampling(num_inference_steps=2, seed=4)
    expected = [
        picture
        for i in range(3)
        for picture in call_pipeline(tiny_pipe, (None,), sampling, first=i)
    ]
    pictures = gallery.pictures().permute(0, 2, 3, 1).numpy()
    assert all(
        np.array_equal(picture, np.asarray(own))
        for picture, own in zip(pictures, expected, strict=True)
    )
    decoded = ((gallery.latents() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.equal(
        decoded, gallery.pictures()
    )  # in pixel space the final sample is the picture


@pytest.mark.parametrize("name", KINDS)
def test_final_latents_are_what_the_pipeline_gives_without_its_decoder(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    assert name in BUILDERS
    pipe = load_pipeline(ModelSource(model=str(tiny(name))), "cpu")
    conditions = (KINDS[name],) * 2
    gallery = Gallery.create(
        tmp_path, RecordRecipe(conditions=conditions, num_inference_steps=2), MODEL
    )
    gallery.fill(pipe, title=name)
    with watch_samples(pipe) as samples:
        call_pipeline(pipe, conditions, Sampling(num_inference_steps=2))
    assert torch.equal(gallery.latents(), samples[-1])
    assert gallery.pictures().shape[:2] == (2, 3) and gallery.pictures().dtype == torch.uint8


def test_gallery_does_not_go_on_with_other_pictures(tmp_path: Path) -> None:
    recipe = replace(THREE, images=Path("photos"))
    Gallery.create(tmp_path, recipe, MODEL, images="red")
    Gallery.create(tmp_path, recipe, MODEL, images="red")
    with pytest.raises(RunError, match="photos have changed since .*; use --overwrite"):
        Gallery.create(tmp_path, recipe, MODEL, images="blue")
    of_an_earlier_version = {"model": MODEL, "recipe": recipe.to_json(), "files": None}
    write_json(tmp_path / "gallery.json", of_an_earlier_version)
    Gallery.create(tmp_path, recipe, MODEL, images="blue")


def test_interrupted_gallery_goes_on_and_equals_an_uninterrupted_one(
    tiny_pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    whole, parts = (Gallery.create(tmp_path / name, THREE, MODEL) for name in ("whole", "parts"))
    whole.fill(tiny_pipe, title="whole")
    parts.fill(tiny_pipe, title="parts")
    parts.path(0).unlink()
    assert parts.missing() == [0]
    before = parts.path(1).read_bytes()
    Gallery.create(parts.directory, THREE, MODEL).fill(tiny_pipe, title="parts")
    assert parts.path(1).read_bytes() == before
    assert torch.equal(parts.pictures(), whole.pictures()) and torch.equal(
        parts.latents(), whole.latents()
    )


def test_altered_pictures_and_those_of_another_place_are_refused(
    tiny_pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    gallery = Gallery.create(tmp_path / "one", THREE, MODEL)
    other = Gallery.create(tmp_path / "other", THREE, {"name": "other"})
    for each in (gallery, other):
        each.fill(tiny_pipe, title="tiny")
    content = gallery.path(0).read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    of_another_place = (gallery.path(1).read_bytes(), other.path(0).read_bytes())
    for wrong in (flipped, *of_another_place):
        gallery.path(0).write_bytes(wrong)
        for read in (gallery.pictures, gallery.latents):
            with pytest.raises(CheckpointError, match="altered, or of another model.*delete it"):
                read()
    gallery.path(0).write_bytes(content)
    assert torch.equal(gallery.pictures(), other.pictures())
    save_file(load_file(other.path(0)), gallery.path(0))  # as an earlier version did
    assert torch.equal(gallery.pictures(), other.pictures())


def test_gallery_knows_the_files_beside_the_denoisers_of_its_export(
    tiny_chained: Chained, tmp_path: Path
) -> None:
    export = tmp_path / "export"
    shutil.copytree(tiny_chained.export, export)
    place, own = tmp_path / "gallery", sealed_files(export)
    assert Gallery.create(place, THREE, MODEL, own).is_of(export)
    for name, is_same in (("unet/note.txt", True), ("scheduler/note.txt", False)):
        (export / name).write_text("changed")
        write_text(export / MARK, Seal.of(export).to_text())
        assert Gallery(place, THREE).is_of(export) == is_same
    with pytest.raises(RunError, match="of another model"):
        Gallery.create(place, THREE, MODEL, sealed_files(export))
    for files in ({}, {"files": None}):  # as earlier versions did, and for what has no seal
        write_json(place / "gallery.json", {"model": MODEL, "recipe": THREE.to_json(), **files})
        assert Gallery.create(place, THREE, MODEL, own).is_of(export)
    write_json(place / "gallery.json", {"model": MODEL, "recipe": THREE.to_json(), "files": own})
    (export / MARK).write_text("{")
    assert not Gallery(place, THREE).is_of(export)
    (export / MARK).unlink()
    assert Gallery(place, THREE).is_of(export)


def test_share_of_an_interrupted_gallery_is_what_is_missing_of_it(
    tiny_pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    recipe = RecordRecipe(conditions=(None,) * 4, num_inference_steps=1, batch_size=1)
    gallery = Gallery.create(tmp_path, recipe, MODEL)
    gallery.fill(tiny_pipe, title="tiny")
    for index in (0, 1, 2):
        gallery.path(index).unlink()
    gallery.fill(tiny_pipe, title="tiny", processes=Processes(0, 2))
    assert gallery.missing() == [1]


def test_complete_gallery_is_not_drawn_again(tiny_pipe: DiffusionPipeline, tmp_path: Path) -> None:
    gallery = Gallery.create(tmp_path, THREE, MODEL)
    gallery.fill(tiny_pipe, title="tiny")
    before = files_of(gallery)
    Gallery.create(tmp_path, THREE, MODEL).fill(tiny_pipe, title="tiny")
    assert files_of(gallery) == before


def test_other_settings_and_other_models_are_refused(tmp_path: Path) -> None:
    Gallery.create(tmp_path, THREE, MODEL)
    with pytest.raises(RunError, match="other settings or of another model"):
        Gallery.create(tmp_path, THREE, {"name": "other"})
    with pytest.raises(RunError, match="other settings or of another model"):
        Gallery.create(tmp_path, RecordRecipe(conditions=(None,)), MODEL)


def test_damage_is_named(tiny_pipe: DiffusionPipeline, tmp_path: Path) -> None:
    gallery = Gallery.create(tmp_path, THREE, MODEL)
    with pytest.raises(RunError, match="00000.safetensors is missing"):
        gallery.pictures()
    gallery.fill(tiny_pipe, title="tiny")
    gallery.path(1).write_bytes(gallery.path(1).read_bytes()[:100])
    with pytest.raises(CheckpointError, match="00001.safetensors is damaged"):
        gallery.latents()
    (tmp_path / "gallery.json").write_text("{")
    with pytest.raises(CheckpointError, match="gallery.json is damaged"):
        Gallery.create(tmp_path, THREE, MODEL)


def test_scheduler_is_left_as_it_was_even_after_an_error(tiny_pipe: DiffusionPipeline) -> None:
    before = dict(vars(tiny_pipe.scheduler))
    with pytest.raises(KeyboardInterrupt), watch_samples(tiny_pipe):
        raise KeyboardInterrupt
    assert vars(tiny_pipe.scheduler) == before
