"""Loss weights: mean 1, in proportion to a power of the denoising factor."""

import pytest
import torch

from msfp_cli.errors import RunError
from msfp_cli.finetuning.loss_weights import loss_weights, timestep_weights
from msfp_cli.finetuning.recipe import FinetuneRecipe


def test_weights_follow_the_denoising_factors_with_mean_one() -> None:
    factors = [(750.0, 0.5), (500.0, 0.25), (250.0, 0.75)]
    whole = FinetuneRecipe(loss_power=1.0)
    weights = timestep_weights([750.0, 500.0, 250.0], factors, whole, 1.0)
    assert weights == pytest.approx({750.0: 1.0, 500.0: 0.5, 250.0: 1.5})
    assert timestep_weights([0.75, 0.5, 0.25], factors, whole, 1000.0) == pytest.approx(
        {0.75: 1.0, 0.5: 0.5, 0.25: 1.5}
    )
    roots = timestep_weights([750.0, 500.0, 250.0], factors, FinetuneRecipe(), 1.0)
    assert sum(roots.values()) == pytest.approx(3.0)
    assert (roots[250.0] / roots[500.0]) ** 4 == pytest.approx(3.0)
    assert timestep_weights([0.75, 0.5], factors, FinetuneRecipe(loss="plain"), 1000.0) == {
        0.75: 1.0,
        0.5: 1.0,
    }
    with pytest.raises(RunError, match="use --loss plain"):
        timestep_weights([750.0], None, FinetuneRecipe(), 1.0)


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
