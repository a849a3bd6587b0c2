"""How an export was made, as far as a run still knows.

An evaluation may be of any export. Only if the run's own calibration made the export can the steps
before it be rebuilt, and a report show candidates of layers, the router, and earlier commands.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.contents import exported_tensors
from msfp_cli.checkpoint.pipeline import read_denoisers
from msfp_cli.checkpoint.quantizer import MSFPConfig
from msfp_cli.finetuning.result import FinetuneState, load_finetunings
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.run import Run


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a run knows of the making of an export.

    Arguments:
        run: the run.
        source: the full-precision model that the export says it was made from.
        sampling: the settings of the sampler that it was calibrated with, by name.
        tables: each denoiser's layers as exported.
        calibration: the one that the export came from; None if it is not the run's.
        is_marked: whether the export says that it is fine-tuned; those of earlier versions do not.
    """

    run: Run
    source: ModelSource
    sampling: Mapping[str, Any]
    tables: dict[str, dict[str, LayerScheme]]
    calibration: Calibration | None
    is_marked: bool = False

    @property
    def is_tuned(self) -> bool:
        """Whether fine-tuning has changed the calibration that the export came from."""
        calibration = self.calibration
        if calibration is None:
            return False
        return self.is_marked or any(
            table != calibration.table(component) for component, table in self.tables.items()
        )

    @cached_property
    def finetunings(self) -> dict[str, FinetuneState]:
        """The fine-tunings that the export holds, by denoiser."""
        if self.calibration is None or not self.is_tuned:
            return {}
        return load_finetunings(self.run, self.calibration)


def provenance_of(run: Run, export: Path) -> Provenance:
    """Return what a run knows of the making of an export.

    Raises:
        ModelError: the directory is not an export.
    """
    configs = read_denoisers(export)
    first = next(iter(configs.values()))
    calibration = _calibration_of(run, export, configs)
    return Provenance(
        run=run,
        source=ModelSource(**first.source),
        sampling={**first.sampling, **(run.sampling() if calibration else {})},
        tables={component: config.table() for component, config in configs.items()},
        calibration=calibration,
        is_marked=any(config.is_tuned for config in configs.values()),
    )


def _calibration_of(
    run: Run, export: Path, configs: Mapping[str, MSFPConfig]
) -> Calibration | None:
    """Return the run's calibration if the export came from it, None if it did not.

    It did if each layer's weight has the same format and the same scales, which fine-tuning leaves
    as they are, and, where it is not fine-tuned, the same codes.

    Arguments:
        configs: of the export's denoisers.
    """
    if not run.calibration.exists():
        return None
    calibration = Calibration.load(run.calibration)
    if calibration.layers.keys() != configs.keys():
        return None
    same = all(
        _has_weights_of(calibration, component, config, export / component)
        for component, config in configs.items()
    )
    return calibration if same else None


def _has_weights_of(
    calibration: Calibration, component: str, config: MSFPConfig, directory: Path
) -> bool:
    """Whether an exported denoiser has the calibration's formats of weights, and its scales."""
    formats = {name: scheme.weight for name, scheme in config.table().items()}
    calibrated = calibration.table(component)
    if formats != {name: scheme.weight for name, scheme in calibrated.items()}:
        return False
    scales = {name: s for name, s in calibration.scales[component].items() if name in formats}
    if not _equal(exported_tensors(directory, "weight_scale"), scales):
        return False
    if config.is_tuned or config.table() != calibrated:  # its codes are its own
        return True
    codes = exported_tensors(directory, "weight_codes")
    expected = calibration.codes.get(component, {})
    return all(torch.equal(codes[name][0], packed) for name, packed in expected.items())


def _equal(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether the same layers have the same tensors."""
    return tensors.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )
