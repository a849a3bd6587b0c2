"""Timestep-aware LoRA (TALoRA): a hub of low-rank updates per layer, and one router that picks one by timestep.

Early timesteps draw outlines and late ones details, so one low-rank update cannot serve them all (Zhao et al. 2025,
arXiv:2505.21591). Each quantized layer has a hub of h updates *inside* its quantizer, and one router for the whole
denoiser, ``timestep embedding -> MLP -> h logits per layer``, picks exactly one per layer and timestep:

    W_q(t) = Q( W + s * B_k A_k ),   k = argmax logits(t),   s = the weight's own step size per output channel

and so are the scale and the zero point of the layer's input: activations change over the timesteps, too (ours).

The choice is hard in the forward pass and soft in the backward pass (straight-through). ``s`` (ours; EfficientDM scales
the learning rate instead) makes B count in steps of the grid, so that one learning rate fits all layers. For a
convolution A is its k x k part and B the 1 x 1 that follows: as matrices, ``(rank, in * k * k)`` and ``(out, rank)``.

Because the update lies inside the quantizer, an export holds h sets of 4-bit weights and no floating-point side branch,
and because the router sees nothing but the timestep, it is exported as a table. The router rounds a timestep to the
table's grid before it looks, so that table and router agree on every timestep, whole or continuous, by construction.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from msfp_cli.formats import FloatFormat
from msfp_cli.parameters import LayerParameters
from msfp_cli.recipe import FinetuneRecipe
from msfp_cli.rounding import Grid, fake_quantize, fake_quantize_learned, round_steps
from msfp_cli.routing import TABLE_SIZE, Route, table_index

_EMBEDDING = 64
_MARGIN = 1.0  # of the first choice's logit over the others


class Choice(NamedTuple):
    """What the router chose for one layer.

    Arguments:
        member: of the layer's hub.
        weights: one per member, ``(hub,)``, that takes gradients.
        input: where training has moved the member's input grid; None if nobody has looked yet.
    """

    member: int
    weights: Tensor
    input: Grid | None = None


class Router(nn.Module):
    """Choose a hub member for every layer from the timestep alone.

    Arguments:
        num_layers, hub_size: shape of the choice.
        unit: what brings timesteps to 0..1000, see `routing.timestep_unit`.
        generator: draws the initial weights.
    """

    def __init__(self, num_layers: int, hub_size: int, unit: float, generator: torch.Generator) -> None:
        super().__init__()
        self.num_layers, self.hub_size, self.unit = num_layers, hub_size, unit
        self.hidden = nn.Linear(_EMBEDDING, _EMBEDDING)
        self.logits = nn.Linear(_EMBEDDING, num_layers * hub_size)
        for layer in (self.hidden, self.logits):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(_EMBEDDING), generator=generator)
            nn.init.zeros_(layer.bias)

    def _scores(self, index: Tensor) -> Tensor:
        """Return logits ``(timesteps, layers, hub)`` for table indices ``(timesteps,)``."""
        embedding = get_timestep_embedding(index.float(), _EMBEDDING)
        hidden = nn.functional.silu(self.hidden(embedding.to(self.hidden.weight)))
        scores: Tensor = self.logits(hidden).view(-1, self.num_layers, self.hub_size)
        return scores

    def forward(self, timestep: float) -> list[Choice]:
        """Choose for every layer; the members' weights are one-hot in value and softmax in gradient."""
        index = torch.tensor([table_index(timestep, self.unit)], device=self.hidden.weight.device)
        soft = self._scores(index)[0].softmax(dim=-1)
        members = soft.argmax(dim=-1)
        weights = nn.functional.one_hot(members, self.hub_size).to(soft) + (soft - soft.detach())
        return [Choice(member, row) for member, row in zip(members.tolist(), weights.unbind(), strict=True)]

    @torch.no_grad()
    def begin_(self, members: Mapping[float, int]) -> None:
        """Let every layer begin with the given member at each timestep, by a margin that training can overturn.

        The last linear map is set to the least-squares solution on the hidden features of these timesteps.
        """
        index = torch.tensor([table_index(timestep, self.unit) for timestep in members])
        device = self.hidden.weight.device
        embedding = get_timestep_embedding(index.float(), _EMBEDDING).to(device)
        features = nn.functional.silu(self.hidden(embedding)).double().cpu()
        wanted = nn.functional.one_hot(torch.tensor(list(members.values())), self.hub_size).double() * _MARGIN
        solution = torch.linalg.lstsq(features, wanted, driver="gelsd").solution.t().float()
        self.logits.weight.copy_(solution.repeat(self.num_layers, 1))

    @torch.no_grad()
    def table(self, timesteps: Sequence[float]) -> Tensor:
        """Return the chosen member for every row of the exported table, uint8 ``(1001, layers)``.

        Arguments:
            timesteps: those that the hub was trained at. A row between them gets the choice of the nearest: what the
                router would say there, no member was trained for.
        """
        known = sorted({table_index(timestep, self.unit) for timestep in timesteps})
        choices = {row: [choice.member for choice in self(row / self.unit)] for row in known}
        rows = [choices[min(known, key=lambda k: (abs(k - row), k))] for row in range(TABLE_SIZE)]
        return torch.tensor(rows, dtype=torch.uint8)


class _RoundedWeight(torch.autograd.Function):
    """``s * round(W / s + B_k A_k)`` for the chosen k, as a matrix ``(out, in * k * k)``.

    The gradient is straight through the rounding and zero where it clipped; it reaches the chosen A and B, and the
    weights of all members.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch does not name this type)
        weight: Tensor,
        scale: Tensor,
        fmt: FloatFormat,
        member: int,
        members: Tensor,
        *loras: Tensor,
    ) -> Tensor:
        hub = len(loras) // 2
        steps = updated_steps(weight, scale, loras[member], loras[hub + member])
        ctx.member = member
        ctx.save_for_backward(steps.abs() <= fmt.largest, scale, *loras)
        return round_steps(steps, fmt).mul_(scale[:, None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        inside, scale, *loras = ctx.saved_tensors
        hub, chosen = len(loras) // 2, ctx.member
        a, b = loras[:hub], loras[hub:]
        grad = (grad * scale[:, None]).mul_(inside)
        # What B_k gets, and what the members' weights get, need the same product with A.
        asked = range(hub) if ctx.needs_input_grad[4] else (chosen,)
        projected = {k: grad @ a[k].t() for k in asked}
        members = torch.stack([(b[k] * projected[k]).sum() for k in asked]) if ctx.needs_input_grad[4] else None
        to_loras: list[Tensor | None] = [None] * len(loras)
        to_loras[chosen], to_loras[hub + chosen] = b[chosen].t() @ grad, projected[chosen]
        return None, None, None, None, members, *to_loras


def updated_steps(weight: Tensor, scale: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ``W / s + B A``, the updated weight in steps of its grid, float32 ``(out, in * k * k)``.

    Arguments:
        weight: ``(out, ...)``.
        scale: float32, ``(out,)``.
        a: ``(rank, in * k * k)``.
        b: ``(out, rank)``.
    """
    with torch.autocast(weight.device.type, enabled=False):  # half a step is all the difference here
        return torch.addmm(weight.detach().float().flatten(1) / scale[:, None], b, a)


def moved_input(grid: Grid, growth: float, steps: float) -> Grid:
    """Return the grid of a layer's input after training, its numbers exact in float32.

    Arguments:
        grid: as calibrated.
        growth: the logarithm of the scale's growth.
        steps: the zero point's move in calibrated steps; signed formats have none.
    """
    zero_point = grid.zero_point + grid.scale * steps * (not grid.format.signed)
    return Grid(grid.format, float(np.float32(grid.scale * math.exp(growth))), float(np.float32(zero_point)))


class TunedLayer(nn.Module):
    """A float layer that computes as its quantized form will, with a LoRA hub inside the quantizer.

    Arguments:
        layer: the float layer; its weight and bias are frozen.
        parameters: the calibrated formats; the weight's is needed, the input's may be None.
        scale: the weight's step size per output channel, ``(out,)``.
        route: where the choice of member is found.
        slot: the layer's row in the choice.
        recipe: hub size, rank, initialisation, and whether the input's grid is trained.
        generator: draws A.

    Each member of the hub has ``lora_a``, ``(rank, in * k * k)``, ``lora_b``, ``(out, rank)``, and where the input's
    grid is trained ``input_shift``, ``(2,)``, the two numbers of `moved_input`. All begin alike, B at zero, so that
    training begins at the calibrated model (unless the recipe asks for another beginning).
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        parameters: LayerParameters,
        scale: Tensor,
        route: Route[Choice],
        slot: int,
        recipe: FinetuneRecipe,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.layer, self.route, self.slot = layer.requires_grad_(False), route, slot
        assert parameters.weight is not None
        self.input, self.weight_format = parameters.input, parameters.weight
        self.register_buffer("scale", scale.to(layer.weight.device).float(), persistent=False)
        a, b = self._beginning(recipe, generator)
        self.lora_a = nn.ParameterList(a.clone() for _ in range(recipe.hub_size))
        self.lora_b = nn.ParameterList(b.clone() for _ in range(recipe.hub_size))
        trained = self.input is not None and recipe.input_learning_rate > 0
        shifts = [torch.zeros(2, device=layer.weight.device) for _ in range(recipe.hub_size)]
        self.input_shift = nn.ParameterList(shifts) if trained else None

    @torch.no_grad()
    def _beginning(self, recipe: FinetuneRecipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the first A and B of every member."""
        weight = self.layer.weight
        out, inner = weight.shape[0], weight[0].numel()
        rank = min(recipe.rank, out, inner)
        if recipe.init == "svd":
            steps = weight.float().flatten(1) / self.get_buffer("scale")[:, None]
            u, s, v = torch.linalg.svd(steps - round_steps(steps, self.weight_format), full_matrices=False)
            return (s[:rank, None].sqrt() * v[:rank]).contiguous(), (u[:, :rank] * s[:rank].sqrt()).contiguous()
        bound = math.sqrt(3 / inner)
        a = torch.empty(rank, inner).uniform_(-bound, bound, generator=generator)
        return a.to(weight.device), torch.zeros(out, rank, device=weight.device)

    def rounded_weight(self) -> Tensor:
        """Return the weight of the member that the route chose, rounded; float32, shape of the weight."""
        choice, weight = self.route.of(self.slot), self.layer.weight
        rounded: Tensor = _RoundedWeight.apply(  # type: ignore[no-untyped-call]
            weight,
            self.get_buffer("scale"),
            self.weight_format,
            choice.member,
            choice.weights,
            *self.lora_a,
            *self.lora_b,
        )
        return rounded.view(weight.shape)

    def rounded_input(self, x: Tensor) -> Tensor:
        """Round the input to its grid, where it has one."""
        if self.input is None:
            return x
        if self.input_shift is None:
            return fake_quantize(x, self.input)
        choice = self.route.of(self.slot)
        shift, unit = self.input_shift[choice.member], float(self.input.scale) * (not self.input.format.signed)
        return fake_quantize_learned(x, choice.input or moved_input(self.input, *shift.tolist()), shift, unit)

    def forward(self, x: Tensor) -> Tensor:
        """Round the input and the updated weight, and run the layer."""
        x = self.rounded_input(x)
        weight = self.rounded_weight().to(x.dtype)
        bias = None if self.layer.bias is None else self.layer.bias.to(x.dtype)
        if isinstance(self.layer, nn.Conv2d):
            y: Tensor = self.layer._conv_forward(x, weight, bias)
            return y
        return nn.functional.linear(x, weight, bias)


def tune_layers_(
    denoiser: nn.Module,
    table: Mapping[str, LayerParameters],
    scales: Mapping[str, Tensor],
    recipe: FinetuneRecipe,
    generator: torch.Generator,
) -> tuple[dict[str, TunedLayer], Route[Choice]]:
    """Replace every layer that has a quantized weight by a `TunedLayer`.

    Returns:
        The new layers by name, and the route that they read; give it the router's choice in each forward.
    """
    route, tuned = Route[Choice](), {}
    for slot, name in enumerate(tuned_names(table)):
        parent, _, child = name.rpartition(".")
        owner = denoiser.get_submodule(parent)
        layer = TunedLayer(getattr(owner, child), table[name], scales[name], route, slot, recipe, generator)
        setattr(owner, child, layer)
        tuned[name] = layer
    return tuned, route


def tuned_names(table: Mapping[str, LayerParameters]) -> list[str]:
    """List the layers that have a hub, in the order of the router's rows: those that multiply by a quantized weight."""
    return [name for name, parameters in table.items() if parameters.weight is not None and not parameters.lookup]
