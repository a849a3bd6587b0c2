import pytest

from msfp_cli.calibration.keep import KeepRule, parse_bits
from msfp_cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "bits"), [("4", 4), (" 8 ", 8), ("2", 2), ("none", None), ("None", None)]
)
def test_bits_are_a_number_or_none(text: str, bits: int | None) -> None:
    assert parse_bits(text, "--weights") == bits


@pytest.mark.parametrize("text", ["", "1", "9", "-4", "4.0", "four", "²"])
def test_other_bits_are_refused_under_the_option_they_came_from(text: str) -> None:
    with pytest.raises(UsageError, match="--weights.*2 to 8 bits, or none"):
        parse_bits(text, "--weights")


def test_keep_rule_is_pattern_and_bits() -> None:
    assert KeepRule.parse("a:b:6") == KeepRule("a:b", 6)
    rule = KeepRule.parse("*attn?.to_[qk]:none")
    assert rule.bits is None
    assert rule.matches("mid.attn1.to_q")
    assert not rule.matches("mid.attn1.to_v") and not rule.matches("mid.ATTN1.to_q")
