from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import Chained
from mistyped import mistyped, read_unsigned, write_signed
from msfp_cli.calibration.result import Calibration
from msfp_cli.errors import CheckpointError
from msfp_cli.files.documents import digest

Change = Callable[[dict[str, Tensor], str], object]


def make_empty(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:0]


def make_shorter(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].clone()


def make_negative(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = -tensors[name]


def make_bytes(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int64)


CHANGES: dict[str, tuple[str, Change]] = {
    "no scale": ("scales", lambda tensors, name: tensors.pop(name)),
    "an empty scale": ("scales", make_empty),
    "a scale too few": ("scales", make_shorter),
    "a negative scale": ("scales", make_negative),
    "empty codes": ("codes", make_empty),
    "a code too few": ("codes", make_shorter),
    "codes of another type": ("codes", make_bytes),
}


def change_signed(directory: Path, kind: str, change: Change) -> None:
    """Change the first tensor of a file, with digests that fit."""
    path = directory / f"{kind}.safetensors"
    tensors = load_file(path)
    change(tensors, min(tensors))
    save_file(tensors, path)
    document = read_unsigned(directory / "calibration.json")
    write_signed(
        directory / "calibration.json", {**document, f"{kind}_digest": digest(load_file(path))}
    )


@pytest.mark.parametrize("change", CHANGES)
def test_signed_tensors_that_do_not_fit_the_layers_are_refused(
    tiny_chained: Chained, copied: Callable[..., Path], change: str
) -> None:
    directory = copied(tiny_chained.run.directory) / "calibration"
    Calibration.load(directory)
    change_signed(directory, *CHANGES[change])
    with pytest.raises(
        CheckpointError, match=r"calibration.json is damaged \(.*\); run the same `msfp"
    ):
        Calibration.load(directory)


@pytest.mark.parametrize("kind", ["codes", "multipliers"])
def test_tensors_of_another_calibration_are_refused(
    tiny_chained: Chained, copied: Callable[..., Path], kind: str
) -> None:
    directory = copied(tiny_chained.run.directory) / "calibration"
    document = read_unsigned(directory / "calibration.json")
    write_signed(directory / "calibration.json", {**document, f"{kind}_digest": None})
    if not (directory / f"{kind}.safetensors").exists():
        save_file({"unet/conv_out": torch.zeros(1)}, directory / f"{kind}.safetensors")
    with pytest.raises(CheckpointError, match=rf"{kind}.safetensors is altered.* with --overwrite"):
        Calibration.load(directory)


def test_signed_values_of_another_type_are_refused(
    tiny_chained: Chained, copied: Callable[..., Path]
) -> None:
    directory = copied(tiny_chained.run.directory) / "calibration"
    document = directory / "calibration.json"
    places = list(mistyped(read_unsigned(document)))
    assert len(places) > 50
    for place, changed in places:
        write_signed(document, changed)
        with pytest.raises(CheckpointError, match="is (damaged|altered)"):
            pytest.fail(f"{place} was read as {Calibration.load(directory)}")
