import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from msfp_cli.errors import UsageError
from msfp_cli.evaluation.features.extractors import Extractor
from msfp_cli.evaluation.features.fashion import load_classifier
from msfp_cli.evaluation.features.reference import (
    BUILT_IN_REFERENCE,
    built_in_reference,
    load_reference,
)
from msfp_cli.evaluation.metrics.distances import (
    frechet_distance,
    kernel_distance,
    precision,
    recall,
)

PIXELS = Extractor("pixels", lambda pictures: pictures.flatten(1))
SIZE = (6, 8)  # height, width


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def features_of(pictures: np.ndarray) -> Tensor:
    """What `PIXELS` gives for pictures ``(pictures, height, width, 3)``."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).flatten(1).float() / 255


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Make a directory of five pictures of one size, named by their order."""
    for i, picture in enumerate(draw(5, *SIZE, 3)):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    return tmp_path


def test_directory_gives_its_pictures_in_the_order_of_their_names(album: Path) -> None:
    (album / "notes.txt").write_text("no picture")
    (album / "more").mkdir()
    (album / "4.png").rename(album / "4.PNG")
    reference = load_reference(album, PIXELS, SIZE)
    assert reference.name == str(album)
    torch.testing.assert_close(
        reference.features, features_of(draw(5, *SIZE, 3)), rtol=0, atol=1e-7
    )


def test_pictures_of_every_kind_become_colours(tmp_path: Path) -> None:
    grey = Image.fromarray(draw(*SIZE))
    kinds = [grey, grey.convert("RGBA"), grey.convert("P"), grey.convert("LA")]
    for i, picture in enumerate(kinds):
        picture.save(tmp_path / f"{i}.png")
    grey.save(tmp_path / "4.bmp")
    Image.fromarray(draw(*SIZE).astype(np.uint16) * 257).save(tmp_path / "5.png")
    tags = Image.Exif()
    tags[0x0112] = 3  # it is upside down
    grey.rotate(180).save(tmp_path / "6.png", exif=tags)
    expected = features_of(np.repeat(draw(*SIZE)[None, :, :, None], 3, axis=3)).expand(7, -1)
    torch.testing.assert_close(
        load_reference(tmp_path, PIXELS, SIZE).features, expected, rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp"])
def test_compressed_pictures_are_read(suffix: str, tmp_path: Path) -> None:
    for i in range(2):
        Image.new("RGB", SIZE[::-1], (200, 100, 50)).save(tmp_path / f"{i}.{suffix}", quality=95)
    features = load_reference(tmp_path, PIXELS, SIZE).features.view(2, 3, -1) * 255
    torch.testing.assert_close(
        features.mean(dim=(0, 2)), torch.tensor([200.0, 100.0, 50.0]), rtol=0, atol=4
    )


def test_array_gives_the_same_as_a_directory(
    album: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("array") / "photos.npz"
    np.savez_compressed(path, images=draw(5, *SIZE, 3), labels=np.arange(5))
    ours, theirs = load_reference(path, PIXELS, SIZE), load_reference(album, PIXELS, SIZE)
    assert ours.name == str(path)
    assert torch.equal(ours.features, theirs.features)


def test_grey_array_is_grey_in_all_channels(tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", images=draw(3, *SIZE))
    expected = features_of(np.repeat(draw(3, *SIZE)[..., None], 3, axis=3))
    features = load_reference(tmp_path / "grey.npz", PIXELS, SIZE).features
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-7)


def test_names_of_the_files_do_not_matter_to_distances(
    album: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("renamed")
    for i, path in enumerate(sorted(album.iterdir())):
        (other / f"{(3 * i + 2) % 5}.png").write_bytes(path.read_bytes())
    ours, theirs = (load_reference(place, PIXELS, SIZE).features for place in (album, other))
    assert not torch.equal(ours, theirs)
    sampled = features_of(draw(6, *SIZE, 3, seed=1))
    for distance in (frechet_distance, kernel_distance):
        assert distance(sampled, ours) == pytest.approx(distance(sampled, theirs), rel=1e-9)
    for share in (precision, recall):
        assert share(sampled, ours) == share(sampled, theirs)


def test_the_reference_of_the_built_in_pipeline_is_of_the_classifiers_features() -> None:
    reference = built_in_reference()
    classifier = load_classifier()
    assert reference.name == BUILT_IN_REFERENCE
    assert reference.features.shape == (2000, 64) and reference.features.dtype == torch.float32
    garments = classifier.garment(reference.features).argmax(1).bincount(minlength=10)
    colours = classifier.colour(reference.features).argmax(1).bincount(minlength=8)
    assert (
        120 < int(garments.min()) and int(garments.max()) < 280
    )  # as many of each kind as there are
    assert 150 < int(colours.min()) and int(colours.max()) < 350


def write_npz(**arrays: np.ndarray) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        np.savez(directory / "photos.npz", **arrays)
        return directory / "photos.npz"

    return write


def write_bytes(data: bytes, name: str = "photos.npz") -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        (directory / name).write_bytes(data)
        return directory / name

    return write


def write_pictures(*sizes: tuple[int, int], text: str | None = None) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        for i, (width, height) in enumerate(sizes):
            Image.new("RGB", (width, height)).save(directory / f"{i}.png")
        if text is not None:
            (directory / "a.png").write_text(text)
        return directory

    return write


def array_bytes() -> bytes:
    """A single array as numpy saves it, not in an npz file."""
    buffer = io.BytesIO()
    np.save(buffer, draw(3, *SIZE, 3))
    return buffer.getvalue()


def archive_bytes(pictures: int = 3) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=draw(pictures, *SIZE, 3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(
            write_pictures(), "holds 0 pictures; a reference needs at least two", id="empty"
        ),
        pytest.param(
            write_pictures((8, 6)), "holds 1 pictures; a reference needs at least two", id="one"
        ),
        pytest.param(
            write_pictures((6, 8), (6, 8)),
            "holds pictures of 6 by 8, the pipeline makes 8 by 6; resize",
            id="other-size",
        ),
        pytest.param(
            write_pictures((8, 6), (8, 7)), "1.png has another size than 0.png", id="two-sizes"
        ),
        pytest.param(
            write_pictures((8, 6), text="hello"),
            "a.png is not a readable picture",
            id="text-as-picture",
        ),
        pytest.param(
            write_pictures((8, 6), text=""),
            "a.png is not a readable picture",
            id="empty-picture",
        ),
        pytest.param(
            lambda directory: directory / "nowhere",
            "no reference in .*nowhere; give a directory",
            id="missing",
        ),
        pytest.param(
            write_npz(pictures=draw(3, *SIZE, 3)),
            "cannot read 'images' from .*photos.npz",
            id="no-images",
        ),
        pytest.param(write_npz(images=draw(1, *SIZE, 3)), "holds 1 pictures", id="one-in-array"),
        pytest.param(write_npz(images=draw(0, *SIZE, 3)), "holds 0 pictures", id="none-in-array"),
        pytest.param(
            write_npz(images=draw(3, 8, 6, 3)), "pictures of 6 by 8", id="other-size-in-array"
        ),
        pytest.param(
            write_npz(images=draw(3, 3, *SIZE)),
            r"is uint8 \(3, 3, 6, 8\); it must be",
            id="channels-first",
        ),
        pytest.param(
            write_npz(images=draw(3, *SIZE, 4)),
            r"is uint8 \(3, 6, 8, 4\); it must be",
            id="four-channels",
        ),
        pytest.param(write_npz(images=draw(6)), r"is uint8 \(6,\); it must be", id="one-dimension"),
        pytest.param(
            write_npz(images=draw(3, *SIZE) / 255),
            r"is float64 \(3, 6, 8\); it must be uint8",
            id="floats",
        ),
        pytest.param(
            write_npz(images=np.array([[1], [1, 2]], dtype=object)),
            "cannot read 'images'",
            id="objects",
        ),
        pytest.param(write_bytes(b"hello"), "cannot read 'images'", id="text-as-array"),
        pytest.param(write_bytes(b""), "cannot read 'images'", id="empty-file"),
        pytest.param(
            write_bytes(array_bytes()), "cannot read 'images'", id="array-outside-an-archive"
        ),
        pytest.param(
            write_bytes(archive_bytes()[:-40]), "cannot read 'images'", id="truncated-archive"
        ),
    ],
)
def test_wrong_reference_is_one_line(
    write: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_reference(write(tmp_path), PIXELS, SIZE)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def damaged(data: bytes) -> Iterator[bytes]:
    """Change every byte of a file, and cut it off at many places."""
    for i in range(len(data)):
        yield data[:i] + bytes([data[i] ^ 255]) + data[i + 1 :]
        if i % 8 == 0:
            yield data[:i]


def unexplained(place: Path, path: Path, data: bytes) -> set[str]:
    """Return which errors but the one for the user there are when a file is damaged anywhere."""
    odd = set()
    for version in damaged(data):
        path.write_bytes(version)
        try:
            load_reference(place, PIXELS, SIZE)
        except UsageError as error:
            assert str(path) in str(error) or str(place) in str(error)
        except Exception as error:
            odd.add(repr(error))
    return odd


def test_array_damaged_anywhere_is_refused_or_read(tmp_path: Path) -> None:
    path = tmp_path / "photos.npz"
    assert unexplained(path, path, archive_bytes(pictures=2)) == set()


def test_picture_damaged_anywhere_is_refused_or_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(draw(*SIZE, 3)).save(buffer, "png")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert unexplained(tmp_path, tmp_path / "b.png", buffer.getvalue()) == set()
