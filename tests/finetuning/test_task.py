"""What a denoiser is trained on: the loss weights of its timesteps."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from msfp_cli.errors import RunError
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.task import refuse_different_replay, timestep_weights
from msfp_cli.pipelines.rows import JoinedCall


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


class Packing(nn.Module):
    """A denoiser that answers some batches and fails on others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        if len(sample) > 2:
            raise RuntimeError("sizes differ\nin dimension 0")
        return (sample * self.weight,)


@pytest.mark.parametrize(
    ("rows", "recorded", "message"),
    [
        (3, 1.0, r"unet cannot be called .* \(sizes differ\), .* exports the calibration$"),
        (2, 2.0, "changes the output of unet .*mixed up"),
        (2, 1.0, None),
    ],
)
def test_denoiser_that_does_not_answer_new_batches_as_before_is_refused(
    rows: int, recorded: float, message: str | None
) -> None:
    call = JoinedCall(
        timesteps=(500.0,) * rows,
        arguments={"sample": torch.ones(rows, 4)},
        output=torch.full((rows, 4), recorded),
    )
    batches = SimpleNamespace(batch=lambda update, number: [call])
    if message is None:
        refuse_different_replay(Packing(), "unet", batches)
    else:
        with pytest.raises(RunError, match=message):
            refuse_different_replay(Packing(), "unet", batches)
