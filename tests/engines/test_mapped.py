"""Pages of a mapped file are given back, and what they hold stays."""

import mmap
import re
import sys
import time
from pathlib import Path

import pytest

from msfp_cli.engines.mapped import giving_back

SIZE = 1 << 24
linux = pytest.mark.skipif(sys.platform != "linux", reason="others do not say what is mapped")


def pages_of(path: Path) -> int:
    """Return the bytes of a file that are in this process's memory."""
    entries = Path("/proc/self/smaps").read_text()
    sizes = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", entries)
    return 1024 * sum(map(int, sizes))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a file.bin"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


@linux
def test_pages_that_were_read_are_given_back_while_others_are_read(file: Path) -> None:
    content = file.read_bytes()
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    with giving_back(file):
        assert mapped[:] == content
        assert pages_of(file) > SIZE / 2
        end = time.monotonic() + 60
        while pages_of(file):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert mapped[:] == content
    assert pages_of(file) == 0
    assert mapped[:] == content


@linux
def test_what_was_written_to_a_mapping_stays(file: Path) -> None:
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped[:4] = b"mine"
    with giving_back(file):
        time.sleep(0.3)
    assert mapped[:4] == b"mine"


def test_error_of_the_work_passes_through(file: Path) -> None:
    with pytest.raises(ValueError, match="mine"), giving_back(file):
        raise ValueError("mine")
