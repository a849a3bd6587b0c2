"""Features of real pictures, from a directory, an array, or the reference built into msfp."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from msfp_cli.errors import UsageError
from msfp_cli.evaluation.features.extractors import Extractor
from msfp_cli.pipelines.pictures import as_seen

BUILT_IN_REFERENCE = "Fashion-MNIST test pictures, tinted"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ReferencePictures:
    """Features of real pictures.

    Arguments:
        name: what they are.
        features: float32 ``(pictures, dimensions)``.
    """

    name: str
    features: Tensor = field(repr=False)


def built_in_reference() -> ReferencePictures:
    """Return the features, by extractor ``fashion``, of 2,000 test pictures.

    The built-in pipeline was not trained on these pictures.
    """
    features = load_file(Path(str(files("msfp_cli") / "data" / "fashion_reference.safetensors")))[
        "features"
    ]
    return ReferencePictures(BUILT_IN_REFERENCE, features.float())


def load_reference(place: Path, extractor: Extractor, size: Sequence[int]) -> ReferencePictures:
    """Read real pictures and return their features.

    Arguments:
        place: a directory of pictures, or an npz file whose ``images`` are uint8 ``(pictures,
            height, width[, 3])``.
        size: height and width of the generated pictures.

    Raises:
        UsageError: it cannot be read, holds fewer than two pictures, or pictures of another size.
    """
    pictures = _from_directory(place) if place.is_dir() else _from_npz(place)
    _refuse_few(place, len(pictures))
    if tuple(pictures.shape[2:]) != tuple(size):
        height, width = pictures.shape[2:]
        h, w = size
        raise UsageError(
            f"{place} holds pictures of {width} by {height}, the pipeline makes {w} by {h}; "
            "resize the reference"
        )
    return ReferencePictures(str(place), extractor.features(pictures))


def require_pictures(place: Path) -> None:
    """Refuse a reference that is missing or has too few files, before any picture is drawn.

    Raises:
        UsageError: the place does not exist, or the directory holds fewer than two pictures.
    """
    if not place.exists():
        raise UsageError(f"no reference in {place}; give a directory of pictures, or an npz file")
    if place.is_dir():
        _refuse_few(place, len(_paths(place)))


def _refuse_few(place: Path, count: int) -> None:
    if count < 2:
        raise UsageError(
            f"{place} holds {count} pictures; a reference needs at least two, better thousands"
        )


def _paths(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.suffix.lower() in _SUFFIXES)


def _from_directory(place: Path) -> Tensor:
    """Read all pictures of a directory, uint8 ``(pictures, 3, height, width)``."""
    paths = _paths(place)
    pictures: list[np.ndarray] = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                pictures.append(np.asarray(as_seen(picture)))
        except Exception:  # Pillow's decoders have many kinds for damaged files
            raise UsageError(
                f"{path} is not a readable picture; take it out of the reference"
            ) from None
        if pictures[-1].shape != pictures[0].shape:
            raise UsageError(
                f"{path} has another size than {paths[0].name}; "
                "a reference needs pictures of one size"
            )
    if not pictures:
        return torch.empty(0, 3, 0, 0)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _from_npz(place: Path) -> Tensor:
    """Read the ``images`` of an npz file, uint8 ``(pictures, 3, height, width)``."""
    try:
        with place.open("rb") as file:  # numpy would leave a damaged one open
            images = _images(file)
    except FileNotFoundError:
        raise UsageError(
            f"no reference in {place}; give a directory of pictures, or an npz file"
        ) from None
    except Exception as error:  # a damaged archive raises whatever its decoder does
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"cannot read 'images' from {place} ({reason}); give an npz file, or a directory"
        ) from None
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or (images.ndim == 4 and images.shape[-1] != 3)
    ):
        raise UsageError(
            f"'images' in {place} is {images.dtype} {images.shape}; "
            "it must be uint8 (pictures, height, width[, 3])"
        )
    pictures = torch.from_numpy(images)
    if pictures.ndim == 3:  # without colour
        return pictures[:, None].expand(-1, 3, -1, -1)
    return pictures.permute(0, 3, 1, 2)


def _images(file: BinaryIO) -> np.ndarray:
    """Read the array ``images`` of an npz file."""
    loaded = np.load(file, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("it holds a single array without a name")
    with loaded:
        return np.asarray(loaded["images"])
