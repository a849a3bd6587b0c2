"""Which networks are denoisers, and how they are told the time, is learned by watching."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from conftest import CONDITIONS
from msfp_cli.errors import CalibrationError, ModelError
from msfp_cli.layers.clock import Clock
from msfp_cli.pipelines.conditions import conditioning_of
from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.pipelines.discovery import _number, clock_of, learn_clocks, refuse_idle
from msfp_cli.pipelines.rows import join_rows, take_rows
from msfp_cli.pipelines.sampling import Sampling, call_pipeline
from msfp_cli.pipelines.watch import watch_calls
from tiny_pipelines import BUILDERS, build_tiny

FLOW = [1000.0, 947.0, 857.0, 667.0]  # FlowMatchEuler, shift 6, 4 steps


def learned(times: Sequence[float], **arguments: Sequence[float]) -> Clock:
    """Return the clock of a denoiser with these arguments at each step."""
    rows = [
        dict(zip(arguments, values, strict=True))
        for values in zip(*arguments.values(), strict=True)
    ]
    return clock_of("unet", list(zip(rows, times, strict=True)))


@pytest.mark.parametrize(
    ("times", "values", "expected"),
    [
        ([999, 666, 333, 0], [999, 666, 333, 0], [999, 666, 333, 0]),
        ([501, 1], [501, 1], [501, 1]),  # Stable Diffusion, two steps
        (FLOW, [1, 0.947, 0.857, 0.667], FLOW),  # Flux
        (FLOW, [0, 0.053, 0.143, 0.333], FLOW),  # Lumina 2, Z-Image, OmniGen
        (FLOW, [0.0, 0.0530, 0.1426, 0.3340], FLOW),  # the same in bfloat16
        ([0, 53, 143, 333], [1000, 947, 857, 667], FLOW),  # a scheduler that counts up
        ([1, 0.5, 0.1], [1, 0.5, 0.1], [1000, 500, 100]),  # Stable Cascade
        ([1.5708, 1.0, 0.2], [1.000004, 0.782708, 0.2], [1000, 728.4, 0]),  # Sana-Sprint
        ([1.0955, -0.2291, -1.5537], [1.0955, -0.2291, -1.5537], [1000, 500, 0]),  # EDM
        ([1.0955, -0.2291, -1.5537], [-1.0955, 0.2291, 1.5537], [1000, 500, 0]),
        ([700, 700, 300], [700, 700, 300], [700, 700, 300]),  # Heun, or several calls a step
    ],
    ids=str,
)
def test_timesteps_run_from_1000_at_noise_to_0(
    times: Sequence[float], values: Sequence[float], expected: Sequence[float]
) -> None:
    clock = learned(times, other=[3.0] * len(times), t=values)
    assert clock.argument == "t"
    assert [clock.read(value) for value in values] == pytest.approx(expected, abs=1.5)


def test_of_two_arguments_that_follow_the_time_the_usual_one_is_taken() -> None:
    clock = learned(FLOW, guidance=[9, 8, 7, 6], r=[0.947, 0.857, 0.667, 0], timestep=FLOW)
    assert clock == Clock()


def test_denoiser_that_is_not_told_the_time_is_refused() -> None:
    with pytest.raises(ModelError, match="no argument of 'unet' goes with the timesteps"):
        learned(FLOW, guidance=[7, 7, 7, 7], noise=[0.1, 0.3, 0.2, 0.4])


@pytest.mark.parametrize("given", [0.0, 1e-4])
def test_tokens_that_are_given_have_a_time_of_their_own(given: float) -> None:
    pairs = []
    for time in FLOW:
        tokens = torch.full((1, 1, 5, 1), time / 1000)
        tokens[:, :, :2] = given
        pairs.append(({"timestep": _number(tokens)}, time))
    assert clock_of("transformer", pairs).read(tokens) == pytest.approx(FLOW[-1])
    assert _number(torch.tensor([0.5, given or 0.25])) is None  # two rows


def draw(pipe: Any) -> Callable[[], object]:  # noqa: ANN401 (a pipeline)
    conditions = CONDITIONS[conditioning_of(pipe)]
    sampling = Sampling(num_inference_steps=2)
    return lambda: call_pipeline(pipe, conditions, sampling, output_type="latent")


@pytest.mark.parametrize("name", BUILDERS)
def test_denoiser_of_each_family_is_found(name: str) -> None:
    pipe = build_tiny(name)
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    scale = 1000.0 if name == "FluxPipeline" else 1.0
    assert learn_clocks(pipe, draw(pipe)) == {component: Clock(scale=scale)}
    assert not any(
        part._forward_pre_hooks for part in pipe.components.values() if isinstance(part, nn.Module)
    )
    assert "step" not in vars(pipe.scheduler)


def test_network_that_helps_the_denoiser_is_not_one() -> None:
    parts = build_tiny("StableDiffusionPipeline").components
    parts["controlnet"] = ControlNetModel.from_unet(
        parts["unet"], conditioning_embedding_out_channels=(8, 8)
    )
    pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    picture = torch.zeros(1, 3, 32, 32)
    clocks = learn_clocks(pipe, lambda: pipe("a cat", image=picture, num_inference_steps=2))
    assert clocks == {"unet": Clock()}


class Network(nn.Module):
    def forward(self, x: Tensor, r: float) -> Tensor:
        return x


class Scheduler:
    def step(self, model_output: Tensor, timestep: float, sample: Tensor) -> Tensor:
        return sample


def test_denoisers_of_several_stages_each_have_their_clock() -> None:
    high, low, vae = Network(), Network(), nn.Identity()
    first, second = Scheduler(), Scheduler()
    parts = {"low": low, "high": high, "vae": vae, "scheduler": first, "prior_scheduler": second}

    def run() -> None:
        for time, network, scheduler in (
            (1.0, high, second),
            (0.4, high, second),
            (900, low, first),
        ):
            for _ in range(2):  # guided
                network(torch.zeros(2), r=time)
            scheduler.step(torch.zeros(2), time, torch.zeros(2))
        low(torch.zeros(2), r=100)
        first.step(torch.zeros(2), timestep=100, sample=torch.zeros(2))
        vae(torch.zeros(2))

    clocks = learn_clocks(SimpleNamespace(components=parts), run)
    assert clocks == {"high": Clock(argument="r", scale=1000.0), "low": Clock(argument="r")}


def test_call_that_fills_a_cache_before_a_step_has_a_time_of_its_own() -> None:
    network, scheduler = Network(), Scheduler()

    def run() -> None:
        for time in (900.0, 400.0):
            for own in (0.0, time):
                network(torch.zeros(2), r=own)
            scheduler.step(torch.zeros(2), time, torch.zeros(2))

    pipe = SimpleNamespace(components={"transformer": network, "scheduler": scheduler})
    assert learn_clocks(pipe, run) == {"transformer": Clock(argument="r")}


def test_denoiser_that_never_ran_is_refused_by_name() -> None:
    parts = {"high": Network(), "low": Network(), "vae": nn.Identity(), "scheduler": Scheduler()}
    pipe = SimpleNamespace(components=parts)
    refuse_idle(pipe, {"high": Clock()}, {"high", "low"})
    with pytest.raises(CalibrationError, match="^low never ran .*; give more --steps"):
        refuse_idle(pipe, {"high": Clock()}, {"high"})  # not learned, but of the same class
    with pytest.raises(CalibrationError, match="^low never ran .*; give more --steps"):
        refuse_idle(pipe, {"high": Clock(), "low": Clock()}, {"high"})


def test_pipeline_whose_networks_run_before_no_step_has_no_denoiser() -> None:
    parts = {"network": Network(), "scheduler": Scheduler(), "tokenizer": None}
    with pytest.raises(ModelError, match=r"no denoiser: .* \(it has network, scheduler\)"):
        learn_clocks(SimpleNamespace(components=parts), lambda: None)


@pytest.fixture(scope="module")
def z_image() -> ZImagePipeline:
    """Return a pipeline whose denoiser takes and returns lists, at a time that counts up."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[64] * 3,
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.ones_(token)
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_z_image_is_recorded_and_replayed_row_by_row(z_image: ZImagePipeline) -> None:
    embeddings = [
        torch.randn(5 + i, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)
    ]

    def run() -> None:
        z_image(
            prompt_embeds=embeddings,
            negative_prompt_embeds=[torch.zeros(3, 16)] * 2,
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_scale=2.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )

    clocks = learn_clocks(z_image, run)
    assert clocks == {"transformer": Clock(argument="t", scale=-1000.0, offset=1000.0)}
    calls = list[DenoiserCall]()
    with watch_calls({"transformer": z_image.transformer}, calls.append, clocks):
        run()
    times = z_image.scheduler.timesteps.tolist()
    assert [call.timestep for call in calls] == pytest.approx(times, abs=1e-3)
    for call in calls:
        assert call.is_listed and torch.equal(replay(z_image.transformer, call), call.output)
        part = take_rows(call, torch.tensor([3, 0]))
        torch.testing.assert_close(replay(z_image.transformer, part), part.output)
    (joined,) = join_rows([(calls[0], 1), (calls[2], 2)])
    again = torch.stack(list(z_image.transformer(**joined.arguments, return_dict=False)[0]))
    torch.testing.assert_close(again, joined.output)
