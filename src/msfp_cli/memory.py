"""Memory: sizes as users write them, and what this process has taken."""

import re
import sys
from pathlib import Path

from msfp_cli.errors import UsageError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def read_size(text: str) -> int:
    """Read a number of bytes: ``8GiB``, ``500MB``, ``8g`` (as GiB) or a plain number.

    Raises:
        UsageError: it is neither, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?\s*", text.lower())
    size = 0
    if match:
        number, unit, ending = match.groups()
        base = 1000 if ending == "b" else 1024
        size = int(float(number) * base ** _POWERS[unit])
    if size <= 0:
        raise UsageError(f"{text!r} is not a size; write for instance 8GiB or 500MB")
    return size


def write_size(size: int) -> str:
    """Write a number of bytes as `read_size` takes it, in the largest unit that it is whole in."""
    for unit in "TGMK":
        count, rest = divmod(size, 1024 ** _POWERS[unit.lower()])
        if not rest:
            return f"{count}{unit}iB"
    return str(size)


def peak_bytes() -> int:
    """Return the largest resident size of this process so far.

    Linux's own count of the process is taken where there is one: what `resource` gives there begins
    with the size of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    import resource  # not everywhere

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
