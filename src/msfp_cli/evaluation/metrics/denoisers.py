"""A model's denoisers against full precision: their output by timestep, and each layer alone."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from msfp_cli.calibration.observe import observe
from msfp_cli.checkpoint.quantizer import saved_tensors
from msfp_cli.evaluation.result import DenoiserError, Histogram
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.pipelines.denoiser import DenoiserCall, find_denoisers
from msfp_cli.pipelines.loading import Pipeline
from msfp_cli.recording.compare import layer_errors, output_error, spread_calls
from msfp_cli.recording.result import Recording

_LAYER_CALLS = 8
_BINS = 64
_SAMPLES = 20_000


def denoiser_errors(
    pipe: Pipeline, recording: Recording, full: Pipeline | None
) -> dict[str, DenoiserError]:
    """Measure every quantized denoiser on recorded calls of full precision.

    Arguments:
        recording: calls of the full-precision denoisers.
        full: the full-precision pipeline, to measure each layer as well; None leaves layers out.
    """
    errors = {}
    for component, denoiser in find_denoisers(pipe).items():
        layers = tuple(quantized_layers(denoiser))
        if not layers:
            continue
        error = output_error(denoiser, recording.calls(component))
        by_layer = dict[str, float]()
        inputs = dict[str, Histogram]()
        if full is not None:
            full_denoiser = find_denoisers(full)[component]
            calls = spread_calls(recording, component, _LAYER_CALLS)
            by_layer = layer_errors(denoiser, full_denoiser, layers, calls)
            inputs = input_histograms(full_denoiser, calls)
        errors[component] = DenoiserError(
            error=error.relative(),
            by_timestep=tuple(error.by_timestep()),
            layers=by_layer,
            inputs=inputs,
        )
    return errors


def input_histograms(denoiser: nn.Module, calls: Sequence[DenoiserCall]) -> dict[str, Histogram]:
    """Return how the elements of every layer's input are spread over some calls of a denoiser."""
    observations = observe(
        denoiser,
        calls,
        len(calls),
        max_samples=_SAMPLES,
        generator=torch.Generator().manual_seed(0),
        advance=lambda steps, note="": None,
    )
    return {
        name: _histogram(observation.views(), observation.minimum, observation.maximum)
        for name, observation in observations.items()
        if observation.samples  # an embedding has none: its input is indices
    }


def _histogram(samples: torch.Tensor, minimum: float, maximum: float) -> Histogram:
    """Count samples in bins of equal width; a constant input has no bins to tell apart."""
    counts = torch.zeros(_BINS)
    if minimum < maximum:
        counts = torch.histc(samples, _BINS, minimum, maximum)
    return Histogram(minimum=minimum, maximum=maximum, counts=tuple(int(count) for count in counts))


def denoiser_bytes(pipe: Pipeline, components: Iterable[str]) -> int:
    """Return the denoisers' size: as exported if quantized, otherwise with 16 bits per number.

    Arguments:
        components: the denoisers that an export has quantized. Other networks beside them, such as
            a ControlNet, do not count.
    """
    size = 0
    for denoiser in (pipe.components[component] for component in components):
        tensors = saved_tensors(denoiser).values()
        if quantized_layers(denoiser):
            size += sum(tensor.nbytes for tensor in tensors)
        else:
            size += sum(2 * tensor.numel() for tensor in tensors)
    return size
