"""Change convolutions in a model of OpenVINO that is about to run, where oneDNN is wrong.

Its convolution of bytes gives wrong values where a row of the output is one pixel wide and the
stride is not 1 (OpenVINO 2026.4, mostly with AMX; torch's oneDNN has the same fault, see
`kernels.onednn`). Of 1,428 random shapes all others were right. With a stride of 1 the first pixel
is the same, and right.
"""

from msfp_cli.engines.package import Model, Operators

_KINDS = ("Convolution", "GroupConvolution")


def keep_first_column_(model: Model, ops: Operators) -> int:
    """Let a convolution whose output is one pixel wide slide by 1, and keep the first column.

    Arguments:
        model: its shapes are known; where a width depends on values, a convolution stays as it is.
        ops: OpenVINO's set of operators.

    Returns:
        How many there were.
    """
    found = [node for node in model.get_ops() if node.get_type_name() in _KINDS]
    count = 0
    for node in found:
        strides = list(node.get_attributes()["strides"])
        shape = node.output(0).get_partial_shape()
        if strides[-1] == 1 or shape.rank.is_dynamic or shape[-1] != 1:
            continue
        users = list(node.output(0).get_target_inputs())
        node.set_attribute("strides", [*strides[:-1], 1])
        node.validate_and_infer_types()
        start, stop, step, axis = (ops.constant([number]) for number in (0, 1, 1, -1))
        column = ops.slice(node.output(0), start, stop, step, axis).output(0)
        for user in users:
            user.replace_source_output(column)
        count += 1
    return count
