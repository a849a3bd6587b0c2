"""Change one file of an export or of a run as chance has it: the number of a mutation says how.

A plain mutation is damage. A signed one is what a faulty writer would leave: after the change all
digests, headers and seals are made anew, with the project's own functions, so that nothing but the
values themselves can give it away.
"""

import json
import os
import pickle
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.contents import header_of, model_text
from msfp_cli.checkpoint.quantizer import MSFPConfig
from msfp_cli.checkpoint.quantizer import to_text as config_text
from msfp_cli.errors import MsfpError
from msfp_cli.files.documents import digest, to_text
from msfp_cli.files.seal import MARK, Seal
from msfp_cli.recording.result import Recording

CANARY = "MSFP_FUZZ_CANARY"  # an environment variable that code of ours sets, if it runs
SOURCE = f"import os\nos.putenv({CANARY!r}, '1')\n"
DEPTH = 100_000
Json: TypeAlias = Any
ODD: tuple[Any, ...] = (
    float("nan"),
    float("inf"),
    1e300,
    10**9,
    2**63,
    -1,
    0,
    0.5,
    None,
    True,
    "",
    "x",
    "../x",
    [],
    {},
    [[1]],
    {"x": None},
)
# What can go wrong when such a file is read or changed, while it is signed: then it stays as it is.
_UNSIGNABLE = (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError)
_ROOT_FILES = ("model_index.json", "run.json")
_HEADERS = ("record", "msfp_finetune", "quantization_config", "model_config")


class Payload:
    """What sets the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.putenv, (CANARY, "1")


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A change of one file.

    Arguments:
        file: its path in the directory.
        words: what was done to it.
        signed: whether digests and seals were made anew afterwards.
        gone: whether there is no file of that name any more.
    """

    file: str
    words: str
    signed: bool
    gone: bool

    def __str__(self) -> str:
        return f"{'signed' if self.signed else 'plain'} | {self.file} | {self.words}"


def mutate(directory: Path, number: int, seed: int) -> Mutation:
    """Change one file of a directory."""
    rng = random.Random(f"{seed}/{number}")
    path = rng.choice(sorted(p for p in directory.rglob("*") if p.is_file()))
    is_signed = rng.random() < 0.5
    change = rng.choice(_CHANGES[".json" if path.suffix == ".json" else ".safetensors"])
    signed = is_signed and change is not _special  # a seal would wait for a pipe without end
    detail = change(path, rng)
    if signed:
        sign(directory, path)
    return Mutation(
        file=path.relative_to(directory).as_posix(),
        words=f"{change.__name__.strip('_')} {detail}"[:200],
        signed=signed,
        gone=not path.exists(),
    )


def _flip(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"at {at}"


def _cut(path: Path, rng: random.Random) -> str:
    length = rng.randrange(path.stat().st_size)
    os.truncate(path, length)
    return f"to {length} bytes"


def _delete(path: Path, rng: random.Random) -> str:
    path.unlink()
    return ""


def _swap(path: Path, rng: random.Random) -> str:
    root = next(p for p in path.parents if any((p / name).is_file() for name in _ROOT_FILES))
    others = sorted(p for p in root.rglob(f"*{path.suffix}") if p.is_file())
    other = rng.choice([p for p in others if p != path])
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"with {other.parent.name}/{other.name}"


def _special(path: Path, rng: random.Random) -> str:
    """Put something else than a file in its place."""
    path.unlink()
    kind = rng.choice(("pipe", "directory", "link to nothing", "/dev/zero"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "/dev/zero" else "nothing")
    return kind


def _pickle(path: Path, rng: random.Random) -> str:
    """Put a pickle beside a file or in its place, under the names that loaders know."""
    name = rng.choice((path.name, f"{path.stem}.bin", "pytorch_model.bin", f"{path.stem}.ckpt"))
    if rng.random() < 0.5:
        path.unlink()
    target = path.with_name(name)
    if rng.random() < 0.5:
        torch.save(Payload(), target)
    else:
        target.write_bytes(pickle.dumps(Payload()))
    return name


def _code(path: Path, rng: random.Random) -> str:
    """Put Python beside a file and name it in the file, as custom pipelines do."""
    (path.parent / "canary.py").write_text(SOURCE)
    document = json.loads(path.read_text("utf-8"))
    key = rng.choice(("_class_name", "auto_map", *document))
    document[key] = rng.choice((["canary", "Canary"], {"AutoModel": "canary.Canary"}, "Canary"))
    path.write_text(json.dumps(document))
    return f"under {key}"


def _place(document: Json, rng: random.Random) -> tuple[Any, Any]:
    """Choose a container in a tree of JSON values, and a key of it; each level is as likely."""
    while True:
        keys = range(len(document)) if isinstance(document, list) else list(document)
        key = rng.choice(keys)
        inner = document[key]
        if not inner or not isinstance(inner, dict | list) or rng.random() < 0.2:
            return document, key
        document = inner


def _change_document(document: Json, rng: random.Random) -> str:
    """Change a value of a document, or take it away."""
    container, key = _place(document, rng)
    if rng.random() < 0.15:
        del container[key]
        return f"without {key}"
    container[key] = rng.choice(ODD)
    return f"{key} = {container[key]!r}"


def _value(path: Path, rng: random.Random) -> str:
    document = json.loads(path.read_text("utf-8"))
    detail = _change_document(document, rng)
    path.write_text(json.dumps(document, indent=1))
    return detail


def _text(path: Path, rng: random.Random) -> str:
    """Write another document, or none."""
    deep = rng.choice(("[" * DEPTH + "]" * DEPTH, '{"a":' * DEPTH + "1" + "}" * DEPTH))
    text = rng.choice((deep, "", "null", "[]", "{}", "1" * 5000, '"x"', "\ufeff{}", "\0"))
    path.write_text(text)
    return repr(text[:8])


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), dict(file.metadata() or {})


def _header(path: Path, rng: random.Random) -> str:
    """Change a value of the document in a header."""
    tensors, header = _read(path)
    keys = [key for key in sorted(header) if key in _HEADERS] or sorted(header)
    if not keys:
        return "it has none"
    key = rng.choice(keys)
    if rng.random() < 0.1:
        header[key] = rng.choice(("", "null", "[]", "[" * DEPTH + "]" * DEPTH))
        detail = repr(header[key][:8])
    elif header[key][:1] == "{":
        document = json.loads(header[key])
        detail = _change_document(document, rng)
        header[key] = json.dumps(document)
    else:
        del header[key]
        detail = "gone"
    save_file(tensors, path, header)
    return f"{key}: {detail}"


def _tensor(path: Path, rng: random.Random) -> str:
    """Change a tensor: a value, its type, its shape, its name, or take it away."""
    tensors, header = _read(path)
    if not tensors:
        return "it has none"
    name = rng.choice(sorted(tensors))
    kind = rng.choice(("value", "type", "shape", "name", "gone", "empty"))
    tensor = tensors.pop(name)
    if kind == "value":
        kind = _fill_(tensor, rng)
    tensors |= {
        "type": {name: tensor.to(rng.choice((torch.float64, torch.int64, torch.float16)))},
        "shape": {name: tensor.reshape(-1)[: max(1, tensor.numel() // 2)].clone()},
        "name": {f"{name}x": tensor},
        "empty": {name: tensor.reshape(-1)[:0].clone()},
        "gone": {},
    }.get(kind, {name: tensor})
    save_file(tensors, path, header)
    return f"{name} {kind}"


def _fill_(tensor: torch.Tensor, rng: random.Random) -> str:
    """Set one element, or all, to a value that its type can hold."""
    if tensor.is_floating_point():
        value = rng.choice((float("nan"), float("inf"), -1.0, 0.0, 1e30))
    else:
        value = rng.choice((0, 1, 127))
    flat = tensor.view(-1)
    flat[: rng.choice((1, flat.numel()))] = value
    return f"= {value}"


_Change = Callable[[Path, random.Random], str]
_BYTES: tuple[_Change, ...] = (_flip, _cut, _delete, _swap, _special)
_CHANGES: dict[str, tuple[_Change, ...]] = {
    ".json": (*_BYTES, *[_value] * 8, _text, _code),
    ".safetensors": (*_BYTES, *[_tensor] * 5, *[_header] * 3, _pickle),
}


def sign(directory: Path, changed: Path) -> None:
    """Make all digests, headers and seals of a directory anew; a seal that was changed stays so."""
    for path in _files(directory, "*.json"):
        with suppress(*_UNSIGNABLE):
            _sign_document(path)
    for path in _files(directory, "*.safetensors"):
        with suppress(*_UNSIGNABLE, SafetensorError, MsfpError):
            _sign_tensors(path)
    for path in _files(directory, MARK):
        if path != changed:
            with suppress(*_UNSIGNABLE):
                patterns = tuple(json.loads(path.read_text("utf-8"))["patterns"])
                seal = Seal(files={} if patterns else Seal.of(path.parent).files, patterns=patterns)
                path.write_text(seal.to_text())


def _files(directory: Path, pattern: str) -> list[Path]:
    """List regular files; whatever else has such a name would be waited for."""
    return sorted(p for p in directory.rglob(pattern) if p.is_file())


def _sign_tensors(path: Path) -> None:
    """Write the header of a denoiser's, a shard's or a fine-tuning's file again."""
    tensors, header = _read(path)
    if "msfp_digest" in header:
        config = json.loads((path.parent / "config.json").read_text("utf-8"))
        header |= header_of(tensors, _config_text(config), model_text(config))
    if "record" in header:
        identity = Recording(path.parent)._identity
        header["record"] = _signed(header["record"], {"recording": identity})
    if "msfp_finetune" in header:
        identity = Calibration.load(path.parents[1] / "calibration").identity()
        digests = {"digest": digest(tensors), "calibration": identity}
        header["msfp_finetune"] = _signed(header["msfp_finetune"], digests)
    save_file(tensors, path, header)


def _signed(text: str, digests: dict[str, str]) -> str:
    """Return a document with other digests, and one of itself."""
    document = json.loads(text)
    document.pop("sha256", None)
    return to_text(document | digests)


def _config_text(config: dict[str, Any]) -> str:
    """Return the quantization config as a writer would put it into the header."""
    try:
        return config_text(MSFPConfig.from_dict(dict(config["quantization_config"])))
    except (*_UNSIGNABLE, MsfpError):
        return json.dumps(config.get("quantization_config"), sort_keys=True)


def _sign_document(path: Path) -> None:
    """Write the digests of a document of msfp again; others have none."""
    document = json.loads(path.read_text("utf-8"))
    if not isinstance(document, dict) or "sha256" not in document:
        return
    for key, name in (("scales_digest", "scales"), ("codes_digest", "codes")):
        file = path.with_name(f"{name}.safetensors")
        if document.get(key) and file.is_file():
            with suppress(SafetensorError):  # a damaged file keeps the digest that it had
                document[key] = digest(load_file(file))
    path.write_text(_signed(json.dumps(document), {}))
