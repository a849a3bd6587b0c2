import importlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from msfp_cli.errors import UsageError
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.pipelines.sampling import (
    Sampling,
    call_pipeline,
    refuse_settings,
    refuse_untaken,
    say_conditions,
)
from msfp_cli.recording.recipe import RecordOptions
from msfp_cli.recording.record import record_recipes


def test_defaults_take_the_place_of_what_is_none_only() -> None:
    defaults = {"num_inference_steps": 20, "guidance_scale": 3.0}
    assert Sampling().or_else(defaults) == Sampling(num_inference_steps=20, guidance_scale=3.0)
    assert Sampling(guidance_scale=0.0).or_else(defaults) == Sampling(
        num_inference_steps=20, guidance_scale=0.0
    )


@pytest.mark.parametrize(("trained", "is_refused"), [(10, True), (1000, False), (1, False)])
def test_more_steps_than_timesteps_are_refused_where_they_are_counted(
    trained: int, is_refused: bool
) -> None:
    pipe = SimpleNamespace(
        scheduler=SimpleNamespace(config={"num_train_timesteps": trained})  # 1: time is a share
    )
    with pytest.raises(UsageError, match="--steps 20") if is_refused else nullcontext():
        refuse_settings(pipe, Sampling(num_inference_steps=20))


@pytest.mark.parametrize(
    ("size", "is_refused"),
    [({}, False), ({"height": 8}, True), ({"width": 8}, True), ({"height": 8, "width": 8}, False)],
)
def test_half_a_size_is_refused(size: dict[str, int], is_refused: bool) -> None:
    given = "".join(f"--{name}" for name in size)
    line = f"^many pipelines ignore {given} without --.*; give both$"
    with pytest.raises(UsageError, match=line) if is_refused else nullcontext():
        refuse_settings(Measuring(), Sampling(**size))


class OfTwoStages:
    """A stock-like pipeline that holds a prior and a decoder."""

    components: ClassVar[dict[str, object]] = {}

    def __call__(
        self,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
    ) -> None: ...


@pytest.mark.parametrize(("guidance", "count"), [(None, 1), (0.0, 2)])
def test_what_does_not_reach_the_first_stage_is_said(guidance: float | None, count: int) -> None:
    lines: list[str] = []
    progress = SimpleNamespace(log=lines.append)
    pipe = OfTwoStages()
    say_conditions(pipe, [None], Sampling(), progress)
    assert lines == []
    sampling = Sampling(num_inference_steps=3, guidance_scale=guidance)
    say_conditions(pipe, [None], sampling, progress)
    steps = "--steps does not reach the prior of OfTwoStages, whose prior_num_inference_steps stays"
    scale = "--guidance-scale does not reach the prior of OfTwoStages, whose prior_guidance_scale"
    assert lines == [f"{steps} at 25", f"{scale} stays at 4.0"][:count]


CLEANING = """
import importlib.util

if importlib.util.find_spec("absent_words") is not None:
    import absent_words


class CleaningPipeline:
    components = {}

    def __call__(self, prompt, num_inference_steps=2):
        return absent_words.clean(prompt) if num_inference_steps < 5 else wrong
"""


def test_package_that_a_pipeline_imports_where_it_can_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cleaning.py").write_text(CLEANING)
    monkeypatch.syspath_prepend(tmp_path)
    pipe = importlib.import_module("cleaning").CleaningPipeline()
    line = "^CleaningPipeline needs the package absent_words; .*`pip install absent_words`$"
    with pytest.raises(UsageError, match=line):
        call_pipeline(pipe, ["a cat"], Sampling(num_inference_steps=2))
    with pytest.raises(NameError, match="wrong"):
        call_pipeline(pipe, ["a cat"], Sampling(num_inference_steps=9))


@pytest.mark.parametrize(
    ("pipeline", "model", "option"),
    [
        ("DDPMPipeline", "DDPMPipeline", {"height": 16, "width": 16}),
        ("DDPMPipeline", "DDPMPipeline", {"guidance_scale": 3.0}),
        ("StableDiffusionPipeline", "StableDiffusionPipeline", {"num_frames": 5}),
        ("StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline", {"num_frames": 5}),
    ],
)
def test_option_that_a_pipeline_does_not_take_is_refused(
    pipeline: str, model: str, option: dict[str, Any], tiny: Callable[[str], Path]
) -> None:
    source = ModelSource(model=str(tiny(model)), pipeline=pipeline)
    pipe = load_pipeline(source, "cpu")
    name = next(iter(option)).replace("_", "-")
    line = f"^{pipeline} takes no --{name}; leave it out$"
    options = RecordOptions(num_images=1, **option)
    with pytest.raises(UsageError, match=line):
        record_recipes(pipe, source, options)
    with pytest.raises(UsageError, match=line):
        refuse_untaken(pipe, Sampling(**option))
    record_recipes(pipe, source, RecordOptions(num_images=1))


def test_size_is_that_of_given_pictures_where_a_pipeline_takes_none(
    tiny: Callable[[str], Path],
) -> None:
    model = str(tiny("StableDiffusionPipeline"))
    pipe = load_pipeline(ModelSource(model=model, pipeline="StableDiffusionImg2ImgPipeline"), "cpu")
    refuse_untaken(pipe, Sampling(height=16, width=24, guidance_scale=2.0))
    (made,) = call_pipeline(pipe, ["a cat"], Sampling(num_inference_steps=2, height=16, width=24))
    assert made.size == (24, 16)


@pytest.mark.parametrize(
    ("name", "steps", "least"),
    [
        ("StableDiffusionImg2ImgPipeline", 1, 2),  # torch fails
        ("StableDiffusionXLImg2ImgPipeline", 3, 4),
        ("StableDiffusionXLInpaintPipeline", 1, 2),  # the pipeline says so itself
    ],
)
def test_steps_of_which_none_is_left_are_refused(
    name: str, steps: int, least: int, tiny: Callable[[str], Path]
) -> None:
    model = "StableDiffusionXLPipeline" if "XL" in name else "StableDiffusionPipeline"
    pipe = load_pipeline(ModelSource(model=str(tiny(model)), pipeline=name), "cpu")
    with pytest.raises(UsageError, match=f"^--steps {steps} leaves .*at least --steps {least}$"):
        call_pipeline(pipe, ["a cat"], Sampling(num_inference_steps=steps))
    call_pipeline(pipe, ["a cat"], Sampling(num_inference_steps=least))


class Decoder:
    """A network that decodes."""

    def decode(self) -> None:
        """Do nothing."""

    def parameters(self) -> None:
        """Do nothing."""


class Measuring:
    """A pipeline that makes arrays, and no pictures or latents."""

    components: ClassVar[dict[str, object]] = {"vae": Decoder()}

    def __call__(self, generator: list[torch.Generator], output_type: str = "np") -> list:
        """Return an array of noise."""
        noise = torch.rand(1, 8, 8, 3, generator=generator[0])
        if output_type not in ("np", "pt"):
            raise ValueError("`output_type` must be one of `pt` or `np`.")
        return [noise.numpy()]


def test_pipeline_that_makes_arrays_only_is_asked_for_them_with_the_same_noise() -> None:
    expected = torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(0)).numpy()
    made = call_pipeline(Measuring(), [None], Sampling(), output_type="latent")
    assert np.array_equal(made, expected)
    (picture,) = call_pipeline(Measuring(), [None], Sampling())
    assert picture.size == (8, 8)


def test_what_a_pipeline_refuses_is_told_in_its_words(tiny: Callable[[str], Path]) -> None:
    pipe = load_pipeline(ModelSource(model=str(tiny("StableDiffusionPipeline"))), "cpu")
    line = "^StableDiffusionPipeline refuses its arguments: `height` and `width` .*divisible by 8"
    with pytest.raises(UsageError, match=line):
        call_pipeline(pipe, ["a cat"], Sampling(num_inference_steps=1, height=28, width=28))


class Dreaming:
    """A pipeline that takes one prompt, and no list."""

    components: ClassVar[dict[str, object]] = {}

    def __call__(self, prompt: str, generator: list[torch.Generator]) -> list:
        """Return an array of noise."""
        noise = torch.rand(1, 8, 8, 3, generator=generator[0])
        if not isinstance(prompt, str):
            raise ValueError(f"`prompt` has to be of type `str` but is {type(prompt)}")
        return [noise.numpy()]


def test_prompt_is_passed_by_itself_and_several_are_refused_where_one_is_taken() -> None:
    assert len(call_pipeline(Dreaming(), ["a cat"], Sampling())) == 1
    with pytest.raises(UsageError, match="^Dreaming makes one picture a call; .*--batch-size 1$"):
        call_pipeline(Dreaming(), ["a cat", "a dog"], Sampling())


class Compositing(Dreaming):
    """A pipeline that takes one prompt and one generator, and no lists."""

    def __call__(self, prompt: str, generator: torch.Generator) -> list:
        """Return an array of noise."""
        for name, value in (("prompts", prompt), ("generators", generator)):
            if isinstance(value, list):
                raise ValueError(f"Passing a list of {name} is not yet supported.")
        return super().__call__(prompt, [generator])


def test_generator_is_passed_by_itself_too_with_the_same_noise() -> None:
    one, other = (
        call_pipeline(pipe, ["a cat"], Sampling(seed=3)) for pipe in (Compositing(), Dreaming())
    )
    assert np.array_equal(np.asarray(one[0]), np.asarray(other[0]))
    with pytest.raises(UsageError, match="^Compositing makes one picture a call"):
        call_pipeline(Compositing(), ["a cat", "a dog"], Sampling())
