"""A file is written whole or not at all: under a temporary name, which is then renamed.

So a killed process leaves the old file or none.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def follow_umask_(path: Path) -> None:
    """Give a file or a directory the mode of any new one; safetensors makes its files private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name; the file written there becomes `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        follow_umask_(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    with replace_file(path) as temporary:
        temporary.write_text(text, "utf-8")
