"""What won is remembered for a while, by any number of processes, and never at any price."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from msfp_cli.layers.trial import winners
from msfp_cli.layers.trial.winners import Winner

FASTER = Winner("cuda", {"cuda": 1e-3, "simulated": 2e-3})
_CHILD = """
import sys
from msfp_cli.layers.trial.winners import Winner, keep
for number in range(20):
    keep(f"{sys.argv[1]} {number}", Winner("cuda", {"cuda": 0.5}))
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where winners are kept, in an empty cache."""
    monkeypatch.setenv("MSFP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(winners, "_known", {})
    return tmp_path / "cache" / "kernels.json"


def forget() -> None:
    """Know what a new process knows."""
    winners._known.clear()


def test_winner_is_found_by_the_next_process(file: Path) -> None:
    winners.keep("a layer", FASTER)
    forget()
    assert winners.find("a layer") == FASTER
    assert winners.find("another layer") is None


def test_winner_that_does_not_last_is_of_this_process(file: Path) -> None:
    winners.keep("a layer", FASTER, lasting=False)
    assert winners.find("a layer") == FASTER
    forget()
    assert winners.find("a layer") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"schema": 1, "winners": []}',
        b'{"schema": 1, "winners": {"a layer": "cuda"}}',
        b'{"schema": 1, "winners": {"a layer": ["cuda", {"cuda": "fast"}]}}',
        b'{"schema": 2, "winners": {"a layer": ["cuda", {"cuda": 1}]}}',
    ],
)
def test_damaged_file_is_as_good_as_none_and_is_replaced(file: Path, content: bytes) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    assert winners.find("a layer") is None
    winners.keep("a layer", FASTER)
    forget()
    assert winners.find("a layer") == FASTER


def test_file_has_the_newest_entries(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winners, "_MOST", 2)
    for key in ("a", "b", "a", "c"):
        winners.keep(key, FASTER)
    assert list(json.loads(file.read_text())["winners"]) == ["a", "c"]


def test_cache_that_cannot_be_written_is_done_without(file: Path) -> None:
    file.parent.write_text("a file where the directory should be")
    winners.keep("a layer", FASTER)
    assert winners.find("a layer") == FASTER


def test_user_without_a_home_has_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MSFP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", lost)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(winners, "_known", {})
    winners.keep("a layer", FASTER)
    forget()
    assert winners.find("a layer") == FASTER
    assert (tmp_path / "msfp" / "kernels.json").exists()


def test_entries_of_other_processes_stay(file: Path) -> None:
    assert winners.find("a layer") is None  # now the file is known to be empty
    subprocess.run([sys.executable, "-c", _CHILD, "other"], check=True)
    winners.keep("a layer", FASTER)
    forget()
    assert winners.find("a layer") == FASTER
    assert winners.find("other 19") == Winner("cuda", {"cuda": 0.5})


def test_file_stays_whole_while_two_processes_write_it(file: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", _CHILD, name]) for name in ("first", "second")
    ]
    assert [child.wait() for child in children] == [0, 0]
    kept = json.loads(file.read_text())["winners"]
    assert set(kept) <= {f"{name} {i}" for name in ("first", "second") for i in range(20)}
    assert {"first 19", "second 19"} & set(kept)
    assert [path.name for path in file.parent.iterdir()] == ["kernels.json"]
