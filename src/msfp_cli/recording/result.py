"""Denoiser calls on disk: one safetensors shard per call of the pipeline.

Layout of a recording directory::

    recording.json          what was asked (the recipe) and how many shards that makes
    00000.safetensors ...   tensors by the hash of their content; the calls, as JSON, in the header

Tensors that are equal (the prompt's embedding at all timesteps, the ids of a position grid) are
stored once, across shards too. A shard is written to a temporary name and renamed, so it is there
whole or not at all; a recording whose shards are all there is complete, and an interrupted one goes
on with the first that is missing.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msfp_cli.errors import CheckpointError, ModelError, RunError
from msfp_cli.pipelines.denoiser import DenoiserCall

_SCHEMA = 1
_MANIFEST = "recording.json"


def _hash(tensor: Tensor) -> str:
    """Name a tensor by its content, type and shape."""
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    data = (
        tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if tensor.numel()
        else b""
    )
    return hashlib.sha256(head + data).hexdigest()[:32]


class _Encoder:
    """Turns trees of arguments into JSON, setting the tensors aside."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def encode(self, value: Any, where: str) -> Any:  # noqa: ANN401 (a JSON tree)
        if isinstance(value, Tensor):
            tensor = value.detach().cpu().contiguous()
            name = _hash(tensor)
            self.tensors.setdefault(name, tensor.clone())
            return {"$tensor": name}
        if isinstance(value, dict):
            return {
                "$dict": {
                    str(key): self.encode(item, f"{where}.{key}") for key, item in value.items()
                }
            }
        if isinstance(value, list | tuple):
            return [self.encode(item, where) for item in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ModelError(
            f"cannot record the denoiser's argument {where!r} of type {type(value).__name__}"
        )


def encode_calls(calls: list[DenoiserCall]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return the calls as JSON values and their tensors by content, each once."""
    encoder = _Encoder()
    encoded = [
        {
            "component": call.component,
            "timestep": call.timestep,
            "arguments": encoder.encode(call.arguments, "arguments"),
            "output": encoder.encode(call.output, "output"),
        }
        for call in calls
    ]
    return encoded, encoder.tensors


def size_bytes(calls: list[DenoiserCall]) -> int:
    """Return the bytes that these calls take on disk, equal tensors counted once."""
    return sum(tensor.nbytes for tensor in encode_calls(calls)[1].values())


class Recording:
    """A recording directory, complete or not."""

    def __init__(self, directory: Path) -> None:
        """Open an existing recording.

        Raises:
            RunError: there is none.
            CheckpointError: its manifest cannot be read.
        """
        self.directory = directory
        try:
            manifest = json.loads((directory / _MANIFEST).read_text())
            self.recipe: dict[str, Any] = manifest["recipe"]
            self.num_shards: int = manifest["num_shards"]
            newer = manifest["schema"] > _SCHEMA
        except FileNotFoundError:
            raise RunError(f"no recording in {directory}; `msfp calibrate` makes one") from None
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{directory / _MANIFEST} is damaged; run `msfp calibrate --overwrite`"
            ) from None
        if newer:
            raise CheckpointError(
                f"{directory} was written by a newer msfp; upgrade msfp, or record again"
            )
        self._where: dict[str, Path] = {}
        self._intact: set[str] = set()

    @classmethod
    def create(cls, directory: Path, recipe: dict[str, Any], num_shards: int) -> "Recording":
        """Begin a recording, or open the one that was begun with the same recipe.

        Raises:
            RunError: the directory holds the recording of another recipe.
        """
        if (directory / _MANIFEST).exists():
            recording = cls(directory)
            if recording.recipe == recipe and recording.num_shards == num_shards:
                return recording
            if len(recording.missing_shards()) < recording.num_shards:
                raise RunError(
                    f"{directory} was recorded with other settings; use --overwrite, or another --run"
                )
        directory.mkdir(parents=True, exist_ok=True)
        manifest = {"schema": _SCHEMA, "recipe": recipe, "num_shards": num_shards}
        temporary = directory / f"{_MANIFEST}.tmp"
        temporary.write_text(json.dumps(manifest, indent=1))
        os.replace(temporary, directory / _MANIFEST)
        return cls(directory)

    def shard_path(self, index: int) -> Path:
        """Return where shard `index` is or will be."""
        return self.directory / f"{index:05d}.safetensors"

    def missing_shards(self) -> list[int]:
        """List the shards still to be recorded."""
        return [index for index in range(self.num_shards) if not self.shard_path(index).exists()]

    def write_shard(
        self,
        index: int,
        calls: list[DenoiserCall],
        factors: list[tuple[float, float]] | None = None,
    ) -> None:
        """Store the calls of one pipeline run; tensors that an earlier shard holds are not stored again.

        Arguments:
            factors: the sampler's (timestep, denoising factor) pairs, None where they are not
                known.
        """
        encoded, tensors = encode_calls(calls)
        known = self._tensor_index()
        fresh = {name: tensor for name, tensor in tensors.items() if name not in known}
        path = self.shard_path(index)
        temporary = path.with_suffix(".tmp")
        save_file(
            fresh,
            temporary,
            metadata={"record": json.dumps({"calls": encoded, "factors": factors})},
        )
        os.replace(temporary, path)
        self._where.update(dict.fromkeys(fresh, path))

    def _tensor_index(self) -> dict[str, Path]:
        """Return which shard holds which tensor."""
        if not self._where:
            for index in range(self.num_shards):
                path = self.shard_path(index)
                if path.exists():
                    with _open(path) as file:
                        self._where.update(dict.fromkeys(file.keys(), path))
        return self._where

    def shard(self, index: int) -> list[DenoiserCall]:
        """Load the calls of one shard.

        Raises:
            CheckpointError: the shard is truncated or altered.
        """
        index_of = self._tensor_index()
        loaded: dict[str, Tensor] = {}
        encoded = self._record(index)["calls"]
        with _open(self.shard_path(index)) as file:
            loaded.update({name: self._tensor(file, name, index) for name in file.keys()})  # noqa: SIM118 (no mapping)

        def decode(value: Any) -> Any:  # noqa: ANN401 (a JSON tree)
            if isinstance(value, dict) and "$tensor" in value:
                name = value["$tensor"]
                if name not in loaded:
                    with _open(index_of[name]) as other:
                        loaded[name] = self._tensor(other, name, index)
                return loaded[name]
            if isinstance(value, dict):
                return {key: decode(item) for key, item in value["$dict"].items()}
            return [decode(item) for item in value] if isinstance(value, list) else value

        try:
            return [
                DenoiserCall(**{key: decode(item) for key, item in call.items()})
                for call in encoded
            ]
        except (KeyError, TypeError):
            raise self._damaged(index) from None

    def _damaged(self, index: int) -> CheckpointError:
        return CheckpointError(
            f"{self.shard_path(index)} is damaged; run `msfp calibrate --overwrite`"
        )

    def _tensor(self, file: Any, name: str, index: int) -> Tensor:  # noqa: ANN401 (safetensors does not name this type)
        """Read a tensor; the first time, compare it with the hash that names it."""
        tensor: Tensor = file.get_tensor(name)
        if name not in self._intact:
            if _hash(tensor) != name:
                raise self._damaged(index)
            self._intact.add(name)
        return tensor

    def calls(
        self, component: str | None = None, shards: Iterable[int] | None = None
    ) -> Iterator[DenoiserCall]:
        """Yield every call in order (of one component, of some shards), one shard in memory at a time."""
        for index in range(self.num_shards) if shards is None else shards:
            for call in self.shard(index):
                if component is None or call.component == component:
                    yield call

    def _record(self, index: int) -> dict[str, Any]:
        """Read a shard's header."""
        with _open(self.shard_path(index)) as file:
            metadata = file.metadata()
        try:
            record: dict[str, Any] = json.loads(metadata["record"])
        except (KeyError, TypeError, ValueError):
            raise self._damaged(index) from None
        return record

    def timesteps(self, index: int, component: str) -> list[float | None]:
        """Return the timestep of each call of a shard, None for calls of another component; reads the header only."""
        calls = self._record(index)["calls"]
        return [call["timestep"] if call["component"] == component else None for call in calls]

    def num_calls(self, component: str | None = None, shards: Iterable[int] | None = None) -> int:
        """Count the calls (of one component, of some shards) by reading headers only."""
        chosen = range(self.num_shards) if shards is None else shards
        calls = (call for index in chosen for call in self._record(index)["calls"])
        return sum(component in (None, call["component"]) for call in calls)

    def factors(self) -> list[tuple[float, float]] | None:
        """Return the sampler's (timestep, denoising factor) pairs, None where they are not known."""
        pairs = self._record(0)["factors"]
        return None if pairs is None else [(timestep, factor) for timestep, factor in pairs]


def _open(path: Path) -> Any:  # noqa: ANN401 (safetensors does not name this type)
    """Open a shard, saying in one line if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise RunError(
            f"{path} is missing; run `msfp calibrate` again to complete the recording"
        ) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it and run `msfp calibrate` again"
        ) from None
