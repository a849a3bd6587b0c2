"""Make pictures with an export, and beside them those of the full-precision model from the same seeds."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from msfp_cli.atomic import replace_directory
from msfp_cli.generation import Sampling, call_pipeline, contact_sheet
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
    sheets: Sequence[Sheet], conditions: Sequence[str | None], sampling: Sampling, directory: Path, *, overwrite: bool
) -> Path:
    """Write every picture as PNG, and a contact sheet with one row per model; return the contact sheet's path.

    Raises:
        RunError: the directory exists and `overwrite` is not set.
    """
    with replace_directory(directory, overwrite=overwrite) as temporary:
        for sheet in sheets:
            for i, picture in enumerate(sheet.pictures):
                picture.save(
                    temporary / f"{i:03d}-{_slug(conditions[i])}seed{sampling.seed + i}{_suffix(sheet, sheets)}.png"
                )
        titles = [sheet.title for sheet in sheets] if len(sheets) > 1 else []
        contact_sheet([sheet.pictures for sheet in sheets], titles=titles).save(temporary / "sheet.png")
    return directory / "sheet.png"


def _slug(condition: str | None) -> str:
    """Turn a prompt into a piece of a file name."""
    return "" if condition is None else re.sub(r"[^a-z0-9]+", "-", condition.lower()).strip("-")[:40] + "-"


def _suffix(sheet: Sheet, sheets: Sequence[Sheet]) -> str:
    """Name the model in the file name where there are several."""
    return "" if len(sheets) == 1 else "-" + re.sub(r"[^a-z0-9]+", "-", sheet.title.lower()).strip("-")
