"""Timestep-aware LoRA (TALoRA): a hub of low-rank updates per layer, picked by one router.

Early timesteps draw outlines and late ones details, so one low-rank update cannot serve them all
(Zhao et al. 2025, arXiv:2505.21591). Each quantized layer has a hub of h updates *inside* its
quantizer, and one router for the whole denoiser, ``timestep embedding -> MLP -> h logits per
layer``, picks exactly one per layer and timestep:

    W_q(t) = Q( W + s * B_k A_k ),   k = argmax logits(t),   s = the weight's own step size per
    output channel

and so are the scale and the zero point of the layer's input: activations change over the timesteps,
too (ours).

The choice is hard in the forward pass and soft in the backward pass (straight-through). ``s``
(ours; EfficientDM scales the learning rate instead) makes B count in steps of the grid, so that one
learning rate fits all layers. For a convolution A is its k x k part and B the 1 x 1 that follows:
as matrices, ``(rank, in * k * k)`` and ``(out, rank)``.

Because the update lies inside the quantizer, an export holds h 4-bit weights per layer and no
floating-point side branch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from msfp_cli.errors import MsfpError
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.router import Choice, TellRouter
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.multipliers import step_sizes
from msfp_cli.formats.rounding import (
    Context,
    Grid,
    fake_quantize,
    fake_quantize_learned,
    round_steps,
)
from msfp_cli.layers.quantized import FloatLayer, kind_of
from msfp_cli.layers.replace import replace_module_
from msfp_cli.layers.routing import Route
from msfp_cli.layers.scheme import LayerScheme

# Of the logarithm of an input's scale, up or down: training that gets there has diverged.
_MAX_GROWTH = 60.0


class _RoundedWeight(torch.autograd.Function):
    """``s * round(W / s + B A)`` as a matrix ``(out, in * k * k)``.

    The gradient is straight through the rounding to A and B, and zero where it clipped.
    """

    @staticmethod
    def forward(
        ctx: Context,
        weight: Tensor,
        sizes: Tensor,
        fmt: FloatFormat,
        a: Tensor,
        b: Tensor,
    ) -> Tensor:
        steps = updated_steps(weight, sizes, a, b)
        ctx.save_for_backward(steps.abs() <= fmt.largest, sizes, a, b)
        return round_steps(steps, fmt).mul_(sizes)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[None, None, None, Tensor, Tensor]:
        inside, sizes, a, b = ctx.saved_tensors
        grad = (grad * sizes).mul_(inside)
        return None, None, None, b.t() @ grad, grad @ a.t()


def updated_steps(weight: Tensor, sizes: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ``W / s + B A``, the updated weight in its own steps.

    Arguments:
        weight: ``(out, ...)``.
        sizes: float32, ``(out, 1)`` or ``(out, in * k * k)``, the step of each weight.
        a: ``(rank, in * k * k)``.
        b: ``(out, rank)``.

    Returns:
        float32 ``(out, in * k * k)``, whatever the autocast: half a step is all the difference.
    """
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight.detach().float().flatten(1) / sizes, b, a)


def weight_sizes(weight: Tensor, scale: Tensor, multipliers: Tensor | None) -> Tensor:
    """Return the step of each weight as a matrix, ``(out, 1)`` or ``(out, in * k * k)``.

    Arguments:
        scale: ``(out,)``.
        multipliers: uint8 ``(out, groups)``, None for a step for each row.
    """
    return step_sizes(scale, multipliers, weight.flatten(1).shape).to(weight.device)


def moved_input(grid: Grid, growth: float, steps: float) -> Grid:
    """Return the grid of a layer's input after training, its numbers exact in float32.

    Arguments:
        grid: as calibrated.
        growth: the logarithm of the scale's growth.
        steps: the zero point's move in calibrated steps; signed formats have none.
    """
    zero_point = grid.zero_point + grid.scale * steps * (not grid.format.signed)
    scale = grid.scale * math.exp(max(-_MAX_GROWTH, min(growth, _MAX_GROWTH)))
    return Grid(grid.format, float(np.float32(scale)), float(np.float32(zero_point)))


class TunedLayer(nn.Module):
    """A float layer that computes as its quantized form will, with a LoRA hub inside the quantizer.

    Arguments:
        layer: the float layer, its weight rotated where inputs are; weight and bias are frozen.
        scheme: the calibrated formats; the weight's is needed, the input's may be None.
        sizes: the step of each weight, ``(out, 1)`` or ``(out, in * k * k)``.
        route: where the choice of member is found.
        slot: the layer's row in the choice.
        recipe: hub size, rank, initialisation, and whether the input's grid is trained.
        generator: draws A.

    Each member of the hub has ``lora_a``, ``(rank, in * k * k)``, ``lora_b``, ``(out, rank)``, and
    where the input's grid is trained ``input_shift``, ``(2,)``, the two numbers of `moved_input`.
    All begin alike, B at zero, so that training begins at the calibrated model (unless the recipe
    asks for another beginning).
    """

    def __init__(
        self,
        layer: FloatLayer,
        scheme: LayerScheme,
        sizes: Tensor,
        route: Route[Sequence[Choice]],
        slot: int,
        recipe: FinetuneRecipe,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.kind = kind_of(layer)
        self.route = route
        self.slot = slot
        assert scheme.weight is not None
        self.transform = scheme.transform
        self.input = scheme.input
        self.lifted_input = scheme.lifted_input
        self.weight_format = scheme.weight
        self.register_buffer("sizes", sizes.to(layer.weight.device).float(), persistent=False)
        a, b = self._beginning(recipe, generator)
        self.lora_a = nn.ParameterList(a.clone() for _ in range(recipe.hub_size))
        self.lora_b = nn.ParameterList(b.clone() for _ in range(recipe.hub_size))
        trained = self.input is not None and recipe.input_learning_rate > 0
        shifts = [torch.zeros(2, device=layer.weight.device) for _ in range(recipe.hub_size)]
        self.input_shift = nn.ParameterList(shifts) if trained else None

    @property
    def weight(self) -> Tensor:
        """The float layer's weight, for models that read its type or its shape."""
        weight: Tensor = self.layer.weight
        return weight

    @torch.no_grad()
    def _beginning(
        self, recipe: FinetuneRecipe, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the first A and B of every member."""
        weight = self.layer.weight
        out = weight.shape[0]
        inner = weight[0].numel()
        rank = min(recipe.rank, out, inner)
        if recipe.init == "svd":
            return self._svd_of_rounding_error(rank)
        bound = math.sqrt(3 / inner)
        a = torch.empty(rank, inner).uniform_(-bound, bound, generator=generator)
        return a.to(weight.device), torch.zeros(out, rank, device=weight.device)

    def _svd_of_rounding_error(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the A and B whose product is nearest to what rounding takes from the weight."""
        steps = self.layer.weight.float().flatten(1) / self.get_buffer("sizes")
        error = steps - round_steps(steps, self.weight_format)
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        root = s[:rank].sqrt()
        return (root[:, None] * v[:rank]).contiguous(), (u[:, :rank] * root).contiguous()

    def rounded_weight(self, member: int) -> Tensor:
        """Return the weight of a member, rounded; float32, shape of the weight."""
        rounded: Tensor = _RoundedWeight.apply(  # type: ignore[no-untyped-call]
            self.layer.weight,
            self.get_buffer("sizes"),
            self.weight_format,
            self.lora_a[member],
            self.lora_b[member],
        )
        return rounded.view(self.layer.weight.shape)

    def rounded_input(self, x: Tensor, choice: Choice) -> Tensor:
        """Round the input to the chosen member's grid, where it has one.

        The grid of lifted inputs is not trained: 8 bits leave next to no error.
        """
        if self.input is None:
            return x
        if choice.is_lifted and self.lifted_input is not None:
            return fake_quantize(x, self.lifted_input)
        if self.input_shift is None:
            return fake_quantize(x, self.input)
        shift = self.input_shift[choice.member]
        grid = choice.input or moved_input(self.input, *shift.tolist())
        unit = float(self.input.scale) * (not self.input.format.signed)
        return fake_quantize_learned(x, grid, shift, unit)

    def forward(self, input: Tensor) -> Tensor:
        """Give each chosen member its rows, and put what they return in order again.

        Raises:
            MsfpError: several members are chosen, and the input's first dimension does not hold the
                batch's rows.
        """
        choices = self.route.of(self.slot)
        if len(choices) == 1:
            return self._with_member(input, choices[0])
        rows_of_choices = chain.from_iterable(choice.rows for choice in choices)
        order = torch.tensor(list(rows_of_choices), device=input.device)
        if len(input) % len(order):
            raise MsfpError(
                f"a layer's input of shape {tuple(input.shape)} does not begin with "
                f"the {len(order)} rows of the call, so they cannot be given to the members of "
                "its hub; give --hub-size 1"
            )
        rows = input.reshape(len(order), -1, *input.shape[1:]).index_select(0, order)
        parts = torch.split(rows, [len(choice.rows) for choice in choices])
        outputs = [
            self._with_member(part.flatten(0, 1), choice)
            for part, choice in zip(parts, choices, strict=True)
        ]
        y = torch.cat(outputs)
        ordered = y.reshape(len(order), -1, *y.shape[1:]).index_select(0, order.argsort())
        return ordered.flatten(0, 1)

    def _with_member(self, x: Tensor, choice: Choice) -> Tensor:
        """Run the layer with one member, around which its input is transformed."""
        return self.transform.around(partial(self._product, choice), x, self.layer.bias)

    def _product(self, choice: Choice, x: Tensor) -> Tensor:
        """Round a transformed input and the updated weight, and run the layer."""
        x = self.rounded_input(x, choice)
        bias = None if self.transform.token_scales else self.layer.bias
        y = self._run(x, self.rounded_weight(choice.member), bias)
        if choice.weights is None:
            return y
        changes = partial(self._changes, choice.member)
        y_with_gradient: Tensor = TellRouter.apply(  # type: ignore[no-untyped-call]
            y, choice.weights, x, changes
        )
        return y_with_gradient

    @torch.no_grad()
    def _changes(self, serving: int, x: Tensor) -> Iterator[Tensor]:
        """Yield what each member adds to the output, where the serving member's is not clipped."""
        weight = self.layer.weight
        sizes = self.get_buffer("sizes")
        steps = updated_steps(weight, sizes, self.lora_a[serving], self.lora_b[serving])
        inside = steps.abs() <= self.weight_format.largest
        for a, b in zip(self.lora_a, self.lora_b, strict=True):
            update = sizes * (b @ a) * inside
            yield self._run(x, update.view(weight.shape), None)

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        return self.kind.apply(self.layer, x, weight.to(x.dtype), bias)


def tune_layers_(
    denoiser: nn.Module,
    table: Mapping[str, LayerScheme],
    scales: Mapping[str, Tensor],
    recipe: FinetuneRecipe,
    generator: torch.Generator,
    multipliers: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[dict[str, TunedLayer], Route[Sequence[Choice]]]:
    """Replace every layer that has a quantized weight by a `TunedLayer`.

    Returns:
        The new layers by name, and the route that they read; give it the router's choice in each
        forward.
    """
    route = Route[Sequence[Choice]]()
    tuned: dict[str, TunedLayer] = {}
    for slot, name in enumerate(tuned_names(table)):
        layer: FloatLayer = denoiser.get_submodule(name)
        sizes = weight_sizes(layer.weight, scales[name], multipliers.get(name))
        tuned[name] = TunedLayer(layer, table[name], sizes, route, slot, recipe, generator)
        replace_module_(denoiser, name, tuned[name])
    return tuned, route


def tuned_names(table: Mapping[str, LayerScheme]) -> list[str]:
    """List the layers that have a hub, in the order of the router's rows.

    They are the layers that multiply by a quantized weight.
    """
    return [name for name, scheme in table.items() if scheme.tunable]
