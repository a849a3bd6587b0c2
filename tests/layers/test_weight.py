import copy
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor, nn

from msfp_cli.errors import UsageError
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.layers.replace import store_layers_
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.layers.weight import PackedWeight

SCHEME = LayerScheme(weight=FloatFormat.parse("e2m1"))
TYPES = [torch.float32, torch.bfloat16]


def quantized(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5, dtype=dtype), nn.Conv2d(4, 8, 3, dtype=dtype))
    scales = {"0": torch.full((5,), 0.1), "1": torch.full((8,), 0.05)}
    store_layers_(net, dict.fromkeys(scales, SCHEME), scales)
    return net


def unread(shape: tuple[int, ...] = (2, 3)) -> PackedWeight:
    def fail() -> Tensor:
        raise AssertionError("its elements were read")

    return PackedWeight(fail, torch.Size(shape), torch.bfloat16, torch.device("cpu"))


def test_shape_type_and_device_are_known_without_the_elements() -> None:
    weight = unread()
    assert (weight.shape, weight.dtype, weight.device.type) == ((2, 3), torch.bfloat16, "cpu")
    assert (weight.dim(), weight.numel(), weight.size(1)) == (2, 6, 3)
    assert weight.is_floating_point() and weight.data.shape == weight.detach().shape == (2, 3)
    assert "PackedWeight((2, 3)" in repr(weight)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_weight_has_the_type_of_the_model_and_the_values_of_the_layer(dtype: torch.dtype) -> None:
    for layer in quantized(dtype):
        assert layer.weight.dtype == layer.weight.data.dtype == dtype
        assert layer.weight.shape == layer.weight_shape
        expected = layer.float_weight().to(dtype)
        for values in (layer.weight.clone(), layer.weight.data.clone(), layer.weight.to(dtype)):
            assert torch.equal(values, expected)
        assert type(layer.weight * 1) is Tensor
        assert torch.equal(torch.cat([layer.weight, layer.weight])[: len(expected)], expected)
        assert quantized().to(dtype)[0].weight.dtype == dtype


def test_gradients_pass_through_a_weight() -> None:
    layer, x = quantized()[0], torch.ones(2, 6, requires_grad=True)
    F.linear(x, layer.weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], layer.float_weight().sum(dim=0))


def test_a_change_of_a_weight_is_refused() -> None:
    weight = quantized()[0].weight
    for change in (weight.data.add_, weight.copy_, weight.data.mul_):
        with pytest.raises(UsageError, match="keep a LoRA as an adapter, or fuse it into"):
            change(torch.ones(5, 6))
    with pytest.raises(UsageError, match="cannot be changed in place"):
        weight.data = torch.ones(5, 6)
    with pytest.raises(UsageError, match="cannot be changed in place"):
        weight.data += 1


def test_state_answers_for_weights_that_are_not_among_its_keys() -> None:
    net = quantized()
    state = net.state_dict()
    assert "0.weight" not in state
    assert state["0.weight"].shape == (5, 6)
    for name in ("0.bias.weight", "2.weight", "0.nothing"):
        with pytest.raises(KeyError):
            state[name]
    with pytest.raises(UsageError, match="a part of a quantized denoiser and has no float weights"):
        net[0].state_dict()
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert list(twin) == list(state)
        with pytest.raises(KeyError):
            twin["0.weight"]


def test_layer_made_of_torchs_arguments_is_torchs() -> None:
    conv, linear = type(quantized()[1]), type(quantized()[0])
    assert type(conv(4, 2, 3, 1, 1, bias=False)) is nn.Conv2d
    assert type(linear(4, 2, bias=False)) is nn.Linear


@pytest.mark.parametrize("is_called", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_bias_and_scale_count_as_they_are_now(index: int, is_called: bool) -> None:
    grid = LayerScheme.from_json(
        {
            "weight": "e2m1",
            "input": {"format": "ue2m2", "scale": 0.1, "zero_point": -0.3},
        }
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5) if index == 0 else nn.Conv2d(6, 5, 3, padding=1))
    store_layers_(net, {"0": grid}, {"0": torch.full((5,), 0.1)})
    layer, x = net[0], torch.randn(2, 6) if index == 0 else torch.randn(2, 6, 5, 5)
    if is_called:
        before = layer(x)
    layer.bias.data.add_(1)
    layer.weight_scale.mul_(2)
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))
    if is_called:
        assert (layer(x) - before).abs().max() > 0.5
    layer.get_buffer("weight_scale").div_(2)
    layer.bias.data.sub_(1)
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_hooks_of_a_float_layer_stay_and_can_be_removed() -> None:
    net, calls = nn.Sequential(nn.Linear(6, 5)), list[str]()
    handles = [
        net[0].register_forward_pre_hook(lambda *_: calls.append("before")),
        net[0].register_forward_hook(lambda *_, **__: calls.append("after"), with_kwargs=True),
    ]
    store_layers_(net, {"0": SCHEME}, {"0": torch.ones(5)})
    net(torch.ones(1, 6))
    for handle in handles:
        handle.remove()
    net(torch.ones(1, 6))
    assert calls == ["before", "after"]


def test_layers_are_called_by_keyword_as_torchs_are() -> None:
    net, x = quantized(), torch.randn(2, 6)
    assert torch.equal(net[0](input=x), net[0](x))


def test_state_is_copied_and_joined_as_a_plain_dictionary() -> None:
    state = quantized().state_dict()
    for other in (state.copy(), copy.copy(state), state | {}, {} | state, type(state)()):
        assert other.keys() in (state.keys(), set())
        with pytest.raises(KeyError):
            other["0.weight"]
    assert (state | {"new": torch.zeros(1)}).keys() == {*state.keys(), "new"}
    assert state["0.weight"].shape == (5, 6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_model_is_traced() -> None:
    net, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    store_layers_(net, {"0": SCHEME}, {"0": torch.full((5,), 0.1)})
    assert torch.equal(torch.jit.trace(net, x, check_trace=False)(x), net(x))
