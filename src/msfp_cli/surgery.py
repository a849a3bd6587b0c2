"""Find and replace layers of a denoiser by name. A table of embeddings counts as a layer."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from msfp_cli.errors import CheckpointError, UsageError
from msfp_cli.kernels import AUTO, choose_kernel
from msfp_cli.layers import KINDS, FloatLayer, QuantConv2d, QuantEmbedding, QuantLinear
from msfp_cli.parameters import LayerParameters
from msfp_cli.routing import RouterTable

QuantizedModule = QuantLinear | QuantConv2d | QuantEmbedding


def find_layers(denoiser: nn.Module) -> dict[str, FloatLayer]:
    """Return every layer that can be quantized, by qualified name, in the order of definition.

    A subclass counts only if it runs torch's own forward: one that does something else would silently lose it. Nor does
    a table count that changes its rows as they are looked up (``max_norm``).
    """
    found: dict[str, FloatLayer] = {}
    for name, module in denoiser.named_modules():
        for kind in KINDS.values():
            if isinstance(module, kind) and type(module).forward is kind.forward and not _renormalizes(module):
                found[name] = module
    return found


def _renormalizes(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.max_norm is not None


def quantized_layers(denoiser: nn.Module) -> dict[str, QuantizedModule]:
    """Return every quantized layer by qualified name, in the order of definition."""
    return {name: m for name, m in denoiser.named_modules() if isinstance(m, QuantizedModule)}


def replace_layers_(
    denoiser: nn.Module, table: Mapping[str, LayerParameters], *, timestep_unit: float = 1.0
) -> dict[str, QuantizedModule]:
    """Put an empty quantized layer in the place of each float layer that `table` names.

    Layers with several sets of weights get a router, the denoiser's module `routing.ROUTER`, in the order of their
    names.

    Arguments:
        timestep_unit: what brings the denoiser's timesteps to 0..1000, for the router.

    Returns:
        The new layers by name; they have the settings and the bias of the old ones, and no codes yet.

    Raises:
        CheckpointError: the denoiser has no such layer, or one of another kind.
    """
    layers = find_layers(denoiser)
    unknown = sorted(table.keys() - layers.keys())
    if unknown:
        raise CheckpointError(
            f"{type(denoiser).__name__} has no layer {unknown[0]!r} ({len(unknown)} unknown in all); "
            "was this made from another model?"
        )
    odd = [name for name in table if isinstance(layers[name], nn.Embedding) != table[name].lookup]
    if odd:
        kind = type(layers[odd[0]]).__name__
        raise CheckpointError(f"layer {odd[0]!r} is of another kind, {kind}; was this made from another model?")
    replaced: dict[str, QuantizedModule] = {}
    for name, parameters in table.items():
        new = _quantized(layers[name], parameters)
        parent, _, child = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), child, new)
        replaced[name] = new
    _attach_router_(denoiser, replaced, timestep_unit)
    return replaced


@torch.no_grad()
def store_layers_(denoiser: nn.Module, table: Mapping[str, LayerParameters], scales: Mapping[str, Tensor]) -> None:
    """Replace each layer that `table` names, and store its weight, rounded, on the way: one float weight at a time.

    Arguments:
        scales: float32 weight scales, ``(out,)``, of the layers with a quantized weight.

    Raises:
        CheckpointError: the denoiser has no such layer.
    """
    layers = find_layers(denoiser)
    for name, quantized in replace_layers_(denoiser, table).items():
        weight = layers.pop(name).weight.detach()
        if table[name].weight is not None:
            quantized.store_(weight, scales[name].to(weight.device))


def _quantized(layer: FloatLayer, parameters: LayerParameters) -> QuantizedModule:
    """Return the empty quantized layer that takes a float one's place."""
    if isinstance(layer, nn.Embedding):
        return QuantEmbedding(layer, parameters)
    return QuantLinear(layer, parameters) if isinstance(layer, nn.Linear) else QuantConv2d(layer, parameters)


def prepare_(denoiser: nn.Module, kernel: str = AUTO, *, keep_packed: bool = False) -> dict[str, tuple[str, str]]:
    """Choose and prepare the kernel of every quantized layer, for the device it is on.

    A layer does so by itself when it first runs. Call this to choose otherwise, to have it done before the first call,
    or before ``torch.compile``, which takes the layers as they are: unprepared ones are simulated.

    Arguments:
        kernel: a name in `kernels.KERNELS`, or ``auto``; a layer that it refuses is simulated.
        keep_packed: keep weights in 4 bits in memory, too, and unpack each at every call.

    Returns:
        By layer name, the kernel that it got, and why others were passed over.

    Raises:
        UsageError: there is no such kernel, or it refuses every layer.
    """
    chosen: dict[str, tuple[str, str]] = {}
    layers = quantized_layers(denoiser)
    fresh = [layer for layer in layers.values() if layer.kernel is None]
    if not keep_packed and any(choose_kernel(layer, kernel)[0].lays_out for layer in fresh):  # type: ignore[arg-type]
        _leave_file_(denoiser)
    for name, layer in layers.items():
        reason = layer.prepare_(kernel, keep_packed=keep_packed)
        assert layer.kernel is not None, "it was prepared"
        chosen[name] = (layer.kernel.name, reason)
    if chosen and kernel != AUTO and all(name != kernel for name, _ in chosen.values()):
        name, (_, reason) = max(chosen.items(), key=lambda entry: bool(entry[1][1]))  # tables have no reason
        raise UsageError(
            f"kernel {kernel!r} can run none of the {len(chosen)} layers; {name}: {reason}; choose {AUTO!r}"
        )
    return chosen


def _leave_file_(denoiser: nn.Module) -> None:
    """Copy tensors on the CPU, which a model that was just loaded reads from its file.

    The file is mapped as a whole, until its last tensor is gone: laid out weights would come on top of it.
    """
    for module in denoiser.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "cpu":
                module._buffers[name] = buffer.clone()  # loaded buffers are views, and would keep what they view


def _attach_router_(denoiser: nn.Module, layers: Mapping[str, QuantizedModule], unit: float) -> None:
    """Give the layers with several sets of weights a common router, if there are any."""
    switching = [layers[name] for name in sorted(layers) if layers[name].parameters_of.hub > 1]
    if not switching:
        return
    router = RouterTable(len(switching), unit, device=switching[0].get_buffer("weight_scale").device)
    for slot, layer in enumerate(switching):
        layer.route, layer.slot = router.route, slot
    router.attach_(denoiser)
