import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from msfp_cli.calibration.observe import observe
from msfp_cli.errors import CalibrationError
from msfp_cli.pipelines.denoiser import DenoiserCall


class Flexible(nn.Module):
    """A denoiser with torch's flex attention, as AnyFlow's autoregressive one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, sample: Tensor, timestep: float, return_dict: bool = True) -> tuple[Tensor]:
        """Attend to the sample."""
        x = self.layer(sample)
        return (flex_attention(x, x, x),)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_denoiser_that_cannot_be_followed_is_refused_by_its_operator() -> None:
    sample = torch.zeros(1, 1, 16, 16)
    call = DenoiserCall(
        component="transformer",
        timestep=5.0,
        arguments={"sample": sample, "timestep": 5.0},
        output=sample,
    )
    with pytest.raises(CalibrationError, match="^Flexible runs torch's flex_attention, inside"):
        observe(
            Flexible(),
            [call],
            1,
            max_samples=10,
            generator=torch.Generator(),
            advance=lambda steps: None,
        )
