"""A directory is written whole or not at all, and replaced only if msfp wrote all that is in it.

`replace_directory` seals what it writes (`seal`), and `claim` marks a directory that grows. Both
begin with `refuse_foreign`, the one place that decides whether something may be replaced.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msfp_cli.errors import MsfpError, RunError
from msfp_cli.files.atomic import follow_umask_, write_text
from msfp_cli.files.seal import MARK, Seal

# The files of directories that grow.
RECORDING = ("recording.json", "[0-9]*.safetensors")
EVALUATION = (
    "asked.json",
    "evaluation.json",
    *(f"trajectories/{name}" for name in (*RECORDING, MARK)),
    "pictures/*/gallery.json",
    "pictures/*/[0-9]*.safetensors",
    "measured/*.json",
    "signed/calibration.json",
    "signed/scales.safetensors",
    f"signed/{MARK}",
)
_EXPORT = ("*/config.json", b'"quant_method": "msfp"')
# Before msfp marked its directories: a file, words in it that only msfp writes, and all the files.
_UNMARKED = (
    ("recording.json", b'"num_shards"', RECORDING),
    ("calibration.json", b'"scales_digest"', ("calibration.json", "scales.safetensors")),
    ("asked.json", b'"num_trajectories"', EVALUATION),
    (*_EXPORT, ("model_index.json", "*/*", MARK)),
)


def refuse_foreign(directory: Path) -> None:
    """Refuse to replace what msfp did not write; an empty directory may be replaced.

    Raises:
        RunError: something there is not ours; the message names it.
    """
    if not directory.exists() and not directory.is_symlink():
        return
    if not directory.is_dir():
        raise _foreign(directory)
    stranger = next(_contents(directory).strangers(directory), None)
    if stranger is not None:
        raise _foreign(directory / stranger)
    is_pipeline = (directory / "model_index.json").exists()
    if is_pipeline and not _mentions(directory, *_EXPORT):  # saved in the place of an export
        raise _foreign(directory / "model_index.json")


def _foreign(path: Path) -> RunError:
    return RunError(
        f"{path} was not written by msfp and is not replaced; move it away, or choose another path"
    )


def _contents(directory: Path) -> Seal:
    """Return what msfp wrote into a directory: by its mark, or as versions without marks did."""
    try:
        seal = Seal.load(directory, redo="")
    except MsfpError:  # a damaged mark is as good as none
        seal = None
    if seal is not None:
        return seal
    for pattern, words, names in _UNMARKED:
        if _mentions(directory, pattern, words):
            return Seal(patterns=names)
    return Seal()


def _mentions(directory: Path, pattern: str, words: bytes) -> bool:
    """Whether a file whose name fits holds these words."""
    files = (path for path in directory.glob(pattern) if path.is_file())
    return any(words in path.read_bytes() for path in files)


def refuse_existing(directory: Path, *, overwrite: bool) -> None:
    """Refuse an output that is already there, before any work is done for it.

    Raises:
        RunError: it exists and `overwrite` is not set, or something in it is not ours.
    """
    if directory.exists() and not overwrite:
        raise RunError(
            f"{directory} exists already; use --overwrite to replace it, or choose another path"
        )
    refuse_foreign(directory)


def claim(directory: Path, patterns: tuple[str, ...]) -> None:
    """Mark a directory that grows as ours; files that are there already have to be ours.

    Arguments:
        patterns: of the paths of all files that will be in it.

    Raises:
        RunError: something there is not ours.
    """
    refuse_foreign(directory)
    if not (directory / MARK).exists():
        write_text(directory / MARK, Seal(patterns=patterns).to_text())


@contextmanager
def replace_directory(directory: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that takes the place of `directory` when the block ends well.

    Raises:
        RunError: `directory` exists and `overwrite` is not set, or something in it is not ours.
    """
    refuse_existing(directory, overwrite=overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    follow_umask_(temporary)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            follow_umask_(path)
        (temporary / MARK).write_text(Seal.of(temporary).to_text())
        if directory.exists():
            old = temporary.with_name(f"{temporary.name}-old")
            os.replace(directory, old)
            os.replace(temporary, directory)
            shutil.rmtree(old)
        else:
            os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
