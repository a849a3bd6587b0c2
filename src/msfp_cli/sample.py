"""Make pictures with an export, and beside them those of the full-precision model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from msfp_cli.checkpoint.pipeline import load_export, read_denoisers
from msfp_cli.picture_files import CONTACT_SHEET, PictureFiles, identity_of_files, picture_files
from msfp_cli.pipelines.conditions import (
    conditioning_of,
    expand_conditions,
    refuse_missing_prompt,
)
from msfp_cli.pipelines.loading import ModelSource, Pipeline, load_pipeline
from msfp_cli.pipelines.media import sample_rate_of
from msfp_cli.pipelines.sampling import Sampling, call_pipeline, refuse_untaken, say_conditions
from msfp_cli.progress import SILENT, Progress
from msfp_cli.run import Run

_TITLE_HEIGHT = 24  # pixels above a row of a contact sheet
_COLUMNS = 8  # of it
_MOST_SHOWN = 64  # pictures of each model on it
_MSFP = "MSFP"  # a title, as the next
_FULL = "full precision"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What `sample_run` wrote.

    Arguments:
        sheet: the contact sheet; the pictures lie beside it.
        num_pictures: of each model.
    """

    sheet: Path
    num_pictures: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"sheet": str(self.sheet), "pictures": self.num_pictures}


def sample_run(
    run: Run,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    export: Path | None = None,
    num_images: int = 1,
    compare: bool = False,
    kernel: str = "auto",
    keep_packed: bool = False,
    directory: Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Samples:
    """Make pictures with the latest export of a run, and write them.

    Arguments:
        prompts: or class labels; empty for an unconditional pipeline.
        sampling: what is None in it is as it was calibrated.
        export: another export than the run's latest.
        num_images: pictures of each prompt.
        compare: make the full-precision pictures of the same seeds, too.
        kernel, keep_packed: see `MSFPPipeline.from_pretrained`.
        directory: where to write; None for a new one in the run directory.
        dtype: a name in `DTYPES`; None for float32 on a CPU and bfloat16 elsewhere.

    Raises:
        RunError: there is no export, or the directory exists and `overwrite` is not set.
        UsageError: a prompt is missing, or no layer can be run by the kernel.
    """
    defaults = {} if export else run.sampling()
    export = export or run.latest_export()
    run.refuse_read_only(directory)
    config = next(iter(read_denoisers(export).values()))
    refuse_missing_prompt(export, prompts, num_images)
    settled = sampling.or_else({**config.sampling, **defaults})
    settings = {
        "export": identity_of_files(export),
        "sampling": [settled.to_json(), settled.digest_of_images()],
        "asked": [list(prompts), num_images, compare, kernel, keep_packed, dtype, device],
    }
    with picture_files(run, directory, settings, overwrite=overwrite) as files:
        typed = ModelSource(model=str(export), dtype=dtype)
        pipe = load_export(typed, device, kernel, keep_packed=keep_packed, progress=progress)
        refuse_untaken(pipe, sampling)
        conditions = expand_conditions(prompts, num_images, conditioning_of(pipe))
        say_conditions(pipe, conditions, settled, progress)
        files.begin(overwrite=overwrite)
        task = _Task(conditions, settled, files, progress, compare)
        rows = {_MSFP: task.make(pipe, _MSFP)}
        if compare:
            del pipe
            source = ModelSource(**config.source)
            full = load_pipeline(replace(source, dtype=dtype or source.dtype), device)
            rows = {_FULL: task.make(full, _FULL), **rows}
        files.finish(chain(*rows.values()), _sheet_of(files, rows), overwrite=overwrite)
    sheet = (directory or files.directory) / CONTACT_SHEET
    return Samples(sheet=sheet, num_pictures=len(conditions))


def _names(conditions: Sequence[str | None], seed: int, title: str) -> list[str]:
    """Return the names of pictures: number, prompt and seed, and the model where there are two."""
    names = []
    for i, condition in enumerate(conditions):
        slug = "" if condition is None else _slug(condition)[:40]
        parts = [f"{i:03d}", slug, f"seed{seed + i}", _slug(title)]
        names.append("-".join(filter(None, parts)))
    return names


class _Task(NamedTuple):
    """Pictures that are to be made by one model or by two, picture i with seed ``seed + i``."""

    conditions: Sequence[str | None]
    sampling: Sampling
    files: PictureFiles
    progress: Progress
    compare: bool

    def make(self, pipe: Pipeline, title: str) -> list[str]:
        """Make those by a model that are missing, and return the names of all."""
        count = len(self.conditions)
        rate = sample_rate_of(pipe)
        names = _names(self.conditions, self.sampling.seed, title if self.compare else "")
        there = sum(self.files.find(name) is not None for name in names)
        if there:
            place = self.files.work
            self.progress.log(f"{there} of {count} pictures by {title} are in {place} already")
        with self.progress.task(f"Sampling {title}", count) as advance:
            for first in range(0, count, self.sampling.batch_size):
                batch = slice(first, first + self.sampling.batch_size)
                if None in map(self.files.find, names[batch]):
                    part = self.conditions[batch]
                    works = call_pipeline(pipe, part, self.sampling, first=first)
                    for name, work in zip(names[batch], works, strict=False):
                        self.files.add(name, work, rate)
                advance(len(names[batch]))
        return [name for name in names if self.files.find(name)]


def _sheet_of(files: PictureFiles, rows: Mapping[str, Sequence[str]]) -> Image.Image:
    """Return the contact sheet of the first pictures, one model's below the other's.

    Arguments:
        rows: names of the pictures, by the title of their model.
    """
    count = min(len(names) for names in rows.values())
    starts = range(0, min(count, _MOST_SHOWN), _COLUMNS)
    parts = [names[start : start + _COLUMNS] for start in starts for names in rows.values()]
    pictures = [[files.still(name) for name in part] for part in parts]
    return contact_sheet(pictures, titles=[*rows] * len(starts) if len(rows) > 1 else ())


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    titles: Sequence[str] = (),
    min_side: int = 128,
    gap: int = 4,
) -> Image.Image:
    """Lay pictures out row by row; small ones are enlarged without smoothing, pixel by pixel.

    Arguments:
        rows: pictures of one size.
        titles: one line above each row, or none.
        min_side: pixels that the longer side of a picture has at least.
        gap: pixels between pictures.
    """
    first = rows[0][0]
    factor = max(1, min_side // max(first.size))
    width = first.width * factor
    height = first.height * factor
    head = _TITLE_HEIGHT if titles else 0
    columns = max(len(row) for row in rows)
    size = (columns * (width + gap) + gap, len(rows) * (head + height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        top = gap + y * (head + height + gap)
        if titles:
            font = ImageFont.load_default(14)
            ImageDraw.Draw(sheet).text((gap, top + 4), titles[y], fill="black", font=font)
        for x, picture in enumerate(row):
            enlarged = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (gap + x * (width + gap), top + head))
    return sheet


def _slug(text: str) -> str:
    """Turn a prompt or a title into a piece of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
