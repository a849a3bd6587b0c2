"""The result of fine-tuning on disk, one file per denoiser: what resuming and exporting need.

``finetune/COMPONENT.safetensors`` in the run directory holds, by the name of the trained parameter,

    now/...                         the state after the last update
    best/...                        the state with the lowest held-out error
    exp_avg/... exp_avg_sq/... step/...   AdamW's moments and counts

and in its header the recipe, the identity of the calibration that it began with, and the history.
The order of the data and the learning rate are functions of the update's number, so nothing else
has to be kept.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from msfp_cli.calibration.result import Calibration
from msfp_cli.errors import RunError
from msfp_cli.files.documents import (
    Json,
    damaged,
    digest,
    read_document,
    refuse_altered,
    to_text,
    write_tensors,
)
from msfp_cli.files.typed import read_fields
from msfp_cli.finetuning.recipe import ROUTER_WIDTH, FinetuneRecipe
from msfp_cli.layers.clock import Clock
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
        clock: reads the timestep of its calls.
        timesteps: those it is trained at, 1000 (noise) to 0 (clean).
        step: updates done.
        history: the evaluations so far; the first is the calibrated model.
        losses: of the updates since the last evaluation.
        shares: (timestep, share of the rows) as drawn by `Batches`.
        tensors: see the module.
    """

    recipe: FinetuneRecipe
    calibration: str
    clock: Clock
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
        done = f"{self.step} of {self.recipe.steps} updates, held-out error"
        before = self.history[0].error
        if self.best.step:
            return f"{done} {before:.5f} -> {self.best.error:.5f}"
        if len(self.history) == 1:
            return f"{done} {before:.5f} before"
        return f"{done} {before:.5f} as calibrated, which training has not lowered"

    def tensors_of(self, kind: str) -> dict[str, Tensor]:
        """Return the tensors of a kind by parameter name.

        Arguments:
            kind: ``now``, ``best``, ``step``, ``exp_avg`` or ``exp_avg_sq``, see the module.
        """
        start = f"{kind}/"
        return {
            name.removeprefix(start): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(start)
        }

    def save(self, path: Path) -> None:
        """Write the file; it is there whole or not at all."""
        document = {
            "schema": _SCHEMA,
            "recipe": self.recipe.to_json(),
            "calibration": self.calibration,
            "clock": self.clock.to_json(),
            "timesteps": list(self.timesteps),
            "step": self.step,
            "history": [asdict(evaluation) for evaluation in self.history],
            "losses": list(self.losses),
            "shares": list(self.shares),
            "digest": digest(self.tensors),
        }
        write_tensors(path, self.tensors, {_HEADER: to_text(document)})

    def shapes(self, calibration: Calibration, component: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the trained parameters of a denoiser by name, as its recipe says."""
        recipe = self.recipe
        shapes = dict[str, tuple[int, ...]]()
        schemes = calibration.table(component)
        tuned = [name for name, scheme in schemes.items() if scheme.tunable]
        for name in tuned:
            out = len(calibration.scales[component][name])
            inner = calibration.layers[component][name].num_weights // out
            rank = min(recipe.rank, out, inner)
            own: dict[str, tuple[int, ...]] = {"lora_a": (rank, inner), "lora_b": (out, rank)}
            if schemes[name].input is not None and recipe.input_learning_rate > 0:
                own["input_shift"] = (2,)
            for member in range(recipe.hub_size):
                shapes |= {f"{name}.{part}.{member}": shape for part, shape in own.items()}
        if recipe.hub_size > 1:
            sizes = {"hidden": ROUTER_WIDTH, "logits": len(tuned) * recipe.hub_size}
            for part, size in sizes.items():
                shapes[f"router.{part}.weight"] = (size, ROUTER_WIDTH)
                shapes[f"router.{part}.bias"] = (size,)
        return shapes

    def refuse_misfit(self, calibration: Calibration, component: str) -> None:
        """Refuse tensors that are not those of the denoiser's hubs and router.

        Raises:
            ValueError: one is missing, unknown, of another shape or type, or not finite.
        """
        shapes = self.shapes(calibration, component)
        for kind in ("now", "best"):
            refuse_other_shapes(kind, self.tensors_of(kind), shapes)
        moments = {kind: self.tensors_of(kind) for kind in ("exp_avg", "exp_avg_sq", "step")}
        moved = {name: shapes[name] for name in moments["step"] if name in shapes}
        for kind, tensors in moments.items():
            own = {name: () if kind == "step" else shape for name, shape in moved.items()}
            refuse_other_shapes(kind, tensors, own)

    def _refuse_odd_numbers(self) -> None:
        """Refuse numbers that no training leaves.

        Raises:
            ValueError: the message names the field.
        """
        if not self.history:
            raise ValueError("its history is empty")
        errors = [each.error for each in self.history]
        errors += [error for each in self.history for _, error in each.by_timestep]
        checks = {
            "timesteps": bool(self.timesteps) and all(map(math.isfinite, self.timesteps)),
            "shares": {timestep for timestep, _ in self.shares} == set(self.timesteps)
            and all(0 <= share < math.inf for _, share in self.shares)
            and any(share for _, share in self.shares),
            "history": all(0 <= error < math.inf for error in errors),
            "step": all(0 <= each.step <= self.step for each in self.history)
            and self.step <= self.recipe.steps,
        }
        for name, is_right in checks.items():
            if not is_right:
                raise ValueError(f"its {name} cannot be")

    def refuse_different(self, calibration: Calibration) -> None:
        """Refuse a calibration that this fine-tuning did not begin with.

        Raises:
            RunError: it began with another one.
        """
        if self.calibration != calibration.identity():
            raise RunError(
                "the fine-tuning began with another calibration; run `msfp finetune --restart`"
            )

    @classmethod
    def load(cls, path: Path) -> "FinetuneState":
        """Read the file.

        Raises:
            RunError: there is none.
            CheckpointError: it is truncated, altered, or newer than this msfp.
        """
        if not path.exists():
            raise RunError(f"no fine-tuning in {path}; run `msfp finetune` first")

        def parse(document: Json, tensors: dict[str, Tensor]) -> FinetuneState:
            refuse_altered(path, tensors, document["digest"], redo=_REDO)
            return cls._from_document(document, tensors)

        return read_document(path, _HEADER, parse, redo=_REDO, schema=_SCHEMA)

    @classmethod
    def _from_document(cls, document: Json, tensors: dict[str, Tensor]) -> "FinetuneState":
        """Put together what the file's header and its tensors say."""
        own = {key: value for key, value in document.items() if key not in ("schema", "digest")}
        if "clock" not in own:
            own = _in_thousandths(own)
        state = read_fields(cls, own, tensors=tensors)
        state._refuse_odd_numbers()
        return state


def refuse_other_shapes(
    kind: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse tensors that have other names or shapes, or that are not finite numbers.

    Raises:
        ValueError: the message names the first.
    """
    for name in sorted(tensors.keys() ^ shapes.keys()):
        raise ValueError(f"{kind}/{name} is {'missing' if name in shapes else 'unknown'}")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or not tensor.is_floating_point():
            raise ValueError(f"{kind}/{name} is of another shape or type")
        if not tensor.isfinite().all():
            raise ValueError(f"{kind}/{name} is not finite")


def _in_thousandths(document: Json) -> Json:
    """Return what a file of earlier versions says, whose timesteps are in the denoiser's unit."""
    rest = dict(document)
    clock = Clock.of_unit(rest.pop("unit"))
    rest["clock"] = clock.to_json()
    rest["timesteps"] = [timestep * clock.scale for timestep in rest["timesteps"]]
    rest["shares"] = _scaled(rest["shares"], clock.scale)
    rest["history"] = [
        {**each, "by_timestep": _scaled(each["by_timestep"], clock.scale)}
        for each in rest["history"]
    ]
    return rest


def _scaled(pairs: Json, scale: float) -> list[tuple[float, float]]:
    """Return (timestep, value) pairs with timesteps in another unit."""
    return [(timestep * scale, value) for timestep, value in pairs]


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
        state = FinetuneState.load(path)
        if state.calibration != identity:
            raise RunError(f"{path} began with another calibration; {_REDO}")
        try:
            state.refuse_misfit(calibration, component)
        except ValueError as error:
            raise damaged(path, error, redo=_REDO) from None
        finetunings[component] = state
    return finetunings


@dataclass(frozen=True, kw_only=True)
class FinetuneReport:
    """How the fine-tuning of one denoiser stands.

    Arguments:
        component: the pipeline's name for it.
        file: where its state is.
        step: updates done.
        steps: updates asked for.
        before: relative squared error on the held-out calls of the calibrated model.
        after: the same of the best state.
        best_step: updates done when it was best; 0 says that training did not help.
    """

    component: str
    file: str
    step: int
    steps: int
    before: float
    after: float
    best_step: int

    @property
    def finished(self) -> bool:
        """Whether all updates are done."""
        return self.step >= self.steps

    def to_json(self) -> Json:
        """Return plain JSON values."""
        return {**asdict(self), "finished": self.finished}


def report_of(component: str, path: Path) -> FinetuneReport:
    """Sum up a saved state."""
    state = FinetuneState.load(path)
    return FinetuneReport(
        component=component,
        file=str(path),
        step=state.step,
        steps=state.recipe.steps,
        before=state.history[0].error,
        after=state.best.error,
        best_step=state.best.step,
    )
