"""Change attention in a model of OpenVINO that is about to run: rounded, and zero without keys.

Attention multiplies every query by every key, which in a large picture takes as long as all layers.
Each query and each key gets a scale of its own, its greatest element over 127, as in SageAttention
(Zhang et al. 2024, arXiv:2410.02367); nothing has to be calibrated. The product of bytes is exact
in 32 bits. The softmax and its product with the values stay in floating point: the weights of a
wide attention are far smaller than the greatest, and would be rounded to nothing.
"""

import math
from typing import Any, TypeAlias

from msfp_cli.engines.package import Model, Operators

Node: TypeAlias = Any  # one of its operators
Output: TypeAlias = Any  # what an operator gives
_KIND = "ScaledDotProductAttention"
_LOWEST = -128
_HIGHEST = 127
_SMALLEST = 1e-30  # of what is divided by, where a query or key is zero


def round_attention_(model: Model, ops: Operators) -> int:
    """Round queries and keys in every attention of a model, except causal and shapeless ones.

    Arguments:
        model: its shapes are known.
        ops: OpenVINO's set of operators.

    Returns:
        How many there were.
    """
    found = [node for node in _attentions(model) if _is_known(node)]
    for node in found:
        node.output(0).replace(_rounded(node, ops).output(0))
    return len(found)


def zero_where_masked_(model: Model, ops: Operators) -> None:
    """Let queries that may see no key get zeros, as in torch; OpenVINO gives them NaN.

    Arguments:
        ops: OpenVINO's set of operators.
    """
    for node in _attentions(model):
        mask = node.input_value(3) if node.get_input_size() > 3 else None
        if mask is None or len(mask.get_partial_shape()) == 0:
            continue
        users = list(node.output(0).get_target_inputs())
        sees, shown = _unmasked(mask, ops)
        node.input(3).replace_source_output(shown.output(0))
        zero = _number(0, node.output(0), ops)
        output = ops.select(sees, node.output(0), zero).output(0)
        for user in users:
            user.replace_source_output(output)


def _unmasked(mask: Output, ops: Operators) -> tuple[Node, Node]:
    """Return whether each query sees a key, and a mask that shows all of them to those that do not.

    Returns:
        ``(..., queries, 1)``, and what has the mask's shape and type.
    """
    last = ops.constant([-1])
    is_plain = mask.get_element_type().to_string() == "boolean"
    shown = mask if is_plain else ops.not_equal(mask, _number(-math.inf, mask, ops))
    sees = ops.reduce_logical_or(shown, last, keep_dims=True)
    if is_plain:
        return sees, ops.logical_or(mask, ops.logical_not(sees))
    return sees, ops.select(sees, mask, _number(0, mask, ops))


def _attentions(model: Model) -> list[Node]:
    """List every attention of a model, except causal ones."""
    found = [node for node in model.get_ops() if node.get_type_name() == _KIND]
    return [node for node in found if not node.get_attributes()["causal"]]


def _is_known(attention: Node) -> bool:
    """Whether rank and width of queries and keys are known: they may depend on values."""
    shapes = [attention.input_value(i).get_partial_shape() for i in range(2)]
    return all(shape.rank.is_static and shape[-1].is_static for shape in shapes)


def _rounded(attention: Node, ops: Operators) -> Node:
    """Return what computes the same from rounded queries and keys."""
    count = attention.get_input_size()
    query, key, value, *others = (attention.input_value(i) for i in range(count))
    width = query.get_partial_shape()[-1].get_length()
    factor = others[1] if len(others) > 1 else _number(width**-0.5, query, ops)
    queries, query_scales = _to_8_bits(query, ops)
    keys, key_scales = _to_8_bits(key, ops)
    products = ops.matmul(queries, keys, False, True)
    # One factor after the other: both as one would be a matrix of the products' size.
    by_key = ops.multiply(products, _transposed(key_scales, ops))
    scores = ops.multiply(by_key, ops.multiply(query_scales, factor))
    if others:
        scores = ops.add(scores, _summand(others[0], scores, ops))
    return ops.matmul(ops.softmax(scores, -1), value, False, False)


def _to_8_bits(rows: Output, ops: Operators) -> tuple[Node, Node]:
    """Return ``(..., rows, width)`` as the integers of bytes, and the scale of each row."""
    greatest = ops.reduce_max(ops.absolute(rows), ops.constant([-1]), keep_dims=True)
    scales = ops.divide(
        ops.maximum(greatest, _number(_SMALLEST, rows, ops)), _number(_HIGHEST, rows, ops)
    )
    lowest = _number(_LOWEST, rows, ops)
    highest = _number(_HIGHEST, rows, ops)
    steps = ops.divide(rows, scales)
    levels = _HIGHEST - _LOWEST + 1
    return ops.fake_quantize(steps, lowest, highest, lowest, highest, levels), scales


def _transposed(columns: Node, ops: Operators) -> Node:
    """Return ``(..., n, 1)`` as ``(..., 1, n)``."""
    rank = len(columns.output(0).get_partial_shape())
    order = [*range(rank - 2), rank - 1, rank - 2]
    return ops.transpose(columns, ops.constant(order))


def _summand(mask: Output, scores: Node, ops: Operators) -> Output:
    """Return what a mask adds to the scores: one of truth values takes away all that is false."""
    if mask.get_element_type().to_string() != "boolean":
        return mask
    none = _number(0, scores.output(0), ops)
    return ops.select(mask, none, _number(-math.inf, scores.output(0), ops))


def _number(value: float, like: Output, ops: Operators) -> Node:
    return ops.constant(value, like.get_element_type())
