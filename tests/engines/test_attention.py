"""Attention with queries and keys at 8 bits: what is computed, by what, and what is left alone."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from layers.kernels.test_kernels import draw
from msfp_cli.engines.attention import round_attention_, zero_where_masked_
from msfp_cli.engines.package import core, import_openvino

pytest.importorskip("openvino")
openvino = import_openvino()
QUERY = draw(2, 3, 6, 16, seed=0)
KEY = draw(2, 3, 9, 16, seed=1)
VALUE = draw(2, 3, 9, 5, seed=2)
ADDED = draw(6, 9, seed=3)
ALLOWED = draw(2, 1, 6, 9, seed=4) > -0.5


class Attention(nn.Module):
    """torch's own."""

    def __init__(self, **options: float) -> None:
        super().__init__()
        self.options = options

    def forward(self, *inputs: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(*inputs, **self.options)


class OfSome(nn.Module):
    """Attention in as many dimensions as values say."""

    def forward(self, keep: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        some = keep.nonzero()[:, 0]
        return functional.scaled_dot_product_attention(query[..., some], key[..., some], value)


def compiled(
    inputs: tuple[Tensor, ...],
    module: nn.Module | None = None,
    *,
    rounds: bool = True,
    **options: float,
) -> tuple[int, Any]:
    """Return how many attentions were rounded, and the compiled model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer is deprecated
        graph = torch.jit.trace(module or Attention(**options), inputs, check_trace=False)
        model = openvino.convert_model(graph, example_input=inputs)
    model.reshape({i: list(x.shape) for i, x in enumerate(inputs)})
    zero_where_masked_(model, openvino.opset13)
    count = round_attention_(model, openvino.opset13) if rounds else 0
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    return count, core().compile_model(model, "CPU", settings)


def run(model: Any, inputs: tuple[Tensor, ...]) -> Tensor:  # noqa: ANN401
    (output,) = model([x.numpy() for x in inputs]).values()
    return torch.from_numpy(output.copy())


def to_8_bits(rows: Tensor) -> Tensor:
    scales = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (rows / scales).round() * scales


@pytest.mark.parametrize(
    ("others", "options"),
    [((), {}), ((), {"scale": 0.7}), ((ALLOWED,), {}), ((ADDED,), {"scale": 0.2})],
    ids=["plain", "scale", "truth values", "summands"],
)
def test_queries_and_keys_are_rounded_row_by_row(
    others: tuple[Tensor, ...], options: dict[str, float]
) -> None:
    count, model = compiled((QUERY, KEY, VALUE, *others), **options)
    assert count == 1
    rounded = (to_8_bits(QUERY), to_8_bits(KEY), VALUE, *others)
    expected = Attention(**options)(*rounded)
    exact = Attention(**options)(QUERY, KEY, VALUE, *others)
    output = run(model, (QUERY, KEY, VALUE, *others))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert 1e-4 < (output - exact).abs().max() < 0.05


def test_product_of_queries_and_keys_runs_in_bytes() -> None:
    _, model = compiled((QUERY, KEY, VALUE))
    facts = [node.get_rt_info() for node in model.get_runtime_model().get_ordered_ops()]
    assert any("i8" in str(fact["primitiveType"].value) for fact in facts)


def test_rows_of_zeros_are_finite_and_weigh_all_values_alike() -> None:
    inputs = (torch.zeros_like(QUERY), torch.zeros_like(KEY), VALUE)
    output = run(compiled(inputs)[1], inputs)
    torch.testing.assert_close(output, VALUE.mean(-2, keepdim=True).expand_as(output))


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("is_summand", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 6, 9), (2, 1, 1, 9), (6, 9), (2, 3, 6, 9)])
def test_query_that_may_see_no_key_gets_zeros(
    shape: tuple[int, ...], *, is_summand: bool, rounds: bool
) -> None:
    mask = draw(*shape, seed=5) > -0.5
    mask.view(-1, 9)[0] = False
    if is_summand:
        mask = torch.zeros(shape).masked_fill(~mask, -math.inf)
    inputs = (QUERY, KEY, VALUE, mask)
    expected = Attention()(*inputs)
    assert (expected == 0).any()
    output = run(compiled(inputs, rounds=rounds)[1], inputs)
    torch.testing.assert_close(output, expected, rtol=0, atol=0.05 if rounds else 1e-5)


def test_scales_differ_by_row() -> None:
    """A row a thousand times as large takes no digit from the others."""
    key = KEY.clone()
    key[..., 0, :] *= 1000
    mask = torch.zeros(6, 9)
    mask[:, 0] = -math.inf
    inputs = (QUERY, key, VALUE, mask)
    output = run(compiled(inputs)[1], inputs)
    assert (output - Attention()(*inputs)).abs().max() < 0.05


def test_causal_attention_stays_as_it_is() -> None:
    inputs = (QUERY, KEY, VALUE)
    count, model = compiled(inputs, is_causal=True)
    assert count == 0
    torch.testing.assert_close(
        run(model, inputs), Attention(is_causal=True)(*inputs), rtol=0, atol=1e-5
    )


def test_attention_of_unknown_width_stays_as_it_is() -> None:
    inputs = (torch.arange(16) % 3, QUERY, KEY, VALUE)
    count, model = compiled(inputs, OfSome())
    assert count == 0
    torch.testing.assert_close(run(model, inputs), OfSome()(*inputs), rtol=0, atol=1e-5)
