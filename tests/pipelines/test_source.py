import pytest

from msfp_cli.errors import UsageError
from msfp_cli.pipelines.source import ModelSource, Sampling


def test_unknown_dtype_lists_the_known() -> None:
    with pytest.raises(UsageError, match="'int4'.*float32, float16, bfloat16"):
        ModelSource(model="x", dtype="int4")


def test_defaults_take_the_place_of_what_is_none_only() -> None:
    defaults = {"num_inference_steps": 20, "guidance_scale": 3.0}
    assert Sampling().or_else(defaults) == Sampling(num_inference_steps=20, guidance_scale=3.0)
    assert Sampling(guidance_scale=0.0).or_else(defaults) == Sampling(
        num_inference_steps=20, guidance_scale=0.0
    )
