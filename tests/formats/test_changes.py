import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msfp_cli.formats.changes import apply_changes, changes_between
from msfp_cli.formats.float_format import FloatFormat

FORMATS = ("e2m1", "e1m2", "ue2m2", "e1m0", "e1m6", "e2m3", "e3m0")


def neighbours_moved(share: float, fmt: FloatFormat, count: int, seed: int) -> tuple[Tensor, ...]:
    """Return codes, and others of which a share went to the next level up."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor(fmt.levels)
    code_of = {integer: code for code, integer in reversed(list(enumerate(fmt.code_book)))}
    codes = torch.tensor([code_of[level] for level in fmt.levels], dtype=torch.uint8)
    ranks = torch.randint(len(levels) - 1, (count,), generator=generator)
    moved = torch.rand(count, generator=generator) < share
    return codes[ranks], codes[ranks + moved]


@given(
    st.sampled_from(FORMATS),
    st.integers(0, 300),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_changes_restore_every_code(name: str, count: int, share: float, seed: int) -> None:
    fmt = FloatFormat.parse(name)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(1 << fmt.bits, (count,), generator=generator).to(torch.uint8)
    random = torch.randint(1 << fmt.bits, (count,), generator=generator).to(torch.uint8)
    other = torch.where(torch.rand(count, generator=generator) < share, random, first)
    after = torch.tensor([1, 2, 3], dtype=torch.uint8)
    changes = torch.cat([changes_between(first, other, fmt), after])
    codes, rest = apply_changes(first, changes, fmt)
    assert torch.equal(codes, other)
    assert torch.equal(rest, after)


@pytest.mark.parametrize("share", [0.0, 0.002, 0.016, 0.05, 0.1, 0.2])
def test_steps_to_the_next_level_take_little_more_than_their_entropy(share: float) -> None:
    count = 1 << 17
    fmt = FloatFormat.parse("e2m1")
    first, other = neighbours_moved(share, fmt, count, seed=0)
    changes = changes_between(first, other, fmt)
    assert torch.equal(apply_changes(first, changes, fmt)[0], other)
    entropy = -sum(p * math.log2(p) for p in (share, 1 - share) if p)
    overhead = 3 * 7  # three counts, and bytes that are not full
    assert 8 * len(changes) / count <= 1.25 * entropy + 8 * overhead / count


@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(0, 255), st.booleans())
def test_damaged_changes_are_refused_or_make_valid_codes(
    seed: int, place: int, byte: int, cut: bool
) -> None:
    fmt = FloatFormat.parse("e2m1")
    first, other = neighbours_moved(0.1, fmt, 300, seed)
    changes = changes_between(first, other, fmt)
    damaged = changes[:place] if cut else changes.clone()
    if not cut:
        damaged[place % len(damaged)] = byte
    try:
        codes, _ = apply_changes(first, damaged, fmt)
    except ValueError:
        return
    assert codes.shape == first.shape
    assert int(codes.max()) < 16


def test_bytes_are_those_that_the_module_describes() -> None:
    fmt = FloatFormat.parse("e2m1")
    first = torch.zeros(16, dtype=torch.uint8)
    other = first.clone()
    other[5] = 1  # the next level up
    other[9] = 7  # the largest
    # One position below 16: 4 low bits, then 1 + 1 + 1 bits, of which the first is 1.
    up = [1, 0, 0, 0, 5, 0b1]
    down = [0, 0, 0, 0, 0b0]
    elsewhere = [1, 0, 0, 0, 9, 0b1]
    assert changes_between(first, other, fmt).tolist() == [*up, *down, *elsewhere, 7]
