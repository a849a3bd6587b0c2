"""Change convolutions in a model of OpenVINO that is about to run, where oneDNN is wrong.

Its convolution of bytes has two faults, mostly with AMX (OpenVINO 2026.4; torch's has the same, see
`kernels.onednn`). It gives wrong values where a row of the output is one pixel wide and the stride
is not 1, and it may crash where a window sees nothing but padding. Of 1,428 random shapes all
others were right. With a stride of 1 the first pixel is the same, and right, and zeros that are
part of the input are no padding.
"""

from typing import Any, TypeAlias

from msfp_cli.engines.package import Model, Operators

Convolution: TypeAlias = Any  # one of its operators
_KINDS = ("Convolution", "GroupConvolution")


def mend_convolutions_(model: Model, ops: Operators) -> int:
    """Let oneDNN compute no convolution that it computes wrongly.

    Arguments:
        model: its shapes are known; where a width depends on values, its stride stays as it is.
        ops: OpenVINO's set of operators.

    Returns:
        How many were changed.
    """
    found = [node for node in model.get_ops() if node.get_type_name() in _KINDS]
    return sum(_pad_first(node, ops) | _keep_first_column(node, ops) for node in found)


def _pad_first(convolution: Convolution, ops: Operators) -> bool:
    """Give padding that a whole window fits into as zeros of the input, if there is any."""
    facts = convolution.get_attributes()
    kernel = list(convolution.input_value(1).get_partial_shape())[-len(facts["strides"]) :]
    reach = [
        dilation * (size.get_length() - 1)
        for size, dilation in zip(kernel, facts["dilations"], strict=True)
    ]
    excess = {
        side: [max(0, pad - most) for pad, most in zip(facts[side], reach, strict=True)]
        for side in ("pads_begin", "pads_end")
    }
    if not any(excess["pads_begin"] + excess["pads_end"]):
        return False
    source = convolution.input_value(0)
    start, stop = (ops.constant([0, 0, *numbers]) for numbers in excess.values())
    zero = ops.constant(0, source.get_element_type())
    padded = ops.pad(source, start, stop, "constant", zero)
    convolution.input(0).replace_source_output(padded.output(0))
    for side, numbers in excess.items():
        left = [pad - more for pad, more in zip(facts[side], numbers, strict=True)]
        convolution.set_attribute(side, left)
    convolution.validate_and_infer_types()
    return True


def _keep_first_column(convolution: Convolution, ops: Operators) -> bool:
    """Let a convolution whose output is one pixel wide slide by 1, and keep the first column."""
    strides = list(convolution.get_attributes()["strides"])
    shape = convolution.output(0).get_partial_shape()
    if strides[-1] == 1 or shape.rank.is_dynamic or shape[-1] != 1:
        return False
    users = list(convolution.output(0).get_target_inputs())
    convolution.set_attribute("strides", [*strides[:-1], 1])
    convolution.validate_and_infer_types()
    start, stop, step, axis = (ops.constant([number]) for number in (0, 1, 1, -1))
    column = ops.slice(convolution.output(0), start, stop, step, axis).output(0)
    for user in users:
        user.replace_source_output(column)
    return True
