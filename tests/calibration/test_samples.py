"""Rows of a layer's input are what its weight is multiplied by, whatever its geometry."""

import zlib

import pytest
import torch
from torch import nn

from msfp_cli.calibration import samples
from msfp_cli.calibration.samples import LayerSamples, input_parts, rows_at, weight_rows
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid, fake_quantize
from msfp_cli.formats.transform import InputTransform
from msfp_cli.layers.scheme import LayerScheme

GRID = Grid(FloatFormat.parse("ue2m2"), 0.1, -0.25)
CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "lopsided": nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(0, 2), dilation=(2, 1)),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "pointwise": nn.Conv2d(4, 6, 1),
}
LAYERS = {**CONVOLUTIONS, "linear": nn.Linear(7, 5), "narrow": nn.Linear(7, 3)}


def input_of(layer: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, 9, 11) if isinstance(layer, nn.Conv2d) else (2, 3, 7)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_rows_times_weight_are_the_output(name: str) -> None:
    layer = LAYERS[name]
    x = input_of(layer)
    y = layer(x)
    outs = layer.weight.shape[0]
    positions = torch.randperm(y.numel() // outs)
    rows = rows_at(layer, x, y, positions)
    got = (rows @ weight_rows(layer, layer.weight).mT).transpose(0, 1).flatten(1) + layer.bias
    flat = y.movedim(1, -1) if isinstance(layer, nn.Conv2d) else y
    torch.testing.assert_close(got, flat.reshape(-1, outs)[positions], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_sums_over_all_rows_are_those_of_the_padded_patches(name: str) -> None:
    """The input is rounded first, then padded with zeros, which are not on the grid."""
    layer = LAYERS[name]
    x = input_of(layer)
    y = layer(x)
    every = torch.arange(y.numel() // layer.weight.shape[0])
    each = LayerSamples("layer", layer, LayerScheme(input=GRID))
    each.add(x, y, len(every))
    each.keep(x, y, 1)
    each.complete_()
    exact = rows_at(layer, x, y, every)
    rounded = rows_at(layer, fake_quantize(x, GRID), y, every)
    torch.testing.assert_close(each.moments[0], rounded.mT @ rounded, rtol=1e-4, atol=1e-4)
    missing = weight_rows(layer, layer.weight) @ (exact - rounded).mT @ rounded
    torch.testing.assert_close(each.missing[0], missing, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_completed_sums_are_symmetric_whatever_the_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LAYERS["plain"]
    x = input_of(layer)
    found = []
    for strip in (1024, 7):
        monkeypatch.setattr(samples, "_STRIP", strip)
        each = LayerSamples("layer", layer, LayerScheme(input=GRID))
        each.add(x, layer(x), 100)
        each.keep(x, layer(x), 30)
        each.keep(x, layer(x), 20)
        each.complete_()
        found.append(each.moments[0])
        assert [check.rounded.shape[1] for check in each.checks] == [50]
    assert torch.equal(found[1], found[1].mT)
    torch.testing.assert_close(found[1], found[0])


@torch.no_grad()
def test_transformed_rows_times_the_rotated_weight_are_the_output() -> None:
    layer = nn.Linear(32, 5)
    x = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
    transform = InputTransform(rotation=16, token_scales=True)
    fine = Grid(FloatFormat.parse("e1m6"), 0.01)  # of sizes up to 1
    scheme = LayerScheme(weight=FloatFormat.parse("e2m1"), input=fine, transform=transform)
    each = LayerSamples("layer", layer, scheme)
    y = layer(x) - layer.bias
    each.keep(x, y, 60)
    (check,) = each.checks
    places = torch.randperm(60, generator=torch.Generator().manual_seed(zlib.crc32(b"layer")))
    outputs = y.flatten(0, 1)[places]
    torch.testing.assert_close(check.outputs[0], outputs, rtol=1e-4, atol=1e-4)
    error = ((check.rounded @ transform.rotate(layer.weight).T)[0] - outputs).square().sum()
    assert 0 < error < 1e-4 * outputs.square().sum()


@torch.no_grad()
def test_rows_depend_on_the_name_and_not_on_other_layers() -> None:
    layer = CONVOLUTIONS["plain"]
    x = input_of(layer)
    sums = []
    for name in ("a", "b", "a"):
        each = LayerSamples(name, layer, LayerScheme())
        each.add(x, layer(x), 20)
        sums.append(each.moments[0])
    assert torch.equal(sums[0], sums[2])
    assert not torch.equal(sums[0], sums[1])


def test_a_wide_layer_has_parts_of_whole_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(10, 2, 3)
    assert input_parts(layer) == [slice(0, 90)]
    monkeypatch.setattr(samples, "MAX_INPUTS", 40)
    parts = input_parts(layer)
    assert [part.start for part in parts] == [0, 36, 72]
    assert parts[-1].stop == 90
