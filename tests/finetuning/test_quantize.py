"""What becomes of a saved state in a quantized denoiser."""

from dataclasses import replace

import pytest
import torch

from conftest import Finetuned
from msfp_cli.calibration.quantize import move_weights_
from msfp_cli.errors import RunError
from msfp_cli.finetuning.lora import moved_input, tuned_names, weight_sizes
from msfp_cli.finetuning.quantize import (
    first_equal,
    member_by_timestep,
    member_table,
    quantize_tuned_,
    renumber,
    used_members,
)
from msfp_cli.finetuning.result import FinetuneState
from msfp_cli.finetuning.router import Router
from msfp_cli.formats.rounding import Grid, quantize
from msfp_cli.layers.replace import find_layers, quantized_layers
from msfp_cli.layers.routing import ROUTER, TABLE_SIZE
from msfp_cli.pipelines.loading import load_pipeline


def test_column_of_the_module_docstring_is_renumbered_as_it_says(tiny_tuned: Finetuned) -> None:
    tensors = {f"best/layer.lora_a.{k}": torch.tensor(float(min(k, 2))) for k in range(4)}
    recipe = replace(tiny_tuned.tuned.recipe, hub_size=4)
    state = replace(tiny_tuned.tuned, recipe=recipe, tensors=tensors)
    table = torch.tensor([[3, 3, 3, 1, 1, 2]], dtype=torch.uint8).t()
    merged = first_equal(state, ["layer"], table)
    assert merged.flatten().tolist() == [2, 2, 2, 1, 1, 2]
    assert used_members(merged[:, 0]) == [1, 2]
    assert renumber(merged[:, 0], [1, 2]).tolist() == [1, 1, 1, 0, 0, 1]


def test_members_by_timestep_are_those_of_the_table_from_noisy_to_clean(
    tiny_tuned: Finetuned,
) -> None:
    names = tuned_names(tiny_tuned.calibration.table("unet"))
    table = member_table(tiny_tuned.tuned, names)
    timesteps = sorted(tiny_tuned.tuned.timesteps, reverse=True)
    members = member_by_timestep(tiny_tuned.tuned, names)
    assert list(members) == names
    for slot, name in enumerate(names):
        assert members[name] == [int(table[round(timestep), slot]) for timestep in timesteps]


def router_of(tuned: FinetuneState, layers: int) -> Router:
    """Return the trained router as it was when the error was lowest."""
    router = Router(layers, tuned.recipe.hub_size, torch.Generator())
    router.load_state_dict(
        {
            n.removeprefix("router."): t
            for n, t in tuned.tensors_of("best").items()
            if "router." in n
        }
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
    unet = load_pipeline(calibration.source, "cpu").unet
    move_weights_(unet, calibration, "unet")
    floats = find_layers(unet)
    denoiser = quantize_tuned_(
        load_pipeline(calibration.source, "cpu").unet, calibration, "unet", tuned
    )
    names, best = tuned_names(calibration.table("unet")), tuned.tensors_of("best")
    router, table = router_of(tuned, len(names)), denoiser.get_submodule(ROUTER)
    hubs = {name: layer.scheme.hub for name, layer in quantized_layers(denoiser).items()}
    assert {1, 3} <= set(hubs.values())
    for timestep in tuned.timesteps:
        members = dict(zip((n for n in sorted(names) if hubs[n] > 1), table(timestep), strict=True))
        for name, (choice,) in zip(names, router([timestep]), strict=True):
            layer, weight = quantized_layers(denoiser)[name], floats[name].weight
            a, b = (best[f"{name}.{part}.{choice.member}"] for part in ("lora_a", "lora_b"))
            sizes = weight_sizes(weight, *calibration.steps_of("unet", name))
            steps = (weight.flatten(1) / sizes).double() + b.double() @ a.double()
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
