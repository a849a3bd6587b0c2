"""The result of fine-tuning on disk, one file per denoiser: all that a killed run needs, and all that an export needs.

``finetune/COMPONENT.safetensors`` in the run directory holds, by the name of the trained parameter,

    now/...  best/...            the state after the last update, and the one with the lowest
    held-out error exp_avg/...  exp_avg_sq/...  step/...   AdamW's moments and counts

and in its header the recipe, the calibration that it started from, and the history. The order of
the data and the learning rate are functions of the update's number, so nothing else has to be kept.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from msfp_cli.calibration.result import Calibration
from msfp_cli.errors import RunError
from msfp_cli.files import Json, digest, read_header, read_tensors, refuse_altered, replace_file
from msfp_cli.finetuning.lora import moved_input, tuned_names, updated_steps
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.router import Router
from msfp_cli.formats.rounding import Grid
from msfp_cli.layers.replace import find_layers, replace_layers_, store_layers_
from msfp_cli.layers.routing import ROUTER, table_index
from msfp_cli.run import Run

_SCHEMA = 1
_HEADER = "msfp_finetune"  # key of the safetensors header
_REDO = "run `msfp finetune --restart`"


@dataclass(frozen=True, kw_only=True)
class HeldOutMeasurement:
    """One measurement on the held-out calls.

    Arguments:
        step: updates done before it.
        loss: mean training loss since the evaluation before; None before the first update.
        error: relative squared error of the output.
        by_timestep: (timestep, relative error) from noisy to clean.
    """

    step: int
    loss: float | None
    error: float
    by_timestep: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class FinetuneState:
    """A fine-tuned denoiser, finished or not.

    Arguments:
        recipe: how it is trained.
        calibration: identity of the calibration it began with, see `Calibration.identity`.
        unit: what brings its timesteps to 0..1000.
        timesteps: those it is trained at, in its own unit.
        step: updates done.
        history: the evaluations so far; the first is the calibrated model.
        losses: of the updates since the last evaluation.
        shares: (timestep, share of the rows) as drawn by `Batches`.
        tensors: see the module.
    """

    recipe: FinetuneRecipe
    calibration: str
    unit: float
    timesteps: tuple[float, ...]
    step: int
    history: tuple[HeldOutMeasurement, ...]
    losses: tuple[float, ...]
    shares: tuple[tuple[float, float], ...]
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def best(self) -> HeldOutMeasurement:
        """The evaluation with the lowest error."""
        return min(self.history, key=lambda evaluation: evaluation.error)

    @property
    def finished(self) -> bool:
        """Whether all updates are done."""
        return self.step >= self.recipe.steps

    def summary(self) -> str:
        """Say in a few words how far training got and what it gained."""
        return (
            f"{self.step} of {self.recipe.steps} updates, "
            f"held-out error {self.history[0].error:.4f} -> {self.best.error:.4f}"
        )

    def state(self, kind: str) -> dict[str, Tensor]:
        """Return the tensors of a kind (``now``, ``best``, ``step``, ``exp_avg``, ``exp_avg_sq``) by parameter name."""
        return {
            n.removeprefix(f"{kind}/"): t
            for n, t in self.tensors.items()
            if n.startswith(f"{kind}/")
        }

    def save(self, path: Path) -> None:
        """Write the file; it is there whole or not at all."""
        document = {
            "schema": _SCHEMA,
            "recipe": self.recipe.to_json(),
            "calibration": self.calibration,
            "unit": self.unit,
            "timesteps": list(self.timesteps),
            "step": self.step,
            "history": [asdict(evaluation) for evaluation in self.history],
            "losses": list(self.losses),
            "shares": list(self.shares),
            "digest": digest(self.tensors),
        }
        with replace_file(path) as temporary:
            save_file(self.tensors, temporary, metadata={_HEADER: json.dumps(document)})

    @classmethod
    def load(cls, path: Path) -> "FinetuneState":
        """Read the file.

        Raises:
            RunError: there is none.
            CheckpointError: it is truncated, altered, or newer than this msfp.
        """
        if not path.exists():
            raise RunError(f"no fine-tuning in {path}; run `msfp finetune` first")
        tensors = read_tensors(path, redo=_REDO)

        def parse(document: Json) -> FinetuneState:
            refuse_altered(path, tensors, document["digest"], redo=_REDO)
            return cls(
                recipe=FinetuneRecipe.from_json(document["recipe"]),
                calibration=document["calibration"],
                unit=float(document["unit"]),
                timesteps=tuple(float(timestep) for timestep in document["timesteps"]),
                step=int(document["step"]),
                history=tuple(_evaluation(entry) for entry in document["history"]),
                losses=tuple(float(loss) for loss in document["losses"]),
                shares=tuple(
                    (float(timestep), float(share)) for timestep, share in document["shares"]
                ),
                tensors=tensors,
            )

        return read_header(path, _HEADER, parse, redo=_REDO, schema=_SCHEMA)


def load_finetunings(run: Run, calibration: Calibration) -> dict[str, FinetuneState]:
    """Load the fine-tunings of a run by component; those that do not exist are left out.

    Raises:
        RunError: one began with another calibration.
        CheckpointError: one is damaged.
    """
    identity = calibration.identity()
    finetunings = {}
    for component in calibration.layers:
        path = run.finetuned(component)
        if not path.exists():
            continue
        finetunings[component] = FinetuneState.load(path)
        if finetunings[component].calibration != identity:
            raise RunError(f"{path} began with another calibration; run `msfp finetune --restart`")
    return finetunings


def member_table(tuned: FinetuneState, layers: Sequence[str]) -> Tensor:
    """Return the member that the best router gives each layer at each timestep, uint8 ``(1001, layers)``.

    Arguments:
        layers: the tuned layers, in the order of the router's rows.
    """
    router = Router(len(layers), tuned.recipe.hub_size, tuned.unit, torch.Generator())
    best = tuned.state("best")
    router.load_state_dict(
        {name: best.get(f"router.{name}", start) for name, start in router.state_dict().items()}
    )
    return router.table(tuned.timesteps)


def member_by_timestep(tuned: FinetuneState, layers: Sequence[str]) -> dict[str, list[int]]:
    """Return for each layer the member that serves each trained timestep, from noisy to clean."""
    table = member_table(tuned, layers)
    rows = [table_index(timestep, tuned.unit) for timestep in sorted(tuned.timesteps, reverse=True)]
    return {name: table[rows, slot].tolist() for slot, name in enumerate(layers)}


@torch.no_grad()
def quantize_tuned_(
    denoiser: nn.Module, calibration: Calibration, component: str, tuned: FinetuneState
) -> nn.Module:
    """Replace the denoiser's layers by quantized ones that hold the members of their hubs, and give it the router.

    A member that serves no timestep is left out, and so is one that equals another (as before the
    first update), so a layer that never switches keeps one set of weights.

    Raises:
        RunError: the fine-tuning began with another calibration.
    """
    if tuned.calibration != calibration.identity():
        raise RunError(
            "the fine-tuning began with another calibration; run `msfp finetune --restart`"
        )
    table, best = calibration.table(component), tuned.state("best")
    names = tuned_names(table)
    chosen = member_table(tuned, names)
    used: dict[str, list[int]] = {}
    for slot, name in enumerate(names):
        chosen[:, slot] = torch.tensor(_first_alike(best, name, tuned.recipe.hub_size))[
            chosen[:, slot].long()
        ]
        used[name] = sorted(set(chosen[:, slot].tolist()))
        chosen[:, slot] = torch.searchsorted(
            torch.tensor(used[name], dtype=torch.uint8), chosen[:, slot].contiguous()
        )
        inputs = _tuned_inputs(
            table[name].input, [best.get(f"{name}.input_shift.{k}") for k in used[name]]
        )
        table[name] = replace(
            table[name], hub=len(used[name]), input=inputs[0], further_inputs=inputs[1:]
        )
    store_layers_(
        denoiser, {n: table[n] for n in table if n not in used}, calibration.scales[component]
    )
    layers = find_layers(denoiser)
    for name, quantized in replace_layers_(
        denoiser, {n: table[n] for n in names}, timestep_unit=tuned.unit
    ).items():
        weight = layers.pop(name).weight.detach()
        for member, k in enumerate(used[name]):
            tensors = (
                calibration.scales[component][name],
                best[f"{name}.lora_a.{k}"],
                best[f"{name}.lora_b.{k}"],
            )
            scale, a, b = (tensor.to(weight.device) for tensor in tensors)
            quantized.store_steps_(updated_steps(weight, scale, a, b), scale, member)
    switching = [names.index(name) for name in sorted(names) if len(used[name]) > 1]
    if switching:
        denoiser.get_submodule(ROUTER).get_buffer("table").copy_(chosen[:, switching])
    return denoiser


def _first_alike(best: dict[str, Tensor], name: str, hub_size: int) -> list[int]:
    """Return for each member of a layer's hub the first one that equals it."""
    parts = [
        f"{name}.{part}"
        for part in ("lora_a", "lora_b", "input_shift")
        if f"{name}.{part}.0" in best
    ]

    def alike(j: int, k: int) -> bool:
        return all(torch.equal(best[f"{part}.{j}"], best[f"{part}.{k}"]) for part in parts)

    return [next(j for j in range(k + 1) if alike(j, k)) for k in range(hub_size)]


def _tuned_inputs(
    grid: Grid | None, shifts: Sequence[Tensor | None]
) -> tuple[Grid, ...] | tuple[None]:
    """Return the grid of a layer's input for each member after training; only one where it was not trained."""
    if grid is None:
        return (None,)
    return tuple(moved_input(grid, *shift.tolist()) for shift in shifts if shift is not None) or (
        grid,
    )


def _evaluation(entry: dict[str, Any]) -> HeldOutMeasurement:
    return HeldOutMeasurement(
        **{**entry, "by_timestep": tuple((float(t), float(e)) for t, e in entry["by_timestep"])}
    )
