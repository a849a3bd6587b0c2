"""Which layers keep other bits than the rest: rules ``PATTERN:BITS`` over their names."""

import fnmatch
from dataclasses import dataclass

from msfp_cli.errors import UsageError
from msfp_cli.formats.float_format import MAX_BITS, MIN_BITS

# Layers that diffusers' denoisers run first or last stay in floating point: near the end of the
# sampling little noise is left in the sample, and a rounded sample hides it. Those that run on the
# timestep or lead into others take few multiply-adds, and all errors pass through them, so 8 bits
# are the custom (EfficientDM, Q-Diffusion).
OUTERMOST = (
    "conv_in",
    "conv_out",
    "x_embedder",
    "pos_embed.*",
    "patch_embed*",
    "proj_out",
    "proj_out_2",
)
_EMBEDDINGS = (
    "context_embedder",
    "norm_out.*",
    "proj_out_1",
    "caption_projection.*",
    "time_embedding.*",
    "add_embedding.*",
    "class_embedding.*",
    "time_text_embed.*",
    "time_embed.*",
    "adaln_single.*",
    "condition_embedder.*",
    "*timestep_embedder.*",
)
DEFAULT_KEEP = (
    *(f"{name}:none" for name in OUTERMOST),
    *(f"{name}:8" for name in _EMBEDDINGS),
)


@dataclass(frozen=True)
class KeepRule:
    """A pattern of layer names and the bits they keep; None keeps them in floating point."""

    pattern: str
    bits: int | None

    @classmethod
    def parse(cls, text: str) -> "KeepRule":
        """Read ``PATTERN:BITS``, BITS a number or ``none``.

        Raises:
            UsageError: it is not of that form.
        """
        pattern, colon, bits = text.rpartition(":")
        if not colon or not pattern:
            raise UsageError(
                f"cannot read --keep {text!r}; write PATTERN:BITS, "
                "for instance 'conv_in:8' or '*attn2*:none'"
            )
        return cls(pattern, parse_bits(bits, "--keep"))

    def matches(self, name: str) -> bool:
        """Whether the rule speaks of the layer `name`."""
        return fnmatch.fnmatchcase(name, self.pattern)


def parse_bits(text: str, option: str) -> int | None:
    """Read a number of bits, or ``none``.

    Raises:
        UsageError: it is neither, or out of range.
    """
    if text.strip().lower() == "none":
        return None
    if not text.strip().isdecimal() or not MIN_BITS <= int(text) <= MAX_BITS:
        raise UsageError(
            f"{option} {text!r} is out of range; choose {MIN_BITS} to {MAX_BITS} bits, or none"
        )
    return int(text)
