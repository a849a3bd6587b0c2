"""The rows of `peers.py`: ways to quantize a pipeline's denoiser in place, the peers' and ours.

Each peer is called through its own documented interface, at the 4-bit setting that did best here.
Unless a row says otherwise, two rules hold for all. What a peer cannot quantize stays in floating
point. So do the first and the last layer and the embedding of the time (`DELICATE`), because at 4
bits these 0.4 % of a UNet's weights would be most of its error; ours has that embedding at 8 bits.

Each peer is imported only in its function, because it is installed only in the peers' environment.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from material import denoiser_of
from torch import nn

from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.finetuning.result import load_finetunings
from msfp_cli.layers.replace import find_layers
from msfp_cli.pipelines.denoiser import replay
from msfp_cli.pipelines.loading import ModelSource, Pipeline
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

DELICATE = (
    *("conv_in", "conv_out", "time_embedding"),  # of the UNets
    *("patch_embed", "proj_out", "time_condition_embed"),  # of CogView4
)


@dataclass(frozen=True)
class Material:
    """What a method may use beside the pipeline.

    Arguments:
        source: the pipeline that is quantized.
        runs: run directories that the user calibrated.
    """

    source: ModelSource
    runs: tuple[Path, ...] = ()

    def recording(self) -> Recording:
        """Return the calls that the first run was calibrated on."""
        if not self.runs:
            raise SystemExit("give --run: this row is calibrated on its recording")
        return Recording(Run(self.runs[0]).recording)


@dataclass(frozen=True, eq=False)
class Method:
    """A row of the table.

    Arguments:
        name: in the table.
        bits: of weights and inputs, ``16`` where they stay in floating point.
        quantize: quantizes a pipeline and returns it; it takes the pipeline, the material and
            `options`.
        options: settings in the peer's words.
        peer: its distribution; empty for ours, which run in this project's environment.
        files: what the row depends on beside its settings.
    """

    name: str
    bits: str
    quantize: Callable[..., Pipeline]
    options: Mapping[str, Any] = field(default_factory=dict)
    peer: str = ""
    files: tuple[Path, ...] = ()


def is_delicate(name: str) -> bool:
    """Whether a layer is one of `DELICATE`."""
    return name.split(".")[0] in DELICATE


def replace_linear_(denoiser: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put what `make` returns in the place of each Linear layer."""
    for name, layer in find_layers(denoiser).items():
        if isinstance(layer, nn.Linear) and not is_delicate(name):
            parent, _, child = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, make(layer))


def full_precision(pipe: Pipeline, material: Material) -> Pipeline:
    """Leave the pipeline as it is."""
    return pipe


def sdnq(pipe: Pipeline, material: Material, **options: Any) -> Pipeline:  # noqa: ANN401 (the peer's options)
    """SDNQ, convolutions as well, not compiled: that takes a minute, and was not faster here."""
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
    from sdnq import SDNQConfig, sdnq_post_load_quant

    torch.manual_seed(0)  # its SVD draws random numbers
    _, denoiser = denoiser_of(pipe)
    sdnq_post_load_quant(denoiser, quantization_config=SDNQConfig(quant_conv=True, **options))
    return pipe


def torchao_int4(pipe: Pipeline, material: Material, *, group_size: int) -> Pipeline:
    """INT4 of torchao by `IntxWeightOnlyConfig`, which alone runs on a CPU; a code takes a byte."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=PerGroup(group_size),
        mapping_type=MappingType.ASYMMETRIC,
    )
    quantize_(
        denoiser_of(pipe)[1],
        config,
        lambda module, name: isinstance(module, nn.Linear | nn.Conv2d) and not is_delicate(name),
    )
    return pipe


def torchao_nvfp4(pipe: Pipeline, material: Material) -> Pipeline:
    """NVFP4 weights of torchao's prototypes: e2m1, a float8 scale for each 16.

    Its 4-bit activations need a GPU.
    """
    from torchao.prototype.mx_formats import inference_workflow
    from torchao.quantization import quantize_

    config = inference_workflow.NVFP4WeightOnlyConfig()
    quantize_(
        denoiser_of(pipe)[1],
        config,
        lambda module, name: isinstance(module, nn.Linear) and not is_delicate(name),
    )
    return pipe


def quanto(
    pipe: Pipeline, material: Material, *, optimizer: str, activations: str | None = None
) -> Pipeline:
    """Quanto, convolutions as well; its activations are calibrated on every third of our calls."""
    peer = import_module("optimum.quanto")
    exclude = [*DELICATE, *(f"{name}.*" for name in DELICATE)]
    chosen = getattr(peer, optimizer)()
    component, denoiser = denoiser_of(pipe)
    peer.quantize(
        denoiser, weights="qint4", activations=activations, optimizer=chosen, exclude=exclude
    )
    with torch.no_grad():
        if activations is not None:
            with peer.Calibration():
                for call in islice(material.recording().calls(component), 0, None, 3):
                    replay(denoiser, call)
        peer.freeze(denoiser)
    return pipe


def bitsandbytes(pipe: Pipeline, material: Material, *, quant_type: str) -> Pipeline:
    """NF4 or FP4 in blocks of 64, scales not quantized again.

    Without a GPU diffusers refuses this peer, so its layers are put in place here.
    """
    from bitsandbytes.nn import Linear4bit

    def make(layer: nn.Linear) -> nn.Module:
        new = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=torch.float32,
            compress_statistics=False,
            quant_type=quant_type,
        )
        new.load_state_dict(layer.state_dict())
        return new.to("cpu")  # rounds

    replace_linear_(denoiser_of(pipe)[1], make)
    return pipe


def hqq(pipe: Pipeline, material: Material, *, group_size: int) -> Pipeline:
    """Half-quadratic quantization."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=group_size, axis=1)
    replace_linear_(
        denoiser_of(pipe)[1],
        lambda layer: HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu"),
    )
    return pipe


def code(words: list[str]) -> list[str]:
    """Return the words of a command line as Markdown shows code; nothing for none."""
    return [f"`{' '.join(words)}`"] if words else []


def methods_of(directory: Path) -> Iterator[Method]:
    """Yield the rows of a run: as it was calibrated and, if it was, as it was fine-tuned."""
    run = Run(directory)
    calibration = Calibration.load(run.calibration)
    recipe = calibration.recipe
    (component,) = calibration.layers
    bits = f"{recipe.weights or 16}/{calibration.input_bits(component):.2g}"
    name = " ".join(("msfp, calibrated", *code(recipe.words())))
    files = tuple(sorted(run.calibration.iterdir()))
    yield Method(name, bits, msfp, {"run": directory, "is_tuned": False}, files=files)
    for state in load_finetunings(run, calibration).values():
        yield Method(
            " ".join((f"{name}, fine-tuned", *code(state.recipe.words()))),
            bits,
            msfp,
            {"run": directory, "is_tuned": True},
            files=(*files, run.finetuned(component)),
        )


def msfp(pipe: Pipeline, material: Material, *, run: Path, is_tuned: bool) -> Pipeline:
    """Load what `msfp calibrate` and `msfp finetune` left in a run directory."""
    calibration = Calibration.load(Run(run).calibration)
    if calibration.source != material.source:
        raise SystemExit(f"{run} is of another model than {material.source.model}")
    tuned = load_finetunings(Run(run), calibration) if is_tuned else {}
    return load_calibrated(calibration, "cpu", tuned)


# SDNQ skips small layers by default.
ALL = {
    "minimum_allowed_numel": 1,
    "modules_to_not_convert": [f".{name}" for name in DELICATE],  # a dot: where names begin with it
}
UINT4 = {"weights_dtype": "uint4", "scale_dtype": "uint8"}
FLOAT4 = {"weights_dtype": "float4_e2m1fn", "scale_dtype": "uint8", "group_size": 16}
HADAMARD = {"use_hadamard": True}
LLOYD_MAX = {"use_codebook": True}
DYNAMIC = {"use_dynamic_quantization": True, "dynamic_loss_threshold": 5e-3}
SVD_8 = {"use_svd": True, "svd_rank": 8}
SVD_32 = {"use_svd": True, "svd_rank": 32}


def of_sdnq(name: str, *options: Mapping[str, Any], bits: str = "4/16") -> Method:
    """Return a row of SDNQ."""
    joined = {key: value for each in options for key, value in each.items()}
    return Method(f"sdnq {name}", bits, sdnq, joined, "sdnq")


def of_quanto(name: str, optimizer: str, bits: str = "4/16", **options: str) -> Method:
    """Return a row of Quanto."""
    options = {"optimizer": optimizer, **options}
    return Method(f"quanto {name}", bits, quanto, options, "optimum-quanto")


METHODS = (
    Method("full precision", "32/32", full_precision),
    of_sdnq("uint4, layers of 16384 weights or more", UINT4),
    of_sdnq("uint4", ALL, UINT4),
    of_sdnq("uint4, dynamic", ALL, UINT4, DYNAMIC, bits="4 and 5/16"),
    of_sdnq("uint4, Lloyd-Max", ALL, UINT4, LLOYD_MAX),
    of_sdnq("uint4 + SVD, rank 8", ALL, UINT4, SVD_8),
    of_sdnq("uint4 + SVD, rank 32", ALL, UINT4, SVD_32),
    of_sdnq("uint4, Hadamard, Lloyd-Max + SVD, rank 32", ALL, UINT4, HADAMARD, LLOYD_MAX, SVD_32),
    of_sdnq("float4_e2m1fn, Hadamard", ALL, FLOAT4, HADAMARD),
    of_sdnq("uint4, int8 inputs of Linear", ALL, UINT4, {"use_quantized_matmul": True}, bits="4/8"),
    of_quanto("qint4", "MaxOptimizer"),
    of_quanto("qint4, HQQ", "HqqOptimizer"),
    of_quanto("qint4, HQQ, qint8 inputs", "HqqOptimizer", bits="4/8", activations="qint8"),
    Method("torchao int4, a byte each", "4/16", torchao_int4, {"group_size": 32}, "torchao"),
    Method("torchao NVFP4, Linear only", "4/16", torchao_nvfp4, {}, "torchao"),
    Method(
        "bitsandbytes NF4, Linear only", "4/16", bitsandbytes, {"quant_type": "nf4"}, "bitsandbytes"
    ),
    Method(
        "bitsandbytes FP4, Linear only", "4/16", bitsandbytes, {"quant_type": "fp4"}, "bitsandbytes"
    ),
    Method("hqq, Linear only", "4/16", hqq, {"group_size": 64}, "hqq"),
)
