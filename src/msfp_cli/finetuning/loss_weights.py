"""The loss weights of the timesteps, from the sampler's denoising factors.

An error of the output at a timestep t moves the next sample by the denoising factor gamma_t times
as much (`pipelines.denoising_factor`). Weighting the loss of t by gamma_t ** p makes training care
about what shows in the picture (denoising-factor alignment, DFA, Zhao et al. 2025,
arXiv:2505.21591, where p is 1; the power is ours). The weights have mean 1, so that a learning rate
means the same whatever the sampler.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from msfp_cli.errors import RunError
from msfp_cli.finetuning.recipe import FinetuneRecipe


def timestep_weights(
    timesteps: Sequence[float],
    factors: Sequence[tuple[float, float]] | None,
    recipe: FinetuneRecipe,
    unit: float,
) -> dict[float, float]:
    """Return the loss weight of each recorded timestep, of mean 1.

    Arguments:
        timesteps: in the denoiser's own unit.
        factors: the sampler's (timestep, denoising factor) pairs, see `Recording.factors`.
        recipe: its loss is ``plain`` for equal weights, ``dfa`` for weights proportional to a power
            of the factor.
        unit: the factor that maps the denoiser's timesteps to the sampler's.

    Raises:
        RunError: the loss is ``dfa`` and the factors are not known.
    """
    if recipe.loss == "plain":
        return dict.fromkeys(timesteps, 1.0)
    if factors is None:
        raise RunError(
            "the denoising factor of this pipeline's scheduler is not known; use --loss plain"
        )
    sampler_timesteps, sampler_factors = torch.tensor(factors, dtype=torch.float64).unbind(dim=1)
    ours = torch.tensor(timesteps, dtype=torch.float64) * unit
    nearest = (ours[:, None] - sampler_timesteps).abs().argmin(dim=1)
    weights = loss_weights(sampler_factors[nearest], power=recipe.loss_power)
    return dict(zip(timesteps, weights.tolist(), strict=True))


def loss_weights(factors: Tensor, *, power: float = 1.0) -> Tensor:
    """Return weights of mean 1 that are proportional to ``factors ** power``.

    A step whose factor is 0 or not finite gets the smallest proper one: a user seldom wants such a
    step to be left untrained.
    """
    proper = factors.isfinite() & (factors > 0)
    if not proper.any():
        return torch.ones_like(factors)
    weights = torch.where(proper, factors, factors[proper].min()).pow(power)
    return weights / weights.mean()
