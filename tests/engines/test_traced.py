"""The layer that is traced: the reference's integers, in operators without a look at bits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layers.kernels.test_kernels import (
    CONVOLUTIONS,
    INPUTS,
    TRANSFORMS,
    WEIGHTS,
    by_kernel,
    conv,
    draw,
    grid_of,
    layer_of,
    linear,
)
from msfp_cli.engines.traced import Traced, integers_of, planes_of
from msfp_cli.formats.float_format import INPUT_INTEGER_BITS, FloatFormat, formats_of_width
from msfp_cli.formats.rounding import Grid, round_steps
from msfp_cli.formats.transform import InputTransform
from msfp_cli.layers.kernels.arithmetic import refusal_of_integers
from msfp_cli.layers.routing import Route

FORMATS = {
    fmt.name: fmt
    for bits in range(2, 9)
    for signed in (False, True)
    for fmt in formats_of_width(bits, signed=signed)
    if fmt.integer_bits <= INPUT_INTEGER_BITS
}


def values_around(fmt: FloatFormat) -> Tensor:
    """Every value of a format, every tie, and their float32 neighbours, in steps."""
    levels = torch.tensor(fmt.levels, dtype=torch.float32)
    ties = (levels[1:] + levels[:-1]) / 2
    marks = torch.cat([levels, ties, levels[-1:] * 2, levels[:1] - 1])
    infinity = torch.tensor(torch.inf)
    return torch.cat([marks, marks.nextafter(infinity), marks.nextafter(-infinity)])


@pytest.mark.parametrize("name", FORMATS)
def test_integers_are_those_of_rounding_ties_included(name: str) -> None:
    fmt = FORMATS[name]
    steps = values_around(fmt)
    assert torch.equal(integers_of(steps, Grid(fmt, 1.0)), round_steps(steps.clone(), fmt))


@pytest.mark.parametrize("name", FORMATS)
def test_integers_are_those_of_rounding_on_a_grid(name: str) -> None:
    grid = grid_of(FORMATS[name])
    x = draw(50_000) * 2
    expected = round_steps((x - grid.zero_point) / grid.scale, grid.format)
    assert torch.equal(integers_of(x, grid), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_planes_are_bytes_that_make_up_the_integers(name: str) -> None:
    fmt = FORMATS[name]
    integers = torch.tensor(fmt.levels, dtype=torch.float32)
    planes = planes_of(integers, fmt)
    low, high = (-128, 127) if fmt.signed else (0, 255)
    assert all(plane.min() >= low and plane.max() <= high for plane in planes)
    weights = (1, 256)[: len(planes)]
    assert torch.equal(sum(w * p for w, p in zip(weights, planes, strict=True)), integers)


def traced(layer: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    layer.restore_()
    layer.take_kernel_(Traced(layer))
    with torch.no_grad():
        y: Tensor = layer(x)
    return y


def same_sums(got: Tensor, expected: Tensor) -> None:
    """Equal but for the last digits of float32, which no integer sum could hide behind."""
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", INPUTS)
def test_layers_compute_what_the_reference_does(name: str) -> None:
    layer = linear(grid=grid_of(INPUTS[name]))
    if refusal_of_integers(layer) is None:
        x = draw(3, 7, 12)
        same_sums(traced(layer, x), by_kernel(layer, x, "reference"))


@pytest.mark.parametrize("name", ["e2m1", "ue2m2", "e2m5", "ue3m5"])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_compute_what_the_reference_does(options: dict[str, Any], name: str) -> None:
    layer = conv(grid=grid_of(INPUTS[name]), **options)
    x = draw(2, 4, 9, 8)
    same_sums(traced(layer, x), by_kernel(layer, x, "reference"))


@pytest.mark.parametrize("layer", [linear(), linear(grid=grid_of(INPUTS["ue2m2"]), weight=None)])
def test_what_is_not_a_product_of_bytes_is_simulated(layer: Any) -> None:  # noqa: ANN401
    assert Traced.reason(layer) is not None
    x = draw(3, 12)
    same_sums(traced(layer, x), by_kernel(layer, x, "simulated"))


@pytest.mark.parametrize("member", [0, 1, 2])
def test_the_member_that_serves_is_selected(member: int) -> None:
    grids = [
        Grid(INPUTS["ue2m2"], scale, zero) for scale, zero in ((0.1, 0), (0.2, -0.3), (0.3, 0))
    ]
    layer = linear(grid=grids[0], hub=3, further=tuple(grids[1:]), weight=WEIGHTS["e2m1"])
    layer.route = Route[int | Tensor]()
    x = draw(4, 12)
    layer.route.open([member])
    expected = by_kernel(layer, x, "reference")
    layer.route.open([torch.tensor([member])])
    same_sums(traced(layer, x), expected)


@pytest.mark.parametrize("variant", range(4))
@pytest.mark.parametrize(("usual", "lifted"), [("e2m1", "e1m6"), ("ue2m2", "ue1m7")])
def test_lifted_inputs_are_selected(usual: str, lifted: str, variant: int) -> None:
    grids = {"grid": grid_of(INPUTS[usual]), "lifted": grid_of(INPUTS[lifted])}
    layer = conv(hub=2, padding=1, **grids)
    layer.route = Route[int | Tensor]()
    x = draw(2, 4, 6, 5)
    layer.route.open([variant])
    expected = by_kernel(layer, x, "reference")
    same_sums(traced(layer, x), expected)
    layer.route.open([torch.tensor([variant])])
    same_sums(traced(layer, x), expected)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_inputs_are_transformed(transform: InputTransform) -> None:
    layer = layer_of(nn.Linear, 32, 5, grid=grid_of(INPUTS["e2m1"]), transform=transform)
    x = draw(2, 7, 32) * torch.linspace(0, 9, 7)[:, None]
    same_sums(traced(layer, x), by_kernel(layer, x, "reference"))


@pytest.mark.parametrize(("width", "refused"), [(60_000, False), (70_000, True)])
def test_sums_that_could_overflow_are_left_in_floating_point(width: int, refused: bool) -> None:
    options = {"weight": WEIGHTS["e1m6"], "grid": grid_of(INPUTS["ue1m7"])}
    layer = layer_of(nn.Linear, width, 1, **options)
    assert (Traced.reason(layer) == "the sum could overflow 32 bits") == refused
    assert (Traced(layer).arithmetic is None) == refused
