"""Killed commands end well when they are run again; `kills.py` tries more of them."""

from pathlib import Path

import pytest

from kills import Harness, kill_everywhere


@pytest.mark.slow
def test_same_command_heals_what_a_kill_has_left(tmp_path: Path) -> None:
    harness = Harness(tmp_path)
    for title in ("calibrate", "export"):
        harness.begin(title)
    harness.begin("export --overwrite")
    wrong = list(kill_everywhere(harness, at_names=5, randomly=1))
    assert len(wrong) > 4
    assert not any(wrong)
    assert not harness.pair()
