"""Commands in trouble end in one line and go on later; `troubles.py` tries all of them."""

from pathlib import Path

import pytest

from kills import Harness
from troubles import TROUBLES, main, on_small_disk


@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--command", 2)])
def test_script_tries_nothing_where_it_is_given_an_option(
    option: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["troubles", option])
    monkeypatch.setattr("troubles.Harness", lambda place: pytest.fail("it tries"))
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == code


@pytest.mark.slow
@pytest.mark.parametrize("name", TROUBLES)
def test_command_in_trouble_loses_nothing_and_goes_on(tmp_path: Path, name: str) -> None:
    harness = Harness(tmp_path)
    outcomes = dict[str, str | None]()
    for title in ("calibrate", "finetune", "export", "export --overwrite"):
        harness.begin(title)
        outcomes[title] = TROUBLES[name](harness)
        harness.end()
    assert set(outcomes.values()) == {""}, outcomes


@pytest.mark.slow
def test_disk_that_is_full_or_read_only_is_one_line(tmp_path: Path) -> None:
    try:
        outcomes = list(on_small_disk(("calibrate", "export")))
    except PermissionError:
        pytest.skip("this process may not mount a disk")
    assert len(outcomes) == 4
    assert not any(outcomes)
