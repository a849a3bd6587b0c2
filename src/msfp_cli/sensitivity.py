"""How much each layer's quantization moves the denoiser's output, and which layers to lift because of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from msfp_cli.calibration import LayerChoice
from msfp_cli.denoiser import DenoiserCall
from msfp_cli.layers import FloatLayer
from msfp_cli.parameters import LayerParameters
from msfp_cli.recording import Recording
from msfp_cli.rounding import Grid, fake_quantize
from msfp_cli.rows import take_rows


def choose_lifted(layers: Mapping[str, LayerChoice], budget: float) -> list[str]:
    """Choose the layers to lift: greatest sensitivity per multiply-add first, while the budget lasts.

    Arguments:
        layers: those with a sensitivity are candidates.
        budget: share of all multiply-adds, 0 to 1.
    """
    left = budget * sum(layer.multiply_adds for layer in layers.values())
    gain = {name: layer.sensitivity / layer.multiply_adds for name, layer in layers.items() if layer.sensitivity}
    chosen = []
    for name in sorted(gain, key=lambda name: (-gain[name], name)):
        if layers[name].multiply_adds <= left:
            left -= layers[name].multiply_adds
            chosen.append(name)
    return chosen


MAX_ROWS = 4  # of each call: enough to rank layers, and a quarter of the time of a default batch


def spread_calls(recording: Recording, component: str, count: int) -> list[DenoiserCall]:
    """Pick calls spread over the timesteps and over the pipeline runs, a few rows of each."""
    shards = [i for i in range(recording.num_shards) if any(t is not None for t in recording.timesteps(i, component))]
    picked = []
    for i in range(count if shards else 0):
        calls = [call for call in recording.shard(shards[i % len(shards)]) if call.component == component]
        call = calls[(2 * i + 1) * len(calls) // (2 * count)]
        batch = call.output.shape[0]
        rows = torch.linspace(0, batch - 1, min(MAX_ROWS, batch)).long()  # both halves of a guided batch
        picked.append(take_rows(call, rows))
    return picked


@contextmanager
def quantized_alone(layer: FloatLayer, parameters: LayerParameters, scale: Tensor | None) -> Iterator[None]:
    """Quantize one layer's weight (with its `scale` per output channel) and input while the context is open."""
    weight, handle = layer.weight.data, None
    if parameters.weight is not None and scale is not None:
        rows = scale.to(weight.device).view(-1, *[1] * (weight.ndim - 1))
        layer.weight.data = fake_quantize(weight, Grid(parameters.weight, rows))
    if parameters.input is not None:
        grid = parameters.input
        handle = layer.register_forward_pre_hook(lambda _, args: (fake_quantize(args[0], grid), *args[1:]))
    try:
        yield
    finally:
        layer.weight.data = weight
        if handle is not None:
            handle.remove()
