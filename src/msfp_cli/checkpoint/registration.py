"""Register our quantizers once the registry of diffusers or transformers is imported, not before.

Importing diffusers takes seconds, and ``msfp --help`` must answer at once; yet after
``import msfp_cli`` a stock ``from_pretrained`` has to know our format, whichever of the two was
imported first. `checkpoint.quantizer` enters itself into diffusers' registry when it is imported.
If the registry is there already, it is imported now. If it is not, a finder on ``sys.meta_path``
lets Python import the registry as usual, and imports `checkpoint.quantizer` right after. The same
holds for the registry of transformers and `checkpoint.text_encoder`.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def _enter_diffusers() -> None:
    """Import the module that enters itself into diffusers' registry."""
    import_module("msfp_cli.checkpoint.quantizer")


def _enter_transformers() -> None:
    """Import the module that enters itself into transformers' registry."""
    import_module("msfp_cli.checkpoint.text_encoder")


_REGISTRIES = {
    "diffusers.quantizers.auto": _enter_diffusers,
    "transformers.quantizers.auto": _enter_transformers,
}


def register() -> None:
    """Make both libraries know the method ``msfp``, now or when their registries are imported."""
    for registry, enter in _REGISTRIES.items():
        if registry in sys.modules:
            enter()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds a registry as Python would, with a loader that tells us when it is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTRIES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _REGISTRIES[fullname])
        return spec


class _Loader(Loader):
    """Runs the real loader, then imports our module, which enters itself."""

    def __init__(self, loader: Loader, enter: Callable[[], None]) -> None:
        self._loader = loader
        self._enter = enter

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._enter()
