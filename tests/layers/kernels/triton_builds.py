"""Compile the Triton kernels for GPUs that are not here, and print each build as JSON.

Triton's interpreter accepts more than its compiler does, so passing there is not enough. A process
of its own, because one that interprets cannot compile.
"""

import inspect
import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from msfp_cli.layers.kernels import triton_ops

POINTERS = {
    **{
        "codes": "*i8",
        "weights": "*i8",
        "member": "*i64",
        "factors": "*fp32",
        "constants": "*fp32",
        "offsets": "*i32",
    },
    **{
        "y": "*bf16",
        "x": "*bf16",
        "numbers": "*fp32",
        "low": "*i8",
        "high": "*i8",
        "largest": "fp32",
    },
}
LINEAR = dict.fromkeys(("width", "columns", "groups", "stride_down", "stride_across", "per_out"), 1)
ONE = dict.fromkeys(
    ("height", "channels", "rows", "windows", "outs", "per_picture", "per_pixel"), 1
)
PRODUCTS: dict[
    str, dict[str, Any]
] = {  # numbers that are 1 are constants to the compiler, and take other ways through it
    "3x3": {"DOWN": 3, "ACROSS": 3, "KINDS": 49, "KINDS_ACROSS": 7, "OUTSIDE": -128, "PLANE": 0},
    "linear": {
        "DOWN": 1,
        "ACROSS": 1,
        "KINDS": 1,
        "KINDS_ACROSS": 2,
        "OUTSIDE": 0,
        "PLANE": 0,
        **LINEAR,
    },
    "high plane": {"DOWN": 3, "ACROSS": 3, "KINDS": 1, "KINDS_ACROSS": 7, "OUTSIDE": 0, "PLANE": 1},
    "one number": {
        "DOWN": 1,
        "ACROSS": 1,
        "KINDS": 1,
        "KINDS_ACROSS": 2,
        "OUTSIDE": 0,
        "PLANE": 0,
        **LINEAR,
        **ONE,
    },
}
ROUNDINGS: dict[str, dict[str, Any]] = {
    "e2m1": {"SIGNED": True, "MANTISSA": 1, "SHIFT": 0, "WIDE": False, "GAIN": 0.0},
    "ue3m1": {"SIGNED": False, "MANTISSA": 1, "SHIFT": 128, "WIDE": False, "GAIN": 0.0},
    "ue4m0": {"SIGNED": False, "MANTISSA": 0, "SHIFT": 0, "WIDE": True, "GAIN": 0.0},
    "float8": {"SIGNED": False, "MANTISSA": 2, "SHIFT": 0, "WIDE": False, "GAIN": 0.25},
}


def build(kernel: Any, capability: int, constants: dict[str, Any], **options: Any) -> Any:  # noqa: ANN401
    """Compile a kernel for a GPU; all arguments but constants and pointers are integers."""
    names = list(inspect.signature(kernel.fn).parameters)
    pointers = POINTERS | ({"low": "*fp8e4nv", "high": "*fp8e4nv"} if constants.get("GAIN") else {})
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names
    }
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(capability: int, tiles: list[triton_ops.Tile]) -> None:
    """Build everything for a GPU."""
    for name, constants in PRODUCTS.items():
        for tile in tiles:
            sizes = {"WINDOWS": tile.windows, "OUTS": tile.outs, "DEPTH": tile.depth}
            options = {
                "num_warps": tile.warps,
                "num_stages": tile.stages,
                "enable_fp_fusion": False,
            }
            built = build(triton_ops.multiply_kernel, capability, constants | sizes, **options)
            on_units = any(
                word in built.asm["ptx"] for word in ("mma.sync", "wgmma.mma", "tcgen05.mma")
            )
            print(
                json.dumps({"build": name, "shared": built.metadata.shared, "on_units": on_units})
            )
    for name, constants in ROUNDINGS.items():
        if not constants["GAIN"] or capability >= 89:
            share = {"PIXELS": 64, "CHANNELS": 64}
            built = build(
                triton_ops.round_kernel, capability, constants | share, enable_fp_fusion=False
            )
            print(
                json.dumps(
                    {
                        "build": name,
                        "shared": built.metadata.shared,
                        "exact": "div.rn" in built.asm["ptx"],
                    }
                )
            )


if __name__ == "__main__":
    main(int(sys.argv[1]), list(triton_ops.TILES[:: int(sys.argv[2])]))
