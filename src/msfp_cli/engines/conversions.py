"""Converted denoisers on disk, by what they were made from.

A conversion is a directory whose name is a digest of the denoiser's tensors and config and of the
tree of its arguments. It lies beside an exported checkpoint (``openvino/``, written by
`msfp export --engine openvino`) or in the user's cache, which keeps the few that were used last.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from msfp_cli.errors import MsfpError, RunError
from msfp_cli.files import directories
from msfp_cli.files.atomic import remove
from msfp_cli.files.documents import Json
from msfp_cli.files.lock import beside, only_writer
from msfp_cli.files.seal import MARK, Seal

FOLDER = "openvino"  # in an export, and in the cache
_MODEL = "model.xml"
# What conversions are in an export, as patterns of `Seal`.
CONVERSIONS = tuple(f"{FOLDER}/*/{name}" for name in (_MODEL, "model.bin", MARK))
_MOST = 6  # conversions that the cache keeps
_NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)
_SCHEMA = 2  # of what is traced; a change makes older conversions useless


def cache_directory() -> Path:
    """Return where conversions are that no export has."""
    return directories.cache_directory() / FOLDER


def key_of(content: str, call: Json) -> str:
    """Return the name of a conversion.

    Arguments:
        content: digest of the denoiser.
        call: the tree of its arguments, and their shapes where they matter.
    """
    text = json.dumps([_SCHEMA, content, call], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def find(key: str, places: Sequence[Path]) -> Path | None:
    """Return the model's file of a conversion that is complete, if one of the places has it."""
    for place in places:
        directory = place / key
        if _is_complete(directory):
            if os.access(directory, os.W_OK):
                os.utime(directory)
            return directory / _MODEL
    return None


def _is_complete(directory: Path) -> bool:
    try:
        seal = Seal.load(directory, redo="")
        if seal is not None:
            seal.refuse_other_files(directory, redo="")
    except MsfpError:
        return False
    return seal is not None


def write(place: Path, key: str, save: Callable[[Path], None]) -> Path:
    """Write a conversion, whole or not at all; the oldest ones beyond `_MOST` are deleted.

    Where another process or thread is writing it, this one waits and takes what the other made.

    Arguments:
        save: writes the model's file.

    Raises:
        RunError: the place cannot be written.
    """
    directory = place / key
    try:
        place.mkdir(parents=True, exist_ok=True)
        with only_writer(directory, beside(directory), wait=True):
            if not _is_complete(directory):
                with directories.replace_directory(directory, overwrite=True) as temporary:
                    save(temporary / _MODEL)
    except OSError as error:
        if error.errno not in _NO_RIGHTS:
            raise
        raise RunError(
            f"the conversion for OpenVINO cannot be written to {place} ({error.strerror}); set "
            "MSFP_CACHE to a directory of yours, or store it with `msfp export --engine openvino`"
        ) from None
    _delete_oldest(place, directory)
    return directory / _MODEL


def _delete_oldest(place: Path, new: Path) -> None:
    """Keep `_MOST` conversions, as far as other processes and users do not tidy up as well.

    Arguments:
        new: the one that was just written, which stays whatever the clock says.
    """
    others = sorted(set(place.glob("[0-9a-f]*")) - {new}, key=_last_used)
    for old in others[: max(0, len(others) + 1 - _MOST)]:
        with suppress(OSError):
            remove(old)


def _last_used(conversion: Path) -> float:
    """Return when a conversion was last used.

    One that is gone goes first, and so does one from the future: since the clock was put back, it
    has not been used.
    """
    try:
        used = conversion.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    return used if used <= time.time() else 0.0
