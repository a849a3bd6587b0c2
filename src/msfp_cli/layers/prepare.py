"""Choose and prepare the kernels of a denoiser's quantized layers, all at once."""

from torch import nn

from msfp_cli.errors import UsageError
from msfp_cli.layers.kernels.registry import AUTO as AUTO  # for callers of `prepare_`
from msfp_cli.layers.kernels.registry import choose_kernel
from msfp_cli.layers.replace import quantized_layers


def prepare_(
    denoiser: nn.Module, kernel: str = AUTO, *, keep_packed: bool = False
) -> dict[str, tuple[str, str]]:
    """Choose and prepare the kernel of every quantized layer, for the device it is on.

    A layer does so by itself when it first runs. Call this to choose otherwise, to have it done
    before the first call, or before ``torch.compile``, which takes the layers as they are:
    unprepared ones are simulated.

    Arguments:
        kernel: a name in `registry.KERNELS`, or ``auto``; a layer that it refuses is simulated.
        keep_packed: keep weights in 4 bits in memory, too, and unpack each at every call.

    Returns:
        By layer name, the kernel that it got, and why others were passed over.

    Raises:
        UsageError: there is no such kernel, or it refuses every layer.
    """
    chosen: dict[str, tuple[str, str]] = {}
    layers = quantized_layers(denoiser)
    fresh = [layer for layer in layers.values() if layer.kernel is None]
    if not keep_packed and any(choose_kernel(layer, kernel)[0].lays_out for layer in fresh):
        _leave_file_(denoiser)
    for name, layer in layers.items():
        reason = layer.prepare_(kernel, keep_packed=keep_packed)
        assert layer.kernel is not None, "it was prepared"
        chosen[name] = (layer.kernel.name, reason)
    if chosen and kernel != AUTO and all(name != kernel for name, _ in chosen.values()):
        # Tables have no reason, so a layer that has one is named.
        name, (_, reason) = max(chosen.items(), key=lambda entry: bool(entry[1][1]))
        raise UsageError(
            f"kernel {kernel!r} can run none of the {len(chosen)} layers; {name}: {reason}; "
            f"choose {AUTO!r}"
        )
    return chosen


def _leave_file_(denoiser: nn.Module) -> None:
    """Copy tensors on the CPU, which a model that was just loaded reads from its file.

    The file is mapped as a whole, until its last tensor is gone: laid out weights would come on top
    of it.
    """
    for module in denoiser.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "cpu":
                # Loaded buffers are views, and would keep what they view.
                module._buffers[name] = buffer.clone()
