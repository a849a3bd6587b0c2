"""A denoiser that is being fine-tuned: it computes exactly what its export will, and can be trained."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

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


class Student(nn.Module):
    """A denoiser with trainable hubs and a router; everything it had is frozen.

    Arguments:
        denoiser: the float denoiser; its layers are replaced in place.
        table, scales: calibrated schemes and weight scales, by layer name.
        recipe: hub size, rank, initialisation, seed.
        unit: what brings its timesteps to 0..1000, see `routing.timestep_unit`.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        table: Mapping[str, LayerScheme],
        scales: Mapping[str, Tensor],
        recipe: FinetuneRecipe,
        unit: float,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser.requires_grad_(False)
        generator = torch.Generator().manual_seed(recipe.seed)
        tuned = set(tuned_names(table))
        store_layers_(denoiser, {name: table[name] for name in table if name not in tuned}, scales)
        self.layers, self.route = tune_layers_(denoiser, table, scales, recipe, generator)
        self.router = Router(len(self.layers), recipe.hub_size, unit, generator)
        self.router.to(next(denoiser.parameters()).device)

    @contextmanager
    def at(self, timesteps: Sequence[float], *, learning: bool = False) -> Iterator[None]:
        """Route every layer while the context is open: forward, and backward if it recomputes.

        Arguments:
            timesteps: one for each row of the call, or one for all.
            learning: whether the router gets a gradient.
        """
        self.route.open(self._with_inputs(self.router(timesteps, learning=learning)))
        try:
            yield
        finally:
            self.route.close()

    @torch.no_grad()
    def _with_inputs(self, routed: list[list[Choice]]) -> list[list[Choice]]:
        """Add where training has moved the chosen input grids: one transfer from the device instead of one a layer."""
        chosen = [
            (choices, i, layer.input, layer.input_shift[choice.member])
            for layer, choices in zip(self.layers.values(), routed, strict=True)
            for i, choice in enumerate(choices)
            if layer.input is not None and layer.input_shift is not None
        ]
        if chosen:
            numbers = torch.stack([shift for *_, shift in chosen]).tolist()
            for (choices, i, grid, _), moved in zip(chosen, numbers, strict=True):
                choices[i] = choices[i]._replace(input=moved_input(grid, *moved))
        return routed

    def forward(self, call: DenoiserCall | JoinedCall) -> Tensor:
        """Return the denoiser's output for a recorded call, within `at`."""
        return call_with(self.denoiser, call.arguments, call.output)

    def is_float16(self) -> bool:
        """Whether what passes between its layers is in float16."""
        return next(self.denoiser.parameters()).dtype == torch.float16

    def trainable(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the trainable parameters by kind (``lora``, ``input``, ``router``), then by name."""
        loras: dict[str, nn.Parameter] = {}
        inputs: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            loras |= {f"{name}.lora_a.{k}": a for k, a in enumerate(layer.lora_a)}
            loras |= {f"{name}.lora_b.{k}": b for k, b in enumerate(layer.lora_b)}
            inputs |= {
                f"{name}.input_shift.{k}": shift for k, shift in enumerate(layer.input_shift or ())
            }
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
