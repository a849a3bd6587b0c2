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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from msfp_cli.errors import RunError
from msfp_cli.files.directories import RECORDING, claim
from msfp_cli.files.documents import (
    Json,
    TensorFile,
    damaged,
    open_tensors,
    read_header,
    read_json,
    to_text,
    write_json,
    write_tensors,
)
from msfp_cli.files.typed import read_fields, read_value
from msfp_cli.layers.clock import TRAINING_CLOCK, Clock
from msfp_cli.pipelines.denoiser import DenoiserCall
from msfp_cli.recording.encode import content_hash, decode_items, encode_calls

T = TypeVar("T")
Factors: TypeAlias = list[tuple[float, float]] | None

_SCHEMA = 1
_LATER = ("schedulers", "pictures")  # settings that earlier versions did not note
_APART = ("conditions", "seed")  # what the held-out pictures have of their own
_MANIFEST = "recording.json"
_HEADER = "record"  # of a shard: the key under which its calls lie
_MAX_SHARDS = 100_000
_REDO = "run the same `msfp calibrate` again, with --overwrite"
_REDO_SHARD = "delete it and run the same `msfp calibrate` again, with --overwrite"


def _parse_manifest(document: Json) -> tuple[dict[str, Any], int]:
    num_shards: int = read_value(int, document["num_shards"])
    if not 1 <= num_shards <= _MAX_SHARDS:
        raise ValueError(f"it counts {num_shards} shards")
    recipe: dict[str, Any] = read_value(dict[str, dict[str, Any]], document["recipe"])
    read_value(str, recipe.get("source", {}).get("model", ""))
    return recipe, num_shards


def is_same(recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a recording was made with these settings, but for what earlier versions left out."""
    left_out = {key: settings[key] for key in _LATER if key in settings}
    return {**left_out, **recorded} == settings


def _identity(recipe: dict[str, Any], num_shards: int) -> str:
    """Return a digest of what was asked, by which each shard names its recording."""
    text = json.dumps([recipe, num_shards], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse_other_shards(directory: Path, identity: str) -> None:
    """Refuse shards of a recording whose manifest is gone, unless they say that they belong here.

    Raises:
        RunError: one belongs to another recording, or was written before shards named theirs.
    """
    for path in sorted(directory.glob(RECORDING[1])):
        home = read_header(path, _HEADER, lambda document: document.get("recording"), redo=_REDO)
        if home != identity:
            raise RunError(
                f"{directory} has lost its {_MANIFEST}, and {path.name} was recorded with other "
                "settings; use --overwrite, or another --run"
            )


class Recording:
    """A recording directory, complete or not."""

    def __init__(self, directory: Path) -> None:
        """Open an existing recording.

        Raises:
            RunError: there is none.
            CheckpointError: its manifest cannot be read.
        """
        self.directory = directory
        if not (directory / _MANIFEST).exists():
            raise RunError(f"no recording in {directory}; {_REDO}")
        self.recipe, self.num_shards = read_json(
            directory / _MANIFEST, _parse_manifest, redo=_REDO, schema=_SCHEMA
        )
        self._identity = _identity(self.recipe, self.num_shards)
        self._shard_of_tensor: dict[str, Path] = {}
        self._intact: set[str] = set()  # tensors that were compared with their names

    @classmethod
    def create(cls, directory: Path, recipe: dict[str, Any], num_shards: int) -> "Recording":
        """Begin a recording, or open the one that was begun with the same recipe.

        Raises:
            RunError: the directory holds the recording of another recipe.
        """
        if (directory / _MANIFEST).exists():
            recording = cls(directory)
            if is_same(recording.recipe, recipe) and recording.num_shards == num_shards:
                return recording
            if len(recording.missing_shards()) < recording.num_shards:
                raise RunError(
                    f"{directory} was recorded with other settings; "
                    "use --overwrite, or another --run"
                )
        _refuse_other_shards(directory, _identity(recipe, num_shards))
        claim(directory, RECORDING)
        manifest = {"schema": _SCHEMA, "recipe": recipe, "num_shards": num_shards}
        write_json(directory / _MANIFEST, manifest)
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
        factors: Mapping[str, Factors] = MappingProxyType({}),
        clocks: Mapping[str, Clock] = MappingProxyType({}),
    ) -> None:
        """Store the calls of one pipeline run, without tensors that an earlier shard holds.

        Other processes may write shards at the same time: see `drop_repeated`.

        Arguments:
            factors: (timestep, denoising factor) pairs by component, None where they are not known.
            clocks: what reads the timestep of a call, by component.
        """
        encoded, tensors = encode_calls(calls)
        path = self.shard_path(index)
        stored = {name for name, home in self._tensor_index().items() if home < path}
        fresh = {name: tensor for name, tensor in tensors.items() if name not in stored}
        document = {
            "calls": encoded,
            "factors": dict(factors),
            "clocks": {component: clock.to_json() for component, clock in clocks.items()},
            "recording": self._identity,
        }
        write_tensors(path, fresh, {_HEADER: to_text(document)})
        self._shard_of_tensor.update(dict.fromkeys(fresh, path))

    def drop_repeated(self) -> None:
        """Leave each tensor in the first shard that has it, as if one process had written all."""
        stored = set[str]()
        for index in range(self.num_shards):
            path = self.shard_path(index)
            with open_tensors(path, redo=_REDO_SHARD) as file:
                names = set(file.keys())
                if names & stored:
                    kept = {name: file.get_tensor(name) for name in names - stored}
                    write_tensors(path, kept, file.metadata())
            stored |= names
        self._shard_of_tensor.clear()

    def _tensor_index(self) -> dict[str, Path]:
        """Return which shard holds which tensor."""
        if not self._shard_of_tensor:
            for index in reversed(range(self.num_shards)):  # the first that holds it counts
                path = self.shard_path(index)
                if path.exists():
                    with open_tensors(path, redo=_REDO_SHARD) as file:
                        self._shard_of_tensor.update(dict.fromkeys(file.keys(), path))
        return self._shard_of_tensor

    def _existing(self, index: int) -> Path:
        """Return where shard `index` is.

        Raises:
            RunError: it is missing.
        """
        path = self.shard_path(index)
        if not path.exists():
            raise RunError(
                f"{path} is missing; run the same `msfp calibrate` again, with --overwrite, to "
                "complete the recording"
            )
        return path

    def _read_header(self, index: int, parse: Callable[[Json], T]) -> T:
        """Read what a shard's header says of its calls."""

        def parse_own(document: Json) -> T:
            if document.get("recording", self._identity) != self._identity:
                raise ValueError("it belongs to another recording")
            return parse(document)

        return read_header(self._existing(index), _HEADER, parse_own, redo=_REDO_SHARD)

    def _read_tensor(self, file: TensorFile, name: str, path: Path) -> Tensor:
        """Read a tensor; the first time, compare it with the hash that names it."""
        tensor: Tensor = file.get_tensor(name)
        if name not in self._intact:
            if content_hash(tensor) != name:
                raise damaged(path, f"tensor {name} is altered", redo=_REDO_SHARD)
            self._intact.add(name)
        return tensor

    def shard(self, index: int) -> list[DenoiserCall]:
        """Load the calls of one shard.

        Raises:
            RunError: the shard is missing.
            CheckpointError: the shard is truncated or altered.
        """
        path = self._existing(index)
        tensors: dict[str, Tensor] = {}
        with open_tensors(path, redo=_REDO_SHARD) as file:
            for name in sorted(file.keys()):
                tensors[name] = self._read_tensor(file, name, path)

        def tensor_of(name: str) -> Tensor:
            """Return a tensor of this shard, or of the shard that stored it first."""
            if name not in tensors:
                home = self._tensor_index()[name]
                with open_tensors(home, redo=_REDO_SHARD) as other:
                    tensors[name] = self._read_tensor(other, name, home)
            return tensors[name]

        def parse(document: Json) -> list[DenoiserCall]:
            calls = [decode_items(call, tensor_of) for call in _calls_of(document)]
            return [read_fields(DenoiserCall, call) for call in calls]

        return self._read_header(index, parse)

    def calls(
        self, component: str | None = None, shards: Iterable[int] | None = None
    ) -> Iterator[DenoiserCall]:
        """Yield calls in order (of a component, of some shards), one shard in memory at a time."""
        for index in range(self.num_shards) if shards is None else shards:
            for call in self.shard(index):
                if component is None or call.component == component:
                    yield call

    def timesteps(self, index: int, component: str) -> list[float | None]:
        """Return the timestep of each call of a shard, None for calls of another component."""

        def parse(document: Json) -> list[float | None]:
            calls = _calls_of(document)
            timesteps = [
                call["timestep"] if call["component"] == component else None for call in calls
            ]
            return [read_value(float | None, timestep) for timestep in timesteps]

        return self._read_header(index, parse)

    def num_calls(self, component: str | None = None, shards: Iterable[int] | None = None) -> int:
        """Count the calls (of one component, of some shards) by reading headers only."""

        def count(document: Json) -> int:
            return sum(component in (None, call["component"]) for call in document["calls"])

        indices = range(self.num_shards) if shards is None else shards
        return sum(self._read_header(index, count) for index in indices)

    def factors(self, component: str) -> Factors:
        """Return a denoiser's (timestep, denoising factor) pairs; None: they are not known."""

        def parse(document: Json) -> Factors:
            by_component = document["factors"]
            if isinstance(by_component, dict):  # earlier versions had one list for all
                by_component = by_component.get(component)
            factors: Factors = read_value(Factors, by_component)
            return factors

        return self._read_header(0, parse)

    def clocks(self) -> dict[str, Clock] | None:
        """Return what reads the timestep of a call, by component; None: nothing says it yet."""
        index = next((i for i in range(self.num_shards) if self.shard_path(i).exists()), None)
        return None if index is None else self._read_header(index, _clocks_of)

    def clock(self, component: str) -> Clock:
        """Return what reads the timestep of a call of a component."""
        return (self.clocks() or {}).get(component, TRAINING_CLOCK)


def _clocks_of(document: Json) -> dict[str, Clock] | None:
    """Return the clocks of a shard; earlier versions wrote the argument ``timestep`` itself."""
    if "clocks" in document:
        clocks: dict[str, Clock] = read_value(dict[str, Clock], document["clocks"])
        return clocks
    clock = Clock.of_unit(_old_unit(document))
    return {call["component"]: clock for call in document["calls"]}


def _old_unit(document: Json) -> float:
    """Return the unit of the timesteps in a shard of an earlier version, which had to guess it."""
    largest = max((call["timestep"] for call in document["calls"]), default=0)
    return 1000.0 if read_value(float, largest) <= 1 else 1.0


def _calls_of(document: Json) -> list[dict[str, Any]]:
    """Return what a shard says of its calls."""
    calls: list[dict[str, Any]] = document["calls"]
    if "clocks" in document:
        return calls
    unit = _old_unit(document)
    added = {"time": "timestep", "is_listed": False}
    return [{**call, "timestep": call["timestep"] * unit, **added} for call in calls]


def refuse_other_recordings(
    recording: Recording, held_out: Recording, source: dict[str, Any], record: dict[str, Any]
) -> None:
    """Refuse recordings that a calibration was not made from, or of which a part is missing.

    This happens when a second calibration was interrupted, or when files of two runs were mixed.

    Arguments:
        source, record: of the calibration, as JSON values.

    Raises:
        RunError: the message names the directory.
    """
    for each in (recording, held_out):
        if missing := each.missing_shards():
            raise RunError(
                f"{each.directory} lacks {len(missing)} of {each.num_shards} shards; "
                "run the same `msfp calibrate` again, with --overwrite, to complete it"
            )
    made_from = {"source": source, "record": record}
    is_same_recording = all(recording.recipe.get(key) == made_from[key] for key in made_from)
    if not is_same_recording or _shared(held_out) != _shared(recording):
        other = held_out if is_same_recording else recording
        raise RunError(
            f"{other.directory} is not the recording that the calibration was made from; "
            "run the same `msfp calibrate` again, with --overwrite"
        )


def _shared(recording: Recording) -> list[Any]:
    """Return what the recordings to choose on and to measure on have in common."""
    recipe = recording.recipe
    record = recipe.get("record", {}).items()
    sampling = {key: value for key, value in record if key not in _APART}
    return [recipe.get("source"), recipe.get("fingerprint"), sampling]
