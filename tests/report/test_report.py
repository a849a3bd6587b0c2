"""Page and plots are written together, and not over others."""

from pathlib import Path

import pytest

from conftest import Finetuned
from msfp_cli.errors import RunError
from msfp_cli.evaluation.result import Evaluation
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
