import pytest

from msfp_cli.calibration.keep import KeepRule, parse_bits, usual_role
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


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("first", ("conv_in", "x_embedder", "pos_embed.proj")),
        ("last", ("conv_out", "proj_out", "proj_out_2")),
        (
            "conditions",
            (
                "time_embedding.linear_1",
                "context_embedder",
                "norm_out.linear",
                "proj_out_1",
                "adaln_single.linear",
                "time_text_embed.timestep_embedder.linear_1",
            ),
        ),
        (
            None,
            (
                "mid_block.resnets.0.conv1",
                "down_blocks.0.resnets.0.time_emb_proj",
                "mid.attentions.0.proj_out",
                "mid.conv_in",
            ),
        ),
    ],
)
def test_usual_names_say_the_role_of_a_layer_that_is_not_run(
    role: str | None, names: tuple[str, ...]
) -> None:
    assert {usual_role(name) for name in names} == {role}


def test_rule_of_a_role_speaks_of_no_name() -> None:
    rule = KeepRule.parse("@last:none")
    assert rule.matches("any", "last")
    assert not rule.matches("last", "first") and not rule.matches("@last")
