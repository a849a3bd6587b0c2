"""Compile a converted denoiser for the shapes of a call, and for a device."""

from pathlib import Path
from typing import Any

import torch

from msfp_cli.engines.attention import round_attention_, zero_where_masked_
from msfp_cli.engines.convolution import mend_convolutions_
from msfp_cli.engines.mapped import giving_back
from msfp_cli.engines.package import Compiled, Model, core, import_openvino

CPU = "CPU"


def read_model(path: Path, shapes: list[list[int]]) -> Model:
    """Read a conversion, for arguments of these shapes.

    Raises:
        RuntimeError: it does not fit them.
    """
    model = core().read_model(path)
    model.reshape(dict(enumerate(shapes)))
    return model


def compile_model(
    model: Model, path: Path, *, device: str, dtype: torch.dtype, rounds_attention: bool
) -> Compiled:
    """Compile a model that was read.

    Arguments:
        path: the file that it was read from, which it keeps mapped.
        dtype: of what is not in bytes; float32 in place of float16, and on devices other than the
            CPU.
        rounds_attention: whether queries and keys are rounded to 8 bits.
    """
    operators = import_openvino().opset13
    zero_where_masked_(model, operators)
    mend_convolutions_(model, operators)
    if rounds_attention:
        round_attention_(model, operators)
    with giving_back(path.with_suffix(".bin")):
        return core().compile_model(model, device, settings_of(device, dtype))


def settings_of(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a device is told: of the CPU its threads, and the type of what is not in bytes.

    With "bf16" the CPU computes single elements in float32, as rounding needs it; with "f16" it
    does not, and neither do other devices by default. The CPU would round inputs of layers with
    nothing but weights in bytes on its own account.
    """
    if device != CPU:
        return {"EXECUTION_MODE_HINT": "ACCURACY"}
    return {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
