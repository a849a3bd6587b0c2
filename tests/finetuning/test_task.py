"""What a denoiser is trained on: the loss weights of its timesteps."""

import pytest

from msfp_cli.errors import RunError
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.task import timestep_weights


def test_weights_follow_the_denoising_factors_with_mean_one() -> None:
    factors = [(750.0, 0.5), (500.0, 0.25), (250.0, 0.75)]
    whole = FinetuneRecipe(loss_power=1.0)
    weights = timestep_weights([750.0, 500.0, 250.0], factors, whole)
    assert weights == pytest.approx({750.0: 1.0, 500.0: 0.5, 250.0: 1.5})
    roots = timestep_weights([750.0, 500.0, 250.0], factors, FinetuneRecipe())
    assert sum(roots.values()) == pytest.approx(3.0)
    assert (roots[250.0] / roots[500.0]) ** 4 == pytest.approx(3.0)
    plain = timestep_weights([750.0, 500.0], factors, FinetuneRecipe(loss="plain"))
    assert plain == {750.0: 1.0, 500.0: 1.0}
    with pytest.raises(RunError, match="use --loss plain"):
        timestep_weights([750.0], None, FinetuneRecipe())
