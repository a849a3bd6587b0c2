"""What msfp wrote into a directory: `msfp.json` says it, in every directory of ours.

Where a directory is finished at once (an export, a calibration, pictures, a report), the file is a
seal: it has the size and the SHA-256 of every other file, so that a changed one can be refused
before it is used. Where a directory grows (a recording, an evaluation), the file has patterns of
the names that msfp gives its files there, and each of them has a digest of its own.

Either way it answers whose a file is: ours, or one that somebody put beside them (`directories`).
"""

import hashlib
import mmap
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from msfp_cli.errors import CheckpointError, MsfpError, RunError
from msfp_cli.files.documents import Json, read_json, require_file, to_text
from msfp_cli.files.typed import read_fields

MARK = "msfp.json"
REDO = (
    "download it again, or export it again with --overwrite; if it was changed on purpose, run "
    "`msfp export --reseal DIR`, or load it with check=False"
)
_SCHEMA = 1
_WINDOW = 1 << 30  # bytes of a file that are mapped at a time; a larger one would stay in memory
_IS_CHECKED = ContextVar("is_checked", default=True)
# Files that are being compared with their seal while the context is open, and the seals themselves.
_COMPARED: ContextVar[frozenset[Path]] = ContextVar("compared", default=frozenset())
# What `atomic` and `directories` call a file or a directory that is not finished.
_TEMPORARY = re.compile(r"\.(.+?)\.msfp-(tmp|old)")


@dataclass(frozen=True, kw_only=True)
class SealedFile:
    """A file as it was written: its size in bytes, and the SHA-256 of its content."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "SealedFile":
        """Read a file in a few long steps, in which Python's other threads are not held up."""
        sha = hashlib.sha256()
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for start in range(0, size, _WINDOW):
                mapped = {"length": min(_WINDOW, size - start), "offset": start}
                with mmap.mmap(file.fileno(), access=mmap.ACCESS_READ, **mapped) as part:
                    sha.update(part)
        return cls(size=size, sha256=sha.hexdigest())


@dataclass(frozen=True, kw_only=True)
class Seal:
    """What `msfp.json` says.

    Arguments:
        files: by their path in the directory, with "/".
        patterns: of further paths that msfp writes there, as in `fnmatch`, part by part.
    """

    files: Mapping[str, SealedFile] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()

    @classmethod
    def of(cls, directory: Path, patterns: tuple[str, ...] | None = None) -> "Seal":
        """Seal the files of a directory; without patterns of their paths, all of them."""
        names = [n for n in _names(directory) if patterns is None or is_named(n, patterns)]
        for name in names:
            require_file(directory / name, redo="move it away")
        return cls(files={name: SealedFile.of(directory / name) for name in names})

    def to_text(self) -> str:
        """Return the content of `msfp.json`."""
        files = {name: asdict(file) for name, file in self.files.items()}
        document = {"schema": _SCHEMA, "patterns": list(self.patterns), "files": files}
        return to_text(document, indent=1)

    @classmethod
    def load(cls, directory: Path, *, redo: str) -> "Seal | None":
        """Read `msfp.json`; None where there is none, as in directories of earlier versions.

        Raises:
            CheckpointError: it is damaged, altered, or newer than this msfp.
        """
        path = directory / MARK
        if not path.exists() and not path.is_symlink():
            return None

        def parse(document: Json) -> Seal:
            return read_fields(cls, {key: document[key] for key in ("files", "patterns")})

        return read_json(path, parse, redo=redo, schema=_SCHEMA)

    def strangers(self, directory: Path) -> Iterator[str]:
        """Yield the paths of files that msfp did not write."""
        for name in _names(directory):
            is_ours = "/".join(map(_finished, PurePath(name).parts)) in self.files
            if not is_ours and not is_named(name, self.patterns):
                yield name

    def refuse_altered(self, directory: Path, names: Iterable[str], *, redo: str) -> None:
        """Compare the content of files with the seal.

        Raises:
            CheckpointError: one differs.
        """
        for name in names:
            if SealedFile.of(directory / name) != self.files[name]:
                raise _altered(directory / name, redo)

    def has_weights_in(self, directory: Path) -> bool:
        """Whether the safetensors files of a directory are those that were sealed."""
        names = [name for name in self.files if name.endswith(".safetensors")]
        return bool(names) and all(
            (directory / name).is_file() and SealedFile.of(directory / name) == self.files[name]
            for name in names
        )

    def refuse_other_files(self, directory: Path, *, redo: str) -> None:
        """Look for files that are missing, of another size, or added where a loader reads them.

        A loader takes whatever has a certain name in the folder of a component, so a file that was
        added there may change what is loaded. Nothing reads files beside ``model_index.json``.

        Raises:
            RunError: one is missing, or may not be read.
            CheckpointError: one is of another size, or was added.
        """
        for name, file in self.files.items():
            require_file(directory / name, redo=redo)
            if (directory / name).stat().st_size != file.size:
                raise _altered(directory / name, redo)
        for name in self.strangers(directory):
            folder = PurePath(name).parts[0]
            if "/" in name and any(ours.startswith(f"{folder}/") for ours in self.files):
                raise CheckpointError(f"{directory / name} was not written by msfp; {redo}")


def is_named(name: str, patterns: Collection[str]) -> bool:
    """Whether a path, or the one that an unfinished file is to have, fits one of the patterns."""
    parts = [_finished(part) for part in PurePath(name).parts]
    return any(_fits(parts, pattern.split("/")) for pattern in patterns)


def _fits(parts: list[str], patterns: list[str]) -> bool:
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _finished(name: str) -> str:
    """Return the name that a file or directory is to have when it is finished."""
    match = _TEMPORARY.fullmatch(name)
    return name if match is None else match[1]


def _names(directory: Path) -> list[str]:
    """List the files of a directory and those below, but not `msfp.json`, finished or not.

    Locks are left out as well.
    """
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    names = sorted(path.relative_to(directory).as_posix() for path in paths)
    return [name for name in names if _finished(name) != MARK and not name.endswith(".msfp-lock")]


def _altered(path: Path, redo: str) -> CheckpointError:
    return CheckpointError(f"{path} is altered: it is not the file that msfp wrote; {redo}")


@contextmanager
def unchecked() -> Iterator[None]:
    """Load what was altered as well, while the context is open."""
    token = _IS_CHECKED.set(False)
    try:
        yield
    finally:
        _IS_CHECKED.reset(token)


def is_checked() -> bool:
    """Whether what was altered is refused here."""
    return _IS_CHECKED.get()


def is_compared(path: Path) -> bool:
    """Whether `checked` compares this file with its seal, so that nobody else has to hash it."""
    return path.resolve() in _COMPARED.get()


@contextmanager
def checked(directory: Path, *, redo: str) -> Iterator[None]:
    """Compare a directory with its seal; without a seal there is nothing to compare.

    Names, sizes and all small files are compared before the block runs, and safetensors files in a
    thread beside it, because hashing them takes longer than loading them: let the block do whatever
    comes after loading, too. What they say comes before any error of the block, which has read the
    same files. Inside of a block nothing is compared again.

    Raises:
        CheckpointError: a file is altered, or was added where a loader reads it.
        RunError: a file is missing, or another process replaced the directory meanwhile.
    """
    is_needed = is_checked() and not is_compared(directory / MARK)
    seal = Seal.load(directory, redo=redo) if is_needed else None
    if seal is None:
        yield
        return
    with _not_replaced(directory, seal):
        seal.refuse_other_files(directory, redo=redo)
        large = [name for name in seal.files if name.endswith(".safetensors")]
        seal.refuse_altered(directory, seal.files.keys() - set(large), redo=redo)
        with ThreadPoolExecutor(1) as pool:
            comparison = pool.submit(seal.refuse_altered, directory, large, redo=redo)
            token = _COMPARED.set(
                frozenset((directory / name).resolve() for name in (MARK, *large))
            )
            try:
                yield
            finally:
                _COMPARED.reset(token)
                comparison.result()


@contextmanager
def _not_replaced(directory: Path, seal: Seal) -> Iterator[None]:
    """Refuse a directory that another process replaces while the context is open.

    What was read may then be half the old one and half the new one, each of them unaltered; and
    what looks altered is not damaged.

    Raises:
        RunError: its seal is another one at the end.
    """
    try:
        yield
    except Exception as error:
        if _is_replaced(directory, seal):
            raise _replaced(directory) from error
        raise
    if _is_replaced(directory, seal):
        raise _replaced(directory)


def _is_replaced(directory: Path, seal: Seal) -> bool:
    try:
        return Seal.load(directory, redo="") != seal
    except MsfpError:  # neither has its name while it is replaced by two renames
        return True


def _replaced(directory: Path) -> RunError:
    return RunError(
        f"{directory} was replaced while it was read; load it again, or run the same command again"
    )
