from typing import Any

import pytest

from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.errors import UsageError
from msfp_cli.formats.float_format import FloatFormat


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_lift": 0.2, "activations": 8}, "--input-lift gives 8 bits to inputs"),
        ({"input_lift": 0.2, "activations": None}, "--input-lift gives 8 bits to inputs"),
        ({"input_lift": 1.5}, "--input-lift must be at most 1, got 1.5"),
        ({"weights": 1}, "--weights must be at least 2, got 1"),
        ({"weights": 9}, "--weights must be at most 8, got 9"),
        ({"activations": 1}, "--activations must be at least 2, got 1"),
        ({"activations": 9}, "--activations must be at most 8, got 9"),
        ({"weights": None, "activations": None}, "neither"),
        ({"lift": 2.0}, "--lift must be at most 1, got 2"),
        ({"lift": -0.1}, "--lift must be at least 0, got -0.1"),
        ({"lift": float("nan")}, "--lift must be at least 0, got nan"),
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ({"sensitivity_calls": 0}, "sensitivity_calls must be at least 1, got 0"),
        ({"keep": ("conv_in",)}, "PATTERN:BITS"),
        ({"keep": (":8",)}, "PATTERN:BITS"),
        ({"keep": ("@frist:8",)}, "no role of layers; choose @first, @last, @conditions"),
        ({"keep": ("conv_in:8", "conv_out:9")}, "--keep '9'"),
        ({"keep": ("conv_in:",)}, "--keep ''"),
        ({"keep": ("conv_in:many",)}, "--keep 'many'"),
        ({"formats": "best"}, "'best'"),
        ({"formats": ""}, "unknown format"),
        ({"formats": "e2m1,"}, "unknown format"),
        ({"formats": "e2m1;ue2m2"}, "unknown format"),
        ({"formats": "e9m9"}, "e9m9"),
    ],
)
def test_calibrate_recipe_refuses_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CalibrateRecipe(**arguments)


def test_list_of_formats_of_no_asked_width_is_refused() -> None:
    with pytest.raises(UsageError, match="e4m3"):
        CalibrateRecipe(weights=4, activations=4, formats="e4m3")
    with pytest.raises(UsageError, match="e2m1"):
        CalibrateRecipe(weights=6, activations=None, formats="e2m1,e1m2")


def test_last_matching_rule_wins_and_default_comes_first() -> None:
    recipe = CalibrateRecipe(keep=("*:6", "conv_*:none", "conv_in:5"))
    assert recipe.kept_bits("conv_in") == (True, 5)
    assert recipe.kept_bits("conv_out") == (True, None)
    assert recipe.kept_bits("time_embedding.linear_1") == (True, 6)
    assert CalibrateRecipe(keep=("conv_in:5", "*:6")).kept_bits("conv_in") == (True, 6)


@pytest.mark.parametrize(
    ("role", "bits"), [("first", (True, None)), ("last", (True, None)), ("conditions", (True, 8))]
)
def test_default_policy_keeps_layers_by_their_role(role: str, bits: tuple[bool, int]) -> None:
    recipe = CalibrateRecipe()
    assert recipe.kept_bits("conv_in", role) == bits
    assert recipe.kept_bits("conv_in", None) == (False, None)  # whatever it is called
    assert CalibrateRecipe(keep=(f"@{role}:6",)).kept_bits("any", role) == (True, 6)
    assert CalibrateRecipe(keep=("an*:5",)).kept_bits("any", role) == (True, 5)
    assert CalibrateRecipe(keep=("an*:5", f"@{role}:6")).kept_bits("any", role) == (True, 6)


@pytest.mark.parametrize(
    ("formats", "inputs", "weights"),
    [
        ("mixed", "e1m2 e2m1 e3m0 ue1m3 ue2m2 ue3m1 ue4m0", "e1m2 e2m1 e3m0"),
        ("signed", "e1m2 e2m1 e3m0", "e1m2 e2m1 e3m0"),
        ("unsigned", "ue1m3 ue2m2 ue3m1 ue4m0", "e1m2 e2m1 e3m0"),
        ("integer", "ue1m3", "e1m2"),
        ("e2m1", "e2m1", "e2m1"),
        ("ue2m2,e2m1", "ue2m2 e2m1", "e2m1"),
        ("ue2m2", "ue2m2", "e1m2 e2m1 e3m0"),
        ("ue2m2, e3m0,e2m3", "ue2m2 e3m0", "e3m0"),
    ],
)
def test_formats_restrict_the_candidates(formats: str, inputs: str, weights: str) -> None:
    recipe = CalibrateRecipe(formats=formats)
    assert [fmt.name for fmt in recipe.input_formats(4)] == inputs.split()
    assert [fmt.name for fmt in recipe.weight_formats(4)] == weights.split()


def test_list_of_4_bit_formats_leaves_8_bit_layers_a_free_choice() -> None:
    recipe = CalibrateRecipe(formats="e2m1,ue2m2")
    assert recipe.input_formats(8) == CalibrateRecipe().input_formats(8)
    assert recipe.weight_formats(8) == CalibrateRecipe().weight_formats(8)


@pytest.mark.parametrize(
    ("bits", "inputs", "weights"),
    [
        (8, "e1m6 e2m5 e3m4 ue1m7 ue2m6 ue3m5", "e1m6"),
        (6, "e1m4 e2m3 e3m2 ue1m5 ue2m4 ue3m3", "e1m4 e2m3"),
        (4, "e1m2 e2m1 e3m0 ue1m3 ue2m2 ue3m1 ue4m0", "e1m2 e2m1 e3m0"),
    ],
)
def test_free_choice_is_among_formats_that_8_bit_units_hold(
    bits: int, inputs: str, weights: str
) -> None:
    recipe = CalibrateRecipe(weights=bits, activations=bits)
    assert [fmt.name for fmt in recipe.input_formats(bits)] == inputs.split()
    assert [fmt.name for fmt in recipe.weight_formats(bits)] == weights.split()


@pytest.mark.parametrize(
    ("bits", "inputs"),
    [
        (8, "e1m6 e2m4 ue1m7 ue2m5"),
        (6, "e1m4 e2m3 ue1m5 ue2m4"),
        (5, "e1m3 e2m2 e3m0 ue1m4 ue2m3 ue3m1"),
        (4, "e1m2 e2m1 e3m0 ue1m3 ue2m2 ue3m1"),
    ],
)
def test_narrow_inputs_take_the_finest_formats_whose_integers_fit_into_a_byte(
    bits: int, inputs: str
) -> None:
    formats = CalibrateRecipe(activations=bits).input_formats(bits, wide=False)
    assert [fmt.name for fmt in formats] == inputs.split()
    for fmt in formats:
        assert fmt.largest * (1 + fmt.signed) <= 255
        if fmt.bits < bits:
            finer = FloatFormat(fmt.exponent_bits, fmt.mantissa_bits + 1, fmt.signed)
            assert finer.largest * (1 + finer.signed) > 255


def test_formats_asked_for_by_name_may_be_any() -> None:
    recipe = CalibrateRecipe(weights=8, activations=8, formats="e4m3")
    assert (
        [fmt.name for fmt in recipe.input_formats(8)]
        == [fmt.name for fmt in recipe.weight_formats(8)]
        == ["e4m3"]
    )


def test_rules_that_match_no_layer_are_told() -> None:
    recipe = CalibrateRecipe(keep=("conv_in:8", "nomatch:8", "[:8", "@first:8"))
    assert recipe.idle_rules(["conv_in", "mid.0"]) == ["nomatch:8", "[:8"]


def test_rules_that_leave_nothing_to_quantize_are_refused() -> None:
    with pytest.raises(UsageError, match="leaves every layer in floating point"):
        CalibrateRecipe(keep=("*:none",)).idle_rules(["conv_in", "mid.0"])
    by_role = CalibrateRecipe(keep=("*:none", "@first:8"))
    assert by_role.idle_rules(["conv_in", "mid.0"]) == []
