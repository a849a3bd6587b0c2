"""What several tests of evaluations share."""

from dataclasses import replace

import pytest
import torch

from conftest import CHEAP, TWO_PICTURES, Chained, chain
from tiny_pipelines import BUILDERS


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Chained:
    """Calibrate and export a model of the smallest one's architecture with other weights."""
    directory = tmp_path_factory.mktemp("other")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        BUILDERS["DDIMPipeline"]().save_pretrained(directory / "model")
    return chain(
        directory / "model", directory / "run", TWO_PICTURES, replace(CHEAP, formats="e2m1,ue2m2")
    )
