"""Choosing among the kernels of a GPU, with kernels, a clock and a device that are made up."""

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from msfp_cli.errors import UsageError
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid
from msfp_cli.layers.base import Kernel, QuantizedLayer
from msfp_cli.layers.kernels import registry
from msfp_cli.layers.kernels.cpu import Cpu
from msfp_cli.layers.kernels.cuda import Cuda
from msfp_cli.layers.kernels.reference import Reference
from msfp_cli.layers.kernels.registry import MEASURED, choose_kernel
from msfp_cli.layers.kernels.simulated import Simulated
from msfp_cli.layers.prepare import measured_in, prepare_
from msfp_cli.layers.quantized import QuantConv2d, QuantLinear
from msfp_cli.layers.routing import Route
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.layers.trial import exactness, measured, winners
from msfp_cli.layers.trial.exactness import is_exact
from msfp_cli.layers.trial.measured import FLOAT, Measured

UNSIGNED = Grid(FloatFormat.parse("ue2m2"), 0.2, -0.25)
WIDE = Grid(FloatFormat.parse("e2m5"), 0.02)


class Fast(Reference):
    """A rival that is right, and holds the weight itself."""

    name: ClassVar[str] = "fast"
    lays_out: ClassVar[bool] = True

    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool) -> None:
        super().__init__(layer, keep_packed=keep_packed)
        self.held = None if keep_packed else [layer.integers(i) for i in range(layer.scheme.hub)]
        self.holds_weight = not keep_packed

    def integers(self, member: int | Tensor) -> Tensor:
        assert self.held is not None
        return self.held[int(member)]


class Wrong(Reference):
    """A rival of whose sums one is wrong by one, in the last row."""

    name: ClassVar[str] = "wrong"

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        y = super().__call__(layer, x)
        factor = self.arithmetic.of_variant(layer.variant(), layer.kernel_bias)[0]
        last = (-1,) * y.ndim if layer.geometry() is None else (-1, 0, 0, 0)
        y[last] += factor[0 if y.ndim == 4 else -1]
        return y


class Broken(Reference):
    """A rival that does not compile."""

    name: ClassVar[str] = "broken"

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        raise RuntimeError("PTX said no")


class Gpu:
    """A machine whose kernels take the seconds that it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.seconds: dict[str, float] = {}
        self.timed: list[str] = []
        monkeypatch.setattr(measured, "seconds_of", self.seconds_of)
        monkeypatch.setattr(Measured, "device", "cpu")
        monkeypatch.setattr(registry, "_IN_TURN", (Measured, Simulated))
        self.has()

    def has(self, *rivals: type[Kernel], **seconds: float) -> None:
        """Let it have these kernels, and say what each takes."""
        self.monkeypatch.setattr(measured, "RIVALS", rivals)
        self.seconds = {"simulated": 2.0, FLOAT: 1.0, **seconds}

    def seconds_of(self, run: "partial[Tensor]") -> float:
        run()
        name = run.func.name if isinstance(run.func, Kernel) else FLOAT
        self.timed.append(name)
        return self.seconds[name]


@pytest.fixture
def gpu(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Gpu:  # noqa: ANN401
    """Make this machine's CPU such a GPU, with an empty cache."""
    monkeypatch.setenv("MSFP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MSFP_KERNEL", raising=False)
    forget(monkeypatch)
    return Gpu(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Know what a new process knows."""
    monkeypatch.setattr(winners, "_known", {})
    monkeypatch.setattr(measured, "_failures", Counter())
    monkeypatch.setattr(measured, "_said", set())
    monkeypatch.setattr(exactness, "_proven", set())


def linear(grid: Grid = UNSIGNED, weight: str = "e2m1", hub: int = 1) -> Any:  # noqa: ANN401
    return quantized(QuantLinear, nn.Linear(12, 5), grid, weight, hub)


def conv(grid: Grid = UNSIGNED, weight: str = "e2m1", hub: int = 1, **options: Any) -> Any:  # noqa: ANN401
    layer = nn.Conv2d(4, 8, **{"kernel_size": 3, "padding": 1, **options})
    return quantized(QuantConv2d, layer, grid, weight, hub)


def quantized(kind: Any, layer: Any, grid: Grid, weight: str, hub: int) -> Any:  # noqa: ANN401
    fmt = FloatFormat.parse(weight)
    further = (grid,) * (hub - 1)
    new = kind(layer, LayerScheme(weight=fmt, input=grid, hub=hub, further_inputs=further))
    scale = layer.weight.detach().abs().flatten(1).amax(dim=1) / fmt.largest
    for member in range(hub):
        new.store_(layer.weight.detach() * (1 - 0.3 * member), scale, member)
    return new


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def kernel_after_a_call(layer: Any, x: Tensor) -> str:  # noqa: ANN401
    """Let a layer choose at its first call, and check the call."""
    prepare_(layer)
    assert layer.kernel.name == MEASURED
    y = layer(x)
    name: str = layer.kernel.name
    layer.prepare_(name) if name in registry.KERNELS else None
    assert torch.equal(layer(x), y)
    return name


@pytest.mark.parametrize("make", [linear, conv])
@pytest.mark.parametrize(
    ("fast", "winner"), [(1.0, "fast"), (1.99, "fast"), (2.01, "simulated"), (9.0, "simulated")]
)
def test_fastest_exact_kernel_stays(
    make: Callable[..., Any], fast: float, winner: str, gpu: Gpu
) -> None:
    gpu.has(Fast, fast=fast)
    x = rows(3, 12) if make is linear else rows(2, 4, 6, 5)
    assert kernel_after_a_call(make(), x) == winner


@pytest.mark.parametrize("make", [linear, conv])
def test_wrong_kernel_is_never_chosen(make: Callable[..., Any], gpu: Gpu) -> None:
    gpu.has(Wrong, Fast, wrong=0.001, fast=1.0)
    x = rows(3, 12) if make is linear else rows(2, 4, 6, 5)
    with pytest.warns(UserWarning, match="kernel 'wrong' is passed over: its sums are wrong"):
        assert kernel_after_a_call(make(), x) == "fast"
    assert "wrong" not in gpu.timed


def test_kernel_that_fails_is_passed_over_and_tried_again_by_the_next_process(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.has(Broken, broken=0.001)
    with pytest.warns(UserWarning, match="is passed over: RuntimeError: PTX said no") as said:
        assert kernel_after_a_call(linear(), rows(3, 12)) == "simulated"
        gpu.timed.clear()
        assert kernel_after_a_call(linear(), rows(3, 12)) == "simulated"
        assert gpu.timed == []  # this process knows
        for number in range(4, 8):
            kernel_after_a_call(linear(), rows(number, 12))
    assert len(said) == 1
    assert measured._failures["broken"] == 2  # then nobody tries it any more
    forget(monkeypatch)
    gpu.timed.clear()
    with pytest.warns(UserWarning, match="PTX"):
        assert kernel_after_a_call(linear(), rows(3, 12)) == "simulated"
    assert gpu.timed == ["simulated", "simulated", FLOAT]


@pytest.mark.parametrize("who", ["fast", "simulated", FLOAT])
def test_memory_that_is_full_decides_nothing(
    who: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.has(Fast, fast=1.0)

    def full(*arguments: object, **options: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        if who == FLOAT:
            patch.setattr(QuantLinear, "float_weight", full)
            patch.setattr(measured, "RIVALS", (Fast,))
            patch.setattr(Simulated, "__call__", full)
        else:
            patch.setattr(Fast if who == "fast" else Simulated, "__call__", full)
        layer = linear()
        prepare_(layer)
        with torch.no_grad():
            layer(rows(3, 12))
    assert layer.kernel.name == ("simulated" if who == "fast" else "fast")
    if who == "fast":  # the next one tries again
        assert kernel_after_a_call(linear(), rows(3, 12)) == "fast"


@pytest.mark.parametrize("grid", [UNSIGNED, WIDE], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (linear, (3, 12)),
        (linear, (1, 12)),
        (linear, (2, 7, 12)),
        (conv, (2, 4, 6, 5)),
        (partial(conv, stride=2, groups=2), (1, 4, 7, 7)),
        (partial(conv, bias=False, dilation=2), (3, 4, 6, 6)),
    ],
)
def test_check_tells_equal_sums_from_sums_that_differ_by_one(
    make: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype, grid: Grid
) -> None:
    layer = make(grid=grid, weight="e2m1" if grid is UNSIGNED else "e1m6")
    x = rows(*shape).to(dtype)
    with torch.no_grad():
        for kind, verdict in ((Wrong, False), (Cpu, True), (Reference, True), (Cuda, True)):
            exactness._proven.clear()
            for _ in range(1 + verdict):  # in float32, and then in the type of the input
                assert is_exact(kind(layer, keep_packed=True), layer, x) == verdict, kind.name


def test_every_member_of_a_hub_can_be_the_one_that_is_tried(gpu: Gpu) -> None:
    gpu.has(Fast, fast=1.0)
    for member in (0, 1):
        layer = linear(hub=2)
        layer.route = Route[int]()
        layer.route.open([member])
        assert kernel_after_a_call(layer, rows(3, 12)) == "fast"


def test_what_won_is_not_tried_again(gpu: Gpu) -> None:
    gpu.has(Fast, fast=1.0)
    kernel_after_a_call(linear(), rows(3, 12))
    assert gpu.timed == ["fast", "simulated", "fast", "simulated", FLOAT]
    assert kernel_after_a_call(linear(), rows(3, 12)) == "fast"
    winners._known.clear()  # as in a new process
    layer = linear()
    assert kernel_after_a_call(layer, rows(3, 12)) == "fast"
    assert len(gpu.timed) == 5
    (kernel,) = measured_in(layer).values()
    assert (kernel.name, kernel.seconds) == ("fast", {"fast": 1.0, "simulated": 2.0, FLOAT: 1.0})


@pytest.mark.parametrize(
    "change", ["card", "versions", "rows", "type", "weights", "formats", "packed"]
)
def test_anything_that_speed_depends_on_is_tried_again(
    change: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.has(Fast, fast=1.0)
    kernel_after_a_call(linear(), rows(3, 12))
    gpu.has(Fast, fast=3.0)
    layer, x = linear(), rows(3, 12)
    if change == "card":
        monkeypatch.setattr(measured, "_card", lambda device: "another card")
    elif change == "versions":
        monkeypatch.setattr(measured, "_versions", lambda: "torch 99")
    elif change == "rows":
        x = rows(4, 12)
    elif change == "type":
        layer, x = layer.bfloat16(), x.bfloat16()
    elif change == "weights":
        layer, x = quantized(QuantLinear, nn.Linear(13, 5), UNSIGNED, "e2m1", 1), rows(3, 13)
    elif change == "formats":
        layer = linear(weight="e1m2")
    layer.prepare_(keep_packed=change == "packed")
    with torch.no_grad():
        layer(x)
    assert layer.kernel.name == "simulated"
    assert len(gpu.timed) == 10


def test_remembered_kernel_that_is_not_there_any_more_is_not_taken(gpu: Gpu) -> None:
    gpu.has(Fast, fast=1.0)
    kernel_after_a_call(linear(), rows(3, 12))
    gpu.has(Wrong, wrong=0.5)
    with pytest.warns(UserWarning, match="wrong"):
        assert kernel_after_a_call(linear(), rows(3, 12)) == "simulated"


@pytest.mark.parametrize("why", ["gradients", "empty", "not finite", "no batch", "compiled"])
def test_call_that_says_nothing_is_simulated_and_the_next_one_chooses(why: str, gpu: Gpu) -> None:
    gpu.has(Fast, fast=1.0)
    layer: Any = conv() if why == "no batch" else linear()
    x = rows(2, 4, 6, 5) if why == "no batch" else rows(3, 12)
    first = {
        "gradients": x.clone().requires_grad_(),
        "empty": x[:0],
        "not finite": torch.full_like(x, torch.nan),
        "no batch": x[0],
        "compiled": x,
    }[why]
    prepare_(layer)
    with torch.set_grad_enabled(why == "gradients"):
        y = torch.compile(layer, backend="eager")(first) if why == "compiled" else layer(first)
    assert layer.kernel.name == MEASURED
    expected = Simulated(layer, keep_packed=True)(layer, first)
    assert torch.allclose(y, expected, equal_nan=True)
    with torch.no_grad():
        layer(x)
    assert layer.kernel.name == "fast"


def test_input_that_no_layer_takes_is_refused_by_torch_and_the_next_one_chooses(gpu: Gpu) -> None:
    gpu.has(Fast, fast=1.0)
    layer = linear()
    layer.prepare_()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(rows(3, 7))
        assert layer.kernel.name == MEASURED
        layer(rows(3, 12))
    assert layer.kernel.name == "fast"


def test_threads_that_call_first_together_get_one_kernel(gpu: Gpu) -> None:
    gpu.has(Fast, fast=1.0)
    layer = linear()
    x = rows(3, 12)
    outputs: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            outputs.append(layer(x))

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert layer.kernel.name == "fast" and gpu.timed.count("fast") == 2
    assert len(outputs) == 6 and all(torch.equal(each, outputs[0]) for each in outputs)


def test_moved_or_changed_layer_chooses_again(gpu: Gpu) -> None:
    gpu.has(Fast, fast=1.0)
    layer = linear()
    x = rows(3, 12)
    assert kernel_after_a_call(layer, x) == "fast"
    codes = layer.packed_codes()
    layer.restore_()
    assert torch.equal(layer.weight_codes, codes)
    with torch.no_grad():
        layer(x)
    assert layer.kernel.name == "fast" and layer.kernel_choice.name == registry.AUTO


def test_layers_that_no_rival_can_run_say_why(gpu: Gpu) -> None:
    gpu.monkeypatch.setattr(Fast, "refusal", staticmethod(lambda layer: "it is too fast for it"))
    gpu.has(Fast)
    assert choose_kernel(linear()) == (Simulated, f"{MEASURED}: it is too fast for it")


def test_environment_names_a_kernel_in_the_place_of_auto(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.has(Fast)
    monkeypatch.setenv("MSFP_KERNEL", "reference")
    assert choose_kernel(linear())[0] is Reference
    assert choose_kernel(linear(), "simulated")[0] is Simulated
    monkeypatch.setenv("MSFP_KERNEL", "")
    assert choose_kernel(linear())[0] is Measured
    monkeypatch.setenv("MSFP_KERNEL", "quickest")
    with pytest.raises(UsageError, match="MSFP_KERNEL=quickest in the environment is not one of"):
        choose_kernel(linear())


def test_time_is_that_of_calls_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(measured.time, "perf_counter", lambda: clock[0])
    calls: list[float] = [100.0, 10.0, *[3.0] * 7]  # the first compiles

    def run() -> Tensor:
        clock[0] += calls.pop(0)
        return torch.zeros(1)

    assert measured.seconds_of(run) == 3.0
    assert not calls


def test_kernel_that_won_stays_when_layers_are_prepared_again(gpu: Gpu) -> None:
    gpu.has(Fast, fast=1.0)
    layer = linear()
    assert kernel_after_a_call(layer, rows(3, 12)) == "fast"
    layer.prepare_()
    with torch.no_grad():
        layer(rows(3, 12))
    kernel = layer.kernel
    layer.prepare_()  # as before torch.compile
    assert layer.kernel is kernel
    layer.prepare_(keep_packed=True)
    assert layer.kernel.name == MEASURED


def test_layer_that_was_measured_in_inference_mode_can_be_trained_around(gpu: Gpu) -> None:
    gpu.has(Fast, fast=1.0)
    layer = linear()
    prepare_(layer)
    with torch.inference_mode():
        layer(rows(3, 12))
    assert not any(tensor.is_inference() for tensor in layer.kernel.held)
    layer.restore_()
    layer.load_state_dict(layer.state_dict())
