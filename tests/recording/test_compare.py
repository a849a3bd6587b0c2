import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.layers.replace import find_layers
from msfp_cli.pipelines.denoiser import replay
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.recording.compare import (
    OutputError,
    SquaredError,
    layer_errors,
    output_error,
    relative_error,
)
from msfp_cli.recording.result import Recording

Recordings = tuple[Recording, Recording]


def test_relative_error_is_the_share_of_the_signal() -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert relative_error(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0])) == 4 / 5
    assert relative_error(values, values) == 0
    assert relative_error(torch.zeros(3, 4), values) == 1
    assert relative_error(torch.ones(2), torch.zeros(2)) == 0


def test_sum_of_errors_is_the_error_of_both_together() -> None:
    values, exact = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    parts = SquaredError.of(values[:3], exact[:3]) + SquaredError.of(values[3:], exact[3:])
    assert abs(parts.relative - relative_error(values, exact)) < 1e-12


def test_error_is_summed_in_double_precision() -> None:
    exact = torch.tensor([1.0, 2.0**-40]).half()
    assert (
        SquaredError.of(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0**-40])).error == 2.0**-80
    )
    assert SquaredError.of(exact, exact) == SquaredError(0.0, 1.0)


def test_errors_are_summed_before_they_are_divided() -> None:
    error = OutputError()
    error.add(500.0, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    error.add(10.0, torch.tensor([0.0, 0.0]), torch.tensor([0.0, 4.0]))
    error.add(500.0, torch.tensor([3.0]), torch.tensor([1.0]))
    assert error.by_timestep() == [(500.0, 5 / 3), (10.0, 1.0)]
    assert error.absolute() == {500.0: 5.0, 10.0: 16.0}
    assert error.relative() == 21 / 19
    assert OutputError().relative() == 0


def test_full_precision_has_no_error_and_a_quantized_model_has(
    tiny_pipe: DiffusionPipeline, tiny_recordings: Recordings, tiny_chained: object
) -> None:
    calls = list(tiny_recordings[1].calls("unet"))
    assert output_error(tiny_pipe.unet, calls).relative() == 0
    calibration: Calibration = tiny_chained.calibration  # type: ignore[attr-defined]
    quantized = load_calibrated(calibration, "cpu").unet
    outputs = torch.cat([replay(quantized, call).double() for call in calls])
    wanted = torch.cat([call.output.double() for call in calls])
    expected = float((outputs - wanted).square().sum() / wanted.square().sum())
    assert abs(output_error(quantized, calls).relative() / expected - 1) < 1e-9


def test_equal_denoisers_have_no_error_in_any_layer(
    tiny_source: ModelSource, tiny_pipe: DiffusionPipeline, tiny_recordings: Recordings
) -> None:
    names, calls = list(find_layers(tiny_pipe.unet)), list(tiny_recordings[1].calls("unet"))
    other = load_pipeline(tiny_source, "cpu").unet
    assert layer_errors(tiny_pipe.unet, other, names, calls) == dict.fromkeys(names, 0.0)


def test_an_error_shows_where_it_arises_and_further_on_but_not_before(
    tiny_source: ModelSource, tiny_pipe: DiffusionPipeline, tiny_recordings: Recordings
) -> None:
    names, calls = list(find_layers(tiny_pipe.unet)), list(tiny_recordings[1].calls("unet"))
    disturbed = load_pipeline(tiny_source, "cpu").unet
    layer = disturbed.get_submodule("mid_block.resnets.0.conv1")
    layer.weight.data *= 1.1
    layer.bias.data *= 1.1
    errors = layer_errors(disturbed, tiny_pipe.unet, names, calls)
    assert abs(errors["mid_block.resnets.0.conv1"] - 0.01) < 1e-6
    assert errors["conv_in"] == errors["down_blocks.0.resnets.0.conv1"] == 0
    assert errors["conv_out"] > 0


class Twice(nn.Module):
    """Runs one layer twice and another one never."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
        self.layer.weight.data = torch.eye(2)

    def forward(
        self, sample: torch.Tensor, timestep: float, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        return (self.layer(self.layer(sample)),)


def test_layer_that_runs_twice_counts_twice_and_an_idle_one_not_at_all() -> None:
    from msfp_cli.pipelines.denoiser import DenoiserCall

    sample = torch.ones(1, 2)
    call = DenoiserCall(
        component="unet", timestep=1.0, arguments={"sample": sample, "timestep": 1.0}, output=sample
    )
    doubled = Twice()
    doubled.layer.weight.data *= 2
    errors = layer_errors(doubled, Twice(), ["layer", "idle"], [call])
    assert errors == {"layer": ((2 - 1) ** 2 + (4 - 1) ** 2) / 2, "idle": 0.0}
