"""Quantize a denoiser that does not fit into memory, part by part, so that a kill loses one part.

The tensors of the model in full precision are read in the order of its files. What some hundred
MiB of them become is a part: a safetensors file with codes and scales, with the tensors that stay,
and with the schemes of its layers in the header. Parts that an earlier, killed process has finished
are not made again. At the end the parts are mapped into a model that has never had memory of its
own, and diffusers writes that.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from msfp_cli.checkpoint.weight_only import WeightEncoder, refuse_not_finite
from msfp_cli.errors import CheckpointError, MsfpError
from msfp_cli.files.atomic import clean, delete
from msfp_cli.files.documents import (
    Json,
    damaged,
    open_tensors,
    read_header,
    read_json,
    require_file,
    write_json,
    write_tensors,
)
from msfp_cli.files.weight_files import StoredTensor, component_files, stored_tensors
from msfp_cli.layers.replace import replace_layers_
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.progress import Progress

_SIZE = 1 << 28  # bytes in full precision of a part
_REDO = "run the same command again"
_SCHEMES = "schemes"


@dataclass(frozen=True)
class Parts:
    """A directory of parts.

    Arguments:
        directory: of one denoiser; it is deleted by whoever has made it.
    """

    directory: Path

    def begin(self, plan: Json) -> None:
        """Keep the parts that were made by this plan, and delete those of another or none."""
        plan = json.loads(json.dumps(plan))  # tuples become lists, as in a file
        path = self.directory / "plan.json"
        if not _is_plan(path, plan):
            delete(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        clean(self.directory)
        write_json(path, plan)

    def encode(
        self, tensors: list[StoredTensor], encoder: WeightEncoder, title: str, progress: Progress
    ) -> int:
        """Make the parts that are missing or damaged.

        Returns:
            How many parameters these hold.

        Raises:
            CheckpointError: the model's files are damaged, or a tensor is not finite.
        """
        done = 0
        total = sum(tensor.count for tensor in tensors)
        with progress.task(title, total) as advance:
            for number, group in enumerate(_groups(tensors)):
                path = self.directory / f"{number:05d}.safetensors"
                if not _is_whole(path):
                    _write_part(path, group, encoder)
                    done += sum(tensor.count for tensor in group)
                advance(sum(tensor.count for tensor in group))
        return done

    def fill_(self, model: nn.Module) -> dict[str, Any]:
        """Give a model on the meta device quantized layers and the tensors of the parts.

        Returns:
            The schemes of its layers, as JSON.

        Raises:
            CheckpointError: the model's files lacked a tensor, or had one too many.
        """
        schemes = dict[str, Any]()
        state = dict[str, Tensor]()
        for path in sorted(self.directory.glob("*.safetensors")):
            with open_tensors(path, redo=_REDO) as file:
                schemes |= json.loads(file.metadata()[_SCHEMES])
                state |= {name: file.get_tensor(name) for name in sorted(file.keys())}
        table = {name: LayerScheme.from_json(scheme) for name, scheme in schemes.items()}
        replace_layers_(model, table)
        _load_(model, state)
        return schemes


def _is_plan(path: Path, plan: Json) -> bool:
    """Whether a file is there and holds a plan."""
    try:
        return bool(read_json(path, dict, redo=_REDO) == plan)
    except MsfpError:
        return False


def _is_whole(path: Path) -> bool:
    """Whether a part is there, and its file can be read."""
    try:
        read_header(path, _SCHEMES, dict, redo=_REDO)
    except MsfpError:
        delete(path)
        return False
    return True


def refuse_damaged(directory: Path, variant: str | None, progress: Progress) -> None:
    """Look for numbers that are not finite in a component that stays as it is.

    Raises:
        ModelError: its weights are in no safetensors file.
        CheckpointError: a file is damaged, or a tensor is not finite; the message names it.
    """
    tensors = list(stored_tensors(component_files(directory, variant)))
    with progress.task(f"Checking {directory.name}", sum(each.count for each in tensors)) as step:
        for stored in tensors:
            refuse_not_finite(stored.name, _read(stored))
            step(stored.count)


def refuse_unreadable(directory: Path) -> None:
    """Look whether the files of a component that are no weights can be read, and are whole.

    They are copied, or read, after what takes long.

    Raises:
        RunError: a file may not be read, or is a link that leads nowhere.
        CheckpointError: a JSON file is damaged.
    """
    redo = "download the model again"
    for path in sorted(directory.iterdir()):
        if not path.is_file() and not path.is_symlink():
            continue
        require_file(path, redo=redo)
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise damaged(path, error, redo=redo) from None


def _read(stored: StoredTensor) -> Tensor:
    with open_tensors(stored.file, redo="download the model again") as file:
        tensor: Tensor = file.get_tensor(stored.key)
    return tensor


def _groups(tensors: list[StoredTensor]) -> Iterator[list[StoredTensor]]:
    """Cut a list into pieces of about one part each."""
    group = list[StoredTensor]()
    size = 0
    for tensor in tensors:
        group.append(tensor)
        size += tensor.size
        if size >= _SIZE:
            yield group
            group = []
            size = 0
    if group:
        yield group


def _write_part(path: Path, group: list[StoredTensor], encoder: WeightEncoder) -> None:
    tensors = dict[str, Tensor]()
    schemes = dict[str, Any]()
    for stored in group:
        tensor = _read(stored)
        if stored.name not in encoder.weights:
            refuse_not_finite(stored.name, tensor)
            tensors[stored.name] = tensor.clone()  # lets go of the file, which is mapped as a whole
            continue
        coded = encoder.encode(stored.name, tensor)
        layer = stored.name.removesuffix(".weight")
        tensors[f"{layer}.weight_codes"] = coded.codes[None].cpu()
        tensors[f"{layer}.weight_scale"] = coded.scale.cpu()
        schemes[layer] = encoder.scheme_of(layer, coded).to_json()
    write_tensors(path, tensors, {_SCHEMES: json.dumps(schemes)})


def _load_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model these tensors, which have to be all of its own."""
    expected = model.state_dict().keys()
    if missing := sorted(expected - state.keys()):
        raise CheckpointError(f"the model's files lack {missing[0]}; download it again")
    if further := sorted(state.keys() - expected):
        raise CheckpointError(
            f"the model's files hold {further[0]}, which {type(model).__name__} does not have; use "
            "the files of diffusers' own format"
        )
    model.load_state_dict(state, assign=True)
