"""What a denoiser is trained on: batches, loss weights and held-out calls, and by which recipe.

The loss weight of a timestep is a power of its denoising factor (`pipelines.denoising_factor`): how
much an error of the output there moves the next sample. So training cares about what shows in the
picture (denoising-factor alignment, DFA, Zhao et al. 2025, arXiv:2505.21591; the power is ours).
The weights have mean 1, so that a learning rate means the same whatever the sampler.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from msfp_cli.errors import RunError
from msfp_cli.finetuning.batches import Batches
from msfp_cli.finetuning.load import Material
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.layers.clock import Clock
from msfp_cli.pipelines.denoiser import DenoiserCall, call_with
from msfp_cli.pipelines.denoising_factor import factors_at, loss_weights
from msfp_cli.recording.compare import relative_error

# The relative squared error of a replayed row that no order of summing explains, in any precision.
_LARGEST_REPLAY_ERROR = 0.01


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """What a denoiser is trained on.

    Arguments:
        recipe: learning rates, updates, calls per update.
        calibration: identity of the calibration that the student begins with.
        clock: reads the timestep of the denoiser's calls.
        batches: the rows of each update.
        weights: loss weight of each timestep.
        held_out: calls to measure on.
    """

    recipe: FinetuneRecipe
    calibration: str
    clock: Clock
    batches: Batches = field(repr=False)
    weights: dict[float, float]
    held_out: list[DenoiserCall] = field(repr=False)

    def row_weights(self, timesteps: Sequence[float]) -> list[float]:
        """Return the factor of each row's error in the loss, a mean over the rows of an update.

        A timestep that is drawn n times as often as with equal shares counts 1 / n of its
        weight, so that the gradient's mean does not depend on the shares.
        """
        shares = self.batches.shares
        rows = self.recipe.calls_per_update * self.recipe.batch_size
        return [self.weights[t] / (shares[t] * len(shares) * rows) for t in timesteps]


def training_task(material: Material, component: str, recipe: FinetuneRecipe) -> TrainingTask:
    """Return what one denoiser is trained on.

    Raises:
        RunError: the recording holds no call of it, or the loss needs factors that are not known.
    """
    recording = material.recording
    batches = Batches(
        recording,
        component,
        batch_size=recipe.batch_size,
        calls_per_update=recipe.calls_per_update,
        seed=recipe.seed,
    )
    return TrainingTask(
        recipe=recipe,
        calibration=material.calibration.identity(),
        clock=recording.clock(component),
        batches=batches,
        weights=timestep_weights(batches.timesteps, recording.factors(component), recipe),
        held_out=list(material.held_out.calls(component)),
    )


def timestep_weights(
    timesteps: Sequence[float],
    factors: Sequence[tuple[float, float]] | None,
    recipe: FinetuneRecipe,
) -> dict[float, float]:
    """Return the loss weight of each recorded timestep, of mean 1.

    Arguments:
        timesteps: those that were recorded.
        factors: (timestep, denoising factor) pairs, see `Recording.factors`.
        recipe: its loss is ``plain`` for equal weights, ``dfa`` for weights proportional to a power
            of the factor.

    Raises:
        RunError: the loss is ``dfa`` and the factors are not known.
    """
    if recipe.loss == "plain":
        return dict.fromkeys(timesteps, 1.0)
    if factors is None:
        raise RunError(
            "the denoising factor of this pipeline's scheduler is not known; use --loss plain"
        )
    weights = loss_weights(factors_at(timesteps, factors), power=recipe.loss_power)
    return dict(zip(timesteps, weights.tolist(), strict=True))


@torch.no_grad()
def refuse_different_replay(denoiser: nn.Module, component: str, batches: Batches) -> None:
    """Refuse a denoiser whose output changes where recorded rows are put together in a new batch.

    The shapes of the arguments say which of them have a row for each picture (`pipelines.rows`).
    Where that fails, a row would be trained on another row's prompt.

    Raises:
        RunError: an output is not what was recorded, or there is none.
    """
    for call in batches.batch(0, 0):
        try:
            output = call_with(denoiser, call.arguments, call.output)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = str(error).partition("\n")[0]
            raise RunError(
                f"{component} cannot be called with recorded rows put together in a new "
                f"batch ({reason}), so it cannot be trained; `msfp export` exports the calibration"
            ) from error
        change = relative_error(output, call.output)
        if change > _LARGEST_REPLAY_ERROR:
            raise RunError(
                f"replaying recorded rows in a new batch changes the output of {component} "
                f"(relative error {change:.2g}): they may be mixed up, so it cannot be trained; "
                "please report this pipeline"
            )
