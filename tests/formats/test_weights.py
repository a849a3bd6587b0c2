"""Weights are encoded without a calibration: nearly as well as by the exact search."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msfp_cli.formats.float_format import FloatFormat, formats_of_width
from msfp_cli.formats.packing import pack, unpack
from msfp_cli.formats.rounding import Grid, dequantize, quantize
from msfp_cli.formats.search import SearchSpace, search_rows
from msfp_cli.formats.weights import CodedWeight, encode_weight, pack_rows

SIGNED = formats_of_width(4, signed=True)


def decode(coded: CodedWeight, shape: torch.Size) -> Tensor:
    codes = unpack(coded.codes, coded.format.bits, shape)
    return dequantize(codes, Grid(coded.format, coded.scale[:, None]))


def heavy_tailed(rows: int, columns: int) -> Tensor:
    torch.manual_seed(1)
    return torch.distributions.StudentT(3.0).sample((rows, columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heavy", [False, True])
def test_error_is_within_a_hundredth_of_the_exact_search(heavy: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (heavy_tailed(300, 512) if heavy else torch.randn(300, 512)).to(dtype)
    coded = encode_weight(weight, SIGNED)
    exact = search_rows(weight, SIGNED, SearchSpace()).winner
    difference = decode(coded, weight.shape) - weight.float()
    error = float(difference.square().sum() / weight.float().square().sum())
    assert coded.format == exact.format
    assert error <= 1.01 * exact.error


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 50),
    fmt=st.sampled_from(
        [fmt for bits in range(2, 9) for fmt in formats_of_width(bits, signed=True)]
    ),
)
def test_blocks_of_rows_are_packed_as_the_whole(rows: int, columns: int, fmt: FloatFormat) -> None:
    generator = torch.Generator().manual_seed(rows * 51 + columns)
    weight = torch.randn(rows, columns, generator=generator)
    scale = torch.rand(rows, generator=generator) / fmt.largest + 1e-3 / fmt.largest
    whole = pack(quantize(weight, Grid(fmt, scale[:, None])), fmt.bits)
    assert torch.equal(pack_rows(weight, scale, fmt), whole)


def test_blocks_smaller_than_a_weight_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy_tailed(45, 33)
    fmt = FloatFormat.parse("e2m3")
    scale = weight.abs().amax(dim=1) / fmt.largest
    whole = pack_rows(weight, scale, fmt)
    monkeypatch.setattr("msfp_cli.formats.weights._BLOCK", 300)
    assert torch.equal(pack_rows(weight, scale, fmt), whole)


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.zeros(9, 16)
    weight[3] = torch.randn(16)
    decoded = decode(encode_weight(weight, SIGNED), weight.shape)
    assert not decoded[:3].any()
    assert decoded[3].any()
