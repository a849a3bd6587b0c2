"""Read the weights of an export as docs/format.md says, with numpy and safetensors only.

Nothing of msfp and of torch is imported, so that the document is what is tested.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
_KEYS = {"weight", "input", "hub", "further_inputs", "lifted_input", "lookup", "weight_groups"} | {
    "rotation",
    "token_scales",
}
_TORCH = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"} | {
    "U8": "torch.uint8",
    "I16": "torch.int16",
    "I64": "torch.int64",
}


def parse_format(name: str) -> tuple[bool, int, int, int]:
    """Return whether a format is signed, its exponent and mantissa bits, and all its bits."""
    match = re.fullmatch(r"(u?)e(\d)m(\d)", name)
    assert match is not None
    signed = not match[1]
    return signed, int(match[2]), int(match[3]), signed + int(match[2]) + int(match[3])


def code_book(name: str) -> NDArray[np.int64]:
    """Return the integer of each code."""
    signed, exponent_bits, mantissa_bits, bits = parse_format(name)
    book = []
    for code in range(2**bits):
        mantissa = code & (2**mantissa_bits - 1)
        exponent = code >> mantissa_bits & (2**exponent_bits - 1)
        size = mantissa
        if exponent:
            size = (2**mantissa_bits + mantissa) << (exponent - 1)
        book.append(-size if signed and code >> (bits - 1) else size)
    return np.array(book)


def unpack(data: Bytes, bits: int, count: int) -> NDArray[np.int64]:
    """Return codes of a stream of bits."""
    stream = np.unpackbits(data, bitorder="little")[: count * bits]
    return stream.reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits))


def take_positions(data: Bytes, n: int) -> tuple[NDArray[np.int64], Bytes]:
    """Return a list of positions, and the bytes after it."""
    m = int.from_bytes(data[:4].tobytes(), "little")
    low = max(0, int(math.log2(max(1, n // max(m, 1)))))
    data = data[4:]
    low_size = (m * low + 7) // 8
    lows = unpack(data[:low_size], low, m) if low else np.zeros(m, np.int64)
    data = data[low_size:]
    size = (m + (n >> low) + 8) // 8
    bits = np.unpackbits(data[:size], bitorder="little")
    highs = np.flatnonzero(bits)[:m] - np.arange(m)
    return (highs << low) + lows, data[size:]


def rotate(rows: Floats, block: int) -> Floats:
    """Return rows whose blocks of columns are rotated; 0 for no rotation."""
    if not block:
        return rows
    signs = [[(i & j).bit_count() % 2 for j in range(block)] for i in range(block)]
    matrix = (1 - 2 * np.array(signs, np.float32)) / np.float32(block**0.5)
    return (rows.reshape(len(rows), -1, block) @ matrix).reshape(rows.shape)


class Component:
    """A quantized component of an export.

    Arguments:
        directory: its folder.
    """

    def __init__(self, directory: Path) -> None:
        document = json.loads((directory / "config.json").read_text())
        self.config: dict[str, Any] = document["quantization_config"]
        assert self.config["quant_method"] == "msfp"
        assert self.config["schema_version"] <= 3
        self.tensors = dict[str, Bytes]()  # the bytes of each
        self.kinds = dict[str, tuple[str, tuple[int, ...]]]()
        self.header = dict[str, str]()
        for path in sorted(directory.glob("*.safetensors")):
            self._read(path.read_bytes())

    def _read(self, content: bytes) -> None:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        self.header = header.pop("__metadata__")
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            self.tensors[name] = np.frombuffer(content[begin:end], np.uint8)
            self.kinds[name] = (entry["dtype"], tuple(entry["shape"]))

    def digest(self) -> str:
        """Return the SHA-256 over all tensors."""
        sha = hashlib.sha256()
        for name in sorted(self.tensors):
            kind, shape = self.kinds[name]
            sha.update(f"{name}\0{_TORCH[kind]}\0{shape}\0".encode())
            sha.update(self.tensors[name].tobytes())
        return sha.hexdigest()

    def table(self) -> Bytes:
        """Return the variant at each timestep of each layer that switches, ``(1001, layers)``."""
        rows = self.tensors["msfp_router.table"].reshape(self.kinds["msfp_router.table"][1])
        starts = self.tensors.get("msfp_router.starts")
        if starts is None:
            return rows
        return np.repeat(rows, np.diff(starts.view("<i2"), append=1001), axis=0)

    def weights(self, layer: str, shape: tuple[int, ...]) -> list[Floats]:
        """Return the weight of each member of a layer, float32 of this shape."""
        entry = self.config["layers"][layer]
        assert entry.keys() <= _KEYS
        book = code_book(entry["weight"])
        scale = self.tensors[f"{layer}.weight_scale"].view("<f4")
        count = math.prod(shape)
        width = count // len(scale)
        multipliers = np.ones((len(scale), width), np.float32)
        if groups := entry.get("weight_groups", 0):
            packed = self.tensors[f"{layer}.weight_multipliers"]
            of_groups = unpack(packed, 4, len(scale) * groups).reshape(len(scale), groups) + 1
            size = -(-width // groups)
            multipliers = of_groups.repeat(size, axis=1)[:, :width].astype(np.float32)
        weights = []
        for codes in self._members(layer, entry):
            rows = book[codes[:count]].astype(np.float32).reshape(len(scale), -1)
            rows = rows * multipliers * scale[:, None]
            weights.append(rotate(rows, entry.get("rotation", 0)).reshape(shape))
        return weights

    def _members(self, layer: str, entry: dict[str, Any]) -> list[NDArray[np.int64]]:
        """Return the codes of each member, those that only fill up the last byte among them."""
        *_, bits = parse_format(entry["weight"])
        rows = self.tensors[f"{layer}.weight_codes"].reshape(self.kinds[f"{layer}.weight_codes"][1])
        n = 8 * rows.shape[1] // bits
        members = [unpack(row, bits, n) for row in rows]
        changes = self.tensors.get(f"{layer}.weight_changes")
        if changes is None:
            assert len(members) == entry["hub"]
            return members
        book = code_book(entry["weight"])
        levels = sorted(set(book.tolist()))
        code_of = {level: int(np.flatnonzero(book == level)[0]) for level in levels}
        for _ in range(1, entry["hub"]):
            codes = members[0].copy()
            for step in (1, -1):
                positions, changes = take_positions(changes, n)
                for position in positions:
                    level = levels.index(int(book[codes[position]]))
                    codes[position] = code_of[levels[level + step]]
            positions, changes = take_positions(changes, n)
            size = (len(positions) * bits + 7) // 8
            codes[positions] = unpack(changes[:size], bits, len(positions))
            changes = changes[size:]
            members.append(codes)
        assert len(changes) == 0
        return members
