"""A denoiser quantized with what fine-tuning has learned: the members of its hubs and the router.

In training every layer has a hub of `hub_size` members, and the router's choice is a table, uint8
``(1001, layers)``: ``table[t, slot]`` is the member that serves layer number `slot` at the timestep
t of 0..1000. An export holds only the members that serve, each once. For a layer with a hub of four
whose members 2 and 3 are equal, a column of the table changes so:

    the router's choice             3 3 3 1 1 2
    equal members are one member    2 2 2 1 1 2     `first_equal`
    members that serve              [1, 2]          `used_members`
    numbers in the exported hub     1 1 1 0 0 1     `renumber`

The column of a layer whose input is lifted at some timesteps says that, too: there, the number of
its members is added (`LayerScheme.variants`). A layer with only one variant does not switch, and
its column is left out of the export.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from msfp_cli.calibration.quantize import move_weights_
from msfp_cli.calibration.result import Calibration
from msfp_cli.finetuning.lora import moved_input, tuned_names, updated_steps, weight_sizes
from msfp_cli.finetuning.result import FinetuneState
from msfp_cli.finetuning.router import Router
from msfp_cli.layers.replace import find_layers, replace_layers_, store_layers_, store_variants_
from msfp_cli.layers.routing import table_index
from msfp_cli.layers.scheme import LayerScheme

# The parts of a member, by the name of the trained parameter: LAYER.PART.MEMBER.
_MEMBER_PARTS = ("lora_a", "lora_b", "input_shift")


def member_table(state: FinetuneState, layers: Sequence[str]) -> Tensor:
    """Return the member that the best router gives each layer at each timestep.

    Arguments:
        layers: the layers with a hub, in the order of the router's rows.

    Returns:
        uint8 ``(1001, layers)``.
    """
    router = Router(len(layers), state.recipe.hub_size, torch.Generator())
    best = state.tensors_of("best")
    # A hub of one has an untrained router, which is not saved: it keeps its initial weights.
    initial = router.state_dict()
    router.load_state_dict({name: best.get(f"router.{name}", initial[name]) for name in initial})
    return router.table(state.timesteps)


def member_by_timestep(state: FinetuneState, layers: Sequence[str]) -> dict[str, list[int]]:
    """Return for each layer the member that serves each trained timestep, from noisy to clean."""
    timesteps = sorted(state.timesteps, reverse=True)
    rows = [table_index(timestep) for timestep in timesteps]
    table = member_table(state, layers)[rows]
    return {name: table[:, slot].tolist() for slot, name in enumerate(layers)}


@torch.no_grad()
def quantize_tuned_(
    denoiser: nn.Module, calibration: Calibration, component: str, state: FinetuneState
) -> nn.Module:
    """Replace the layers by quantized ones with the members of their hubs, and attach the router.

    Raises:
        RunError: the fine-tuning began with another calibration.
    """
    state.refuse_different(calibration)
    move_weights_(denoiser, calibration, component)
    schemes = calibration.table(component)
    scales = calibration.scales[component]
    multipliers = calibration.multipliers.get(component, {})
    names = tuned_names(schemes)
    table = first_equal(state, names, member_table(state, names))
    members = {name: used_members(table[:, slot]) for slot, name in enumerate(names)}
    best = state.tensors_of("best")
    tuned = {name: _scheme_with_hub(schemes[name], best, name, members[name]) for name in names}
    untuned = {name: schemes[name] for name in schemes if name not in members}
    store_layers_(denoiser, untuned, scales, multipliers)
    _store_members_(denoiser, tuned, scales, multipliers, state, members)
    columns = {name: renumber(table[:, names.index(name)], members[name]) for name in names}
    lift = calibration.input_lifts.get(component)
    if lift is not None:
        rows = lift.rows().to(table.dtype)
        for name in names:
            if tuned[name].lifted_input is not None:
                columns[name] = columns[name] + rows * tuned[name].hub
    store_variants_(denoiser, {name: columns[name] for name in names if tuned[name].variants > 1})
    return denoiser


def first_equal(state: FinetuneState, layers: Sequence[str], table: Tensor) -> Tensor:
    """Return the table with each member replaced by the first one of its hub that equals it.

    Members are equal where no update has told them apart, as before the first one.
    """
    best = state.tensors_of("best")
    merged = torch.empty_like(table)
    for slot, name in enumerate(layers):
        firsts = torch.tensor(_first_equals(best, name, state.recipe.hub_size), dtype=table.dtype)
        merged[:, slot] = firsts[table[:, slot].long()]
    return merged


def _first_equals(best: Mapping[str, Tensor], name: str, hub_size: int) -> list[int]:
    """Return for each member of a layer's hub the first one that equals it."""
    parts = [f"{name}.{part}" for part in _MEMBER_PARTS if f"{name}.{part}.0" in best]

    def are_equal(one: int, other: int) -> bool:
        return all(torch.equal(best[f"{part}.{one}"], best[f"{part}.{other}"]) for part in parts)

    firsts = list[int]()
    for member in range(hub_size):
        firsts.append(next(first for first in range(member + 1) if are_equal(first, member)))
    return firsts


def used_members(column: Tensor) -> list[int]:
    """Return the members that serve some timestep, in ascending order.

    Arguments:
        column: a layer's column of the table.
    """
    return sorted(set(column.tolist()))


def renumber(column: Tensor, members: Sequence[int]) -> Tensor:
    """Return the column with each member replaced by its position in `members`."""
    return torch.searchsorted(torch.tensor(members, dtype=column.dtype), column.contiguous())


def _scheme_with_hub(
    scheme: LayerScheme, best: Mapping[str, Tensor], name: str, members: Sequence[int]
) -> LayerScheme:
    """Return a layer's scheme with a hub of the used members and the input grid of each."""
    shifts = [f"{name}.input_shift.{member}" for member in members]
    if scheme.input is None or shifts[0] not in best:  # the grid was not trained: one for all
        return replace(scheme, hub=len(members))
    grids = [moved_input(scheme.input, *best[shift].tolist()) for shift in shifts]
    return replace(scheme, hub=len(members), input=grids[0], further_inputs=tuple(grids[1:]))


def _store_members_(
    denoiser: nn.Module,
    schemes: Mapping[str, LayerScheme],
    scales: Mapping[str, Tensor],
    multipliers: Mapping[str, Tensor],
    state: FinetuneState,
    members: Mapping[str, Sequence[int]],
) -> None:
    """Replace the layers with a hub, and store the weights of their used members.

    A layer's float weight is let go of before the next layer's members are computed.
    """
    best = state.tensors_of("best")
    layers = find_layers(denoiser)
    for name, quantized in replace_layers_(denoiser, schemes, clock=state.clock).items():
        weight = layers.pop(name).weight.detach()
        scale = scales[name]
        factors = multipliers.get(name)
        sizes = weight_sizes(weight, scale, factors)
        for position, member in enumerate(members[name]):
            a = best[f"{name}.lora_a.{member}"].to(weight.device)
            b = best[f"{name}.lora_b.{member}"].to(weight.device)
            steps = updated_steps(weight, sizes, a, b)
            quantized.store_steps_(steps, scale, position, factors)
