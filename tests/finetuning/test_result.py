"""The saved state comes back whole or is refused, and becomes a quantized denoiser."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import FEW_UPDATES, Finetuned, Invoke, only_line
from msfp_cli.calibration.result import Calibration
from msfp_cli.errors import CheckpointError, RunError
from msfp_cli.finetuning.lora import moved_input, tuned_names
from msfp_cli.finetuning.result import (
    FinetuneState,
    load_finetunings,
    member_table,
    quantize_tuned_,
)
from msfp_cli.finetuning.router import Router
from msfp_cli.formats.rounding import Grid, quantize
from msfp_cli.layers.replace import find_layers, quantized_layers
from msfp_cli.layers.routing import ROUTER, TABLE_SIZE
from msfp_cli.pipelines.loading import load_pipeline
from msfp_cli.run import Run


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


def test_failed_save_leaves_the_state_before(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, tuned = file.read_bytes(), FinetuneState.load(file)

    def half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("pulled the plug")

    monkeypatch.setattr("msfp_cli.finetuning.result.save_file", half)
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


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: "damaged",
    empty: "damaged",
    flip_bit: "altered",
    lose_tensor: "altered",
    lose_history: "damaged",
    lose_document: "damaged",
    odd_history: "damaged",
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


def router_of(tuned: FinetuneState, layers: int) -> Router:
    """Return the trained router as it was when the error was lowest."""
    router = Router(layers, tuned.recipe.hub_size, tuned.unit, torch.Generator())
    router.load_state_dict(
        {n.removeprefix("router."): t for n, t in tuned.state("best").items() if "router." in n}
    )
    return router


def test_table_says_what_the_router_does_at_every_trained_timestep(tiny_tuned: Finetuned) -> None:
    names = tuned_names(tiny_tuned.calibration.table("unet"))
    router, table = router_of(tiny_tuned.tuned, len(names)), member_table(tiny_tuned.tuned, names)
    assert table.shape == (TABLE_SIZE, len(names))
    for timestep in tiny_tuned.tuned.timesteps:
        assert table[round(timestep)].tolist() == [
            choice.member for (choice,) in router([timestep])
        ]


@torch.no_grad()
def test_layers_hold_the_members_that_serve_and_switch_as_the_router_does(
    tiny_tuned: Finetuned,
) -> None:
    calibration, tuned = tiny_tuned.calibration, tiny_tuned.tuned
    floats = find_layers(load_pipeline(calibration.source, "cpu").unet)
    denoiser = quantize_tuned_(
        load_pipeline(calibration.source, "cpu").unet, calibration, "unet", tuned
    )
    names, best = tuned_names(calibration.table("unet")), tuned.state("best")
    router, table = router_of(tuned, len(names)), denoiser.get_submodule(ROUTER)
    hubs = {name: layer.scheme.hub for name, layer in quantized_layers(denoiser).items()}
    assert {1, 3} <= set(hubs.values())
    for timestep in tuned.timesteps:
        members = dict(
            zip((n for n in sorted(names) if hubs[n] > 1), table.choices(timestep), strict=True)
        )
        for name, (choice,) in zip(names, router([timestep]), strict=True):
            layer, weight = quantized_layers(denoiser)[name], floats[name].weight
            a, b = (best[f"{name}.{part}.{choice.member}"] for part in ("lora_a", "lora_b"))
            scale = calibration.scales["unet"][name][:, None]
            steps = (weight.flatten(1) / scale).double() + b.double() @ a.double()
            member = members.get(name, 0)
            codes = quantize(steps.float(), Grid(layer.scheme.weight, 1.0)).view(weight.shape)
            assert (layer.codes(member) == codes).float().mean() > 0.999, name  # but for ties
            grid, moved = (
                layer.scheme.input_of(member),
                best[f"{name}.input_shift.{choice.member}"],
            )
            assert grid == moved_input(calibration.table("unet")[name].input, *moved.tolist())


def test_no_set_of_weights_is_kept_that_serves_no_timestep(tiny_tuned: Finetuned) -> None:
    denoiser = quantize_tuned_(
        load_pipeline(tiny_tuned.calibration.source, "cpu").unet,
        tiny_tuned.calibration,
        "unet",
        tiny_tuned.tuned,
    )
    layers = [
        layer for _, layer in sorted(quantized_layers(denoiser).items()) if layer.scheme.hub > 1
    ]
    table = denoiser.get_submodule(ROUTER).get_buffer("table")
    for layer in layers:
        assert table[:, layer.slot].unique().tolist() == list(range(layer.scheme.hub))
        assert layer.get_buffer("weight_codes").shape[0] == layer.scheme.hub


def test_state_of_another_calibration_is_not_quantized(tiny_tuned: Finetuned) -> None:
    other = replace(tiny_tuned.tuned, calibration="0" * 64)
    with pytest.raises(
        RunError, match="began with another calibration; run `msfp finetune --restart`"
    ):
        quantize_tuned_(torch.nn.Module(), tiny_tuned.calibration, "unet", other)


def test_fine_tuning_of_an_equal_calibration_is_loaded(
    file: Path, tiny_tuned: Finetuned, tmp_path: Path
) -> None:
    run = Run(file.parents[1])
    calibration = Calibration.load(run.calibration)
    identities = {calibration.identity(), tiny_tuned.tuned.calibration}
    assert identities == {tiny_tuned.calibration.identity()}
    assert load_finetunings(run, calibration)["unet"].recipe == FEW_UPDATES
    assert load_finetunings(Run(tmp_path / "empty"), calibration) == {}
