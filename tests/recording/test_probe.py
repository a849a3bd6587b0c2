"""One call is enough to know what a recording takes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from msfp_cli.errors import UsageError
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.recording.probe import probe
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.recording.record import record_calls
from tiny_pipelines import with_controlnet

CONDITIONS = {"DDIMPipeline": None, "StableDiffusionPipeline": "a cat", "DiTPipeline": "1"}


@pytest.mark.parametrize("name", CONDITIONS)
def test_what_one_call_says_is_what_the_recording_takes(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = ModelSource(model=str(tiny(name)))
    pipe = load_pipeline(source, "cpu")
    conditions = (CONDITIONS[name],) * 2
    recipe = RecordRecipe(
        conditions=conditions, num_inference_steps=3, guidance_scale=4.0, batch_size=2
    )
    cost = probe(pipe, recipe)
    recording = record_calls(pipe, source, recipe, tmp_path / "recording")
    calls = recording.shard(0)
    size = recording.shard_path(0).stat().st_size
    assert cost.steps == len(calls)
    assert cost.rows == len(calls[0].output)
    assert 0.5 * size < cost.num_bytes < 2.2 * size  # half of DiT's output is not recorded
    assert cost.seconds > 0


def test_controlnet_is_not_taken_for_the_denoiser(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[nn.Module]()
    monkeypatch.setattr("msfp_cli.recording.probe._seconds", lambda module, *_: seen.append(module))
    pipe = load_pipeline(ModelSource(model=str(tiny("StableDiffusionPipeline"))), "cpu")
    pipe = with_controlnet(pipe)
    pipe.controlnet.larger = nn.Linear(1000, 1000)
    probe(pipe, RecordRecipe(conditions=("a cat",), num_inference_steps=2))
    assert seen == [pipe.unet]


class Preparing:
    """A pipeline that needs what another method of it makes before, as LEdits++ does."""

    def __init__(self, unet: nn.Module) -> None:
        self.components = {"unet": unet}

    def __call__(self, num_inference_steps: int = 2) -> None:
        """Fail."""
        self.unprepared  # noqa: B018


class Asserting(Preparing):
    """A pipeline whose checks have no words."""

    def __call__(self, num_inference_steps: int = 2) -> None:
        """Fail."""
        raise AssertionError  # steps


def test_failure_without_words_is_told_by_the_line_that_failed(tiny: Callable[[str], Path]) -> None:
    pipe = load_pipeline(ModelSource(model=str(tiny("DDIMPipeline"))), "cpu")
    recipe = RecordRecipe(conditions=(None,), num_inference_steps=2)
    line = r"^Asserting fails .*\(AssertionError: raise AssertionError  # steps\); if"
    with pytest.raises(UsageError, match=line):
        probe(Asserting(pipe.unet), recipe)


def test_pipeline_that_needs_more_is_refused_in_one_line(tiny: Callable[[str], Path]) -> None:
    pipe = load_pipeline(ModelSource(model=str(tiny("DDIMPipeline"))), "cpu")
    unet = pipe.unet
    recipe = RecordRecipe(conditions=(None,), num_inference_steps=2)
    line = r"^Preparing fails when it is called \(AttributeError: .*unprepared.*--pipeline CLASS$"
    with pytest.raises(UsageError, match=line) as refusal:
        probe(Preparing(unet), recipe)
    assert isinstance(refusal.value.__cause__, AttributeError)  # `msfp --debug` shows where
    assert not unet._forward_hooks and not unet._forward_pre_hooks
    assert probe(pipe, recipe).seconds > 0  # as it says: another pipeline of the same model
