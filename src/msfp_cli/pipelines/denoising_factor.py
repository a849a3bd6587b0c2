"""The denoising factor: how much an error of the denoiser's output moves the next sample.

A sampler's update is linear in the denoiser's output, and gamma_t is the absolute value of that
coefficient (denoising factor of Zhao et al. 2025, arXiv:2505.21591). With ``abar`` the cumulative
signal power at the timestep t, ``s`` the next timestep of the sampler, and eta the share of fresh
noise (0: DDIM's ordinary differential equation, 1: DDPM),

    gamma_t = | sqrt(1 - abar_s - v) * | d eps / d output | - sqrt(abar_s) * | d x0 / d output | |
    v       = eta^2 (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
    d eps / d output = 1 (epsilon), sqrt(abar_t) (v-prediction), sqrt(abar_t / (1 - abar_t))
    (sample)
    d x0 / d output  = sqrt((1 - abar_t) / abar_t), sqrt(1 - abar_t), 1

and for flow matching ``gamma_t = |sigma_s - sigma_t|``, or ``sigma_t (1 - sigma_s)`` where all
noise is drawn anew. On the same timesteps the number is the same for DDIM, Euler, DPM-Solver and
PNDM: they integrate one equation in different coordinates
(derivation: ours). Read naively, Euler's step in sigma space is 64 where DDIM's is below 1; only
the sample rescaled to unit variance is comparable. Multi-step schedulers mix in earlier outputs;
the first-order factor is the one that speaks of this timestep alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from msfp_cli.errors import ModelError
from msfp_cli.pipelines.loading import Scheduler


def denoising_factors(scheduler: Scheduler, *, eta: float | None = None) -> tuple[Tensor, Tensor]:
    """Return the timesteps of a scheduler and the denoising factor at each.

    Arguments:
        scheduler: a diffusers scheduler after ``set_timesteps``.
        eta: share of fresh noise; None takes the scheduler's own: 1 for DDPM, ancestral samplers
            and solvers of the stochastic equation, all noise anew for LCM, and 0 for all others.
            TCD and SA-Solver, which draw a share that is set elsewhere, are taken for samplers that
            draw none, and so is the stochastic DPM-Solver with the sigmas of flow matching.

    Returns:
        Two float64 tensors ``(timesteps,)``: each distinct timestep from noisy to clean, and its
        factor.

    Raises:
        ModelError: the scheduler has neither a table of signal powers nor flow-matching sigmas.
    """
    # KDPM2 visits pairs of timesteps that differ in the fourth digit.
    is_paired = type(scheduler).__name__.startswith("KDPM2")
    timesteps = _distinct(scheduler.timesteps, nearest=0.01 if is_paired else 0.0)
    if _is_flow_matching(scheduler):
        sigmas = _distinct(scheduler.sigmas)
        if len(sigmas) == len(timesteps):
            # The schedule ends above zero: its last step still goes to the clean sample.
            sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        if _draws_flow_noise(scheduler):  # the sample is (1 - s) x0 + s noise, all noise anew
            return timesteps, (sigmas[:-1] * (1 - sigmas[1:]))[: len(timesteps)]
        return timesteps, sigmas.diff().abs()[: len(timesteps)]
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise ModelError(
            f"no denoising factor is known for {type(scheduler).__name__}; use --loss plain"
        )
    now = _signal_power(table, timesteps)
    following = torch.cat([now[1:], _final_power(scheduler)])
    direct = (1 - following - _fresh_noise(scheduler, eta, now, following)).clamp_min(0).sqrt()
    noise, sample = _parts_per_output(str(scheduler.config.prediction_type), now)
    return timesteps, (direct * noise - following.sqrt() * sample).abs()


def factors_at(timesteps: Sequence[float], known: Sequence[tuple[float, float]]) -> Tensor:
    """Return the denoising factor at each timestep: that of the sampler's nearest one, float64.

    Arguments:
        known: the sampler's (timestep, denoising factor) pairs.
    """
    sampler_timesteps, factors = torch.tensor(known, dtype=torch.float64).unbind(dim=1)
    ours = torch.tensor(timesteps, dtype=torch.float64)
    return factors[(ours[:, None] - sampler_timesteps).abs().argmin(dim=1)]


def loss_weights(factors: Tensor, *, power: float = 1.0) -> Tensor:
    """Return weights of mean 1 proportional to ``factors ** power``.

    A mean of 1 leaves learning rates their meaning. A step whose factor is 0 or not finite gets the
    smallest proper one, because few users want it unlearned.
    """
    proper = factors.isfinite() & (factors > 0)
    if not proper.any():
        return torch.ones_like(factors)
    weights = torch.where(proper, factors, factors[proper].min()).pow(power)
    return weights / weights.mean()


def _distinct(values: Tensor, nearest: float = 0.0) -> Tensor:
    """Return the distinct values from large to small; Heun and PNDM visit some timesteps twice.

    Arguments:
        nearest: a value that is no farther than this below another one counts as that one.
    """
    distinct: Tensor = torch.unique(values.detach().cpu().double()).flip(0)  # type: ignore[no-untyped-call]
    far = distinct.diff().abs() > nearest
    return distinct[torch.cat([far.new_ones(len(distinct[:1])), far])]


def _draws_flow_noise(scheduler: Scheduler) -> bool:
    """Whether a sampler of flow matching takes new noise at each step."""
    is_lcm = type(scheduler).__name__.startswith("FlowMatchLCM")
    return is_lcm or bool(scheduler.config.get("stochastic_sampling"))


def _is_flow_matching(scheduler: Scheduler) -> bool:
    """Whether the scheduler interpolates between noise and data on a straight line."""
    config = scheduler.config
    return (
        "FlowMatch" in type(scheduler).__name__
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
    )


def _final_power(scheduler: Scheduler) -> Tensor:
    """Return the signal power after the last step, ``(1,)``: 1 unless the schedule ends before."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        power = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0))
    else:
        power = 1 / (1 + sigmas[-1].double().square())
    return power.double().cpu().reshape(1)


def _fresh_noise(scheduler: Scheduler, eta: float | None, now: Tensor, following: Tensor) -> Tensor:
    """Return the power of the noise that the sampler draws at each step, ``v``."""
    name = type(scheduler).__name__
    if eta is None and name.startswith("LCM"):
        return 1 - following
    if eta is None:
        is_of_sde = str(scheduler.config.get("algorithm_type")).startswith("sde")
        is_ancestral = name.startswith(("DDPM", "UnCLIP", "CogVideoXDPM"))
        is_ancestral = is_ancestral or "Ancestral" in name or "SDE" in name
        eta = 1.0 if is_of_sde or is_ancestral else 0.0
    return eta**2 * (1 - following) / (1 - now) * (1 - now / following)


def _signal_power(table: Tensor, timesteps: Tensor) -> Tensor:
    """Look up ``abar`` at timesteps; between entries sigma is linear, as in Euler's scheduler.

    It is 0 where nothing but noise is left, at an infinite sigma.
    """
    sigmas = ((1 - table.double()) / table.double()).sqrt().cpu()
    low = timesteps.floor().long().clamp(0, len(table) - 1)
    high = (low + 1).clamp_max(len(table) - 1)
    between = torch.lerp(sigmas[low], sigmas[high], timesteps - low)
    sigma = torch.where(timesteps == low, sigmas[low], between)
    return 1 / (1 + sigma.square())


def _parts_per_output(prediction_type: str, power: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``|d eps / d output|`` and ``|d x0 / d output|`` at signal powers ``abar``."""
    if prediction_type == "epsilon":
        return torch.ones_like(power), ((1 - power) / power).sqrt()
    if prediction_type == "v_prediction":
        return power.sqrt(), (1 - power).sqrt()
    if prediction_type == "sample":
        return (power / (1 - power)).sqrt(), torch.ones_like(power)
    raise ModelError(
        f"no denoising factor is known for prediction type {prediction_type!r}; use --loss plain"
    )
