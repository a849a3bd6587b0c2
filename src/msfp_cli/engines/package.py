"""OpenVINO's package, if it is installed, and its core."""

import functools
import sys
from typing import Any, TypeAlias

from msfp_cli.errors import UsageError

OpenVino: TypeAlias = Any  # the package, which may be missing
Core: TypeAlias = Any  # an openvino.Core
Model: TypeAlias = Any  # an openvino.Model
Operators: TypeAlias = Any  # the module openvino.opset13
Compiled: TypeAlias = Any  # an openvino.CompiledModel
NAME = "openvino"


def import_openvino() -> OpenVino:
    """Return the package OpenVINO, without the part of it that reports its use to Intel.

    Raises:
        UsageError: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # means: missing
    try:
        import openvino
    except ImportError:
        raise UsageError(
            f"kernel {NAME!r} needs OpenVINO; install it with `pip install 'msfp[openvino]'`"
        ) from None
    return openvino


def core() -> Core:
    """Return OpenVINO's core, one for the whole process and until its end.

    A core that runs on the CPU gives the thread a stack for signals, and puts back the one before
    when it goes. With two cores that is the stack of the first one, which may be gone by then, and
    the next signal, Ctrl-C for one, would end the process with a segmentation fault.

    Raises:
        UsageError: OpenVINO is not installed.
    """
    return _core_of(import_openvino())


@functools.cache
def _core_of(openvino: OpenVino) -> Core:
    return openvino.Core()
