"""Make pictures with an export, and beside them those of the full-precision model from the same seeds."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from msfp_cli.files import replace_directory
from msfp_cli.pipelines.sampling import call_pipeline
from msfp_cli.pipelines.source import Sampling
from msfp_cli.progress import SILENT, Progress


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Pictures of one model, in the order of the conditions."""

    title: str
    pictures: Sequence[Image.Image]


def make_pictures(
    pipe: Any,  # noqa: ANN401 (a pipeline's class is the user's)
    conditions: Sequence[str | None],
    sampling: Sampling,
    *,
    title: str,
    progress: Progress = SILENT,
) -> Sheet:
    """Make one picture per condition; picture i is drawn with seed ``sampling.seed + i``."""
    pictures: list[Image.Image] = []
    with progress.task(f"Sampling {title}", len(conditions)) as advance:
        for first in range(0, len(conditions), sampling.batch_size):
            batch = conditions[first : first + sampling.batch_size]
            pictures.extend(call_pipeline(pipe, batch, sampling, first=first))
            advance(len(batch))
    return Sheet(title=title, pictures=pictures)


def save_pictures(
    sheets: Sequence[Sheet],
    conditions: Sequence[str | None],
    sampling: Sampling,
    directory: Path,
    *,
    overwrite: bool,
) -> Path:
    """Write every picture as PNG, and a contact sheet with one row per model; return the contact sheet's path.

    Raises:
        RunError: the directory exists and `overwrite` is not set.
    """
    with replace_directory(directory, overwrite=overwrite) as temporary:
        for sheet in sheets:
            for i, picture in enumerate(sheet.pictures):
                picture.save(
                    temporary
                    / f"{i:03d}-{_slug(conditions[i])}seed{sampling.seed + i}{_suffix(sheet, sheets)}.png"
                )
        titles = [sheet.title for sheet in sheets] if len(sheets) > 1 else []
        contact_sheet([sheet.pictures for sheet in sheets], titles=titles).save(
            temporary / "sheet.png"
        )
    return directory / "sheet.png"


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    titles: Sequence[str] = (),
    min_side: int = 128,
    gap: int = 4,
) -> Image.Image:
    """Lay pictures out row by row; small ones are enlarged without smoothing so that pixels can be seen.

    Arguments:
        rows: pictures of one size.
        titles: one line above each row, or none.
    """
    width, height = rows[0][0].size
    factor = max(1, min_side // max(width, height))
    width, height, head = width * factor, height * factor, 24 if titles else 0
    columns = max(len(row) for row in rows)
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, len(rows) * (head + height + gap) + gap), "white"
    )
    for y, row in enumerate(rows):
        top = gap + y * (head + height + gap)
        if titles:
            ImageDraw.Draw(sheet).text(
                (gap, top + 4), titles[y], fill="black", font=ImageFont.load_default(14)
            )
        for x, picture in enumerate(row):
            enlarged = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (gap + x * (width + gap), top + head))
    return sheet


def _slug(condition: str | None) -> str:
    """Turn a prompt into a piece of a file name."""
    return (
        ""
        if condition is None
        else re.sub(r"[^a-z0-9]+", "-", condition.lower()).strip("-")[:40] + "-"
    )


def _suffix(sheet: Sheet, sheets: Sequence[Sheet]) -> str:
    """Name the model in the file name where there are several."""
    return (
        "" if len(sheets) == 1 else "-" + re.sub(r"[^a-z0-9]+", "-", sheet.title.lower()).strip("-")
    )
