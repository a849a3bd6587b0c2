"""What `msfp sample` makes, on the disk as soon as it is made.

A stopped command loses no picture: they lie in a directory beside the one that was asked for, until
all are there and become that one. The same command goes on with those that are missing. Layout::

    002-unfinished/
        sample.json           what makes them: the export, the prompts, the settings
        000-a-cat-seed0.png   each picture, video or sound, whole or not at all
        stills/               pictures that show videos and sound
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from PIL import Image

from msfp_cli.errors import RunError
from msfp_cli.files.atomic import clean, delete, remove, remove_if_empty, temporary_of
from msfp_cli.files.directories import behind, claim, refuse_existing, replace_directory
from msfp_cli.files.documents import Json, read_json, write_json
from msfp_cli.files.lock import beside, only_writer, remove_stale_in
from msfp_cli.files.seal import MARK
from msfp_cli.pipelines.media import ENDINGS, Work, save, still
from msfp_cli.run import Run, refuse_stage

CONTACT_SHEET = "sheet.png"
_SETTINGS = "sample.json"
_STILLS = "stills"
_UNFINISHED = "-unfinished"
_PATTERNS = (_SETTINGS, *(f"*{ending}" for ending in ENDINGS), f"{_STILLS}/*.png")
_REDO = "delete the directory and run the same command again"


@dataclass(frozen=True)
class PictureFiles:
    """Pictures, videos or sound, named without their endings.

    Arguments:
        directory: where they will be when all are there.
        settings: what makes them, as JSON values.
    """

    directory: Path
    settings: dict[str, Json]

    @property
    def work(self) -> Path:
        """Where they are until then."""
        return unfinished_of(self.directory)

    def fits(self) -> bool:
        """Whether there are none yet, or those that were begun with the same settings."""
        path = self.work / _SETTINGS
        return not path.exists() or read_json(path, dict, redo=_REDO) == self.settings

    def begin(self, *, overwrite: bool) -> None:
        """Make the directory, or go on with the one that was begun with the same settings.

        Raises:
            RunError: it holds pictures of other settings and `overwrite` is not set, or what msfp
                did not write.
        """
        clean(self.work)
        clean(self.work / _STILLS)
        claim(self.work, _PATTERNS)
        if not self.fits():
            if not overwrite:
                raise RunError(
                    f"{self.work} holds pictures that were begun with other settings; use "
                    "--overwrite to begin again, or choose another path"
                )
            remove(self.work)
            claim(self.work, _PATTERNS)
        write_json(self.work / _SETTINGS, self.settings)

    def find(self, name: str) -> Path | None:
        """Return the file of what was made, None if it is still to come."""
        paths = [self.work / f"{name}{ending}" for ending in ENDINGS]
        return next(filter(Path.exists, paths), None)

    def add(self, name: str, work: Work, sample_rate: int) -> None:
        """Write what was made.

        Arguments:
            sample_rate: of sound, in Hertz.
        """
        if not isinstance(work, Image.Image):
            save(still(work), self.work / _STILLS / name)
        save(work, self.work / name, sample_rate)

    def still(self, name: str) -> Image.Image:
        """Return a picture that shows what was made."""
        drawn = self.work / _STILLS / f"{name}.png"
        path = drawn if drawn.exists() else self.find(name)
        assert path is not None, "it was made"
        with Image.open(path) as picture:
            return picture.convert("RGB")

    def finish(self, names: Iterable[str], contact_sheet: Image.Image, *, overwrite: bool) -> None:
        """Make them the directory that was asked for.

        Raises:
            RunError: the directory exists and `overwrite` is not set.
        """
        with replace_directory(self.directory, overwrite=overwrite) as temporary:
            for path in filter(None, map(self.find, names)):
                shutil.copy(path, temporary / path.name)
            contact_sheet.save(temporary / CONTACT_SHEET)
        remove(self.work)


@contextmanager
def picture_files(
    run: Run, directory: Path | None, settings: dict[str, Json], *, overwrite: bool
) -> Iterator[PictureFiles]:
    """Be the only process that writes pictures to a directory.

    Arguments:
        directory: None for a new one in the run.
        settings: what makes the pictures, as JSON values.

    Raises:
        RunError: the directory exists and `overwrite` is not set, or another process writes it.
    """
    if directory is None:
        with new_samples(run, lambda place: PictureFiles(place, settings).fits()) as place:
            yield PictureFiles(place, settings)
        return
    refuse_stage(directory)
    place = behind(directory)
    place.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(place, beside(place)):
        work = unfinished_of(place)
        delete(temporary_of(work))
        refuse_existing(directory, overwrite=overwrite, work=work)
        yield PictureFiles(place, settings)


@contextmanager
def new_samples(run: Run, fits: Callable[[Path], bool] = lambda directory: True) -> Iterator[Path]:
    """Yield a new directory of a run for pictures: ``samples/001``, ``samples/002`` and so on.

    No other process gets the same one while the context is open.

    Arguments:
        fits: whether what was begun for a directory, if anything, can be gone on with.

    Raises:
        RunError: the run directory is a pipeline, which is not written to.
    """
    run.refuse_pipeline()
    run.samples.mkdir(parents=True, exist_ok=True)
    remove_stale_in(run.samples)
    for directory in _places_in(run.samples):
        with ExitStack() as stack:
            stack.callback(remove_if_empty, run.samples)
            try:
                stack.enter_context(only_writer(directory, beside(directory)))
            except RunError:  # another process makes pictures for it
                continue
            if directory.exists():  # and what was left as it got its name goes
                remove(unfinished_of(directory))
                continue
            if fits(directory):
                yield directory
                return


def _places_in(samples: Path) -> Iterator[Path]:
    """Yield directories for pictures: those that were begun, then new ones."""
    names = [path.name for path in sorted(samples.glob("*"))]
    for name in names:
        begun, mark, _ = name.lstrip(".").partition(_UNFINISHED)  # hidden ones are half gone
        if mark and begun.isdecimal():
            yield samples / begun
    numbers = map(int, filter(str.isdecimal, names))
    for number in count(max(numbers, default=0) + 1):
        yield samples / f"{number:03d}"


def unfinished_of(directory: Path) -> Path:
    """Return where pictures for a directory are until all are there."""
    return directory.with_name(f"{directory.name}{_UNFINISHED}")


def identity_of_files(export: Path) -> str:
    """Return what tells an export from others: a digest of all of its files, else its path."""
    seal = export / MARK
    if not seal.exists():
        return str(export.resolve())
    return hashlib.sha256(seal.read_bytes()).hexdigest()
