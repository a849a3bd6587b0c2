"""Pictures that a pipeline is conditioned on: those of a folder, or stand-ins made from noise.

What a pipeline takes is read off its signature: ``image`` or ``control_image``, and ``mask_image``
or ``control_mask`` for inpainting. All pictures of a call get one size.
"""

import hashlib
import inspect
import random
import re
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from msfp_cli.errors import UsageError
from msfp_cli.files.seal import SealedFile
from msfp_cli.pipelines.loading import Pipeline
from msfp_cli.progress import Progress

if TYPE_CHECKING:  # `msfp --help` loads it late
    from PIL.Image import Image

_PICTURES = ("image", "control_image", "images")
_MASKS = ("mask_image", "control_mask")
# Arguments and components of pipelines that cannot do without a picture, where the signature has
# None for its default.
_SIGNS = ("strength", "control_image", "image_guidance_scale", "mask_image")
_PARTS = ("controlnet", "low_res_scheduler", "image_noising_scheduler", "adapter")
_ENLARGING = ("low_res_scheduler", "image_noising_scheduler")  # components; they add noise to it
# Names of arguments that take pictures, videos or sound; those of an IP-adapter may be left out.
_MEDIA = re.compile(r"^(?!ip_adapter|num_)(\w+_)?(images?|video|frames|audio)$")
# What errors say where None was taken for a picture.
_NO_MEDIUM = re.compile(r"NoneType|only support .*PIL\.Image")
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SIZE = 512  # of stand-ins for a pipeline that names no size
_STAND_IN = 8  # pixels of the noise that a stand-in is enlarged from


class PictureSettings(Protocol):
    """What of a sampling says which pictures are given."""

    @property
    def images(self) -> Path | None:
        """A folder of them."""

    @property
    def height(self) -> int | None:
        """In pixels."""

    @property
    def width(self) -> int | None:
        """In pixels."""


def picture_arguments(pipe: Pipeline) -> list[str]:
    """Return the arguments of a pipeline that take pictures or masks."""
    parameters = inspect.signature(pipe.__call__).parameters
    names = [name for name in _PICTURES if name in parameters]
    masks = [name for name in _MASKS if name in parameters]
    return [*names, *masks] if names else []


def needs_pictures(pipe: Pipeline) -> bool:
    """Whether a pipeline cannot be called without a picture."""
    parameters = inspect.signature(pipe.__call__).parameters
    names = picture_arguments(pipe)
    required = any(parameters[name].default is inspect.Parameter.empty for name in names)
    parts = getattr(pipe, "components", {})
    has_signs = any(name in parameters for name in _SIGNS) or any(name in parts for name in _PARTS)
    return bool(names) and (required or has_signs)


def refuse_without_media(pipe: Pipeline, given: Collection[str], error: Exception) -> None:
    """Refuse a call that failed because a picture, video or sound was None, in one line.

    Many pipelines need one and do not say so in their signature. Some need what networks outside of
    them make of a picture, and the line that failed names it.

    Arguments:
        given: the arguments of the call.
        error: of the call.

    Raises:
        UsageError: the error speaks of such an argument, or of None or pictures where there is one.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    absent = [
        name
        for name, parameter in parameters.items()
        if parameter.default is None and name not in given
    ]
    missing = [name for name in absent if _MEDIA.search(name)]
    text = str(error) or type(error).__name__
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    named = [name for name in missing if re.search(rf"\b{name}\b", text)]
    if not named and "NoneType" in text:
        named = [name for name in absent if re.search(rf"\b{name}\b", line)]
    if not named and not _NO_MEDIUM.search(text):
        return
    for name in named or missing[:1]:
        reason = text.splitlines()[0][:100]
        raise UsageError(
            f"{type(pipe).__name__} failed without {name!r} ({reason}); {_advice(name)}"
        ) from error


def _advice(name: str) -> str:
    """Return what to do where an argument of a pipeline is missing."""
    if name in _PICTURES:
        return "give a folder of pictures with --images"
    if _MEDIA.search(name):
        return (
            "msfp has no option for it: calibrate the same model as a pipeline that takes prompts "
            "alone, with --pipeline CLASS; its export serves this one, too"
        )
    return "it is neither a prompt nor a picture, so msfp cannot call this pipeline"


def refuse_list(pipe: Pipeline, given: Mapping[str, object], error: Exception) -> None:
    """Refuse a call that failed because several prompts or pictures were passed, in one line.

    Arguments:
        given: the arguments of the call.
        error: of the call.

    Raises:
        UsageError: the pipeline makes one picture a call.
    """
    names = ("prompt", *_PICTURES)
    lists = [name for name in names if isinstance(given.get(name), list)]
    if any(re.search(rf"`{name}` .*\blist\b|list of {name}s", str(error)) for name in lists):
        raise UsageError(
            f"{type(pipe).__name__} makes one picture a call; give --batch-size 1"
        ) from error


def say_pictures(
    pipe: Pipeline, settings: PictureSettings, progress: Progress, count: int = 1
) -> None:
    """Say that stand-ins take the place of pictures, where none are given.

    Arguments:
        count: of the pictures that are made. Those that are given for them are read, so that a
            broken one is refused now and not when its call comes.

    Raises:
        UsageError: pictures are given to a pipeline that takes none, or there are none, or one
            cannot be read.
    """
    names = picture_arguments(pipe)
    if settings.images is not None:
        if not names:
            raise UsageError(f"{type(pipe).__name__} takes no pictures; leave --images out")
        files = picture_files(settings.images)[:count]
        _refuse_unreadable(pipe, files)
        _say_masks(pipe, files, progress)
    elif needs_pictures(pipe):
        progress.log(
            f"no --images: pictures made from noise stand in for {' and '.join(names)} of "
            f"{type(pipe).__name__}; give a folder of pictures such as it will be used with"
        )


def _takes_masks(pipe: Pipeline) -> bool:
    return not set(_MASKS).isdisjoint(picture_arguments(pipe))


def _refuse_unreadable(pipe: Pipeline, files: list[Path]) -> None:
    """Refuse pictures, and masks where the pipeline takes some, that cannot be read to their end.

    Raises:
        UsageError: the message names the file.
    """
    masks = map(_mask_file, files) if _takes_masks(pipe) else ()
    for path in (*files, *masks):
        if path is not None:
            _open(path, as_small=True)


def _say_masks(pipe: Pipeline, files: list[Path], progress: Progress) -> None:
    """Say which pictures lack the mask that a pipeline takes with each."""
    without = [path for path in files if _mask_file(path) is None]
    if without and _takes_masks(pipe):
        progress.log(
            f"{len(without)} of {len(files)} pictures have no mask beside them, so their middle is "
            f"repainted: that of {without[0].name} would be {without[0].stem}-mask.png"
        )


def digest_of_pictures(folder: Path) -> str:
    """Return a digest of the pictures and masks of a folder, names and bytes.

    Raises:
        UsageError: it holds no picture, or cannot be read.
    """
    picture_files(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _ENDINGS:
            digest.update(f"{path.name} {SealedFile.of(path).sha256}\n".encode())
    return digest.hexdigest()


def picture_files(folder: Path) -> list[Path]:
    """Return the pictures of a folder by name, without masks.

    Raises:
        UsageError: the folder cannot be read, or holds no picture.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
    except OSError as error:
        raise UsageError(f"cannot read --images {folder}: {error.strerror}") from None
    paths = [path for path in paths if not path.stem.endswith("-mask")]
    if not paths:
        raise UsageError(f"--images {folder} holds no picture; it may hold {', '.join(_ENDINGS)}")
    return paths


def pictures_of(
    pipe: Pipeline, settings: PictureSettings, first: int, count: int
) -> dict[str, "list[Image]"]:
    """Return the arguments that pass pictures to a call of a pipeline.

    Arguments:
        first: index of the call's first picture.
        count: pictures of the call; picture i is conditioned on file i, or i modulo their number.
    """
    names = picture_arguments(pipe)
    if settings.images is None and not needs_pictures(pipe):
        return {}
    numbers = range(first, first + count)
    files = None if settings.images is None else picture_files(settings.images)
    pictures = [_stand_in(i) if files is None else _open(files[i % len(files)]) for i in numbers]
    size = _size_of(pipe, settings, None if files is None else _open(files[0]))
    given = {name: [_fit(picture, size) for picture in pictures] for name in names}
    masks = [None if files is None else _mask_file(files[i % len(files)]) for i in numbers]
    for name in set(names) & set(_MASKS):
        given[name] = [_fit(_mask(path), size) for path in masks]
    return given


def passed(pipe: Pipeline, name: str, pictures: "list[Image]") -> object:
    """Return the pictures of an argument as a pipeline takes them.

    One picture is not in a list, which some pipelines refuse, unless the argument's name is in the
    plural; several ControlNets or adapters get all of them each.
    """
    argument = pictures if len(pictures) > 1 or name == "images" else pictures[0]
    count = _num_nets(pipe)
    names = picture_arguments(pipe)
    of_nets = "control_image" if "control_image" in names else "image"
    return [argument] * count if count and name == of_nets else argument


def _num_nets(pipe: Pipeline) -> int:
    """Return how many ControlNets or adapters a pipeline has in a list, 0 if in none."""
    nets = getattr(getattr(pipe, "controlnet", None), "nets", None)
    adapters = getattr(getattr(pipe, "adapter", None), "adapters", None)
    return len(nets or adapters or ())


def _size_of(pipe: Pipeline, settings: PictureSettings, example: "Image | None") -> tuple[int, int]:
    """Return width and height of the pictures: those asked for, or the first picture's."""
    own = _usual_size(pipe) if example is None else example.size
    return settings.width or own[0], settings.height or own[1]


def _usual_size(pipe: Pipeline) -> tuple[int, int]:
    """Return the size of the pictures that a pipeline makes by itself, as far as it says so.

    One that enlarges a picture takes it as large as the latents are.
    """
    side = getattr(pipe, "default_sample_size", None)
    for name in ("unet", "transformer"):
        config = getattr(getattr(pipe, name, None), "config", {})
        side = side or config.get("sample_size")
    if not isinstance(side, int):
        return _SIZE, _SIZE
    if not any(name in getattr(pipe, "components", {}) for name in _ENLARGING):
        side *= getattr(pipe, "vae_scale_factor", 1)
    return side, side


def _open(path: Path, *, as_small: bool = False) -> "Image":
    """Read a picture.

    Arguments:
        as_small: read a JPEG file at an eighth of its size, which takes a fraction of the time.

    Raises:
        UsageError: it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            if as_small:
                picture.draft(None, (1, 1))
            return as_seen(picture)
    except Exception as error:  # Pillow's decoders have many kinds for damaged files
        raise UsageError(f"cannot read the picture {path}: {error}") from None


def as_seen(picture: "Image") -> "Image":
    """Return a picture as viewers show it, in RGB of 8 bits.

    A camera that was held upright writes a picture on its side, and beside it how to turn it.
    Pillow turns nothing by itself, and takes all but the darkest of 16 bits for white.
    """
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(picture)
    return (_in_8_bits(upright) if upright.mode.startswith("I") else upright).convert("RGB")


def _in_8_bits(picture: "Image") -> "Image":
    """Return a picture of 16 bits of grey, as depth is often stored, in 8."""
    import numpy as np
    from PIL import Image

    values = np.asarray(picture).astype(np.float64) * (255 / 65535)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _fit(picture: "Image", size: tuple[int, int]) -> "Image":
    """Return a picture cut and scaled to a size."""
    from PIL import ImageOps

    return picture if picture.size == size else ImageOps.fit(picture, size)


def _mask_file(path: Path) -> Path | None:
    """Return the mask that lies beside a picture, None if there is none.

    It may be of another kind than the picture: that of a PNG file may be a JPEG file.
    """
    endings = (path.suffix, *_ENDINGS, *(ending.upper() for ending in _ENDINGS))
    masks = [path.with_name(f"{path.stem}-mask{ending}") for ending in endings]
    return next((mask for mask in masks if mask.exists()), None)


def _mask(path: Path | None) -> "Image":
    """Return a mask; without a file, of the middle of a picture."""
    from PIL import Image

    if path is not None:
        return _open(path).convert("L")
    mask = Image.new("L", (_SIZE, _SIZE))
    mask.paste(255, (_SIZE // 4, _SIZE // 4, 3 * _SIZE // 4, 3 * _SIZE // 4))
    return mask


def _stand_in(index: int) -> "Image":
    """Return a smooth picture made from noise, always the same for an index."""
    from PIL import Image

    generator = random.Random(index)
    pixels = bytes(generator.randrange(256) for _ in range(3 * _STAND_IN**2))
    noise = Image.frombytes("RGB", (_STAND_IN, _STAND_IN), pixels)
    return noise.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
