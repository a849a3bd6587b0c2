import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from msfp_cli.errors import CheckpointError, MsfpError
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid
from msfp_cli.layers.clock import Clock
from msfp_cli.layers.quantized import QuantConv2d, Quantized, QuantLinear
from msfp_cli.layers.replace import find_layers, quantized_layers, replace_layers_
from msfp_cli.layers.routing import ROUTER, TABLE_SIZE, RouterTable
from msfp_cli.layers.scheme import LayerScheme
from tiny_pipelines import build_tiny

TABLE = LayerScheme(weight=FloatFormat.parse("e3m4"), lookup=True)
SCHEME = LayerScheme(
    weight=FloatFormat.parse("e2m1"), input=Grid(FloatFormat.parse("ue2m2"), 0.1, -0.2)
)


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Masked(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu())


class Plain(nn.Linear):
    """A subclass that only adds an attribute."""

    extra = 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 6)), nn.LayerNorm(6)]
        )
        self.odd = nn.ModuleDict(
            {"doubling": Doubling(4, 4), "masked": Masked(3, 3, 1), "plain": Plain(4, 4)}
        )
        self.upsample = nn.Upsample(scale_factor=2)
        self.both = nn.Bilinear(4, 4, 1)
        self.embedding = nn.Embedding(3, 4)


def schemes_of_all(net: nn.Module) -> dict[str, LayerScheme]:
    return {
        n: TABLE if isinstance(m, nn.Embedding) else SCHEME for n, m in find_layers(net).items()
    }


def test_finds_layers_and_tables_in_order_of_definition() -> None:
    assert list(find_layers(Net())) == [
        "conv_in",
        "blocks.0.0",
        "blocks.0.2",
        "odd.plain",
        "embedding",
    ]


def test_found_layers_are_the_modules_themselves() -> None:
    net = Net()
    assert all(net.get_submodule(name) is layer for name, layer in find_layers(net).items())


def test_replaces_only_the_named_layers_in_place() -> None:
    net = Net()
    before = {name: module for name, module in net.named_modules() if name}
    new = replace_layers_(net, {"conv_in": SCHEME, "blocks.0.2": SCHEME, "odd.plain": SCHEME})
    assert [type(layer) for layer in new.values()] == [QuantConv2d, QuantLinear, QuantLinear]
    for name, module in net.named_modules():
        if name:
            assert module is (new[name] if name in new else before[name])
    assert list(find_layers(net)) == ["blocks.0.0", "embedding"]
    assert all(layer.scheme == SCHEME for layer in new.values())


def test_new_layers_share_the_bias_and_have_the_settings_of_the_old() -> None:
    net = Net()
    old = find_layers(net)
    new = replace_layers_(net, schemes_of_all(net))
    for name, layer in new.items():
        assert layer.bias is getattr(old[name], "bias", None)
        assert layer.weight_shape == old[name].weight.shape
    conv = new["conv_in"]
    assert isinstance(conv, QuantConv2d)
    assert (conv.stride, conv.padding, conv.bias) == ((2, 2), (1, 1), None)


def test_replaced_network_runs() -> None:
    net = Net()
    old = find_layers(net)
    for name, layer in replace_layers_(net, schemes_of_all(net)).items():
        layer.store_(old[name].weight.detach(), torch.full(layer.weight_shape[:1], 0.05))
    assert net.blocks[0](torch.ones(2, 4)).shape == (2, 6)
    assert net.conv_in(torch.ones(1, 3, 8, 8)).shape == (1, 4, 4, 4)
    assert net.embedding(torch.ones(2, dtype=torch.int)).shape == (2, 4)


@pytest.mark.parametrize(
    "name", ["conv_out", "blocks.0.1", "blocks.7.0", "odd.doubling", "upsample"]
)
def test_unknown_layer_is_named_and_nothing_is_replaced(name: str) -> None:
    net = Net()
    before = dict(net.named_modules())
    with pytest.raises(CheckpointError, match=f"Net has no layer '{name}'.*another model"):
        replace_layers_(net, {"conv_in": SCHEME, name: SCHEME})
    assert dict(net.named_modules()) == before


@pytest.mark.parametrize(("name", "kind"), [("embedding", "Embedding"), ("odd.plain", "Plain")])
def test_layer_of_another_kind_is_named_and_nothing_is_replaced(name: str, kind: str) -> None:
    net = Net()
    before = dict(net.named_modules())
    with pytest.raises(
        CheckpointError, match=f"layer '{name}' is of another kind, {kind}.*another model"
    ):
        replace_layers_(net, {"conv_in": SCHEME, name: TABLE if name == "odd.plain" else SCHEME})
    assert dict(net.named_modules()) == before


def hub_of(members: int) -> LayerScheme:
    return replace(SCHEME, hub=members)


HUBS = {
    "odd.plain": hub_of(2),
    "conv_in": hub_of(1),
    "blocks.0.2": hub_of(4),
    "blocks.0.0": hub_of(3),
}


def test_quantized_layers_are_listed_in_order_of_definition() -> None:
    net = Net()
    assert quantized_layers(net) == {}
    new = replace_layers_(net, dict.fromkeys(["odd.plain", "conv_in"], SCHEME))
    assert list(quantized_layers(net)) == ["conv_in", "odd.plain"]
    assert quantized_layers(net) == new


def test_layers_of_one_member_need_no_router() -> None:
    net = Net()
    for layer in replace_layers_(net, schemes_of_all(net)).values():
        assert layer.route is None
    assert not hasattr(net, ROUTER)
    assert not net._forward_pre_hooks and not net._forward_hooks


@pytest.mark.parametrize("clock", [Clock(), Clock(argument="t", scale=-1.0)], ids=str)
def test_layers_of_several_members_share_a_router_in_the_order_of_their_names(clock: Clock) -> None:
    net = Net()
    new = replace_layers_(net, HUBS, clock=clock)
    router = net.get_submodule(ROUTER)
    assert isinstance(router, RouterTable) and router.clock == clock
    assert router.table.shape == (TABLE_SIZE, 3)
    switching = ["blocks.0.0", "blocks.0.2", "odd.plain"]
    assert [new[name].slot for name in switching] == [0, 1, 2]
    assert all(new[name].route is router.route for name in switching)
    assert new["conv_in"].route is None


def test_router_is_made_on_the_layers_device() -> None:
    with torch.device("meta"):
        net = Net()
    replace_layers_(net, HUBS)
    assert net.get_submodule(ROUTER).table.is_meta


SWITCHING = {"conv_out": 3, "mid_block.attentions.0.to_q": 2, "time_embedding.linear_1": 1}
TIMESTEPS = (0, 400, 999)
MEMBERS = {0: (2, 0), 400: (1, 1), 999: (0, 1)}  # of conv_out and to_q


def store_(layer: Quantized, weight: Tensor, member: int, source: int) -> None:
    """Put the weight that is the `source`-th of its layer in the place of a member."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(source))
    scale = weight.abs().flatten(1).amax(dim=1) / 4
    layer.store_(weight + scale.view(-1, *[1] * (weight.ndim - 1)) * noise, scale, member)


def quantized_unet(
    table: dict[str, LayerScheme], sources: Callable[[str], range | tuple[int, ...]]
) -> nn.Module:
    unet = build_tiny("DDIMPipeline").unet
    weights = {name: layer.weight.detach() for name, layer in find_layers(unet).items()}
    for name, layer in replace_layers_(unet, table).items():
        for member, source in enumerate(sources(name)):
            store_(layer, weights[name], member, source)
    return unet


def switching_unet() -> nn.Module:
    table = {name: hub_of(members) for name, members in SWITCHING.items()}
    unet = quantized_unet(table, lambda name: range(SWITCHING[name]))
    for timestep, members in MEMBERS.items():
        unet.get_submodule(ROUTER).table[timestep] = torch.tensor(members, dtype=torch.uint8)
    return unet


@torch.no_grad()
def output_at(unet: nn.Module, timestep: int) -> Tensor:
    sample = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return unet(sample, timestep=torch.tensor(timestep), return_dict=False)[0]


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_denoiser_computes_with_the_members_that_the_table_names(timestep: int) -> None:
    chosen = dict(zip(sorted(SWITCHING)[:2], MEMBERS[timestep], strict=True))
    fixed = quantized_unet(dict.fromkeys(SWITCHING, SCHEME), lambda name: (chosen.get(name, 0),))
    unet = switching_unet()
    assert torch.equal(output_at(unet, timestep), output_at(fixed, timestep))
    other = next(t for t in TIMESTEPS if t != timestep)
    unet.get_submodule(ROUTER).table[timestep] = unet.get_submodule(ROUTER).table[other]
    assert not torch.equal(output_at(unet, timestep), output_at(fixed, timestep))


def test_switching_denoiser_and_its_copy_do_not_touch_each_other() -> None:
    unet = switching_unet()
    expected = [output_at(unet, timestep) for timestep in TIMESTEPS]
    twin = copy.deepcopy(unet)
    assert all(
        torch.equal(output_at(twin, t), output)
        for t, output in zip(TIMESTEPS, expected, strict=True)
    )
    twin.get_submodule(ROUTER).table.zero_()
    twin.conv_out.restore_()
    twin.conv_out.weight_codes.zero_()
    assert not torch.equal(output_at(twin, 400), expected[1])
    assert all(
        torch.equal(output_at(unet, t), output)
        for t, output in zip(TIMESTEPS, expected, strict=True)
    )
    assert twin.conv_out.route is twin.get_submodule(ROUTER).route is not unet.conv_out.route


def test_switching_denoiser_is_restored_from_its_state() -> None:
    unet, table = switching_unet(), {name: hub_of(members) for name, members in SWITCHING.items()}
    again = quantized_unet(table, lambda name: range(5, 5 + SWITCHING[name]))
    assert not torch.equal(output_at(again, 400), output_at(unet, 400))
    again.load_state_dict(unet.state_dict(), strict=True)
    assert all(torch.equal(output_at(again, t), output_at(unet, t)) for t in TIMESTEPS)


def test_switching_layer_may_not_run_by_itself() -> None:
    unet = switching_unet()
    output_at(unet, 400)
    with pytest.raises(MsfpError, match="ran outside its denoiser"):
        unet.conv_out(torch.zeros(1, 16, 4, 4))
