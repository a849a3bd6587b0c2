"""What a pipeline makes: pictures, videos as lists of frames, or sound.

Each is shown as a picture (`still`) and saved as what it is (`save`): PNG, GIF or WAV. diffusers
returns videos as frames of Pillow where it can, and sound as waves of -1 to 1. Sound and embeddings
are drawn, and such a picture says so (`is_drawing`): its pixels tell little of what was made.
"""

import wave
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw

from msfp_cli.files.atomic import replace_file
from msfp_cli.pipelines.loading import Pipeline

Made: TypeAlias = Any  # an output class of diffusers, or what it holds of one thing
# A picture, the frames of a video, or the wave of a sound, ``(samples,)`` or ``(channels,
# samples)``.
Work: TypeAlias = Image.Image | list[Image.Image] | np.ndarray

ENDINGS = (".png", ".gif", ".wav")  # of files: of pictures, videos and sound
_SAMPLE_RATE = 44_100  # of sound whose pipeline does not say
_FRAME_MILLISECONDS = 125
_WAVE_SIZE = (256, 64)  # pixels of a drawn wave
_DRAWING = "msfp: drawing"  # a key of what a picture says of itself


def works_of(result: Made) -> list[Work]:
    """Return what a pipeline made, one by one."""
    if hasattr(result, "audios"):
        return [_array(sound) for sound in result.audios]
    names = ("images", "frames")
    made = next((getattr(result, name) for name in names if hasattr(result, name)), None)
    return [_work(each) for each in (result[0] if made is None else made)]


def one_for_each(works: list[Work], count: int) -> list[Work]:
    """Return one work for each condition.

    A pipeline may make several pictures for one, as that of a scene's colours and materials; they
    are put side by side.

    Arguments:
        count: of conditions.
    """
    pictures = [work for work in works if isinstance(work, Image.Image)]
    each = len(pictures) // count
    if len(pictures) < len(works) or each < 2 or each * count < len(works):
        return works
    return [_side_by_side(pictures[i * each : (i + 1) * each]) for i in range(count)]


def _array(made: Made) -> np.ndarray:
    return made.detach().float().cpu().numpy() if isinstance(made, torch.Tensor) else made


def _work(made: Made) -> Work:
    """Return a picture or the frames of a video."""
    if isinstance(made, Image.Image):
        return made
    if isinstance(made, list | tuple):
        return [_picture(frame) for frame in made]
    values = _array(made)
    if values.ndim <= 2:  # an embedding
        return _drawn(values)
    if values.ndim == 4:
        return [_picture(frame) for frame in values]
    return _picture(values)


def _picture(made: Made) -> Image.Image:
    """Return a frame as a picture; arrays have values of 0 to 1 and channels first or last.

    Of an embedding, which has more channels, the mean over them is shown.
    """
    if isinstance(made, Image.Image):
        return made
    values = np.asarray(made, dtype=np.float32)
    if values.shape[0] in (1, 3) and values.shape[-1] not in (1, 3):
        values = values.transpose(1, 2, 0)
    is_embedding = values.shape[-1] not in (1, 3)
    if is_embedding:
        values = np.nan_to_num(values.mean(axis=0, keepdims=True).transpose(1, 2, 0))
        values = (values - values.min()) / max(np.ptp(values), np.finfo(np.float32).tiny)
    pixels = (values.clip(0, 1) * 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    picture.info[_DRAWING] = is_embedding
    return picture


def is_drawing(picture: Image.Image) -> bool:
    """Whether a picture shows what is none: sound or an embedding."""
    return bool(picture.info.get(_DRAWING, False))


def still(work: Work) -> Image.Image:
    """Return a picture that shows it: itself, its frames side by side, or the drawn wave."""
    if isinstance(work, Image.Image):
        return work.convert("RGB")
    if isinstance(work, np.ndarray):
        return _drawn(work)
    return _side_by_side(work)


def _side_by_side(frames: Sequence[Image.Image]) -> Image.Image:
    width, height = frames[0].size
    strip = Image.new("RGB", (width * len(frames), height))
    for number, frame in enumerate(frames):
        strip.paste(frame.convert("RGB"), (number * width, 0))
    return strip


def _drawn(sound: np.ndarray) -> Image.Image:
    """Draw a wave as a line for each column of pixels, from its least to its greatest value."""
    width, height = _WAVE_SIZE
    picture = Image.new("RGB", _WAVE_SIZE, "white")
    picture.info[_DRAWING] = True
    draw = ImageDraw.Draw(picture)
    mono = np.nan_to_num(np.atleast_2d(sound).mean(axis=0))
    for x, piece in enumerate(np.array_split(mono, width)):
        if piece.size:
            ends = [(1 - float(end)) / 2 * (height - 1) for end in (piece.max(), piece.min())]
            draw.line([(x, ends[0]), (x, ends[1])], fill="black")
    return picture


def save(work: Work, path: Path, sample_rate: int = _SAMPLE_RATE) -> Path:
    """Write it as what it is, whole or not at all, and return the path with its ending.

    Arguments:
        path: without an ending.
        sample_rate: of sound, in Hertz.
    """
    picture, video, sound = ENDINGS
    if isinstance(work, np.ndarray):
        return _write(path, sound, partial(_save_sound, work, sample_rate=sample_rate))
    if isinstance(work, Image.Image):
        return _write(path, picture, partial(work.save, format="PNG"))
    return _write(path, video, partial(_save_video, work))


def _write(path: Path, ending: str, write: Callable[[Path], None]) -> Path:
    target = path.with_name(f"{path.name}{ending}")
    with replace_file(target) as temporary:
        write(temporary)
    return target


def _save_video(frames: Sequence[Image.Image], path: Path) -> None:
    """Write frames as GIF that is shown again and again."""
    first, *rest = [frame.convert("RGB") for frame in frames]
    options = {"duration": _FRAME_MILLISECONDS, "loop": 0}
    first.save(path, "GIF", save_all=True, append_images=rest, **options)


def _save_sound(sound: np.ndarray, path: Path, sample_rate: int) -> None:
    """Write a wave as 16-bit WAV."""
    channels = np.nan_to_num(np.atleast_2d(sound))
    samples = (channels.clip(-1, 1) * 32767).round().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.T.tobytes())


def sample_rate_of(pipe: Pipeline) -> int:
    """Return the sample rate of a pipeline's sound in Hertz."""
    for part in pipe.components.values():
        config = getattr(part, "config", None)
        for name in ("sampling_rate", "sample_rate"):
            rate = getattr(config, name, None)
            if isinstance(rate, int) and rate > 1000:
                return rate
    return _SAMPLE_RATE
