"""Files of ours: written whole or not at all, and read with one line when something is wrong.

A writer works under a temporary name and renames, so a killed process leaves the old file or none.
A reader turns whatever `json` and `safetensors` raise, and whatever its caller's parser raises,
into one line that names the file, says what is wrong, and ends with what to type (`redo`). A file
that is damaged, altered or newer than this msfp is a `CheckpointError`, a missing one a `RunError`.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from safetensors import SafetensorError, safe_open

from msfp_cli.errors import CheckpointError, RunError, UsageError

if TYPE_CHECKING:  # `msfp --help` must not load torch
    from torch import Tensor

Json: TypeAlias = Any  # what a JSON file holds: a tree of dicts, lists, strings and numbers
TensorFile: TypeAlias = Any  # an open safetensors file: keys(), get_tensor(name), metadata()
T = TypeVar("T")

# One of these lies in every directory that we write.
_MARKS = (
    "recording.json",
    "calibration.json",
    "model_index.json",
    "sheet.png",
    "report.html",
)
# What a parser raises when a document is not of the expected form.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, UsageError)


def is_ours(directory: Path, parts: Collection[str] | None = None) -> bool:
    """Say whether a directory may be replaced: it is empty, or msfp wrote it.

    Arguments:
        parts: names of all that msfp writes into such a directory; anything else in it makes it
            somebody else's. None allows anything beside a file that only msfp writes (people put
            a README into an export).
    """
    if not directory.is_dir():
        return False
    names = [path.name for path in directory.iterdir()]
    if parts is None:
        return not names or any(mark in names for mark in _MARKS)
    temporary = tuple(f".{part}" for part in parts)  # left behind by a process that was killed
    return all(name in parts or name.startswith(temporary) for name in names)


def refuse_foreign(directory: Path, parts: Collection[str] | None = None) -> None:
    """Refuse to replace what msfp did not write, see `is_ours`.

    Raises:
        RunError: something is there, and it is not ours.
    """
    if directory.exists() and not is_ours(directory, parts):
        raise RunError(
            f"{directory} was not written by msfp and is not replaced; choose another path"
        )


def refuse_existing(directory: Path, *, overwrite: bool) -> None:
    """Refuse an output that is already there, before any work is done for it.

    Raises:
        RunError: it exists and `overwrite` is not set, or msfp did not write it.
    """
    if directory.exists() and not overwrite:
        raise RunError(
            f"{directory} exists already; use --overwrite to replace it, or choose another path"
        )
    refuse_foreign(directory)


@contextmanager
def replace_directory(directory: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that takes the place of `directory` when the block ends well.

    Raises:
        RunError: `directory` exists and `overwrite` is not set.
    """
    refuse_existing(directory, overwrite=overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if directory.exists():
            old = temporary.with_name(f"{temporary.name}-old")
            os.replace(directory, old)
            os.replace(temporary, directory)
            shutil.rmtree(old)
        else:
            os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name; the file written there becomes `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    with replace_file(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: Path, document: Json) -> None:
    """Write a JSON file under a temporary name, then rename it."""
    write_text(path, json.dumps(document, indent=1))


def damaged(path: Path, reason: object, *, redo: str) -> CheckpointError:
    """Return the error of a file that cannot be used as it is.

    Arguments:
        reason: what is wrong with it.
        redo: what to type, in the imperative.
    """
    return CheckpointError(f"{path} is damaged ({reason}); {redo}")


def _parse(
    path: Path, text: str | bytes, parse: Callable[[Json], T], redo: str, schema: int | None
) -> T:
    """Parse a JSON text found in `path`, see `read_json`."""
    try:
        document = json.loads(text)
        if schema is not None and document["schema"] > schema:
            raise CheckpointError(f"{path} was written by a newer msfp; upgrade msfp, or {redo}")
        return parse(document)
    except _UNREADABLE as error:
        raise damaged(path, error, redo=redo) from None


def read_json(path: Path, parse: Callable[[Json], T], *, redo: str, schema: int | None = None) -> T:
    """Read a JSON file.

    Arguments:
        parse: makes a value of the document; what it raises is damage of the file.
        redo: what to type when the file cannot be used, in the imperative.
        schema: the newest ``schema`` that this msfp reads; None for a file without one.

    Raises:
        RunError: there is no such file.
        CheckpointError: it is damaged, or newer than this msfp.
    """
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{path} is missing; {redo}") from None
    return _parse(path, text, parse, redo, schema)


def read_header(
    path: Path, key: str, parse: Callable[[Json], T], *, redo: str, schema: int | None = None
) -> T:
    """Read a JSON document that lies under `key` in the header of a safetensors file.

    Arguments and errors are those of `read_json`.
    """
    with open_tensors(path, redo=redo) as file:
        text = (file.metadata() or {}).get(key)
    if text is None:
        raise damaged(path, f"its header has no {key!r}", redo=redo)
    return _parse(path, text, parse, redo, schema)


@contextmanager
def open_tensors(path: Path, *, redo: str) -> Iterator[TensorFile]:
    """Open a safetensors file; its tensors are read one by one, while the context is open.

    Raises:
        RunError: there is no such file.
        CheckpointError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise RunError(f"{path} is missing; {redo}") from None
    except SafetensorError as error:
        raise damaged(path, error, redo=redo) from None


def read_tensors(path: Path, *, redo: str) -> "dict[str, Tensor]":
    """Read all tensors of a safetensors file, see `open_tensors`."""
    with open_tensors(path, redo=redo) as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def read_document(
    path: Path,
    key: str,
    parse: "Callable[[Json, dict[str, Tensor]], T]",
    *,
    redo: str,
    schema: int | None = None,
) -> T:
    """Read the tensors of a safetensors file and the JSON document under `key` in its header.

    Both are read from one opened file, because another process may replace it at any time: a
    training saves its state every few updates. `parse` gets the document and the tensors; other
    arguments and errors are those of `read_json`.
    """
    with open_tensors(path, redo=redo) as file:
        text = (file.metadata() or {}).get(key)
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    if text is None:
        raise damaged(path, f"its header has no {key!r}", redo=redo)
    return _parse(path, text, lambda document: parse(document, tensors), redo, schema)


def digest(tensors: "Mapping[str, Tensor]") -> str:
    """Return the SHA-256 of tensors: names, types, shapes and bytes, in the order of the names."""
    import torch  # whoever has a tensor has loaded it

    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def refuse_altered(
    path: Path, tensors: "Mapping[str, Tensor]", expected: str, *, redo: str
) -> None:
    """Refuse tensors that are not those that were written.

    Arguments:
        path: where they were read.
        expected: the `digest` that was written with them.

    Raises:
        CheckpointError: the digests differ.
    """
    if digest(tensors) != expected:
        raise CheckpointError(f"{path} is altered: its tensors do not match their digest; {redo}")
