"""Give the pages of a mapped file back while a model is compiled from it.

OpenVINO maps the weights of a conversion, and lays each of them out anew while it compiles. The
mapping stays as long as what was compiled, which does not read it again, and so do its pages: as
much memory as the weights take, once more.
"""

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_EVERY = 0.1  # seconds


@contextmanager
def giving_back(path: Path) -> Iterator[None]:
    """Give the pages of a file that this process maps back to the system, again and again.

    A page that is read later comes from the system's cache, or from the disk. Mappings that may be
    written to are left alone, and so are all where the system is not Linux, which says what is
    mapped where.

    Arguments:
        path: the file, whose mappings have to stay while the context is open: another one might
            take their place.
    """
    if not _MAPS.exists():
        yield
        return
    file = os.path.realpath(path)
    is_over = threading.Event()

    def work() -> None:
        while not is_over.wait(_EVERY):
            _give_back(file)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        _give_back(file)


def _give_back(file: str) -> None:
    """Give back the pages of a file that are in memory now."""
    advise = ctypes.CDLL(None).madvise
    for line in _MAPS.read_text().splitlines():
        span, rights, _, _, _, *path = line.split(maxsplit=5)
        if path == [file] and "w" not in rights:
            start, end = (int(each, 16) for each in span.split("-"))
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
