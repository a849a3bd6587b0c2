"""A call of a denoiser as a tree and its tensors."""

import json

import pytest
import torch

from msfp_cli.engines.arguments import Call
from msfp_cli.errors import UsageError

ARGUMENTS = {
    "sample": torch.ones(2, 3, dtype=torch.bfloat16),
    "timestep": 7,
    "added": {"text": torch.zeros(2, dtype=torch.int64), "none": None, "parts": [torch.ones(1), 2]},
}


def test_tree_is_json_and_gives_the_arguments_back() -> None:
    call = Call.of(ARGUMENTS)
    tree = json.loads(json.dumps(call.tree))
    again = call._replace(tree=tree).arguments(call.tensors)
    assert list(call.tensors) == ["sample", "timestep", "added.text", "added.parts.0"]
    assert again["timestep"] == 7
    assert again["added"]["none"] is None
    assert again["added"]["parts"][1] == 2
    assert again["added"]["text"].dtype == torch.int64


def test_floating_point_is_float32_and_the_timestep_a_tensor() -> None:
    tensors = Call.of(ARGUMENTS).tensors
    assert tensors["sample"].dtype == tensors["timestep"].dtype == torch.float32


def test_shapes_and_timesteps_leave_a_tree_alone_and_all_else_does_not() -> None:
    tree = Call.of(ARGUMENTS).tree
    assert (
        Call.of({**ARGUMENTS, "timestep": torch.tensor(9), "sample": torch.ones(5, 1)}).tree == tree
    )
    assert Call.of({**ARGUMENTS, "sample": torch.ones(1, 2, 3)}).tree != tree
    assert Call.of({**ARGUMENTS, "scale": 1.0}).tree != Call.of({**ARGUMENTS, "scale": 2.0}).tree


def test_other_arguments_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="'added.hook' of the denoiser is a function"):
        Call.of({"timestep": 0, "added": {"hook": lambda: None}})
