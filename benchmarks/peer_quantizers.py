"""The rows of `peers.py`: ways to quantize a pipeline's denoiser in place, the peers' and ours.

Each peer is called through its own documented interface, at the 4-bit setting that did best here.
Unless a row says otherwise, two rules hold for all. What a peer cannot quantize stays in floating
point. So do the first and the last layer and the embedding of the time (`DELICATE`), because at 4
bits these 0.4 % of a UNet's weights would be most of its error; ours has that embedding at 8 bits.

Each peer is imported only in its function, because it is installed only in the peers' environment.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from material import denoiser_of
from torch import nn

from msfp_cli.calibration.calibrate import calibrate_
from msfp_cli.calibration.observe import observe
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.finetuning.result import load_finetunings
from msfp_cli.formats.rounding import Grid
from msfp_cli.layers.replace import find_layers, store_layers_
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.pipelines.denoiser import replay
from msfp_cli.pipelines.loading import ModelSource, Pipeline, load_pipeline
from msfp_cli.recording.recipe import RecordOptions
from msfp_cli.recording.record import record_both
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
        work: where the calibration's recordings are kept.
        options: what to record.
        runs: what the user fine-tuned, run directories.
    """

    source: ModelSource
    work: Path
    options: RecordOptions
    runs: tuple[Path, ...] = ()

    def record(self) -> tuple[Recording, Recording]:
        """Return the calls that all are calibrated on, and the held-out ones; record them once."""
        pipe = load_pipeline(self.source, "cpu")
        return record_both(pipe, Run(self.work / "calibration"), self.source, self.options)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Arguments:
        name: in the table.
        bits: of weights and activations, ``16`` where they stay in floating point.
        quantize: quantizes a pipeline and returns it; it takes the pipeline, the material and
            `options`.
        options: settings in the peer's words.
        peer: its distribution; empty for ours, which run in this project's environment.
    """

    name: str
    bits: str
    quantize: Callable[..., Pipeline]
    options: Mapping[str, Any] = field(default_factory=dict)
    peer: str = ""


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


def torchao_int4(
    pipe: Pipeline, material: Material, *, kinds: tuple[type, ...], group_size: int
) -> Pipeline:
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
        lambda module, name: isinstance(module, kinds) and not is_delicate(name),
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
                for call in islice(material.record()[0].calls(component), 0, None, 3):
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


def min_max(pipe: Pipeline, material: Material) -> Pipeline:
    """Plain integers over the whole range, of the recorded input and of each output channel."""
    recipe = CalibrateRecipe(formats="integer")
    recording, _ = material.record()
    component, denoiser = denoiser_of(pipe)
    generator = torch.Generator().manual_seed(0)
    seen = observe(
        denoiser,
        recording.calls(component),
        recording.num_calls(component),
        max_samples=1,
        generator=generator,
        advance=lambda steps, note="": None,
    )
    layers = find_layers(denoiser)
    table = {}
    scales = {}
    for name, observed in seen.items():
        kept, kept_bits = recipe.kept_bits(name, observed.role)
        if kept and kept_bits is None:
            continue
        bits = kept_bits or 4
        weight, inputs = recipe.weight_formats(bits)[0], recipe.input_formats(bits)[0]
        span = torch.tensor(observed.maximum - observed.minimum)
        table[name] = LayerScheme(
            weight=weight, input=Grid.with_maximum(inputs, span, observed.minimum)
        )
        scales[name] = layers[name].weight.detach().flatten(1).abs().amax(1) / weight.largest
    store_layers_(denoiser, table, scales)
    return pipe


def msfp(pipe: Pipeline, material: Material, **changes: Any) -> Pipeline:  # noqa: ANN401 (fields of the recipe)
    """`msfp calibrate`."""
    calibrate_(pipe, *material.record(), CalibrateRecipe(**changes))
    return pipe


def msfp_linear(pipe: Pipeline, material: Material, **changes: Any) -> Pipeline:  # noqa: ANN401 (fields of the recipe)
    """`msfp calibrate` of just the layers that the peers without convolutions quantize."""
    layers = find_layers(denoiser_of(pipe)[1]).items()
    names = [name for name, layer in layers if isinstance(layer, nn.Conv2d) or is_delicate(name)]
    return msfp(
        pipe,
        material,
        keep=tuple(f"{name}:none" for name in names),
        **changes,
    )


def msfp_finetuned(pipe: Pipeline, material: Material, *, inputs: int) -> Pipeline:
    """Load what the user fine-tuned with inputs of so many bits."""
    for directory in material.runs:
        run = Run(directory)
        calibration = Calibration.load(run.calibration)
        tuned = load_finetunings(run, calibration)
        if calibration.recipe.activations == inputs and tuned:
            if calibration.source != material.source:
                raise SystemExit(f"{directory} is of another model than {material.source.model}")
            return load_calibrated(calibration, "cpu", tuned)
    raise SystemExit(
        f"give --run, a directory that `msfp calibrate --activations {inputs}` and `msfp finetune` "
        "made"
    )


LINEAR = (nn.Linear,)
BOTH = (nn.Linear, nn.Conv2d)
# SDNQ skips small layers by default.
ALL = {"minimum_allowed_numel": 1, "modules_to_not_convert": list(DELICATE)}
UINT4 = {"weights_dtype": "uint4", "scale_dtype": "uint8"}
FLOAT4 = {
    "weights_dtype": "float4_e2m1fn",
    "scale_dtype": "uint8",
    "group_size": 16,
    "use_hadamard": True,
}
DYNAMIC = {"use_dynamic_quantization": True, "dynamic_loss_threshold": 5e-3}
SVD_8 = {"use_svd": True, "svd_rank": 8}
SVD_32 = {"use_svd": True, "svd_rank": 32}
METHODS = (
    Method("full precision", "32/32", full_precision),
    Method("sdnq uint4, layers of 16384 weights or more", "4/16", sdnq, UINT4, "sdnq"),
    Method("sdnq uint4", "4/16", sdnq, {**ALL, **UINT4}, "sdnq"),
    Method("sdnq uint4, dynamic", "4 and 5/16", sdnq, {**ALL, **UINT4, **DYNAMIC}, "sdnq"),
    Method("sdnq uint4 + SVD, rank 8", "4/16", sdnq, {**ALL, **UINT4, **SVD_8}, "sdnq"),
    Method("sdnq uint4 + SVD, rank 32", "4/16", sdnq, {**ALL, **UINT4, **SVD_32}, "sdnq"),
    Method("sdnq float4_e2m1fn, Hadamard", "4/16", sdnq, {**ALL, **FLOAT4}, "sdnq"),
    Method(
        "sdnq uint4, int8 inputs of Linear",
        "4/8",
        sdnq,
        {**ALL, **UINT4, "use_quantized_matmul": True},
        "sdnq",
    ),
    Method("quanto qint4", "4/16", quanto, {"optimizer": "MaxOptimizer"}, "optimum-quanto"),
    Method("quanto qint4, HQQ", "4/16", quanto, {"optimizer": "HqqOptimizer"}, "optimum-quanto"),
    Method(
        "quanto qint4, HQQ, qint8 activations",
        "4/8",
        quanto,
        {"optimizer": "HqqOptimizer", "activations": "qint8"},
        "optimum-quanto",
    ),
    Method(
        "torchao int4, a byte each",
        "4/16",
        torchao_int4,
        {"kinds": BOTH, "group_size": 32},
        "torchao",
    ),
    Method(
        "torchao int4, a byte each, Linear only",
        "4/16",
        torchao_int4,
        {"kinds": LINEAR, "group_size": 32},
        "torchao",
    ),
    Method("torchao NVFP4, Linear only", "4/16", torchao_nvfp4, {}, "torchao"),
    Method(
        "bitsandbytes NF4, Linear only", "4/16", bitsandbytes, {"quant_type": "nf4"}, "bitsandbytes"
    ),
    Method(
        "bitsandbytes FP4, Linear only", "4/16", bitsandbytes, {"quant_type": "fp4"}, "bitsandbytes"
    ),
    Method("hqq, Linear only", "4/16", hqq, {"group_size": 64}, "hqq"),
    Method(
        "msfp, weights only, Linear only", "4/16", msfp_linear, {"activations": None, "lift": 0.0}
    ),
    Method("msfp, weights only", "4/16", msfp, {"activations": None}),
    Method("INT4, min-max", "4/4", min_max),
    Method("INT4, best clipping", "4/4", msfp, {"formats": "integer", "lift": 0.0}),
    Method("FP4, signed", "4/4", msfp, {"formats": "signed", "lift": 0.0}),
    Method("msfp, calibrated, 8-bit inputs", "4/8", msfp, {"activations": 8}),
    Method("msfp, calibrated", "4/4", msfp),
    Method(
        "msfp, calibrated, 8-bit inputs at 40% of the steps",
        "4/4 and 8",
        msfp,
        {"input_lift": 0.4},
    ),
    Method("msfp, fine-tuned, 8-bit inputs", "4/8", msfp_finetuned, {"inputs": 8}),
    Method("msfp, fine-tuned", "4/4", msfp_finetuned, {"inputs": 4}),
)
