"""`MSFPPipeline`: an exported checkpoint as a pipeline, with what only we know about it."""

import shlex
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from msfp_cli.checkpoint.engine import attach_engine_, device_of, engine_of, is_engine
from msfp_cli.checkpoint.quantizer import METHOD, MSFPConfig
from msfp_cli.errors import ModelError
from msfp_cli.files.documents import Json, open_tensors, read_json, require_file
from msfp_cli.files.seal import REDO, Seal, checked, unchecked
from msfp_cli.layers.prepare import AUTO, MEASURED, measured_in, prepare_
from msfp_cli.layers.replace import quantized_layers, select_layers
from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.pipelines.loading import ModelSource, Pipeline, load_pipeline
from msfp_cli.progress import SILENT, Progress


def read_configs(directory: Path) -> dict[str, MSFPConfig]:
    """Return the quantization config of every quantized component of an export, by its name.

    Raises:
        ModelError: the directory is no pipeline, or none of its components was exported by msfp.
        CheckpointError: a config is damaged or newer than this msfp.
    """
    return {name: config for name, (config, _) in _read_components(directory).items()}


def read_denoisers(directory: Path) -> dict[str, MSFPConfig]:
    """Return those of the denoisers alone: text encoders may be quantized beside them.

    Raises:
        ModelError, CheckpointError: see `read_configs`.
    """
    components = _read_components(directory)
    return {name: config for name, (config, denoises) in components.items() if denoises}


def _read_components(directory: Path) -> dict[str, tuple[MSFPConfig, bool]]:
    """Return the config of every quantized component, and whether it is a denoiser."""
    if not (directory / "model_index.json").exists():
        _refuse_lost_files(directory)
        raise ModelError(
            f"{directory} is not an exported pipeline: it has no model_index.json; "
            "`msfp export` makes one"
        )
    components = {}
    for path in sorted(directory.glob("*/config.json")):
        config, denoises = read_json(path, _quantization_config, redo=REDO)
        if config is not None:
            components[path.parent.name] = MSFPConfig.from_dict(config), denoises
            _refuse_truncated(path.parent)
    if not components:
        _refuse_lost_files(directory)
        raise ModelError(
            f"{directory} is a pipeline, but msfp did not export it; "
            f"run `msfp calibrate {shlex.quote(str(directory))}` and `msfp export`"
        )
    return components


def times_of(configs: Mapping[str, MSFPConfig]) -> dict[str, str]:
    """Return the argument that tells each denoiser what time it is."""
    return {component: config.read_clock().argument for component, config in configs.items()}


def _refuse_lost_files(directory: Path) -> None:
    """Name what an export has lost; other directories have no seal, or all their files."""
    seal = Seal.load(directory, redo=REDO)
    for name in () if seal is None else seal.files:
        require_file(directory / name, redo=REDO)


def _quantization_config(document: Json) -> tuple[dict[str, Any] | None, bool]:
    """Return our part of a component's config, and whether the component is a denoiser.

    There is no such part if the component is not quantized by msfp. Denoisers are models of
    diffusers, whose configs name a class; text encoders are models of transformers.
    """
    config = document.get("quantization_config") or {}
    return config if config.get("quant_method") == METHOD else None, "_class_name" in document


def _refuse_truncated(directory: Path) -> None:
    """Look at the headers of a component's files; diffusers does not say what is wrong with one."""
    for path in sorted(directory.glob("*.safetensors")):
        with open_tensors(path, redo=REDO):
            pass


class LayerKernel(NamedTuple):
    """How a layer runs.

    Arguments:
        kernel: its name.
        why: the others were passed over, if they said it.
        seconds: of a call by each way to run the layer, where they were measured.
    """

    kernel: str
    why: str
    seconds: Mapping[str, float]


def kernels_of(
    export: Path,
    pattern: str | None = None,
    *,
    device: str | None = None,
    calls: Mapping[str, DenoiserCall] = MappingProxyType({}),
) -> dict[str, dict[str, LayerKernel]]:
    """Return how each layer of an export runs on this machine, by component and layer.

    Arguments:
        pattern: of layers; None takes all.
        calls: by component, to be made where kernels are measured when they first run.

    Raises:
        UsageError: no layer matches the pattern.
    """
    pipe = MSFPPipeline.from_pretrained(export, device=device)
    kernels = {}
    for component in pipe.configs:
        denoiser = getattr(pipe, component)
        ways = {name: LayerKernel(*choice, {}) for name, choice in prepare_(denoiser).items()}
        if component in calls and any(way.kernel == MEASURED for way in ways.values()):
            replay(denoiser, calls[component])
            won = measured_in(denoiser).items()
            ways |= {name: LayerKernel(each.name, "", each.seconds) for name, each in won}
        kernels[component] = {name: ways[name] for name in select_layers(ways, pattern)}
    return kernels


def load_export(
    source: ModelSource,
    device: str | None,
    kernel: str,
    *,
    keep_packed: bool = False,
    progress: Progress = SILENT,
) -> Pipeline:
    """Load an export as a stock pipeline whose denoisers run by a kernel."""
    return MSFPPipeline.from_pretrained(
        source.model,
        dtype=None if source.dtype is None else getattr(torch, source.dtype),
        device=device,
        kernel=kernel,
        keep_packed=keep_packed,
        progress=progress,
    ).pipe


class MSFPPipeline:
    """What a stock pipeline with quantized layers can do besides.

    `from_pretrained` returns a pipeline of the class that the export names, which has these methods
    as well. ``DiffusionPipeline.from_pretrained`` on the same directory gives it without them.
    """

    configs: dict[str, MSFPConfig]

    @property
    def pipe(self) -> Pipeline:
        """The stock pipeline, which it is itself."""
        return self

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        kernel: str = AUTO,
        keep_packed: bool = False,
        variant: str | None = None,
        check: bool = True,
        progress: Progress = SILENT,
    ) -> Pipeline:
        """Load an exported directory.

        Arguments:
            dtype: of everything that is not quantized; None chooses float32 on a CPU and bfloat16
                elsewhere.
            torch_dtype: diffusers' name for the same.
            device: where to put it; None takes an accelerator if there is one.
            kernel: how to run the layers of its denoiser, a name in `registry.KERNELS`; ``auto``
                takes the fastest that can. ``openvino`` and ``openvino:DEVICE`` run the denoiser as
                a whole; ``openvino-qk8`` also rounds queries and keys of attention to 8 bits. Text
                encoders choose for themselves.
            keep_packed: keep weights in 4 bits in memory, too: half the memory, and slower.
            variant: of the files' names, if ``save_pretrained`` was given one.
            check: whether to refuse files that were changed since msfp wrote them, see `seal`.
            progress: shows the conversion for an engine, at the first call.

        Raises:
            ModelError: it is not an export.
            CheckpointError: it is truncated, altered, or newer than this msfp.
            RunError: another process replaced it meanwhile.
            UsageError: there is no such kernel, or it can run no layer.
        """
        directory = Path(directory)
        device = device_of(kernel, device)
        _read_components(directory)  # which says best what is damaged
        dtype = torch_dtype if dtype is None else dtype
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        with checked(directory, redo=REDO) if check else unchecked():
            components = _read_components(directory)  # of the very files that are loaded
            configs = {each: config for each, (config, _) in components.items()}
            denoisers = {
                each: config for each, (config, denoises) in components.items() if denoises
            }
            source = ModelSource(model=str(directory), dtype=name, variant=variant)
            pipe = load_pipeline(source, device)
            if is_engine(kernel):
                attach_engine_(pipe, times_of(denoisers), kernel, directory, progress)
            for component in configs:
                if component not in denoisers:
                    encoder = getattr(pipe, component)
                    prepare_(encoder, keep_packed=keep_packed, may_be_refused=True)
                elif not is_engine(kernel):
                    prepare_(getattr(pipe, component), kernel, keep_packed=keep_packed)
        return _with_methods_(pipe, configs)

    def save_pretrained(
        self,
        directory: str | Path,
        *args: Any,  # noqa: ANN401 (diffusers' own)
        overwrite: bool = False,
        **options: Any,  # noqa: ANN401 (diffusers' own)
    ) -> None:
        """Write the pipeline again; what was loaded unchanged gives the same bytes.

        Arguments:
            args, options: of diffusers; with others than ``max_shard_size``, diffusers writes.
        """
        if args or options.keys() - {"max_shard_size"}:
            super().save_pretrained(directory, *args, **options)  # type: ignore[misc]
            return
        from msfp_cli.checkpoint.export import save_pipeline

        save_pipeline(self, Path(directory), overwrite=overwrite, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what a copy needs: pickle cannot find a class that is made of the stock one."""
        stock = type(self).__mro__[type(self).__mro__.index(MSFPPipeline) + 1]
        return _new_with_methods, (stock,), vars(self)

    def describe(self) -> str:
        """Return what was quantized, from what, and how, as a few lines of text."""
        lines = []
        for component, config in self.configs.items():
            table = config.table().values()
            weights = sorted({str(p.weight) for p in table if p.weight})
            inputs = sorted({str(p.input.format) for p in table if p.input})
            unsigned = sum(p.input is not None and not p.input.format.signed for p in table)
            formats = f"{' '.join(inputs)}, {unsigned} of them unsigned"
            model = config.source.get("model", "unknown")
            lines.append(
                f"{component}: {len(table)} quantized layers of {model}; "
                f"weights {' '.join(weights)}; "
                f"inputs {formats if inputs else 'in floating point'}; "
                f"run by {self._kernels(component)}"
            )
        return "\n".join(lines)

    def _kernels(self, component: str) -> str:
        """Return how many layers of a component each kernel runs, or which engine runs it."""
        engine = engine_of(getattr(self.pipe, component))
        if engine is not None:
            return engine.describe()
        layers = quantized_layers(getattr(self.pipe, component)).values()
        names = Counter(
            "no kernel yet" if layer.kernel is None else layer.kernel.name for layer in layers
        )
        return ", ".join(f"{name} ({count})" for name, count in names.most_common())


def _with_methods_(pipe: Pipeline, configs: dict[str, MSFPConfig]) -> Pipeline:
    """Give a stock pipeline the methods of `MSFPPipeline`."""
    stock: Any = type(pipe)
    pipe.__class__ = _class_with_methods(stock)
    pipe.configs = configs
    return pipe


@cache
def _class_with_methods(stock: type) -> type:
    """Return the subclass of a stock pipeline that has the methods of `MSFPPipeline`, and its name.

    diffusers writes the name of the class, and finds related pipelines by it.
    """
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (MSFPPipeline, stock), names)


def _new_with_methods(stock: type) -> Pipeline:
    """Return a pipeline without components, for a copy in this process or in another one."""
    made: Any = _class_with_methods(stock)
    return made.__new__(made)
