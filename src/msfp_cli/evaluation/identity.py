"""What identifies a model, and whether a quantized model was made from a certain one."""

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from msfp_cli.checkpoint.pipeline import read_denoisers
from msfp_cli.engines.conversions import CONVERSIONS
from msfp_cli.errors import ModelError
from msfp_cli.files.documents import digest
from msfp_cli.files.seal import REDO, Seal, is_named
from msfp_cli.layers.replace import find_layers, quantized_layers
from msfp_cli.pipelines.denoiser import find_denoisers, fingerprint
from msfp_cli.pipelines.loading import Pipeline


def identity_of(pipe: Pipeline) -> dict[str, str]:
    """Return, for each denoiser, a digest that no other model and no other quantization has."""
    return {component: _identity(denoiser) for component, denoiser in find_denoisers(pipe).items()}


def _identity(denoiser: nn.Module) -> str:
    layers = quantized_layers(denoiser)
    if not layers:
        return fingerprint(denoiser)
    # The grids of inputs are not tensors, so they are not in the state.
    schemes = {name: layer.scheme.to_json() for name, layer in layers.items()}
    text = json.dumps(schemes, sort_keys=True) + digest(denoiser.state_dict())
    return hashlib.sha256(text.encode()).hexdigest()


def sealed_files(export: Path) -> str | None:
    """Return a digest of the files of an export beside its denoisers; None if it has no seal.

    It tells exports apart whose denoisers are equal (see `identity_of`), but not their schedulers
    or decoders. What is converted for an engine changes no picture.

    Raises:
        CheckpointError: the seal is damaged.
    """
    seal = Seal.load(export, redo=REDO)
    if seal is None:
        return None
    left_out = (*CONVERSIONS, *(f"{name}/*" for name in read_denoisers(export)))
    sums = {n: each.sha256 for n, each in seal.files.items() if not is_named(n, left_out)}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def refuse_other_model(full: Pipeline, quantized: Pipeline) -> None:
    """Refuse a full-precision model that is not the one that the export was made from.

    Layers must have the same names and shapes, and what quantization leaves alone (norms, biases,
    embeddings) must have the same values, up to the rounding of a shorter type.

    Raises:
        ModelError: they differ; the message names the first difference.
    """
    full_denoisers = find_denoisers(full)
    for component, denoiser in find_denoisers(quantized).items():
        if not quantized_layers(denoiser):
            continue
        if component not in full_denoisers:
            raise ModelError(
                f"the export is of another model: {component!r} is missing; give it with --against"
            )
        difference = _first_difference(denoiser, full_denoisers[component])
        if difference is not None:
            raise ModelError(
                f"the export is of another model: its {difference} differs; give it with --against"
            )


def _first_difference(denoiser: nn.Module, full: nn.Module) -> str | None:
    """Name the first layer or parameter that differs from the full-precision denoiser."""
    layers = find_layers(full)
    for name, layer in quantized_layers(denoiser).items():
        if name not in layers or layers[name].weight.shape != layer.weight_shape:
            return f"layer {name!r}"
    parameters = dict(full.named_parameters())
    for name, parameter in denoiser.named_parameters():
        if name not in parameters or not _are_close(parameter, parameters[name]):
            return repr(name)
    return None


def _are_close(a: nn.Parameter, b: nn.Parameter) -> bool:
    """Whether two parameters are equal up to the rounding of a shorter type."""
    return a.shape == b.shape and torch.allclose(
        a.float().cpu(), b.float().cpu(), rtol=1e-2, atol=1e-3
    )
