"""Calibration in bounded memory chooses what calibration of the whole model chooses."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import QUICK, TWO_PICTURES, Invoke, only_line
from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.calibration.result import Calibration
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.run import Run

GROUPED = dataclasses.replace(QUICK, activations=8, weight_groups=16, lift=0.2)
CASES = {
    "StableDiffusionPipeline": QUICK,
    "FluxPipeline": QUICK,
    "DiTPipeline": GROUPED,
}


@pytest.mark.parametrize("name", CASES)
def test_formats_codes_and_errors_are_those_of_the_whole_model(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    found = dict[str, Calibration]()
    for way, max_memory in (("whole", None), ("bounded", 1)):
        run = Run(tmp_path / way)
        source = ModelSource(model=str(tiny(name)))
        options = {"device": "cpu", "max_memory": max_memory}
        calibrate_run(run, source, TWO_PICTURES, CASES[name], **options)
        found[way] = Calibration.load(run.calibration)
    assert found["bounded"].identity() == found["whole"].identity()
    assert found["bounded"].layers == found["whole"].layers
    assert found["bounded"].held_out_error == found["whole"].held_out_error


def test_a_recording_of_the_whole_model_is_used_again(
    tiny_source: ModelSource, msfp: Invoke, tmp_path: Path
) -> None:
    sizes = ("--num-images", "2", "--steps", "1", "--lift", "0", "--rounding", "nearest")
    command = ["calibrate", tiny_source.model, "--run", tmp_path / "run", *sizes]
    assert msfp(*command).exit_code == 0
    shards = sorted((tmp_path / "run" / "recording").glob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in shards]
    assert msfp(*command, "--overwrite", "--max-memory", "2GiB").exit_code == 0
    assert [path.stat().st_mtime_ns for path in shards] == before


def test_a_size_that_is_none_is_refused(msfp: Invoke) -> None:
    result = msfp("calibrate", "--max-memory", "much")
    assert only_line(result, 2).startswith("--max-memory 'much' is not a size; write for instance")
