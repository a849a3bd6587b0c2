"""How an export was made, as far as its run still knows.

An evaluation may be of any export. Only if the run's own calibration made the export does the
report show candidates of layers, the router, and the commands before the evaluation.
"""

from dataclasses import dataclass
from pathlib import Path

from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.pipeline import read_configs
from msfp_cli.evaluation.identity import calibration_of
from msfp_cli.finetuning.result import FinetuneState, load_finetunings
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.run import Run


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is known of the making of an export.

    Arguments:
        tables: each denoiser's layers as exported.
        calibration: the one that the export came from; None if it is not the run's.
        finetunings: those that the export holds, by denoiser.
    """

    tables: dict[str, dict[str, LayerScheme]]
    calibration: Calibration | None
    finetunings: dict[str, FinetuneState]


def provenance_of(run: Run, export: Path) -> Provenance:
    """Return what a run knows of the making of an export."""
    configs = read_configs(export)
    tables = {component: config.table() for component, config in configs.items()}
    calibration = calibration_of(run, export, configs)
    finetunings = {} if calibration is None else _exported_finetunings(run, calibration, tables)
    return Provenance(tables=tables, calibration=calibration, finetunings=finetunings)


def _exported_finetunings(
    run: Run, calibration: Calibration, tables: dict[str, dict[str, LayerScheme]]
) -> dict[str, FinetuneState]:
    """Return the run's fine-tunings, but none if the export is as calibrated, without them."""
    if all(table == calibration.table(component) for component, table in tables.items()):
        return {}
    return load_finetunings(run, calibration)
