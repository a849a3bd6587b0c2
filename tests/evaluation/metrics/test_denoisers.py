"""Histograms of what reaches every layer, and the size of denoisers."""

import struct

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import Chained, Finetuned
from msfp_cli.checkpoint.quantizer import saved_tensors
from msfp_cli.evaluation.metrics.denoisers import denoiser_bytes, input_histograms
from msfp_cli.files.documents import digest
from msfp_cli.layers.replace import find_layers
from msfp_cli.pipelines.denoiser import DenoiserCall, find_denoisers
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.recording.result import Recording


def test_histograms_count_what_reaches_every_layer(
    tiny_pipe: DiffusionPipeline, tiny_recordings: tuple[Recording, Recording]
) -> None:
    calls = list(tiny_recordings[1].calls("unet"))
    found, inputs = input_histograms(tiny_pipe.unet, calls), dict[str, list[Tensor]]()
    layers = find_layers(tiny_pipe.unet)
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, args, out, name=name: inputs.setdefault(name, []).append(args[0])
        )
    for call in calls:
        tiny_pipe.unet(**call.arguments)
    assert found.keys() == inputs.keys() == layers.keys()
    for name, histogram in found.items():
        values = torch.cat([each.detach().flatten() for each in inputs[name]])
        assert (histogram.minimum, histogram.maximum) == (float(values.min()), float(values.max()))
        assert len(histogram.counts) == 64 and sum(histogram.counts) > 0
        if sum(histogram.counts) < 1000:
            continue  # the embedding of a timestep has few elements
        shares = torch.tensor(histogram.counts) / sum(histogram.counts)
        wanted = torch.histc(values, 64, histogram.minimum, histogram.maximum) / values.numel()
        assert float((shares - wanted).abs().sum()) < 0.3  # a sample of them


def test_histograms_are_the_same_each_time(
    tiny_pipe: DiffusionPipeline, tiny_recordings: tuple[Recording, Recording]
) -> None:
    calls = list(tiny_recordings[1].calls("unet"))
    first = input_histograms(tiny_pipe.unet, calls)
    torch.rand(3)
    assert input_histograms(tiny_pipe.unet, calls) == first


class OneLayer(nn.Module):
    """A denoiser of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, sample: Tensor, timestep: float, return_dict: bool = True) -> tuple[Tensor]:
        return (self.layer(sample),)


@pytest.mark.parametrize(
    ("value", "counts"), [(0.5, [0] * 64), (None, [2, *[0] * 62, 2])], ids=["constant", "two"]
)
def test_histogram_of_few_values(value: float | None, counts: list[int]) -> None:
    sample = (
        torch.tensor([[-1.0, 3.0], [3.0, -1.0]]) if value is None else torch.full((2, 2), value)
    )
    call = DenoiserCall(
        component="unet", timestep=1.0, arguments={"sample": sample, "timestep": 1.0}, output=sample
    )
    (histogram,) = input_histograms(OneLayer(), [call]).values()
    assert (histogram.minimum, histogram.maximum) == (sample.min(), sample.max())
    nonzero = [i for i, count in enumerate(histogram.counts) if count]
    assert nonzero == [i for i, count in enumerate(counts) if count]


@pytest.mark.parametrize("name", ["tiny_chained", "tiny_grouped", "tiny_tuned"])
def test_size_is_what_the_export_holds_and_sixteen_bits_of_full_precision(
    name: str, request: pytest.FixtureRequest, tiny_pipe: DiffusionPipeline
) -> None:
    chained: Chained | Finetuned = request.getfixturevalue(name)
    exported = load_pipeline(ModelSource(model=str(chained.export)), "cpu")
    (path,) = (chained.export / "unet").glob("*.safetensors")
    assert denoiser_bytes(exported, ["unet"]) == sum(
        tensor.nbytes for tensor in load_file(path).values()
    )
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert path.stat().st_size == 8 + header + denoiser_bytes(exported, ["unet"])
    assert denoiser_bytes(tiny_pipe, ["unet"]) == 2 * sum(
        parameter.numel() for parameter in tiny_pipe.unet.parameters()
    )
    assert denoiser_bytes(exported, ["unet"]) < 0.5 * denoiser_bytes(tiny_pipe, ["unet"])
    assert digest(saved_tensors(find_denoisers(exported)["unet"])) == digest(load_file(path))
