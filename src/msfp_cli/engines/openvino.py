"""Run a denoiser in OpenVINO: traced once, converted, compiled for a device, and cached.

The stock pipeline keeps its denoiser, whose ``forward`` is replaced: hooks, config and settings are
where they were. At the first call the denoiser is traced with these arguments, each layer as
`traced` writes it, and converted; the result is stored by content (`conversions`) and takes any
batch and resolution. It is compiled for the shapes of a call, and the last few that were compiled
stay in memory, each with its weights in bytes. The router's table is part of the graph, so a hub's
member follows the timestep of each call.
"""

import copy
import functools
import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from msfp_cli.engines import conversions
from msfp_cli.engines.arguments import Call
from msfp_cli.engines.compilation import CPU, compile_model, read_model
from msfp_cli.engines.devices import refuse_inexact
from msfp_cli.engines.package import NAME, Compiled, Model, core
from msfp_cli.engines.tracing import floating_layers, write_converted
from msfp_cli.errors import UsageError
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.progress import SILENT, Progress

Denoiser: TypeAlias = Any  # a model of diffusers, which is untyped
Pipeline: TypeAlias = Any  # one of its pipelines
Output: TypeAlias = Any  # what a denoiser returns: a tuple, or an output class
QK8 = "openvino-qk8"  # the same with queries and keys of attention at 8 bits
NAMES = (NAME, QK8)
_MOST_COMPILED = 2
# What would change layers that no longer run, or what is traced, or take the denoiser apart.
_CHANGES = (
    "load_lora_adapter",
    "add_adapter",
    "enable_group_offload",
    "compile",
    "compile_repeated_blocks",
    "enable_freeu",
    "enable_forward_chunking",
    "set_attention_slice",
)
_OFFLOADS = (
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_group_offload",
)


def attach_(
    denoiser: Denoiser,
    content: str,
    *,
    time: str = "timestep",
    kernel: str = NAME,
    device: str = "",
    stored: Path | None = None,
    place: Path | None = None,
    progress: Progress = SILENT,
) -> "Engine":
    """Let a quantized denoiser run in OpenVINO from now on.

    Arguments:
        content: what tells the denoiser from others, such as a digest of its files.
        time: the argument that says what time it is.
        kernel: one of `NAMES`; they share conversions.
        device: OpenVINO's name of it, such as CPU, GPU or NPU; empty for the CPU.
        stored: where to look for a conversion first, the folder in an export.
        place: where to write a new one; None for the user's cache.

    Raises:
        UsageError: OpenVINO is not installed, or the device is missing or does not round exactly.
    """
    device = device or CPU
    devices = core().available_devices
    if device.partition(".")[0] not in {name.partition(".")[0] for name in devices}:
        raise UsageError(
            f"OpenVINO has no device {device!r} here; choose one of {', '.join(devices)}"
        )
    refuse_inexact(device)
    place = place or conversions.cache_directory()
    places = [place] if stored is None else [stored, place]
    engine = Engine(denoiser, device, content, places, progress, time, kernel)
    denoiser.forward = engine.forward
    _refuse_methods_(denoiser, _CHANGES)
    return engine


def engine_of(denoiser: Denoiser) -> "Engine | None":
    """Return the engine that runs a denoiser, if one does."""
    engine = getattr(getattr(denoiser, "forward", None), "engine", None)
    return engine if isinstance(engine, Engine) else None


def refuse_offloading_(pipe: Pipeline) -> None:
    """Let a pipeline whose denoiser runs here refuse to move it about."""
    _refuse_methods_(pipe, _OFFLOADS)


def _refuse_methods_(owner: Denoiser | Pipeline, methods: Sequence[str]) -> None:
    for method in methods:
        if hasattr(owner, method):
            setattr(owner, method, functools.partial(_refuse, method))


def _refuse(method: str, *args: object, **kwargs: object) -> NoReturn:
    raise UsageError(
        f"{method} does not work with kernel {NAME!r}, which runs the denoiser as a whole; "
        "load the pipeline with another kernel"
    )


class Engine:
    """A denoiser in OpenVINO.

    The denoiser refers to its engine, and the engine weakly to the denoiser, which so is freed with
    its last user.

    Arguments:
        content: see `attach_`.
        places: where conversions are looked for; new ones are written to the last.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        device: str,
        content: str,
        places: Sequence[Path],
        progress: Progress,
        time: str = "timestep",
        kernel: str = NAME,
    ) -> None:
        self._time = time
        self._kernel = kernel
        self.device = device
        self._weak = weakref.ref(denoiser)
        layers = quantized_layers(denoiser).items()
        self._loaded = [(name, layer, layer.settings()) for name, layer in layers]
        self._attentions = [
            (name, module, type(module.processor))
            for name, module in denoiser.named_modules()
            if hasattr(module, "processor")
        ]
        self._places = places
        self._progress = progress
        self._lock = threading.Lock()
        self._compiled = OrderedDict[str, Any]()
        self._content = content
        self._dtype = denoiser.dtype
        self.signature = inspect.signature(denoiser.forward)

    @property
    def forward(self) -> "_Forward":
        """What the denoiser is called by."""
        return _Forward(self)

    def copy_for(self, denoiser: Denoiser, memo_: dict[int, Any]) -> "Engine":
        """Return an engine like this one for a copy of its denoiser that is being made.

        Arguments:
            memo_: of `copy.deepcopy`.
        """
        made = object.__new__(Engine)
        vars(made).update(vars(self))
        made._weak = weakref.ref(denoiser)
        made._loaded = copy.deepcopy(self._loaded, memo_)
        made._attentions = copy.deepcopy(self._attentions, memo_)
        made._lock = threading.Lock()
        made._compiled = OrderedDict()
        return made

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser that it runs."""
        denoiser = self._weak()
        assert denoiser is not None, "it is running, or somebody asks about it"
        return denoiser

    def describe(self) -> str:
        """Return where the denoiser runs, and which layers are not products of bytes there."""
        floating = floating_layers(self.denoiser)
        count = len(self._loaded) - len(floating)
        names = f"; in floating point: {', '.join(floating)}" if floating else ""
        return f"{self._kernel} on {self.device} ({count} layers in bytes{names})"

    def run(self, *args: Output, **kwargs: Output) -> Output:
        """Run the denoiser.

        Raises:
            UsageError: the call is compiled, needs gradients, or has an argument of another kind;
                or a layer or an attention was changed since the denoiser was loaded.
        """
        if torch.compiler.is_compiling():
            _refuse("torch.compile")
        self._refuse_changed_layers()
        self._refuse_changed_attention()
        arguments = dict(self.signature.bind(*args, **kwargs).arguments)
        is_wrapped = arguments.pop("return_dict", True)
        call = Call.of(arguments, self._time)
        if torch.is_grad_enabled() and any(_needs_gradient(value) for value in arguments.values()):
            raise UsageError(f"kernel {NAME!r} has no gradients; load with another kernel")
        with self._lock:
            compiled = self._compile(call)
            (output,) = compiled([tensor.numpy() for tensor in call.tensors.values()]).values()
            sample = torch.from_numpy(output.copy()).to(self.denoiser.dtype)
        return _wrap(sample) if is_wrapped else (sample,)

    def _refuse_changed_layers(self) -> None:
        for name, layer, settings in self._loaded:
            if layer.settings() != settings:
                raise UsageError(
                    f"the padding or another setting of {name} was changed, but kernel {NAME!r} "
                    "runs the denoiser as it was loaded; load the pipeline with another kernel"
                )

    def _refuse_changed_attention(self) -> None:
        """Refuse what computes attention otherwise: IP-Adapters, perturbed guidance, slices.

        A conversion would ignore it, or keep it for every later pipeline.
        """
        for name, attention, processor in self._attentions:
            if type(attention.processor) is not processor:
                raise UsageError(
                    f"the attention processor of {name} was changed, but kernel {NAME!r} runs "
                    "the denoiser as it was loaded; load the pipeline with another kernel"
                )

    def _compile(self, call: Call) -> Compiled:
        """Return the model compiled for the shapes of a call."""
        shapes = [list(tensor.shape) for tensor in call.tensors.values()]
        name = f"{self.denoiser.dtype} {shapes} {call.tree}"
        if name not in self._compiled:
            while len(self._compiled) >= _MOST_COMPILED:
                self._compiled.popitem(last=False)
            self._compiled[name] = compile_model(
                *self._model(call, shapes),
                device=self.device,
                dtype=self.denoiser.dtype,
                rounds_attention=self._kernel == QK8,
            )
        self._compiled.move_to_end(name)
        return self._compiled[name]

    def _model(self, call: Call, shapes: list[list[int]]) -> tuple[Model, Path]:
        """Return the converted denoiser for these shapes, and the file that it was read from.

        Where a conversion does not fit them, because the denoiser takes another branch than with
        those that it was made with, they get their own.
        """
        path = self._convert(call)
        try:
            return read_model(path, shapes), path
        except RuntimeError:
            path = self._convert(call, shapes if path.exists() else None)  # else it was deleted
            return read_model(path, shapes), path

    def _convert(self, call: Call, shapes: list[list[int]] | None = None) -> Path:
        """Return the file of a conversion, which is made unless there is one.

        Arguments:
            shapes: that it is for; None for every call with such arguments.
        """
        what = call.tree if shapes is None else [call.tree, shapes]
        key = conversions.key_of(self._identity(), what)
        path = conversions.find(key, self._places)
        if path is not None:
            return path
        save = functools.partial(write_converted, self.denoiser, call)
        with self._progress.task("Converting for OpenVINO", None):
            return conversions.write(self._places[-1], key, save)

    def _identity(self) -> str:
        """Return what tells the denoiser from others: its types, too, which round its weights."""
        types = dict.fromkeys((self._dtype, self.denoiser.dtype))
        return " ".join([self._content, *map(str, types)])


class _Forward:
    """What takes the place of a denoiser's ``forward``; a copy of the denoiser gets its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.__signature__ = engine.signature
        self.__name__ = "forward"

    def __call__(self, *args: Output, **kwargs: Output) -> Output:
        return self.engine.run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Forward":
        denoiser = memo.get(id(self.engine.denoiser))
        return self if denoiser is None else self.engine.copy_for(denoiser, memo).forward

    def __reduce__(self) -> NoReturn:
        _refuse("pickle")


def _needs_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _wrap(sample: Tensor) -> Output:
    """Return an output as denoisers do whose caller does not ask for a tuple."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)
