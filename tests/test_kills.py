"""Killed commands end well when they are run again; `kills.py` tries more of them."""

from pathlib import Path

import pytest

from kills import kill_everywhere


@pytest.mark.slow
def test_same_command_heals_what_a_kill_has_left(tmp_path: Path) -> None:
    outcomes = kill_everywhere(tmp_path, 8, only=("export --overwrite",))
    results = outcomes["export --overwrite"]
    assert results
    assert not any(results)
