from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from msfp_cli.errors import UsageError
from msfp_cli.pipelines.sampling import Sampling, refuse_steps


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
        refuse_steps(pipe, Sampling(num_inference_steps=20))
