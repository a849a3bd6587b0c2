"""What pipelines make is shown as a picture and saved as what it is."""

import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msfp_cli.pipelines.media import (
    is_drawing,
    one_for_each,
    sample_rate_of,
    save,
    still,
    works_of,
)

RED, BLUE = (Image.new("RGB", (6, 4), color) for color in ("red", "blue"))
TONE = np.sin(np.linspace(0, 60, 4000)).astype(np.float32)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def test_picture_is_saved_as_png(tmp_path: Path) -> None:
    (picture,) = works_of(SimpleNamespace(images=[RED]))
    path = save(picture, tmp_path / "0.5-a")
    assert path.name == "0.5-a.png"
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(RED))
    assert still(picture).size == (6, 4)


@pytest.mark.parametrize(
    "frames",
    [[RED, BLUE, RED], pixels(3, 4, 6, 3), torch.from_numpy(pixels(3, 3, 4, 6))],
    ids=["pictures", "array", "tensor, channels first"],
)
def test_video_is_saved_as_frames_that_move(frames: Any, tmp_path: Path) -> None:  # noqa: ANN401 (as diffusers returns it)
    (video,) = works_of(SimpleNamespace(frames=[frames]))
    assert [frame.size for frame in video] == [(6, 4)] * 3
    assert still(video).size == (18, 4)
    with Image.open(save(video, tmp_path / "video")) as moving:
        assert (moving.format, moving.n_frames, moving.size) == ("GIF", 3, (6, 4))


def test_strip_has_the_frames_from_left_to_right() -> None:
    strip = np.asarray(still([RED, BLUE]))
    assert np.array_equal(strip, np.hstack([np.asarray(RED), np.asarray(BLUE)]))


@pytest.mark.parametrize("sound", [TONE, np.stack([TONE, -TONE]), torch.from_numpy(TONE)])
def test_sound_is_saved_as_wave(sound: Any, tmp_path: Path) -> None:  # noqa: ANN401 (as diffusers returns it)
    (work,) = works_of(SimpleNamespace(audios=[sound]))
    path = save(work, tmp_path / "tone", 16_000)
    with wave.open(str(path)) as file:
        assert (path.suffix, file.getframerate(), file.getnframes()) == (".wav", 16_000, 4000)
        assert file.getnchannels() == (2 if sound.ndim == 2 else 1)
        first = np.frombuffer(file.readframes(4000), "<i2")[:: file.getnchannels()]
    assert abs(first / 32767 - TONE).max() < 1e-4
    assert np.asarray(still(work)).min() == 0
    assert is_drawing(still(work))


def test_embedding_is_shown_as_the_mean_of_its_channels(tmp_path: Path) -> None:
    values = pixels(16, 8, 6) * 9 - 4
    (picture,) = works_of(([values],))
    assert save(picture, tmp_path / "e").suffix == ".png"
    mean = values.mean(axis=0)
    shown = np.asarray(picture, np.float32) / 255
    assert abs(shown - (mean - mean.min()) / np.ptp(mean)).max() < 0.01
    assert is_drawing(still(picture))
    assert not any(is_drawing(still(work)) for work in works_of(([RED, pixels(4, 6, 3)],)))


def test_a_tuple_holds_what_was_made() -> None:
    assert works_of(([RED],)) == [RED]


def test_sample_rate_is_that_of_a_component() -> None:
    parts = {"vae": SimpleNamespace(config=SimpleNamespace(sampling_rate=16_000)), "unet": None}
    assert sample_rate_of(SimpleNamespace(components=parts)) == 16_000
    assert sample_rate_of(SimpleNamespace(components={})) == 44_100


def test_several_pictures_for_a_condition_are_put_side_by_side() -> None:
    blue = Image.new("RGB", (8, 8), "blue")
    red = blue.copy()
    red.paste("red", (0, 0, 8, 8))
    first, second = one_for_each([red, blue, blue, blue], 2)
    assert first.size == second.size == (16, 8)
    assert first.getpixel((0, 0)) == (255, 0, 0) and first.getpixel((8, 0)) == (0, 0, 255)
    for works, count in (([red, blue], 2), ([red, blue, red], 2), ([[red], [blue]], 1)):
        assert one_for_each(works, count) is works
