"""One call is enough to know what a recording takes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.recording.probe import probe
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.recording.record import record_calls

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
