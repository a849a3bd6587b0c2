"""Page and plots are written together, and not over others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import Finetuned
from msfp_cli.errors import RunError
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.files.atomic import write_text
from msfp_cli.files.seal import MARK, Seal
from msfp_cli.report.report import write_report


def test_page_and_plots_are_written_whole(
    tiny_tuned: Finetuned, evaluated: Evaluation, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    written = write_report(tiny_tuned.run, evaluated, tmp_path / "report", overwrite=False)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "msfp.json",
        written.page.name,
        *(path.name for path in written.plots),
    }
    before = written.page.read_bytes()
    with pytest.raises(RunError, match="exists already; use --overwrite"):
        write_report(tiny_tuned.run, evaluated, tmp_path / "report", overwrite=False)
    assert (
        write_report(
            tiny_tuned.run, evaluated, tmp_path / "report", overwrite=True
        ).page.read_bytes()
        == before
    )


def test_export_that_was_changed_since_it_was_evaluated_is_noted(
    tiny_tuned: Finetuned, evaluated: Evaluation, copied: Callable[..., Path], tmp_path: Path
) -> None:
    export = copied(evaluated.export)
    moved = replace(evaluated, settings={**evaluated.settings, "export": str(export)})

    def notes(number: int) -> tuple[str, ...]:
        place = tmp_path / f"report-{number}"
        return write_report(tiny_tuned.run, moved, place, overwrite=False).notes

    assert notes(0) == ()
    config = export / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.02", "0.03"))
    write_text(export / MARK, Seal.of(export).to_text())
    (note,) = notes(1)
    assert note.startswith(f"{export} was changed since it was evaluated")
