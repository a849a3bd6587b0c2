"""The saved state comes back whole or is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import Finetuned, Invoke, only_line
from mistyped import mistyped
from msfp_cli.calibration.result import Calibration
from msfp_cli.errors import CheckpointError
from msfp_cli.files.documents import digest, to_text
from msfp_cli.finetuning.result import FinetuneState, load_finetunings
from msfp_cli.run import Run

Change: TypeAlias = Callable[[dict[str, Tensor], dict[str, Any]], object]


@pytest.fixture
def file(tiny_tuned: Finetuned, copied: Callable[..., Path]) -> Path:
    """Copy a fine-tuned run into the working directory and return its state file."""
    return Run(copied(tiny_tuned.run.directory, "msfp-run")).finetuned("unet")


def test_state_comes_back_as_it_was_saved(tiny_tuned: Finetuned, tmp_path: Path) -> None:
    tiny_tuned.tuned.save(tmp_path / "deep" / "state.safetensors")
    again = FinetuneState.load(tmp_path / "deep" / "state.safetensors")
    assert replace(again, tensors={}) == replace(tiny_tuned.tuned, tensors={})
    assert all(
        torch.equal(again.tensors[name], tensor)
        for name, tensor in tiny_tuned.tuned.tensors.items()
    )
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize(
    "opener", ["msfp_cli.files.documents.safe_open", "torch.UntypedStorage.from_file"]
)
@pytest.mark.parametrize("is_before", [False, True])
def test_state_that_is_replaced_while_it_is_read_comes_back_whole(
    opener: str,
    is_before: bool,
    tiny_tuned: Finetuned,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """safetensors opens the file twice, the second time for torch."""
    path = tmp_path / "state.safetensors"
    first = tiny_tuned.tuned
    later = replace(first, step=1, tensors={n: t + 1 for n, t in first.tensors.items()})
    first.save(path)
    opened = safe_open if opener.endswith("safe_open") else torch.UntypedStorage.from_file
    replacements = []

    def open_and_replace(*arguments: object, **options: object) -> object:
        if is_before:
            later.save(path)
        file = opened(*arguments, **options)
        later.save(path)
        replacements.append(file)
        return file

    monkeypatch.setattr(opener, open_and_replace)
    state = FinetuneState.load(path)
    assert replacements
    assert state.step == first.step
    assert all(torch.equal(state.tensors[name], first.tensors[name]) for name in first.tensors)


def test_failed_save_leaves_the_state_before(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, tuned = file.read_bytes(), FinetuneState.load(file)

    def half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("pulled the plug")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        tuned.save(file)
    assert [path.read_bytes() for path in file.parent.iterdir()] == [before]


def test_best_is_the_lowest_error_and_the_first_of_equals(tiny_tuned: Finetuned) -> None:
    first = tiny_tuned.tuned.history[0]
    errors = (0.5, 0.25, 0.75, 0.25)
    history = tuple(replace(first, step=step, error=error) for step, error in enumerate(errors))
    assert replace(tiny_tuned.tuned, history=history).best.step == 1


def truncate(path: Path) -> None:
    """Cut the last byte off."""
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    """Leave a file of no bytes, as a full disk does."""
    path.write_bytes(b"")


def flip_bit(path: Path) -> None:
    """Change the last bit of the data."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _rewrite(path: Path, change: Callable[[dict, dict], object]) -> None:
    """Change the tensors or the document, and write the file again."""
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["msfp_finetune"])
    tensors = load_file(path)
    del document["sha256"]  # as earlier versions, which had none
    change(tensors, document)
    save_file(tensors, path, {"msfp_finetune": json.dumps(document)})


def lose_tensor(path: Path) -> None:
    """Leave one tensor out."""
    _rewrite(path, lambda tensors, document: tensors.popitem())


def lose_history(path: Path) -> None:
    """Leave a key out."""
    _rewrite(path, lambda tensors, document: document.pop("history"))


def lose_document(path: Path) -> None:
    """Leave a file that another program could have written."""
    save_file(load_file(path), path)


def odd_history(path: Path) -> None:
    """Add a key that an evaluation does not have."""
    _rewrite(path, lambda tensors, document: document["history"][0].update(mood="good"))


def odd_recipe(path: Path) -> None:
    """Name a loss that there is not."""
    _rewrite(path, lambda tensors, document: document["recipe"].update(loss="mse"))


def unknown_setting(path: Path) -> None:
    """Add a setting that this version does not have."""
    _rewrite(path, lambda tensors, document: document["recipe"].update(momentum=0.9))


def newer(path: Path) -> None:
    """Pretend that a later version wrote it."""
    _rewrite(path, lambda tensors, document: document.update(schema=99))


def no_history(path: Path) -> None:
    """Leave no measurement in the history."""
    _rewrite(path, lambda tensors, document: document.update(history=[]))


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: "damaged",
    empty: "damaged",
    flip_bit: "altered",
    lose_tensor: "altered",
    lose_history: "damaged",
    lose_document: "damaged",
    odd_history: "damaged",
    no_history: "damaged .its history is empty",
    odd_recipe: (
        "damaged .unknown --loss 'mse'; choose one of dfa, plain.; run `msfp finetune --restart`"
    ),
    unknown_setting: r"damaged .*'momentum'.*; run `msfp finetune --restart`",
    newer: "written by a newer msfp; upgrade msfp, or run `msfp finetune --restart`",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_broken_state_is_refused_in_one_line(damage: Callable[[Path], None], file: Path) -> None:
    damage(file)
    with pytest.raises(CheckpointError, match=DAMAGES[damage]) as caught:
        FinetuneState.load(file)
    assert len(str(caught.value).splitlines()) == 1
    assert file.name in str(caught.value)


@pytest.mark.parametrize("damage", [truncate, flip_bit], ids=lambda damage: damage.__name__)
def test_every_command_says_how_to_get_past_a_broken_state(
    damage: Callable[[Path], None], file: Path, msfp: Invoke
) -> None:
    damage(file)
    for command in (("finetune",), ("export", "--overwrite"), ("status",)):
        assert "run `msfp finetune --restart`" in only_line(msfp(*command), 1)
    assert msfp("export", "--calibrated", "--out", "plain").stdout == "plain\n"
    assert (
        msfp("finetune", "--restart", "--steps", 1, "--rank", 1, "--device", "cpu").exit_code == 0
    )
    assert FinetuneState.load(file).finished


def _resign(path: Path, change: Callable[[dict, dict], object]) -> None:
    """Change the tensors or the document as a faulty writer would: all digests fit."""
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["msfp_finetune"])
    tensors = load_file(path)
    del document["sha256"]
    change(tensors, document)
    document["digest"] = digest(tensors)
    save_file(tensors, path, {"msfp_finetune": to_text(document)})


def _tensor(kind: str, part: str, change: Callable[[Tensor], Tensor | None]) -> Change:
    """Return a change of the first tensor of a kind whose name has a part."""

    def apply(tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        name = next(name for name in sorted(tensors) if name.startswith(kind) and part in name)
        changed = change(tensors.pop(name).clone())
        if changed is not None:
            tensors[name] = changed

    return apply


def _recipe(**values: object) -> Change:
    return lambda tensors, document: document["recipe"].update(values)


def _field(name: str, value: object) -> Change:
    return lambda tensors, document: document.update({name: value})


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.fill_(value)


# Signed states that no training leaves: the change, and what the message has to name.
ODD: dict[str, tuple[Change, str]] = {
    "a member with a NaN": (_tensor("now/", "lora_b", _filled(float("nan"))), "is not finite"),
    "a best member with an infinity": (
        _tensor("best/", "lora_a", _filled(float("inf"))),
        "is not finite",
    ),
    "a router with a NaN": (_tensor("best/", "router", _filled(float("nan"))), "is not finite"),
    "a moment with a NaN": (_tensor("exp_avg/", "", _filled(float("nan"))), "is not finite"),
    "no member": (_tensor("best/", "lora_a", lambda tensor: None), "is missing"),
    "no router": (_tensor("now/", "router", lambda tensor: None), "is missing"),
    "no moment": (_tensor("exp_avg_sq/", "", lambda tensor: None), "is missing"),
    "no count": (_tensor("step/", "", lambda tensor: None), "is unknown"),
    "a shorter member": (_tensor("now/", "lora_b", lambda t: t[:-1].clone()), "of another shape"),
    "a flat router": (
        _tensor("best/", "router", lambda t: t.reshape(-1)[:1].clone()),
        "of another",
    ),
    "a member of whole numbers": (_tensor("best/", "lora_a", Tensor.long), "of another"),
    "one tensor more": (
        lambda tensors, document: tensors.update({"now/extra": torch.zeros(1)}),
        "is unknown",
    ),
    "another rank": (_recipe(rank=1), "of another shape"),
    "a larger hub": (_recipe(hub_size=5), "is missing"),
    "a smaller hub": (_recipe(hub_size=1), "is unknown"),
    "no moved inputs": (_recipe(input_learning_rate=0), "is unknown"),
    "no updates": (_recipe(steps=0), "--steps must be at least 1"),
    "more updates than its recipe": (_field("step", 10**9), "its step cannot be"),
    "a negative count": (_field("step", -1), "its step cannot be"),
    "another clock": (
        lambda tensors, document: document["clock"].update(scale=float("nan")),
        "is not finite",
    ),
    "no timesteps": (_field("timesteps", []), "its timesteps cannot be"),
    "a timestep of NaN": (_field("timesteps", [float("nan")]), "its timesteps cannot be"),
    "no shares": (_field("shares", []), "its shares cannot be"),
    "shares of nothing": (
        lambda tensors, document: document.update(shares=[[t, 0.0] for t in document["timesteps"]]),
        "its shares cannot be",
    ),
    "an error of NaN": (
        lambda tensors, document: document["history"][0].update(error=float("nan")),
        "its history cannot be",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_signed_state_that_no_training_leaves_is_one_line_for_every_command(
    kind: str, file: Path, msfp: Invoke
) -> None:
    change, message = ODD[kind]
    _resign(file, change)
    for command in ("finetune", "export --overwrite", "inspect", "status"):
        line = only_line(msfp(*command.split()), 1)
        assert message in line, command
        assert line.endswith("run `msfp finetune --restart`")


def test_a_state_of_other_timesteps_is_begun_again(file: Path, msfp: Invoke) -> None:
    def move(tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        document["timesteps"] = [timestep + 1 for timestep in document["timesteps"]]
        document["shares"] = [[timestep + 1, share] for timestep, share in document["shares"]]
        document["recipe"]["steps"] += 1

    _resign(file, move)
    line = only_line(msfp("finetune", "--device", "cpu"), 1)
    assert "was trained on other timesteps than the recording has" in line
    assert line.endswith("run `msfp finetune --restart`")


def test_fine_tuning_of_an_equal_calibration_is_loaded(
    file: Path, tiny_tuned: Finetuned, tmp_path: Path
) -> None:
    run = Run(file.parents[1])
    calibration = Calibration.load(run.calibration)
    identities = {calibration.identity(), tiny_tuned.tuned.calibration}
    assert identities == {tiny_tuned.calibration.identity()}
    assert load_finetunings(run, calibration)["unet"].recipe == tiny_tuned.tuned.recipe
    assert load_finetunings(Run(tmp_path / "empty"), calibration) == {}


def test_signed_values_of_another_type_are_refused(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        document = json.loads(opened.metadata()["msfp_finetune"])
    del document["sha256"]
    tensors = load_file(file)
    places = list(mistyped(document))
    assert len(places) > 25
    for place, changed in places:
        save_file(tensors, file, {"msfp_finetune": to_text(changed)})
        with pytest.raises(CheckpointError, match="is (damaged|altered)"):
            pytest.fail(f"{place} was read as {FinetuneState.load(file)}")
