"""Pictures as conditions: which argument takes them, files beside masks, and stand-ins."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

import tiny_pipelines
from msfp_cli.errors import UsageError
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.pipelines.pictures import (
    needs_pictures,
    picture_arguments,
    picture_files,
    pictures_of,
    say_pictures,
)
from msfp_cli.pipelines.sampling import Sampling, call_pipeline
from pipelines.test_conditions import Lines

ORIENTATION = 0x0112  # the tag of a picture's file that says how to turn it
TAKEN = {
    "StableDiffusionPipeline": [],
    "StableDiffusionImg2ImgPipeline": ["image"],
    "StableDiffusionInpaintPipeline": ["image", "mask_image"],
    "StableDiffusionInstructPix2PixPipeline": ["image"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with two pictures, one of which has a mask, and a text."""
    for name, color, size in (("b.png", "red", (40, 30)), ("a.jpg", "blue", (36, 36))):
        Image.new("RGB", size, color).save(tmp_path / name)
    Image.new("L", (36, 36), 255).save(tmp_path / "a-mask.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


@pytest.fixture(params=TAKEN)
def pipe(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> DiffusionPipeline:
    source = ModelSource(model=str(tiny("StableDiffusionPipeline")), pipeline=request.param)
    return load_pipeline(source, "cpu")


def test_what_takes_pictures_is_read_off_the_signature(pipe: DiffusionPipeline) -> None:
    taken = TAKEN[type(pipe).__name__]
    assert picture_arguments(pipe) == taken
    assert needs_pictures(pipe) == bool(taken)
    stand_ins = pictures_of(pipe, Sampling(), 0, 2)
    assert list(stand_ins) == taken


def test_stand_ins_are_said_and_given_pictures_are_not(
    pipe: DiffusionPipeline, folder: Path
) -> None:
    said = Lines()
    say_pictures(pipe, Sampling(), said)
    taken = TAKEN[type(pipe).__name__]
    assert len(said.lines) == bool(taken)
    assert all(name in said.lines[0] and "stand in" in said.lines[0] for name in taken)
    if taken:
        Image.new("L", (40, 30), 255).save(folder / "b-mask.png")
        say_pictures(pipe, Sampling(images=folder), said, count=2)
        assert len(said.lines) == 1
    else:
        with pytest.raises(UsageError, match="takes no pictures; leave --images out"):
            say_pictures(pipe, Sampling(images=folder), said)


def test_pictures_come_in_the_order_of_their_names_and_again(
    tiny: Callable[[str], Path], folder: Path
) -> None:
    source = ModelSource(
        model=str(tiny("StableDiffusionPipeline")), pipeline="StableDiffusionInpaintPipeline"
    )
    pipe = load_pipeline(source, "cpu")
    assert [path.name for path in picture_files(folder)] == ["a.jpg", "b.png"]
    given = pictures_of(pipe, Sampling(images=folder), first=1, count=2)
    assert [picture.size for picture in given["image"]] == [(36, 36)] * 2  # as the first
    reds = [np.asarray(picture)[..., 0].mean() for picture in given["image"]]
    assert reds[0] > 200 > 50 > reds[1]
    masks = [np.asarray(mask).mean() for mask in given["mask_image"]]
    assert masks[0] == pytest.approx(255 / 4, rel=0.2)  # none beside it: the middle
    assert masks[1] == 255
    sized = pictures_of(pipe, Sampling(images=folder, width=24, height=16), 0, 1)
    assert {each[0].size for each in sized.values()} == {(24, 16)}


def test_stand_ins_are_the_same_each_time_and_differ_from_each_other(
    tiny: Callable[[str], Path],
) -> None:
    source = ModelSource(
        model=str(tiny("StableDiffusionPipeline")), pipeline="StableDiffusionImg2ImgPipeline"
    )
    pipe = load_pipeline(source, "cpu")
    one, other = pictures_of(pipe, Sampling(), 0, 2)["image"]
    (again,) = pictures_of(pipe, Sampling(), 1, 1)["image"]
    assert np.array_equal(np.asarray(other), np.asarray(again))
    assert not np.array_equal(np.asarray(one), np.asarray(other))
    assert one.size == (32, 32)  # what the pipeline makes by itself


@pytest.mark.parametrize("name", [name for name in TAKEN if TAKEN[name]][:2])
def test_a_picture_changes_what_is_made(
    name: str, tiny: Callable[[str], Path], folder: Path
) -> None:
    source = ModelSource(model=str(tiny("StableDiffusionPipeline")), pipeline=name)
    pipe = load_pipeline(source, "cpu")
    made = [
        np.asarray(call_pipeline(pipe, ["a cat"], sampling)[0])
        for sampling in (
            Sampling(num_inference_steps=2),
            Sampling(num_inference_steps=2, images=folder, width=32, height=32),
        )
    ]
    assert made[0].shape == made[1].shape == (32, 32, 3)
    assert not np.array_equal(*made)


def test_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no picture"):
        picture_files(tmp_path)
    with pytest.raises(UsageError, match="cannot read --images .*missing"):
        picture_files(tmp_path / "missing")


def test_picture_that_cannot_be_read_is_named(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no")
    source = ModelSource(
        model=str(tiny("StableDiffusionPipeline")), pipeline="StableDiffusionImg2ImgPipeline"
    )
    with pytest.raises(UsageError, match=r"cannot read the picture .*a\.png"):
        pictures_of(load_pipeline(source, "cpu"), Sampling(images=tmp_path), 0, 1)


def test_picture_that_only_a_later_call_would_get_is_read_before_the_first(
    pipe: DiffusionPipeline, folder: Path
) -> None:
    photo = folder / "c.jpg"
    Image.effect_noise((400, 300), 64).save(photo)
    whole = photo.read_bytes()
    sampling = Sampling(images=folder)
    if not picture_arguments(pipe):
        return
    say_pictures(pipe, sampling, Lines(), count=3)
    photo.write_bytes(whole[: len(whole) // 2])
    say_pictures(pipe, sampling, Lines(), count=2)  # nobody gets it
    with pytest.raises(UsageError, match=r"cannot read the picture .*c\.jpg: image file is trunc"):
        say_pictures(pipe, sampling, Lines(), count=3)
    photo.write_bytes(whole)
    (folder / "a-mask.png").write_bytes(b"no")
    if "mask_image" not in picture_arguments(pipe):
        say_pictures(pipe, sampling, Lines(), count=3)
        return
    with pytest.raises(UsageError, match=r"cannot read the picture .*a-mask\.png"):
        say_pictures(pipe, sampling, Lines(), count=3)


def inpainting(tiny: Callable[[str], Path]) -> DiffusionPipeline:
    """Return a pipeline that takes a mask with each picture."""
    model = str(tiny("StableDiffusionPipeline"))
    source = ModelSource(model=model, pipeline="StableDiffusionInpaintPipeline")
    return load_pipeline(source, "cpu")


@pytest.mark.parametrize("picture", ["a.png", "a.jpg", "A b\u00e9.PNG"])
@pytest.mark.parametrize("ending", [".png", ".jpg", ".JPG", ".PNG", ".webp", ".bmp"])
def test_mask_is_found_whatever_its_ending(
    tiny: Callable[[str], Path], tmp_path: Path, picture: str, ending: str
) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / picture)
    Image.new("L", (32, 32), 255).save(tmp_path / f"{Path(picture).stem}-mask{ending}")
    pipe, sampling, said = inpainting(tiny), Sampling(images=tmp_path), Lines()
    (mask,) = pictures_of(pipe, sampling, 0, 1)["mask_image"]
    assert np.asarray(mask).min() > 250
    say_pictures(pipe, sampling, said)
    assert said.lines == []


def test_pictures_without_a_mask_are_said(tiny: Callable[[str], Path], folder: Path) -> None:
    said = Lines()
    say_pictures(inpainting(tiny), Sampling(images=folder), said, count=5)
    (line,) = said.lines
    assert line.startswith("1 of 2 pictures have no mask beside them") and "b-mask.png" in line


def test_photo_of_an_upright_camera_is_turned_as_viewers_turn_it(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    seen = Image.new("RGB", (32, 48), "blue")
    seen.paste("red", (0, 0, 32, 24))  # the upper half
    tags = Image.Exif()
    tags[ORIENTATION] = 6  # to be turned clockwise
    seen.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=tags)
    mask = Image.new("L", seen.size)
    mask.paste(255, (0, 0, 32, 24))
    mask.save(tmp_path / "a-mask.png")
    source = ModelSource(
        model=str(tiny("StableDiffusionPipeline")), pipeline="StableDiffusionInpaintPipeline"
    )
    given = pictures_of(load_pipeline(source, "cpu"), Sampling(images=tmp_path), 0, 1)
    assert np.array_equal(np.asarray(given["image"][0]), np.asarray(seen))
    assert np.array_equal(np.asarray(given["mask_image"][0]), np.asarray(mask))


def test_grey_of_16_bits_has_its_shades(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    shades = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    Image.fromarray(shades.astype(np.uint16)).save(tmp_path / "a.png")
    source = ModelSource(
        model=str(tiny("StableDiffusionPipeline")), pipeline="StableDiffusionImg2ImgPipeline"
    )
    (depth,) = pictures_of(load_pipeline(source, "cpu"), Sampling(images=tmp_path), 0, 1)["image"]
    assert depth.mode == "RGB"
    assert np.abs(np.asarray(depth) - shades[..., None] / 257).max() <= 1


def enlarging(tiny: Callable[[str], Path]) -> DiffusionPipeline:
    """Return a pipeline that enlarges a picture of the latents' size, here twice."""
    parts = load_pipeline(ModelSource(model=str(tiny("StableDiffusionPipeline"))), "cpu").components
    parts["unet"] = tiny_pipelines._conditional_unet(in_channels=7, num_class_embeds=1000)
    parts["vae"].register_to_config(scaling_factor=0.08333)
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    return diffusers.StableDiffusionUpscalePipeline(
        **{name: parts[name] for name in names}, low_res_scheduler=diffusers.DDPMScheduler()
    )


def test_pipeline_that_enlarges_takes_pictures_of_the_size_of_its_latents(
    tiny: Callable[[str], Path], folder: Path
) -> None:
    pipe = enlarging(tiny)
    assert needs_pictures(pipe)
    (stand_in,) = pictures_of(pipe, Sampling(), 0, 1)["image"]
    assert stand_in.size == (16, 16)
    (made,) = call_pipeline(pipe, ["a cat"], Sampling(num_inference_steps=2))
    assert made.size == (32, 32)
    given = Sampling(num_inference_steps=2, images=folder, width=24, height=16)
    assert call_pipeline(pipe, ["a cat"], given)[0].size == (48, 32)


def test_pipeline_that_needs_a_video_says_so_and_what_to_do(tmp_path: Path) -> None:
    tokenizer = tiny_pipelines._t5_tokenizer()
    pipe = diffusers.CogVideoXVideoToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_pipelines._t5_encoder(tokenizer),
        vae=None,
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=1, text_embed_dim=32
        ),
        scheduler=diffusers.DDIMScheduler(),
    )
    with pytest.raises(UsageError, match="failed without 'video' .*--pipeline CLASS"):
        call_pipeline(pipe, ["a cat"], Sampling(num_inference_steps=2))


class Editing:
    """A pipeline that needs a picture, and says so nowhere."""

    components: ClassVar[dict[str, object]] = {}

    def __call__(
        self,
        prompt: str,
        image: object = None,
        ip_adapter_image: object = None,
        num_inference_steps: int = 2,
    ) -> None:
        """Fail as pipelines do."""
        if num_inference_steps > 5:
            raise ValueError("too many steps")
        raise ValueError(f"`image` has to be a picture, not {image}")


def test_call_that_fails_for_want_of_a_picture_names_the_option() -> None:
    with pytest.raises(UsageError, match=r"Editing failed without 'image' \(.*--images"):
        call_pipeline(Editing(), ["a cat"], Sampling())
    with pytest.raises(ValueError, match="too many steps"):
        call_pipeline(Editing(), ["a cat"], Sampling(num_inference_steps=6))


class Identifying:
    """A pipeline that needs what a network outside of it makes of a face, and says so nowhere."""

    components: ClassVar[dict[str, object]] = {}

    def __call__(self, prompt: str, id_cond: Any = None, mask: object = None) -> None:  # noqa: ANN401 (None)
        """Fail as pipelines do."""
        id_cond.to("cpu")


def test_call_that_fails_for_want_of_anything_else_names_it() -> None:
    line = "^Identifying failed without 'id_cond' .*neither a prompt nor a picture"
    with pytest.raises(UsageError, match=line):
        call_pipeline(Identifying(), ["a cat"], Sampling())


@pytest.mark.parametrize("name", ["NoSuchPipeline", "UNet2DModel", "version"])
def test_class_that_is_not_a_pipeline_is_refused(name: str, tiny: Callable[[str], Path]) -> None:
    with pytest.raises(
        UsageError, match=f"'{name}' is not a pipeline of diffusers {diffusers.__version__}"
    ):
        load_pipeline(ModelSource(model=str(tiny("DDIMPipeline")), pipeline=name), "cpu")


class Animating:
    """A pipeline that takes one picture, and no list."""

    def __init__(self, **components: object) -> None:
        self.components = components
        self.__dict__.update(components)

    def __call__(self, prompt: str, image: object) -> list[list[object]]:
        """Return the picture, or that of the first ControlNet."""
        self.given = image
        nets = self.components.get("controlnet")
        if isinstance(image, list) and nets is None:
            raise ValueError(f"`image` has to be a `PIL.Image.Image` but is {type(image)}")
        return [[image if nets is None else image[0]]]


def test_picture_is_passed_by_itself_and_several_are_refused_where_one_is_taken() -> None:
    (made,) = call_pipeline(Animating(), ["a cat"], Sampling())
    assert isinstance(made, Image.Image)
    with pytest.raises(UsageError, match="^Animating makes one picture a call; .*--batch-size 1$"):
        call_pipeline(Animating(), ["a cat", "a dog"], Sampling())


def test_each_of_several_controlnets_is_given_the_picture() -> None:
    pipe = Animating(controlnet=SimpleNamespace(nets=["canny", "depth"]))
    call_pipeline(pipe, ["a cat"], Sampling())
    one, other = pipe.given
    assert isinstance(one, Image.Image) and one is other


class Repainting(Animating):
    """A pipeline whose ControlNet is given the mask, and no other part."""

    def __call__(
        self, prompt: str, control_image: object = None, control_mask: object = None
    ) -> list[list[object]]:
        """Return what it is given."""
        return [[control_image, control_mask]]


def test_mask_of_a_controlnet_is_a_mask(folder: Path) -> None:
    sampling = Sampling(images=folder)
    given = pictures_of(Repainting(), sampling, 0, 1)
    assert [given[name][0].mode for name in ("control_image", "control_mask")] == ["RGB", "L"]


class Adapting(Animating):
    """A pipeline with several adapters, which wants a picture for each in one list."""

    def __call__(self, prompt: str, image: list[object]) -> list[list[object]]:
        """Return the picture of the first adapter."""
        self.given = image
        return [image[:1]]


def test_each_of_several_adapters_is_given_the_picture() -> None:
    pipe = Adapting(adapter=SimpleNamespace(adapters=["canny", "depth", "pose"]))
    call_pipeline(pipe, ["a cat"], Sampling())
    assert len(pipe.given) == 3 and all(each is pipe.given[0] for each in pipe.given)


class Combining(Animating):
    """A pipeline that takes several pictures for one prompt."""

    def __call__(self, prompt: str, images: list[object] | None = None) -> list[list[object]]:
        """Return the pictures."""
        return [[images[0]]]


def test_one_picture_is_in_a_list_where_the_argument_is_in_the_plural(folder: Path) -> None:
    (made,) = call_pipeline(Combining(), ["a cat"], Sampling(images=folder))
    assert isinstance(made, Image.Image)


class Inpainting(Animating):
    """A pipeline that is given the picture beside that of its ControlNets."""

    def __call__(self, prompt: str, image: object, control_image: list) -> list[list[object]]:
        """Return the picture."""
        self.given = [image, *control_image]
        return [[image]]


def test_picture_beside_that_of_several_controlnets_is_passed_by_itself() -> None:
    pipe = Inpainting(controlnet=SimpleNamespace(nets=["canny", "depth"]))
    call_pipeline(pipe, ["a cat"], Sampling())
    assert [isinstance(each, Image.Image) for each in pipe.given] == [True] * 3
