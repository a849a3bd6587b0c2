"""A denoiser in training: it computes exactly what its export will, and its hubs can be trained."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from msfp_cli.finetuning.lora import moved_input, tune_layers_, tuned_names
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.router import Choice, Router
from msfp_cli.layers.replace import store_layers_
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.pipelines.denoiser import DenoiserCall, call_with
from msfp_cli.pipelines.rows import JoinedCall
from msfp_cli.recording.compare import OutputError


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one kind, which have a learning rate and a clipped norm in common.

    Arguments:
        kind: ``lora``, ``input`` or ``router``.
        rate: at the first update; it decays linearly to 0.
        parameters: by name.
    """

    kind: str
    rate: float
    parameters: dict[str, nn.Parameter]


class Student(nn.Module):
    """A denoiser with trainable hubs and a router; everything it had is frozen.

    Arguments:
        denoiser: the float denoiser; its layers are replaced in place.
        table, scales: calibrated schemes and weight scales, by layer name.
        recipe: hub size, rank, initialisation, seed.
        multipliers: of the weights in groups, by layer name.
        is_lifted_at: whether inputs are lifted at a timestep; None for nowhere.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        table: Mapping[str, LayerScheme],
        scales: Mapping[str, Tensor],
        recipe: FinetuneRecipe,
        multipliers: Mapping[str, Tensor] = MappingProxyType({}),
        is_lifted_at: Callable[[float], bool] | None = None,
    ) -> None:
        super().__init__()
        self._is_lifted_at = is_lifted_at
        self.denoiser = denoiser.requires_grad_(False)
        generator = torch.Generator().manual_seed(recipe.seed)
        tuned = set(tuned_names(table))
        untuned = {name: table[name] for name in table if name not in tuned}
        store_layers_(denoiser, untuned, scales, multipliers)
        self.layers, self.route = tune_layers_(
            denoiser, table, scales, recipe, generator, multipliers
        )
        self.router = Router(len(self.layers), recipe.hub_size, generator)
        self.router.to(next(denoiser.parameters()).device)

    @property
    def largest_rank(self) -> int:
        """The largest rank of a LoRA here; that of a layer is at most its weight's smaller side."""
        return max(len(layer.lora_a[0]) for layer in self.layers.values())

    @contextmanager
    def at(self, timesteps: Sequence[float], *, learning: bool = False) -> Iterator[None]:
        """Route every layer while the context is open: forward, and backward if it recomputes.

        Arguments:
            timesteps: one for each row of the call, or one for all.
            learning: whether the router gets a gradient.
        """
        lifted = list(map(self._is_lifted_at, timesteps)) if self._is_lifted_at else None
        routed = self.router(timesteps, learning=learning, lifted=lifted)
        self.route.open(self._with_inputs(routed))
        try:
            yield
        finally:
            self.route.close()

    @torch.no_grad()
    def _with_inputs(self, routed: list[list[Choice]]) -> list[list[Choice]]:
        """Add to the choices where training has moved the input grids of the chosen members.

        All numbers come from the device in one transfer, instead of one for each layer.
        """
        places = []
        shifts = []
        for layer, choices in zip(self.layers.values(), routed, strict=True):
            if layer.input is None or layer.input_shift is None:
                continue
            for position, choice in enumerate(choices):
                places.append((choices, position, layer.input))
                shifts.append(layer.input_shift[choice.member])
        numbers = torch.stack(shifts).tolist() if shifts else []
        for (choices, position, grid), shift in zip(places, numbers, strict=True):
            choices[position] = choices[position]._replace(input=moved_input(grid, *shift))
        return routed

    @contextmanager
    def as_calibrated(self) -> Iterator[None]:
        """Take all updates away while the context is open, where they do not begin at zero."""
        matrices = [b for layer in self.layers.values() for b in layer.lora_b]
        before = [b.detach().clone() for b in matrices]
        for b in matrices:
            b.data.zero_()
        try:
            yield
        finally:
            for b, values in zip(matrices, before, strict=True):
                b.data.copy_(values)

    def forward(self, call: DenoiserCall | JoinedCall) -> Tensor:
        """Return the denoiser's output for a recorded call, within `at`."""
        return call_with(self.denoiser, call.arguments, call.output)

    def is_float16(self) -> bool:
        """Whether what passes between its layers is in float16."""
        return next(self.denoiser.parameters()).dtype == torch.float16

    def trainable(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the parameters that can be trained, by kind and then by name.

        Returns:
            ``lora``: A and B of every member; ``input``: the moves of the input grids; ``router``.
        """
        loras: dict[str, nn.Parameter] = {}
        inputs: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            loras |= _numbered(f"{name}.lora_a", layer.lora_a)
            loras |= _numbered(f"{name}.lora_b", layer.lora_b)
            inputs |= _numbered(f"{name}.input_shift", layer.input_shift or ())
        router = {f"router.{name}": parameter for name, parameter in self.router.named_parameters()}
        return {"lora": loras, "input": inputs, "router": router}

    @torch.no_grad()
    def output_error(self, calls: Iterable[DenoiserCall]) -> OutputError:
        """Measure the error of the output over recorded calls."""
        error = OutputError()
        for call in calls:
            with self.at([call.timestep]):
                error.add(call.timestep, self(call), call.output)
        return error


def _numbered(name: str, parameters: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the parameters of a hub's members by name, ``NAME.MEMBER``."""
    return {f"{name}.{member}": parameter for member, parameter in enumerate(parameters)}


def parameter_groups(student: Student, recipe: FinetuneRecipe) -> list[ParameterGroup]:
    """Return the kinds of parameters that a recipe trains; a kind with a rate of 0 is left out."""
    rates = {
        "lora": recipe.learning_rate,
        "input": recipe.input_learning_rate,
        "router": recipe.router_learning_rate if recipe.hub_size > 1 else 0.0,
    }
    kinds = student.trainable()
    return [
        ParameterGroup(kind, rate, kinds[kind])
        for kind, rate in rates.items()
        if rate and kinds[kind]
    ]


def train_only_(student: Student, groups: list[ParameterGroup]) -> None:
    """Give gradients to the parameters of the groups and to nothing else."""
    student.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
