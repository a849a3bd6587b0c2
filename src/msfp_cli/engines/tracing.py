"""Trace a quantized denoiser and convert it, each layer as `traced` writes it."""

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from msfp_cli.engines.arguments import Call
from msfp_cli.engines.package import Model, import_openvino
from msfp_cli.engines.traced import Traced
from msfp_cli.errors import UsageError
from msfp_cli.layers.replace import quantized_layers

Denoiser: TypeAlias = Any  # a model of diffusers, which is untyped


def write_converted(denoiser: Denoiser, call: Call, path: Path) -> None:
    """Trace and convert a denoiser, and write it; weights of bytes stay bytes.

    Raises:
        UsageError: OpenVINO has no such operator, or cannot tell its types.
    """
    inputs = tuple(call.tensors.values())
    with traceable(denoiser), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, that Python's branches are fixed
        module = _Flat(denoiser, call)
        traced = torch.jit.trace(module, inputs, strict=False, check_trace=False)
        model = _converted(traced, inputs)
        import_openvino().save_model(model, path, compress_to_fp16=False)


def floating_layers(denoiser: Denoiser) -> dict[str, str]:
    """Return why layers that multiply are computed in floating point, by name."""
    layers = quantized_layers(denoiser)
    reasons = {name: Traced.reason(layer) for name, layer in layers.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _converted(traced: torch.jit.ScriptModule, inputs: tuple[Tensor, ...]) -> Model:
    """Convert what was traced.

    Raises:
        UsageError: OpenVINO has no such operator, or cannot tell its types.
    """
    try:
        with _interrupt_later():
            return import_openvino().convert_model(traced, example_input=inputs)
    except Exception as error:  # whose classes are no RuntimeErrors
        summary = str(error).partition("Summary:")[2] or str(error)
        said = next((line for line in summary.splitlines() if line.strip()), "")
        raise UsageError(
            f"OpenVINO cannot convert the denoiser ({said.strip(' -')}); choose another kernel"
        ) from error


@contextmanager
def _interrupt_later() -> Iterator[None]:
    """Let Ctrl-C wait until the context ends: OpenVINO would call it a failure of its own.

    The second one interrupts at once. Where signals are not heard, nothing changes.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if asked:
            before(number, frame)
        asked.append(number)

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if asked:
            before(asked[0], None)


@contextmanager
def traceable(denoiser: Denoiser) -> Iterator[None]:
    """Give a denoiser its own forward, float32 and traceable layers while the context is open."""
    forward = denoiser.__dict__.pop("forward")
    dtype = denoiser.dtype
    layers = quantized_layers(denoiser).values()
    try:
        if dtype != torch.float32:
            denoiser.float()
        for layer in layers:
            layer.restore_()
            layer.take_kernel_(Traced(layer))
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.restore_()
        if dtype != torch.float32:
            denoiser.to(dtype)
        denoiser.forward = forward


class _Flat(nn.Module):
    """A denoiser whose arguments are a list of tensors."""

    def __init__(self, denoiser: Denoiser, call: Call) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.call = call

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the denoiser's output without what it is wrapped in."""
        named = dict(zip(self.call.tensors, tensors, strict=True))
        output: Tensor = self.denoiser(**self.call.arguments(named), return_dict=False)[0]
        return output
