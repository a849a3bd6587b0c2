"""Which layers keep other bits than the rest: rules ``PATTERN:BITS`` over their names and roles.

A pattern that begins with ``@`` is a role: what a layer does in the calls that were recorded.
"""

import fnmatch
from dataclasses import dataclass

from msfp_cli.errors import UsageError
from msfp_cli.formats.float_format import MAX_BITS, MIN_BITS

# The roles of layers, which `recording.flow` finds in a recorded call. Near the end of the sampling
# little noise is left in the sample, and a rounded sample hides it, so the first layer and the last
# stay in floating point. All errors pass through those that lead conditions into the others, and
# they take few multiply-adds, so 8 bits are the custom (EfficientDM, Q-Diffusion).
ROLES = ("first", "last", "conditions")
DEFAULT_KEEP = ("@first:none", "@last:none", "@conditions:8")

# What the layers with a role are called in many models, for a model that is not run.
_NAMES = {
    "first": ("conv_in", "x_embedder", "pos_embed.*", "patch_embed*"),
    "last": ("conv_out", "proj_out", "proj_out_2"),
    "conditions": (
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
    ),
}


def usual_role(name: str) -> str | None:
    """Return the role that a layer of this name has in many models, None if it has none."""
    for role, patterns in _NAMES.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return role
    return None


@dataclass(frozen=True)
class KeepRule:
    """A pattern of layer names, or ``@`` and a role, and the bits they keep.

    Bits that are None keep them in floating point.
    """

    pattern: str
    bits: int | None

    @classmethod
    def parse(cls, text: str) -> "KeepRule":
        """Read ``PATTERN:BITS``, BITS a number or ``none``.

        Raises:
            UsageError: it is not of that form, or there is no such role.
        """
        pattern, colon, bits = text.rpartition(":")
        if not colon or not pattern:
            raise UsageError(
                f"cannot read --keep {text!r}; write PATTERN:BITS, "
                "for instance 'conv_in:8' or '*attn2*:none'"
            )
        if pattern.startswith("@") and pattern[1:] not in ROLES:
            raise UsageError(
                f"--keep {text!r} names no role of layers; choose @{', @'.join(ROLES)}, or a "
                "pattern of names such as '*attn2*:none'"
            )
        return cls(pattern, parse_bits(bits, "--keep"))

    @property
    def is_of_role(self) -> bool:
        """Whether it speaks of layers by their role."""
        return self.pattern.startswith("@")

    def matches(self, name: str, role: str | None = None) -> bool:
        """Whether the rule speaks of the layer `name`, which has this role."""
        if self.is_of_role:
            return self.pattern == f"@{role}"
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
