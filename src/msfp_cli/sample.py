"""Make pictures with an export, and beside them those of the full-precision model."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from msfp_cli.checkpoint.pipeline import MSFPPipeline, read_denoisers
from msfp_cli.files.directories import refuse_existing, replace_directory
from msfp_cli.pipelines.conditions import conditioning_of, expand_conditions
from msfp_cli.pipelines.loading import ModelSource, Pipeline, load_pipeline
from msfp_cli.pipelines.media import Work, sample_rate_of, save, still
from msfp_cli.pipelines.sampling import Sampling, call_pipeline, refuse_untaken, say_conditions
from msfp_cli.progress import SILENT, Progress
from msfp_cli.run import Run, refuse_stage

_TITLE_HEIGHT = 24  # pixels above a row of a contact sheet
_FULL = "full precision"  # a title


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What one model made, in the order of the conditions: pictures, videos or sound.

    Arguments:
        title: of the model.
        works: one for each condition.
        sample_rate: of sound, in Hertz.
    """

    title: str
    works: Sequence[Work]
    sample_rate: int = 0


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
    with nullcontext(directory) if directory else run.new_samples() as place:
        refuse_stage(place)
        refuse_existing(place, overwrite=overwrite)
        pipe = MSFPPipeline.from_pretrained(
            export,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=device,
            kernel=kernel,
            keep_packed=keep_packed,
            progress=progress,
        ).pipe
        refuse_untaken(pipe, sampling)
        sampling = sampling.or_else({**config.sampling, **defaults})
        conditions = expand_conditions(prompts, num_images, conditioning_of(pipe))
        say_conditions(pipe, conditions, sampling, progress)
        sheets = [make_pictures(pipe, conditions, sampling, title="MSFP", progress=progress)]
        if compare:
            source = ModelSource(**config.source)
            full = load_pipeline(replace(source, dtype=dtype or source.dtype), device)
            sheet = make_pictures(full, conditions, sampling, title=_FULL, progress=progress)
            sheets.insert(0, sheet)
        path = save_pictures(sheets, conditions, sampling, place, overwrite=overwrite)
        return Samples(sheet=path, num_pictures=len(conditions))


def make_pictures(
    pipe: Pipeline,
    conditions: Sequence[str | None],
    sampling: Sampling,
    *,
    title: str,
    progress: Progress = SILENT,
) -> Sheet:
    """Make one picture per condition; picture i is drawn with seed ``sampling.seed + i``."""
    works: list[Work] = []
    with progress.task(f"Sampling {title}", len(conditions)) as advance:
        for first in range(0, len(conditions), sampling.batch_size):
            batch = conditions[first : first + sampling.batch_size]
            works.extend(call_pipeline(pipe, batch, sampling, first=first))
            advance(len(batch))
    return Sheet(title=title, works=works, sample_rate=sample_rate_of(pipe))


def save_pictures(
    sheets: Sequence[Sheet],
    conditions: Sequence[str | None],
    sampling: Sampling,
    directory: Path,
    *,
    overwrite: bool,
) -> Path:
    """Write all that was made, as PNG, GIF or WAV, and a contact sheet with one row per model.

    Returns:
        The path of the contact sheet.

    Raises:
        RunError: the directory exists and `overwrite` is not set.
    """
    several = len(sheets) > 1
    with replace_directory(directory, overwrite=overwrite) as temporary:
        for sheet in sheets:
            suffix = f"-{_slug(sheet.title)}" if several else ""
            for i, work in enumerate(sheet.works):
                condition = conditions[i]
                slug = "" if condition is None else _slug(condition)[:40]
                prompt = f"{slug}-" if slug else ""
                name = f"{i:03d}-{prompt}seed{sampling.seed + i}{suffix}"
                save(work, temporary / name, sheet.sample_rate)
        titles = [sheet.title for sheet in sheets] if several else []
        contact = contact_sheet([_stills(sheet) for sheet in sheets], titles=titles)
        contact.save(temporary / "sheet.png")
    return directory / "sheet.png"


def _stills(sheet: Sheet) -> list[Image.Image]:
    """Return a picture of each work."""
    return [still(work) for work in sheet.works]


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
