"""Register our quantizer with diffusers, as soon as diffusers' registry is imported and not a moment earlier.

Importing diffusers takes seconds, and ``msfp --help`` must not; yet after ``import msfp_cli`` a
stock ``from_pretrained`` has to know us, whichever of the two was imported first. So if the
registry is there we write into it, and if it is not, a finder on ``sys.meta_path`` lets Python
import it as usual and writes into it right after.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRY = "diffusers.quantizers.auto"


def register() -> None:
    """Make diffusers know the method ``msfp``, now or when it is imported."""
    if _REGISTRY in sys.modules:
        _write_into(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _write_into(registry: ModuleType) -> None:
    """Add our classes to diffusers' two plain dicts; it has no function for that."""
    ours = sys.modules.get("msfp_cli.checkpoint.quantizer")
    if ours is not None and not hasattr(ours, "MSFPQuantizer"):
        return  # it is being imported, and diffusers through it; it calls `register` when it is done
    from msfp_cli.checkpoint.quantizer import METHOD, MSFPConfig, MSFPQuantizer

    registry.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, MSFPQuantizer)
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, MSFPConfig)


class _Finder(MetaPathFinder):
    """Finds the registry as Python would, with a loader that tells us when it is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Runs the real loader, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _write_into(module)
