"""Choose and prepare the kernels of a denoiser's quantized layers, all at once."""

from collections.abc import Mapping

from torch import nn

from msfp_cli.errors import UsageError
from msfp_cli.layers.base import Kernel
from msfp_cli.layers.kernels.registry import AUTO as AUTO  # for callers of `prepare_`
from msfp_cli.layers.kernels.registry import MEASURED as MEASURED  # likewise
from msfp_cli.layers.kernels.registry import choose_kernel, words_for
from msfp_cli.layers.replace import quantized_layers, require_network


def prepare_(
    denoiser: nn.Module,
    kernel: str = AUTO,
    *,
    keep_packed: bool = False,
    may_be_refused: bool = False,
) -> dict[str, tuple[str, str]]:
    """Choose and prepare the kernel of every quantized layer, for the device it is on.

    A layer does so by itself when it first runs. Call this to choose otherwise, to have it done
    before the first call, or before ``torch.compile``, which takes the layers as they are:
    unprepared ones are simulated. On a GPU ``auto`` measures at the first call, so make one first.

    Arguments:
        kernel: a name in `registry.KERNELS`, or ``auto``; a layer that it refuses is simulated.
        keep_packed: keep weights in 4 bits in memory, too, and unpack each at every call.
        may_be_refused: simulate a network all of whose layers the kernel refuses, too.

    Returns:
        By layer name, the kernel that it got, and why others were passed over.

    Raises:
        UsageError: there is no such kernel, or it refuses every layer; all stay as they are. Or a
            whole pipeline was given.
    """
    require_network(denoiser)
    layers = quantized_layers(denoiser)
    choices = {name: choose_kernel(layer, kernel) for name, layer in layers.items()}
    if not may_be_refused:
        _refuse_idle(choices, kernel)
    fresh = [name for name, layer in layers.items() if layer.kernel is None]
    if not keep_packed and any(choices[name][0].lays_out for name in fresh):
        _leave_file_(denoiser)
    for layer in layers.values():
        layer.prepare_(kernel, keep_packed=keep_packed)
    return {name: (kind.name, reason) for name, (kind, reason) in choices.items()}


def _refuse_idle(choices: Mapping[str, tuple[type[Kernel], str]], asked: str) -> None:
    """Refuse a kernel that somebody has named and no layer gets.

    Arguments:
        choices: by layer, the kernel that it gets, and why others were passed over.
        asked: as in `prepare_`.
    """
    kernel, words, advice = words_for(asked)
    if not choices or kernel == AUTO or any(kind.name == kernel for kind, _ in choices.values()):
        return
    # Tables have no reason, so a layer that has one is named.
    name, (_, reason) = max(choices.items(), key=lambda entry: bool(entry[1][1]))
    raise UsageError(
        f"{words} can run none of the {len(choices)} layers; {name}: {reason}; {advice}"
    )


def measured_in(denoiser: nn.Module) -> dict[str, Kernel]:
    """Return the kernels that won in their layers by being the fastest, by layer name."""
    kernels = {name: layer.kernel for name, layer in quantized_layers(denoiser).items()}
    return {name: kernel for name, kernel in kernels.items() if kernel and kernel.seconds}


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
