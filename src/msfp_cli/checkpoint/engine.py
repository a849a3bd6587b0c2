"""Let an engine run the denoisers of an export, with conversions that lie beside it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from msfp_cli.engines.conversions import FOLDER
from msfp_cli.engines.openvino import NAMES, attach_, engine_of, refuse_offloading_
from msfp_cli.engines.package import NAME, import_openvino
from msfp_cli.errors import UsageError
from msfp_cli.files.seal import SealedFile
from msfp_cli.pipelines.loading import Pipeline
from msfp_cli.progress import Progress

__all__ = ["FOLDER", "attach_engine_", "device_of", "engine_of", "is_engine", "require_engine"]


def is_engine(kernel: str) -> bool:
    """Whether a kernel's name is that of an engine, which runs a whole denoiser."""
    name, colon, device = kernel.partition(":")
    return name in NAMES and bool(device) == bool(colon)


def require_engine(name: str) -> None:
    """Refuse what is not an engine, or an engine that is not installed.

    Raises:
        UsageError: the message says which there are, or how to install it.
    """
    # What it stores serves every kernel of the engine.
    if not is_engine(name) or name.partition(":")[0] != NAME:
        raise UsageError(f"unknown --engine {name!r}; choose {NAME}")
    import_openvino()


def device_of(kernel: str, device: str | torch.device | None) -> str | torch.device | None:
    """Return where torch has the pipeline: on the CPU, if an engine runs its denoiser.

    Raises:
        UsageError: another device was asked for.
    """
    if not is_engine(kernel):
        return device
    if device is not None and str(device).partition(":")[0] != "cpu":
        raise UsageError(
            f"kernel {kernel!r} takes its tensors from the CPU, not from device {str(device)!r}; "
            f"leave the device out, or name one of OpenVINO's as in {NAME}:GPU"
        )
    return "cpu"


def attach_engine_(
    pipe: Pipeline,
    times: Mapping[str, str],
    kernel: str,
    directory: Path,
    progress: Progress,
    place: Path | None = None,
) -> None:
    """Let an engine run the denoisers of an export.

    Arguments:
        times: by component, the argument that says what time it is.
        place: where to write new conversions; None for the user's cache.
    """
    name, _, device = kernel.partition(":")
    for component, time in times.items():
        attach_(
            getattr(pipe, component),
            _content(directory / component),
            time=time,
            kernel=name,
            device=device,
            stored=directory / FOLDER,
            place=place,
            progress=progress,
        )
    refuse_offloading_(pipe)


def _content(directory: Path) -> str:
    """Return a digest of a component's files."""
    sums = [SealedFile.of(path).sha256 for path in sorted(directory.iterdir()) if path.is_file()]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()
