import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msfp_cli.formats.float_format import FloatFormat, formats_within
from msfp_cli.formats.multipliers import (
    GroupedScale,
    expand,
    group_size,
    largest_multiplier,
    num_groups,
    pack_multipliers,
    refuse_multipliers,
    search_groups,
    step_sizes,
    unpack_multipliers,
)
from msfp_cli.formats.rounding import round_steps
from msfp_cli.formats.search import SearchSpace, search_rows

E2M1 = FloatFormat.parse("e2m1")
FORMATS = formats_within(4, 8, signed=True)


def grouped_weight(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Draw rows whose stretches of 16 have different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(rows, -(-width // 16), generator=generator) * 2 + 0.1
    return torch.randn(rows, width, generator=generator) * sizes.repeat_interleave(16, 1)[:, :width]


def error_of(weight: torch.Tensor, found: GroupedScale) -> float:
    """Return the relative squared error of rounding to the nearest with found steps."""
    sizes = step_sizes(found.scale, found.multipliers, weight.shape)
    rounded = round_steps(weight / sizes, found.format) * sizes
    return float((rounded - weight).double().square().sum() / weight.double().square().sum())


@given(st.integers(1, 5000), st.integers(1, 200))
def test_groups_cover_a_row_and_have_no_more_weights_than_asked_for(width: int, most: int) -> None:
    groups = num_groups(width, most)
    size = group_size(width, groups)
    assert size <= most
    assert (groups - 1) * size < width <= groups * size
    assert num_groups(width, size) == groups


@pytest.mark.parametrize(("name", "most"), [("e2m1", 10), ("e1m2", 16), ("e3m0", 1), ("e1m6", 1)])
def test_integers_of_every_multiplier_are_signed_bytes(name: str, most: int) -> None:
    fmt = FloatFormat.parse(name)
    assert largest_multiplier(fmt) == most
    assert most * fmt.largest <= 127


@pytest.mark.parametrize("shape", [(3, 64), (5, 100), (4, 6, 3, 3), (2, 7)])
def test_reported_error_is_that_of_rounding(shape: tuple[int, ...]) -> None:
    weight = grouped_weight(shape[0], torch.Size(shape[1:]).numel()).view(shape)
    found = search_groups(weight, FORMATS, 4)
    assert found is not None
    assert found.multipliers.shape == (shape[0], num_groups(weight[0].numel(), 4))
    assert found.error == pytest.approx(error_of(weight, found), rel=1e-4)
    refuse_multipliers("layer", found.multipliers, found.format, found.multipliers.shape)


def test_groups_help_where_sizes_differ() -> None:
    weight = grouped_weight(16, 256)
    rows = search_rows(weight, FORMATS, SearchSpace()).winner
    found = search_groups(weight, FORMATS, 16)
    assert found is not None
    assert found.error < 0.8 * rows.error


def test_no_multiplier_of_the_found_step_would_do_better() -> None:
    weight = grouped_weight(2, 24)
    found = search_groups(weight, (E2M1,), 8)
    assert found is not None
    for row, group in itertools.product(range(2), range(3)):
        part = weight[row, 8 * group : 8 * group + 8]
        errors = []
        for multiplier in range(1, largest_multiplier(E2M1) + 1):
            step = found.scale[row] * multiplier
            errors.append(float((round_steps(part / step, E2M1) * step - part).square().sum()))
        assert errors[int(found.multipliers[row, group]) - 1] == pytest.approx(min(errors))


def test_rows_of_one_group_and_formats_without_a_choice_are_left_alone() -> None:
    weight = grouped_weight(4, 32)
    assert search_groups(weight, FORMATS, 32) is None
    assert search_groups(weight, (FloatFormat.parse("e1m6"),), 8) is None


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-41, 1e-35])
def test_rows_that_are_nearly_zero_have_steps_that_can_be_multiplied(size: float) -> None:
    weight = grouped_weight(2, 64)
    weight[1] *= size
    found = search_groups(weight, FORMATS, 32)
    rows = search_rows(weight, FORMATS, SearchSpace()).winner
    assert found is not None
    tiny = torch.finfo(torch.float32).tiny
    for scale in (found.scale, rows.max_value / rows.format.largest):
        assert bool((scale > 2**8 * tiny).all())


def test_rows_of_zeros_have_positive_steps() -> None:
    found = search_groups(torch.zeros(2, 64), FORMATS, 32)
    assert found is not None
    assert (found.scale > 0).all()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_packing_is_undone(rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    multipliers = torch.randint(1, 17, (rows, groups), generator=generator).to(torch.uint8)
    packed = pack_multipliers(multipliers)
    assert len(packed) == (rows * groups + 1) // 2
    assert torch.equal(unpack_multipliers(packed, (rows, groups)), multipliers)


def test_multipliers_go_to_consecutive_weights_of_a_row() -> None:
    multipliers = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    of_weights = expand(multipliers, torch.Size((2, 1, 1, 5)))
    assert of_weights.view(2, 5).tolist() == [[1, 1, 1, 2, 2], [3, 3, 3, 4, 4]]


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 3, dtype=torch.uint8),
        torch.full((2, 3), 11, dtype=torch.uint8),
        torch.ones(2, 2, dtype=torch.uint8),
        torch.ones(2, 3),
    ],
)
def test_multipliers_that_cannot_be_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="conv has"):
        refuse_multipliers("conv", wrong, E2M1, (2, 3))
