"""Sizes as users write them."""

import pytest

from msfp_cli.errors import UsageError
from msfp_cli.memory import peak_bytes, read_size, write_size

SIZES = {"8GiB": 8 * 2**30, "500MB": 500_000_000, "8g": 8 * 2**30, "1.5 KiB": 1536, "4096": 4096}


@pytest.mark.parametrize("text", SIZES)
def test_sizes_are_read_in_the_units_that_they_name(text: str) -> None:
    assert read_size(text) == SIZES[text]


@pytest.mark.parametrize("text", ["8GiB", "1025TiB", "1536KiB", "500000001"])
def test_sizes_are_written_as_they_are_read(text: str) -> None:
    assert write_size(read_size(text)) == text


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "8 pears", "nan"])
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="write for instance 8GiB"):
        read_size(text)


def test_the_peak_never_falls() -> None:
    before = peak_bytes()
    assert before > 2**20
    assert peak_bytes() >= before
