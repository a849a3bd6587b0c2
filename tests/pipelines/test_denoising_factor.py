"""The denoising factor: closed forms, agreement of samplers, and what `scheduler.step` does."""

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)

from msfp_cli.errors import ModelError
from msfp_cli.pipelines.denoising_factor import denoising_factors, loss_weights

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAILING = {**BETAS, "timestep_spacing": "trailing"}


def prepared(kind: Any, steps: int = 20, **settings: Any) -> Any:  # noqa: ANN401
    scheduler = kind(**settings)
    scheduler.set_timesteps(steps)
    return scheduler


def powers(scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    """Return abar at the timesteps and at the ones that follow, the last of which is clean."""
    now = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    return now, torch.cat([now[1:], torch.ones(1, dtype=torch.float64)])


def step_coefficient(scheduler: Any, timestep: torch.Tensor, **arguments: Any) -> float:  # noqa: ANN401
    """Probe the scheduler's own step with two outputs; their noise is equal and cancels."""
    sample = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    previous = [
        scheduler.step(
            torch.full_like(sample, value),
            timestep,
            sample,
            generator=torch.Generator().manual_seed(0),
            **arguments,
        ).prev_sample
        for value in (0.0, 1.0)
    ]
    return float((previous[1] - previous[0]).abs().mean())


def test_ddpm_on_its_full_schedule_equals_the_textbook_form() -> None:
    scheduler = prepared(DDPMScheduler, 1000, **BETAS)
    timesteps, factors = denoising_factors(scheduler)
    alphas, bars = scheduler.alphas.double().flip(0), scheduler.alphas_cumprod.double().flip(0)
    textbook = (1 - alphas) / (alphas.sqrt() * (1 - bars).sqrt())
    assert timesteps.tolist() == list(range(999, -1, -1))
    # The scheduler keeps abar in float32, so 1 - abar has few digits left near the clean end.
    torch.testing.assert_close(factors, textbook, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_equals_its_own_step(eta: float, prediction_type: str) -> None:
    settings = {
        **TRAILING,
        "prediction_type": prediction_type,
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
    scheduler = prepared(DDIMScheduler, **settings)
    _, factors = denoising_factors(scheduler, eta=eta)
    stepped = [step_coefficient(scheduler, t, eta=eta) for t in scheduler.timesteps]
    torch.testing.assert_close(factors.float(), torch.tensor(stepped), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_step_from_pure_noise_has_the_factor_of_ddims_own_step(prediction_type: str) -> None:
    settings = {**TRAILING, "rescale_betas_zero_snr": True, "prediction_type": prediction_type}
    scheduler = prepared(DDIMScheduler, **settings, clip_sample=False)
    assert scheduler.alphas_cumprod[-1] == 0
    _, factors = denoising_factors(scheduler)
    stepped = [step_coefficient(scheduler, t) for t in scheduler.timesteps]
    torch.testing.assert_close(factors.float(), torch.tensor(stepped), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_equals_the_closed_form(eta: float) -> None:
    scheduler = prepared(DDIMScheduler, **TRAILING)
    now, following = powers(scheduler)
    sigma2 = eta**2 * (1 - following) / (1 - now) * (1 - now / following)
    closed = (
        (1 - following - sigma2).clamp_min(0).sqrt() - (following * (1 - now) / now).sqrt()
    ).abs()
    torch.testing.assert_close(
        denoising_factors(scheduler, eta=eta)[1], closed, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_samplers_of_one_equation_agree_on_equal_timesteps(kind: Any, prediction_type: str) -> None:  # noqa: ANN401
    reference = prepared(DDIMScheduler, **TRAILING, prediction_type=prediction_type)
    other = prepared(kind, **TRAILING, prediction_type=prediction_type)
    timesteps, factors = denoising_factors(other)
    expected_timesteps, expected = denoising_factors(reference)
    torch.testing.assert_close(timesteps, expected_timesteps)
    torch.testing.assert_close(factors, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_multistep_solvers_have_the_first_order_factor_of_their_timesteps(kind: Any) -> None:  # noqa: ANN401
    scheduler = prepared(kind, **TRAILING)
    now, following = powers(scheduler)
    sigma, following_sigma = ((1 - now) / now).sqrt(), ((1 - following) / following).sqrt()
    closed = (following_sigma - sigma).abs() / (1 + following_sigma.square()).sqrt()
    torch.testing.assert_close(denoising_factors(scheduler)[1], closed, rtol=1e-9, atol=1e-12)


def test_first_order_dpm_solver_equals_its_own_step() -> None:
    scheduler = prepared(
        DPMSolverMultistepScheduler, **TRAILING, solver_order=1, algorithm_type="dpmsolver++"
    )
    _, factors = denoising_factors(scheduler)
    stepped = []
    for i, t in enumerate(scheduler.timesteps[:-1]):
        scheduler._step_index = i
        first = scheduler.step(torch.zeros(1, 1, 2, 2), t, torch.zeros(1, 1, 2, 2)).prev_sample
        scheduler._step_index = i
        stepped.append(
            float(
                (
                    scheduler.step(torch.ones(1, 1, 2, 2), t, torch.zeros(1, 1, 2, 2)).prev_sample
                    - first
                ).mean()
            )
        )
    torch.testing.assert_close(
        factors[:-1].float(), torch.tensor(stepped).abs(), rtol=1e-3, atol=1e-5
    )


def test_eulers_factor_is_its_step_rescaled_to_unit_variance() -> None:
    scheduler = prepared(EulerDiscreteScheduler, **TRAILING)
    _, factors = denoising_factors(scheduler)
    naive = scheduler.sigmas.double().diff().abs()
    rescaled = naive / (1 + scheduler.sigmas[1:].double().square()).sqrt()
    torch.testing.assert_close(factors, rescaled, rtol=1e-4, atol=1e-6)
    assert float(naive[0]) > 3 * float(
        factors[0]
    )  # the trap: read naively, the first step looks enormous


def stepped_alone(scheduler: Any) -> torch.Tensor:  # noqa: ANN401
    """Probe the scheduler's own step at each of its timesteps, as if it were the first one."""
    steps = []
    for index, timestep in enumerate(scheduler.timesteps):
        twin = prepared(type(scheduler), len(scheduler.timesteps), **scheduler.config)
        twin.is_scale_input_called = True
        twin.step = partial(_step_at, twin.step, twin, index)
        steps.append(step_coefficient(twin, timestep))
    return torch.tensor(steps)


def _step_at(step: Any, scheduler: Any, index: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    scheduler._step_index = index
    return step(*args, **kwargs)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ancestral_samplers_have_the_factor_of_their_own_step(prediction_type: str) -> None:
    settings = {**TRAILING, "prediction_type": prediction_type}
    scheduler = prepared(EulerAncestralDiscreteScheduler, 12, **settings)
    rescaled = stepped_alone(scheduler) / (1 + scheduler.sigmas[1:].square()).sqrt()
    factors = denoising_factors(scheduler)[1].float()
    torch.testing.assert_close(factors, rescaled, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DPMSolverMultistepScheduler, {"solver_order": 1, "final_sigmas_type": "sigma_min"}),
        (DPMSolverMultistepScheduler, {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
        (LCMScheduler, {}),
    ],
)
def test_samplers_that_draw_noise_or_end_above_zero_have_the_factor_of_their_own_step(
    kind: Any,  # noqa: ANN401
    settings: dict[str, Any],
    prediction_type: str,
) -> None:
    scheduler = prepared(kind, 12, **BETAS, **settings, prediction_type=prediction_type)
    factors = denoising_factors(scheduler)[1].float()
    torch.testing.assert_close(factors, stepped_alone(scheduler), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_unclip_has_the_factor_of_its_own_step(prediction_type: str) -> None:
    scheduler = prepared(UnCLIPScheduler, 12, prediction_type=prediction_type, clip_sample=False)
    steps = scheduler.timesteps
    stepped = [
        step_coefficient(scheduler, now, prev_timestep=following)
        for now, following in zip(steps[:-1], steps[1:], strict=True)
    ]
    factors = denoising_factors(scheduler)[1].float()
    torch.testing.assert_close(factors[:-1], torch.tensor(stepped), rtol=1e-3, atol=1e-5)


def test_solver_of_cogvideox_has_the_factor_of_its_own_step() -> None:
    settings = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = prepared(CogVideoXDPMScheduler, 10, **settings)
    sample = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    stepped = []
    for now in scheduler.timesteps:
        ends = [
            scheduler.step(
                torch.full_like(sample, value),
                None,
                now,
                None,
                sample,
                generator=torch.Generator().manual_seed(0),
            )[0]
            for value in (0.0, 1.0)
        ]
        stepped.append(float((ends[1] - ends[0]).abs().mean()))
    factors = denoising_factors(scheduler)[1].float()
    torch.testing.assert_close(factors, torch.tensor(stepped), rtol=2e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers
def test_pairs_of_timesteps_are_one_step() -> None:
    scheduler = prepared(KDPM2AncestralDiscreteScheduler, 8, **BETAS)
    timesteps, factors = denoising_factors(scheduler)
    assert len(timesteps) < len(scheduler.timesteps)
    assert bool((timesteps.diff() < -0.01).all()) and bool((factors[:-1] > 1e-3).all())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
        (FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "stochastic_sampling": True}),
        (FlowMatchLCMScheduler, {"shift": 3.0}),
    ],
)
def test_flow_matching_has_the_factor_of_its_own_step(
    kind: Any,  # noqa: ANN401
    settings: dict[str, Any],
) -> None:
    scheduler = prepared(kind, 8, **settings)
    timesteps, factors = denoising_factors(scheduler)
    torch.testing.assert_close(factors.float(), stepped_alone(scheduler), rtol=1e-4, atol=1e-6)
    assert timesteps.tolist() == [float(t) for t in scheduler.timesteps]


def test_weights_have_mean_one_and_keep_the_order() -> None:
    factors = torch.tensor([0.3, 0.2, 0.1, 0.05], dtype=torch.float64)
    weights = loss_weights(factors)
    assert float(weights.mean()) == pytest.approx(1)
    torch.testing.assert_close(weights / weights[0], factors / factors[0])
    assert loss_weights(factors, power=0.0).tolist() == pytest.approx([1, 1, 1, 1])


def test_weights_of_improper_factors_are_the_smallest_proper_one() -> None:
    weights = loss_weights(
        torch.tensor([0.4, 0.0, float("inf"), float("nan"), 0.2], dtype=torch.float64)
    )
    assert weights.isfinite().all()
    assert weights[1] == weights[2] == weights[3] == weights[4] < weights[0]
    assert loss_weights(torch.zeros(3)).tolist() == [1, 1, 1]


def test_unknown_prediction_type_is_refused() -> None:
    scheduler = prepared(DDIMScheduler, **TRAILING)
    scheduler.register_to_config(prediction_type="something")
    with pytest.raises(ModelError, match="--loss plain"):
        denoising_factors(scheduler)
