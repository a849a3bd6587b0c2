"""Register our quantizer with diffusers once diffusers' registry is imported, and not before.

Importing diffusers takes seconds, and ``msfp --help`` must answer at once; yet after
``import msfp_cli`` a stock ``from_pretrained`` has to know our format, whichever of the two was
imported first. `checkpoint.quantizer` enters itself into diffusers' registry when it is imported.
If the registry is there already, it is imported now. If it is not, a finder on ``sys.meta_path``
lets Python import the registry as usual, and imports `checkpoint.quantizer` right after.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRY = "diffusers.quantizers.auto"


def register() -> None:
    """Make diffusers know the method ``msfp``, now or when its registry is imported."""
    if _REGISTRY in sys.modules:
        _import_quantizer()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _import_quantizer() -> None:
    """Import the module that enters itself into the registry, unless it is being imported."""
    import_module("msfp_cli.checkpoint.quantizer")


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
    """Runs the real loader, then imports our quantizer, which enters itself."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _import_quantizer()
