"""What identifies a model, and whether an export was made from a certain one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.quantizer import REDO, MSFPConfig
from msfp_cli.errors import ModelError
from msfp_cli.files import digest, open_tensors
from msfp_cli.layers.replace import find_layers, quantized_layers
from msfp_cli.pipelines.denoiser import find_denoisers, fingerprint
from msfp_cli.pipelines.source import Pipeline
from msfp_cli.run import Run


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


def calibration_of(run: Run, export: Path, configs: Mapping[str, MSFPConfig]) -> Calibration | None:
    """Return the run's calibration if the export came from it, None if it did not.

    It did if each layer's weight has the same format and the same scales, which fine-tuning leaves
    as they are.

    Arguments:
        configs: of the export's quantized components.
    """
    if not run.calibration.exists():
        return None
    calibration = Calibration.load(run.calibration)
    if calibration.layers.keys() != configs.keys():
        return None
    same = all(
        _has_weights_of(calibration, component, config, export / component)
        for component, config in configs.items()
    )
    return calibration if same else None


def _has_weights_of(
    calibration: Calibration, component: str, config: MSFPConfig, directory: Path
) -> bool:
    """Whether an exported denoiser has the calibration's formats of weights, and its scales."""
    formats = {name: scheme.weight for name, scheme in config.table().items()}
    calibrated = calibration.table(component)
    if formats != {name: scheme.weight for name, scheme in calibrated.items()}:
        return False
    scales = {name: s for name, s in calibration.scales[component].items() if name in formats}
    return digest(_exported_scales(directory)) == digest(scales)


def _exported_scales(directory: Path) -> dict[str, Tensor]:
    """Read the weight scales of an exported denoiser, by layer.

    Raises:
        CheckpointError: a file is truncated.
    """
    ending = ".weight_scale"
    scales = dict[str, Tensor]()
    for path in sorted(directory.glob("*.safetensors")):
        with open_tensors(path, redo=REDO) as file:
            for name in sorted(file.keys()):
                if name.endswith(ending):
                    scales[name.removesuffix(ending)] = file.get_tensor(name)
    return scales


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
