"""JSON documents and tensors of ours: written, and read with one line when something is wrong.

A reader turns whatever `json` and `safetensors` raise, and whatever its caller's parser raises,
into one line that names the file, says what is wrong, and ends with what to type (`redo`). A file
that is damaged, altered or newer than this msfp is a `CheckpointError`, a missing one a `RunError`.
"""

import hashlib
import json
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from safetensors import SafetensorError, safe_open

from msfp_cli.errors import CheckpointError, RunError, UsageError
from msfp_cli.files.atomic import replace_file, write_text

if TYPE_CHECKING:  # `msfp --help` must not load torch
    from torch import Tensor

Json: TypeAlias = Any  # what a JSON file holds: a tree of dicts, lists, strings and numbers
TensorFile: TypeAlias = Any  # an open safetensors file: keys(), get_tensor(name), metadata()
T = TypeVar("T")

# What a parser raises when a document is not of the expected form.
_UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
    UsageError,
)
_SEAL = "sha256"  # the key under which a document has a digest of the rest of it


def write_json(path: Path, document: Json) -> None:
    """Write a JSON file with a digest of itself, under a temporary name that is then renamed."""
    write_text(path, to_text(document, indent=1))


def write_tensors(
    path: Path, tensors: "Mapping[str, Tensor]", header: dict[str, str] | None = None
) -> None:
    """Write tensors, with texts in their file's header."""
    from safetensors.torch import save_file

    with replace_file(path) as temporary:
        save_file(dict(tensors), temporary, metadata=header)


def to_text(document: Json, *, indent: int | None = None) -> str:
    """Return a document as JSON text; an object gets a digest of itself as one more key."""
    plain = json.loads(json.dumps(document))  # tuples become lists, and keys text
    if isinstance(plain, dict):
        plain[_SEAL] = _digest_of(plain)
    return json.dumps(plain, indent=indent)


def _digest_of(document: Json) -> str:
    """Return the SHA-256 of a document in its shortest form, keys sorted."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def damaged(path: Path, reason: object, *, redo: str) -> CheckpointError:
    """Return the error of a file that cannot be used as it is.

    Arguments:
        reason: what is wrong with it.
        redo: what to type, in the imperative.
    """
    return CheckpointError(f"{path} is damaged ({reason}); {redo}")


def require_file(path: Path, *, redo: str) -> None:
    """Refuse what cannot be opened as a file; a pipe would be waited for without end.

    Raises:
        RunError: it is missing, or may not be read.
        CheckpointError: it is something else than a file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise damaged(path, "it is not a regular file", redo=redo)
        path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        missing = "is a link to nothing" if path.is_symlink() else "is missing"
        raise RunError(f"{path} {missing}; {redo}") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None


def _parse(
    path: Path, text: str | bytes, parse: Callable[[Json], T], redo: str, schema: int | None
) -> T:
    """Parse a JSON text found in `path`, see `read_json`."""
    try:
        document = json.loads(text)
        if schema is not None and document["schema"] > schema:
            raise CheckpointError(f"{path} was written by a newer msfp; upgrade msfp, or {redo}")
        # Files of earlier versions have no digest of themselves.
        expected = document.pop(_SEAL, None) if isinstance(document, dict) else None
        if expected is not None and _digest_of(document) != expected:
            raise CheckpointError(f"{path} is altered: it does not match its digest; {redo}")
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
        RunError: there is no such file, or it may not be read.
        CheckpointError: it is damaged, altered, or newer than this msfp.
    """
    require_file(path, redo=redo)
    return _parse(path, path.read_bytes(), parse, redo, schema)


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
    require_file(path, redo=redo)
    try:
        with _one_file(path) as name, safe_open(name, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise damaged(path, error, redo=redo) from None


@contextmanager
def _one_file(path: Path) -> Iterator[str]:
    """Yield a name of the file that is at `path` now, whatever takes its place in the meantime.

    safetensors opens a file twice, for its header and for its tensors, and a training replaces its
    state every few updates. Windows has no such name, but does not replace an open file either.
    """
    descriptors = Path("/dev/fd")
    if not descriptors.exists():
        yield str(path)
        return
    with path.open("rb") as file:
        yield str(descriptors / str(file.fileno()))


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
