"""Denoisers in OpenVINO: the sums of `reference`, products of bytes, and what is refused."""

import copy
import ctypes
import gc
import os
import pickle
import shutil
import signal
import sys
import warnings
import weakref
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import SlicedAttnProcessor
from torch import Tensor, nn

from layers.kernels.test_kernels import (
    CONVOLUTIONS,
    INPUTS,
    WEIGHTS,
    by_kernel,
    call,
    conv,
    draw,
    grid_of,
    linear,
    unet,
)
from msfp_cli.engines import openvino as engine
from msfp_cli.engines.compilation import compile_model
from msfp_cli.engines.convolution import mend_convolutions_
from msfp_cli.engines.devices import refuse_inexact
from msfp_cli.engines.package import core, import_openvino
from msfp_cli.engines.traced import Traced, integers_of
from msfp_cli.errors import UsageError
from msfp_cli.formats.rounding import Grid
from msfp_cli.layers.kernels.arithmetic import refusal_of_integers
from msfp_cli.layers.prepare import prepare_

pytest.importorskip("openvino")
openvino = import_openvino()


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MSFP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


class Several(nn.Module):
    """Layers with an input each."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


def in_openvino(layers: list[Any], inputs: list[Tensor]) -> tuple[list[Tensor], Counter[str]]:
    """Return the layers' outputs, and how often which primitive multiplies."""
    for layer in layers:
        layer.restore_()
        layer.take_kernel_(Traced(layer))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.jit.trace(Several(layers), tuple(inputs), check_trace=False)
        model = openvino.convert_model(graph, example_input=tuple(inputs))
    model.reshape({i: list(x.shape) for i, x in enumerate(inputs)})
    mend_convolutions_(model, openvino.opset13)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = core().compile_model(model, "CPU", settings)
    outputs = [torch.from_numpy(y.copy()) for y in compiled([x.numpy() for x in inputs]).values()]
    return outputs, Counter(primitives(compiled))


def primitives(compiled: Any) -> list[str]:  # noqa: ANN401
    """List what a compiled model multiplies with."""
    ops = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    kinds = ("Convolution", "FullyConnected", "MatMul", "GroupConvolution")
    return [
        str(op["primitiveType"].value).lower() for op in ops if str(op["layerType"].value) in kinds
    ]


def compare(layers: list[Any], inputs: list[Tensor]) -> Counter[str]:
    """Compare with the reference: the integer sums may not differ by one."""
    outputs, kinds = in_openvino(layers, inputs)
    for layer, x, y in zip(layers, inputs, outputs, strict=True):
        expected = by_kernel(layer, x, "reference")
        factor = layer.kernel.arithmetic.factors[0].view(
            -1, *[1] * (x.ndim - 2 if x.ndim == 4 else 0)
        )
        assert float(((y - expected) / factor).abs().max()) < 0.3, layer
    return kinds


def test_sums_are_those_of_the_reference_in_every_format() -> None:
    layers = [
        linear(grid=grid_of(fmt), weight=w) for fmt in INPUTS.values() for w in (WEIGHTS["e2m1"],)
    ]
    layers += [linear(grid=grid_of(INPUTS["ue2m2"]), weight=w) for w in WEIGHTS.values()]
    layers = [layer for layer in layers if refusal_of_integers(layer) is None]
    kinds = compare(layers, [draw(3, 7, 12, seed=i) for i in range(len(layers))])
    assert all("8" in kind for kind in kinds), kinds


@pytest.mark.parametrize("name", ["e2m1", "ue2m2", "ue3m5"])
def test_sums_are_those_of_the_reference_in_every_convolution(name: str) -> None:
    layers = [conv(grid=grid_of(INPUTS[name]), **options) for options in CONVOLUTIONS.values()]
    compare(layers, [draw(2, 4, 9, 7, seed=i) for i in range(len(layers))])


class Rounded(nn.Module):
    """Rounds its input to each grid."""

    def __init__(self, grids: list[Grid]) -> None:
        super().__init__()
        self.grids = grids

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(integers_of(x, grid) for grid in self.grids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_rounded_in_float32_whatever_the_denoiser_is_in(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    grids = [grid_of(fmt) for fmt in INPUTS.values() if fmt.bits == 4]
    x = draw(1 << 12).bfloat16().float() * 2
    model, expected = converted(Rounded(grids), x)
    compiled = compile_model(
        model, tmp_path / "model.xml", device="CPU", dtype=dtype, rounds_attention=False
    )
    outputs = compiled([x.numpy()])
    assert len(outputs) == len(grids) > 1
    for got, integers in zip(outputs.values(), expected, strict=True):
        assert torch.equal(torch.from_numpy(got.copy()), integers)


def converted(layer: nn.Module, x: Tensor) -> tuple[Any, Any]:
    """Return a module in OpenVINO, for this shape, and its output in torch."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.jit.trace(layer, x, check_trace=False)
        model = openvino.convert_model(graph, example_input=x)
        model.reshape({0: list(x.shape)})
        return model, layer(x)


def outputs_of(model: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([x.numpy()])[0].copy())


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_one_pixel_wide_slides_by_1(groups: int) -> None:
    layer = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups)
    x = draw(1, 4, 6, 2)
    model, expected = converted(layer, x)
    for width, count in ((4, 0), (2, 1)):
        model.reshape({0: [1, 4, 6, width]})
        assert mend_convolutions_(model, openvino.opset13) == count
    (convolution,) = (op for op in model.get_ops() if "Convolution" in op.get_type_name())
    assert list(convolution.get_attributes()["strides"]) == [2, 1]
    torch.testing.assert_close(outputs_of(model, x), expected)


def test_padding_that_a_window_fits_into_becomes_zeros() -> None:
    layer = nn.Conv2d(4, 8, (4, 1), stride=(1, 3), padding=(7, 4), dilation=2)
    x = draw(1, 4, 9, 7)
    model, expected = converted(layer, x)
    assert mend_convolutions_(model, openvino.opset13) == 1
    (facts,) = (
        op.get_attributes() for op in model.get_ops() if op.get_type_name() == "Convolution"
    )
    assert list(facts["pads_begin"]) == list(facts["pads_end"]) == [6, 0]
    assert mend_convolutions_(model, openvino.opset13) == 0
    torch.testing.assert_close(outputs_of(model, x), expected)


def attached(hub: int = 1, *, rounds_inputs: bool = True, **options: Any) -> Any:  # noqa: ANN401
    denoiser = unet(hub, rounds_inputs=rounds_inputs)
    engine.attach_(denoiser, f"a tiny one with {hub}, {rounds_inputs}", **options)
    return denoiser


def test_denoiser_is_that_of_the_reference_and_members_follow_the_timestep() -> None:
    expected = unet(hub=2)
    prepare_(expected, "reference")
    denoiser = attached(hub=2)
    for timestep in (20, 700):
        torch.testing.assert_close(
            call(denoiser, timestep), call(expected, timestep), rtol=0, atol=1e-4
        )


def test_attention_at_8_bits_shares_the_conversion_and_moves_the_output_a_little(
    cache: Path,
) -> None:
    # With rounded inputs the least change of a tiny denoiser moves some of them by a whole step.
    exact = call(attached(rounds_inputs=False), 20)
    rounded = attached(rounds_inputs=False, kernel=engine.QK8)
    error = call(rounded, 20) - exact
    assert 1e-9 < error.square().mean() / exact.square().mean() < 1e-4
    assert len(list(cache.iterdir())) == 1
    assert engine.engine_of(rounded).describe().startswith("openvino-qk8 on CPU (")


def same_at_size(denoiser: Any, height: int, width: int) -> None:  # noqa: ANN401
    expected = unet()
    sample = draw(1, 4, height, width)
    text = draw(1, 5, denoiser.config.cross_attention_dim)
    with torch.no_grad():
        torch.testing.assert_close(
            denoiser(sample, 20, text).sample, expected(sample, 20, text).sample, rtol=0, atol=1e-4
        )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_process_has_one_core_so_that_signals_keep_their_stack() -> None:
    first = attached()
    second = attached()
    call(first, 20)
    call(second, 20)
    before = stack_of_signals()
    del first
    gc.collect()
    del second
    gc.collect()
    assert stack_of_signals() == before
    assert is_mapped(before)


def stack_of_signals() -> int:
    """Return where the stack is that this thread's signals are handled on; 0 if it is its own."""
    stack = (ctypes.c_size_t * 3)()  # its address, flags, and size
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack[0]


def is_mapped(address: int) -> bool:
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    return any(start <= address < end for start, end in ranges)


@pytest.mark.slow
def test_stored_conversion_equals_a_fresh_one_and_serves_other_shapes(cache: Path) -> None:
    denoiser = attached()
    state = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    fresh = call(denoiser, 20)
    assert all(torch.equal(tensor, state[name]) for name, tensor in denoiser.state_dict().items())
    (conversion,) = cache.iterdir()
    written = (conversion / "model.bin").stat().st_mtime_ns
    denoiser = attached()
    assert torch.equal(call(denoiser, 20), fresh)
    same_at_size(denoiser, 24, 8)
    assert list(cache.iterdir()) == [conversion]
    assert (conversion / "model.bin").stat().st_mtime_ns == written
    same_at_size(denoiser, 9, 7)  # where a UNet resizes by another branch
    assert len(list(cache.iterdir())) == 2


def test_unknown_device_is_named_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match="no device 'XPU' here; choose one of CPU"):
        attached(device="XPU")


@pytest.mark.parametrize("is_exact", [True, False])
def test_device_that_rounds_in_fewer_bits_is_refused(
    monkeypatch: pytest.MonkeyPatch, is_exact: bool
) -> None:
    """The CPU takes the place of a device, and computes no octaves where that has too few bits."""
    plain = core().compile_model
    asked = []

    def compiled(model: Any, device: str, settings: dict[str, Any]) -> Any:  # noqa: ANN401
        asked.append((device, settings))
        if not is_exact:
            for node in model.get_ops():
                if node.get_type_name() == "Subtract":
                    node.output(0).replace(node.input_value(1))
        return plain(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    fake = SimpleNamespace(compile_model=compiled)
    monkeypatch.setattr("msfp_cli.engines.devices.core", lambda: fake)
    refuse_inexact.cache_clear()
    expected = nullcontext() if is_exact else pytest.raises(UsageError, match="'NPU' computes with")
    with expected:
        refuse_inexact("NPU")
    refuse_inexact.cache_clear()
    assert asked == [("NPU", {"EXECUTION_MODE_HINT": "ACCURACY"})]


def test_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(UsageError, match=r"pip install 'msfp\[openvino\]'"):
        attached()


def test_what_changes_layers_is_refused() -> None:
    denoiser = attached()
    changes = ("add_adapter", "load_lora_adapter", "compile", "enable_freeu", "set_attention_slice")
    for change in (getattr(denoiser, name) for name in changes):
        with pytest.raises(UsageError, match="does not work with kernel 'openvino'"):
            change()


def test_changed_padding_is_refused() -> None:
    denoiser = attached()
    layer = denoiser.down_blocks[0].resnets[0].conv1
    layer.padding_mode = "circular"
    with pytest.raises(UsageError, match=r"down_blocks.0.resnets.0.conv1 was changed"):
        call(denoiser, 20)
    layer.padding_mode = "zeros"
    call(denoiser, 20)


def test_changed_attention_is_refused_before_it_is_converted_and_after(cache: Path) -> None:
    denoiser = attached()
    (name, attention), *_ = (
        (name, module) for name, module in denoiser.named_modules() if hasattr(module, "processor")
    )
    usual = attention.processor
    for _ in range(2):
        attention.set_processor(SlicedAttnProcessor(1))
        with pytest.raises(UsageError, match=f"the attention processor of {name} was changed"):
            call(denoiser, 20)
        attention.set_processor(type(usual)())
        call(denoiser, 20)
    assert len(list(cache.iterdir())) == 1


def test_denoiser_is_freed_with_its_last_user() -> None:
    denoiser = attached()
    call(denoiser, 20)
    gc.collect()  # what the tracer of torch leaves
    weak = weakref.ref(denoiser)
    gc.disable()
    try:
        del denoiser
        assert weak() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_copy_runs_by_itself_when_the_original_is_gone() -> None:
    denoiser = attached()
    expected = call(denoiser, 20)
    copied = copy.deepcopy(denoiser)
    del denoiser
    gc.collect()
    assert torch.equal(call(copied, 20), expected)
    copied.down_blocks[0].resnets[0].conv1.padding_mode = "circular"
    with pytest.raises(UsageError, match=r"down_blocks.0.resnets.0.conv1 was changed"):
        call(copied, 20)


class Cumulative(nn.Module):
    """What OpenVINO has no operator for."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumprod(-1)


@pytest.mark.slow
def test_operator_that_openvino_lacks_is_named_with_what_to_do(cache: Path) -> None:
    denoiser = attached()
    denoiser.conv_act = Cumulative()
    with pytest.raises(UsageError, match=r"convert the denoiser \(.*cumprod\); choose another"):
        call(denoiser, 20)
    denoiser.conv_act = nn.SiLU()
    call(denoiser, 20)
    assert len(list(cache.glob("*/model.xml"))) == 1


@pytest.mark.slow
def test_weights_rounded_by_another_type_are_not_kept_for_others() -> None:
    rounded = attached().to(torch.bfloat16)
    sample, text = draw(1, 4, 16, 16), draw(1, 5, rounded.config.cross_attention_dim)
    with torch.no_grad():
        rounded(sample.bfloat16(), 20, text.bfloat16())
    same_at_size(attached(), 16, 16)


def test_conversion_that_was_deleted_meanwhile_is_made_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = attached()
    plain = engine.read_model

    def read(path: Path, shapes: list[list[int]]) -> Any:  # noqa: ANN401
        if not reads:
            shutil.rmtree(path.parent)  # as another process does that tidies up
        reads.append(path)
        return plain(path, shapes)

    reads: list[Path] = []
    monkeypatch.setattr(engine, "read_model", read)
    call(denoiser, 20)
    assert len(reads) == 2 and reads[0] == reads[1]


@pytest.mark.parametrize("answer", ["fails", "succeeds"])
def test_ctrl_c_during_the_conversion_is_not_taken_for_a_failure(
    monkeypatch: pytest.MonkeyPatch, cache: Path, answer: str
) -> None:
    """OpenVINO swallows the exception of Ctrl-C and may raise one of its own."""
    plain = openvino.convert_model

    def interrupted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        os.kill(os.getpid(), signal.SIGINT)
        if answer == "fails":
            raise RuntimeError("Check 'false' failed")
        return plain(*args, **kwargs)

    denoiser = attached()
    monkeypatch.setattr(openvino, "convert_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(denoiser, 20)
    assert not list(cache.glob("*/model.xml"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_pickling_is_refused() -> None:
    with pytest.raises(UsageError, match="pickle does not work with kernel 'openvino'"):
        pickle.dumps(attached())


def test_gradients_are_refused() -> None:
    denoiser = attached()
    sample = draw(1, 4, 16, 16).requires_grad_()
    with pytest.raises(UsageError, match="no gradients"):
        denoiser(sample, 20, draw(1, 5, denoiser.config.cross_attention_dim))
