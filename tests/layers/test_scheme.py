"""Values of a layer's scheme are checked where they enter."""

import math

import pytest

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid
from msfp_cli.layers.clock import Clock
from msfp_cli.layers.scheme import MAX_HUB, LayerScheme

E2M1 = FloatFormat.parse("e2m1")


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e300, 1e38, 1e-60])
def test_a_scale_is_positive_and_finite(scale: float) -> None:
    with pytest.raises(ValueError, match="a scale of .* is not positive and finite"):
        Grid(E2M1, scale)


@pytest.mark.parametrize("zero_point", [math.nan, math.inf, -math.inf, 1e300])
def test_a_zero_point_is_finite(zero_point: float) -> None:
    with pytest.raises(ValueError, match="a zero point of .* is not finite"):
        Grid(E2M1, 1.0, zero_point)


@pytest.mark.parametrize("hub", [0, -1, MAX_HUB + 1, 10**9])
def test_a_hub_has_members_that_a_byte_can_count(hub: int) -> None:
    with pytest.raises(ValueError, match="hub of"):
        LayerScheme(weight=E2M1, hub=hub)
    LayerScheme(weight=E2M1, hub=MAX_HUB)


@pytest.mark.parametrize("unit", [0.0, math.nan, 1e300, -1.0, None, "x"])
def test_a_unit_brings_timesteps_to_thousands(unit: object) -> None:
    with pytest.raises(ValueError, match="neither 1 nor 1000"):
        Clock.of_unit(unit)
    assert (Clock.of_unit(1).scale, Clock.of_unit(1000.0).scale) == (1.0, 1000.0)
