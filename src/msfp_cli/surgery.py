"""Find and replace layers of a denoiser by name."""

from collections.abc import Mapping

from torch import nn

from msfp_cli.errors import CheckpointError
from msfp_cli.layers import LayerParameters, QuantConv2d, QuantLinear

QuantizedModule = QuantLinear | QuantConv2d


def find_layers(denoiser: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return every layer that can be quantized, by qualified name, in the order of definition.

    A subclass counts only if it runs torch's own forward: one that does something else would silently lose it.
    """
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, module in denoiser.named_modules():
        for kind in (nn.Linear, nn.Conv2d):
            if isinstance(module, kind) and type(module).forward is kind.forward:
                found[name] = module
    return found


def replace_layers_(denoiser: nn.Module, table: Mapping[str, LayerParameters]) -> dict[str, QuantizedModule]:
    """Put an empty quantized layer in the place of each float layer that `table` names.

    Returns:
        The new layers by name; they have the settings and the bias of the old ones, and no codes yet.

    Raises:
        CheckpointError: the denoiser has no such layer.
    """
    layers = find_layers(denoiser)
    unknown = sorted(table.keys() - layers.keys())
    if unknown:
        raise CheckpointError(
            f"{type(denoiser).__name__} has no layer {unknown[0]!r} ({len(unknown)} unknown in all); "
            "was this made from another model?"
        )
    replaced: dict[str, QuantizedModule] = {}
    for name, parameters in table.items():
        layer = layers[name]
        new = QuantLinear(layer, parameters) if isinstance(layer, nn.Linear) else QuantConv2d(layer, parameters)
        parent, _, child = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), child, new)
        replaced[name] = new
    return replaced
