"""Write the report of an evaluation: a page, and plots beside it. The workflow of `msfp report`."""

from dataclasses import dataclass
from pathlib import Path

from msfp_cli.errors import UsageError
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.files.directories import refuse_existing, replace_directory
from msfp_cli.files.documents import Json
from msfp_cli.report.document import gather, say_changed
from msfp_cli.report.page import render
from msfp_cli.report.plots import draw_plots
from msfp_cli.run import Run, refuse_stage

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written.

    Arguments:
        page: the HTML file.
        plots: PNG files beside it; none where matplotlib is missing.
        notes: what the user should know.
    """

    page: Path
    plots: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """Return plain JSON values."""
        return {"page": str(self.page), "plots": [str(plot) for plot in self.plots]}


def report_run(
    run: Run,
    evaluation: Path | None = None,
    directory: Path | None = None,
    *,
    pictures: int = 8,
    overwrite: bool = False,
) -> Report:
    """Write the report of an evaluation.

    Arguments:
        evaluation: its directory; None for the run's own.
        directory: where to write; None for the run's own report directory.
        pictures: prompts to show.

    Raises:
        RunError: the evaluation does not exist, or the directory does and `overwrite` is not set.
    """
    if evaluation is None:
        run.require()
    run.refuse_read_only(directory)
    result = Evaluation.load(evaluation or run.evaluation)
    with run.lock(directory, create=True):
        return write_report(
            run, result, directory or run.report, pictures=pictures, overwrite=overwrite
        )


def write_report(
    run: Run, evaluation: Evaluation, directory: Path, *, pictures: int = 8, overwrite: bool
) -> Report:
    """Write the page and its plots.

    Arguments:
        run: gives the per-layer candidates and the router, where the export is its own.
        pictures: prompts to show.

    Raises:
        RunError: the directory exists and `overwrite` is not set.
    """
    refuse_stage(directory, "report")
    refuse_existing(directory, overwrite=overwrite)
    document = gather(run, evaluation, pictures)
    plots: tuple[Path, ...] = ()
    notes = say_changed(evaluation)
    with replace_directory(directory, overwrite=overwrite) as temporary:
        (temporary / PAGE).write_text(render(document), "utf-8")
        try:
            plots = tuple(directory / path.name for path in draw_plots(document, temporary))
        except UsageError as error:
            notes += (f"no PNG plots beside the page: {error}",)
    return Report(page=directory / PAGE, plots=plots, notes=notes)
