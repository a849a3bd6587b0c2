"""The result of a calibration as a value and on disk.

Layout of a calibration directory::

    calibration.json       source, recipe, per layer: formats, scales, errors, sensitivity, and
        every format's score
    scales.safetensors     the weight scales, one tensor per layer, named ``component/layer``
    multipliers.safetensors
        the multipliers of the weights in groups, likewise
    codes.safetensors      packed codes of the weights that are not rounded to the nearest, likewise
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor

from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.errors import RunError
from msfp_cli.files.directories import replace_directory
from msfp_cli.files.documents import (
    Json,
    digest,
    read_json,
    read_tensors,
    refuse_altered,
    to_text,
)
from msfp_cli.files.typed import read_fields, read_value
from msfp_cli.formats.multipliers import refuse_multipliers
from msfp_cli.formats.packing import packed_size
from msfp_cli.formats.rounding import are_scales
from msfp_cli.layers.clock import TRAINING_CLOCK, Clock
from msfp_cli.layers.input_lift import InputLift
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.recording.recipe import RecordRecipe

_SCHEMA = 1
_DOCUMENT = "calibration.json"
_SCALES = "scales.safetensors"
_CODES = "codes.safetensors"
_MULTIPLIERS = "multipliers.safetensors"
_REDO = "run the same `msfp calibrate` again, with --overwrite"
_NAMED = 3  # parts in floating point that are named
# Keys that say nothing of the result.
_OF_THE_FILE = ("schema", "scales_digest", "codes_digest", "multipliers_digest")


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else "less than 0.1%"


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one format can do for a tensor: its best maximum and zero point, and their error.

    The error is the squared error of the rounded tensor relative to the signal.
    `max_value` is None for weights, which have one maximum per output channel.
    """

    format: str
    error: float
    max_value: float | None = None
    zero_point: float | None = None


@dataclass(frozen=True, kw_only=True)
class Compensation:
    """How one layer's weight was rounded, and what that does to the layer's output.

    Arguments:
        damping: that did best on calls that were held back; None is nearest rounding.
        error, nearest_error: relative squared error of the layer's output on those calls, as it was
            rounded and as nearest rounding would have it.
    """

    damping: float | None
    error: float
    nearest_error: float


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """What was chosen for one layer, and why.

    Arguments:
        kind: a name in `layers.KINDS`.
        reason: ``default``, ``kept`` (a rule) or ``lifted`` (its sensitivity).
        num_weights: elements of the weight.
        multiply_adds: of one denoiser call.
        minimum, maximum: of the layer's input over the whole recording.
        scheme: formats, and the input's scale and zero point.
        weight_scores, input_scores: every candidate, best first.
        sensitivity: relative error of the denoiser's output when this layer alone is quantized at
            the default bits; None where it was not measured.
        compensation: how the weight was rounded; None if only nearest rounding was tried.
        role: what the layer does in a call, see `recording.flow`; None for most layers, and in
            files of earlier versions.
    """

    kind: str
    reason: str
    num_weights: int
    multiply_adds: float
    minimum: float
    maximum: float
    scheme: LayerScheme
    weight_scores: tuple[Score, ...] = ()
    input_scores: tuple[Score, ...] = ()
    sensitivity: float | None = None
    compensation: Compensation | None = None
    role: str | None = None

    def _chosen(self, scores: tuple[Score, ...], name: str | None) -> float | None:
        return next((score.error for score in scores if score.format == name), None)

    @property
    def weight_error(self) -> float | None:
        """Relative squared error of the rounded weight."""
        weight = self.scheme.weight
        return self._chosen(self.weight_scores, None if weight is None else weight.name)

    @property
    def input_error(self) -> float | None:
        """Relative squared error of the rounded input."""
        grid = self.scheme.input
        return self._chosen(self.input_scores, None if grid is None else grid.format.name)

    def refuse_misfit(
        self,
        name: str,
        scale: Tensor | None,
        codes: Tensor | None,
        multipliers: Tensor | None = None,
    ) -> None:
        """Refuse a weight's scale, packed codes and multipliers that do not fit the layer.

        Raises:
            ValueError: one is missing, of a wrong size, or has a value that cannot be.
        """
        weight = self.scheme.weight
        if weight is None:
            return
        if scale is None:
            raise ValueError(f"{name} has a quantized weight and no scale")
        if scale.ndim != 1 or not len(scale) or self.num_weights % len(scale):
            raise ValueError(f"{name} has {tuple(scale.shape)} scales")
        if not are_scales(scale):
            raise ValueError(f"{name} has a scale that is not positive and finite")
        size = packed_size(self.num_weights, weight.bits)
        if codes is not None and (codes.dtype != torch.uint8 or codes.shape != (size,)):
            raise ValueError(f"{name} has codes of another size")
        groups = self.scheme.weight_groups
        if (multipliers is not None) != bool(groups):
            raise ValueError(f"{name} has {groups} groups of weights, which do not fit its tensors")
        if multipliers is not None:
            refuse_multipliers(name, multipliers, weight, (len(scale), groups))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; files call the scheme ``parameters``."""
        data = {**asdict(self), "scheme": self.scheme.to_json()}
        return {"parameters" if key == "scheme" else key: value for key, value in data.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "LayerChoice":
        """Undo `to_json`."""
        values = dict(data)
        scheme = LayerScheme.from_json(values.pop("parameters"))
        return read_fields(cls, values, scheme=scheme)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Everything that turns a float denoiser into a quantized one.

    Arguments:
        source, record, recipe: the settings that led here.
        layers: by component, then by layer name.
        scales: float32 weight scales, ``(out,)``, by component and layer name, for layers with a
            quantized weight.
        multipliers: uint8 ``(out, groups)``, by component and layer name, for weights in groups.
        codes: packed codes of the weights that are not rounded to the nearest, uint8, by component
            and layer name.
        input_lifts: the timesteps whose inputs are lifted, by component; empty if there are none.
        held_out_error: relative squared error of the denoiser's output on held-out calls, by
            component.
        unused: layers that never ran and stay in floating point, by component.
        others: parameters that are not the weight of one of `layers`, by component, as
            `denoiser_search.Rest` has them; empty in files of earlier versions.
        clocks: what reads the timestep of a call, by component; None in files of earlier versions.
        fingerprints: of the float denoisers, see `print_of`; None in files of earlier versions.
        options: of the command, those that differ from their defaults, as words; None in files
            of earlier versions. They are no part of an export.
    """

    source: ModelSource
    record: RecordRecipe
    recipe: CalibrateRecipe
    layers: Mapping[str, Mapping[str, LayerChoice]]
    scales: Mapping[str, Mapping[str, Tensor]]
    multipliers: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    codes: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    input_lifts: Mapping[str, InputLift] = field(default_factory=dict)
    held_out_error: Mapping[str, float] = field(default_factory=dict)
    unused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    clocks: Mapping[str, Clock] | None = None
    fingerprints: Mapping[str, str] | None = None
    options: list[str] | None = None

    def clock(self, component: str) -> Clock:
        """Return what reads the timestep of a call of a component."""
        return (self.clocks or {}).get(component, TRAINING_CLOCK)

    def table(self, component: str) -> dict[str, LayerScheme]:
        """Return the scheme of the component's quantized layers."""
        return {
            name: layer.scheme
            for name, layer in self.layers[component].items()
            if layer.scheme.weight is not None or layer.scheme.input is not None
        }

    def input_bits(self, component: str) -> float:
        """Return the average bits of a layer's input, over the multiply-adds of a sampling.

        Inputs in floating point count as 16 bits.
        """
        lift = self.input_lifts.get(component)
        share = lift.share if lift else 0.0
        layers = self.layers[component].values()
        total = sum(layer.multiply_adds for layer in layers)
        bits = sum(layer.multiply_adds * layer.scheme.input_bits(share) for layer in layers)
        return bits / total if total else 16.0

    def transforms_in_words(self, component: str) -> str:
        """Say how many inputs are transformed before they are rounded; empty if none is."""
        transforms = [layer.scheme.transform for layer in self.layers[component].values()]
        if all(each.is_identity for each in transforms):
            return ""
        rotated = sum(each.rotation > 0 for each in transforms)
        scaled = sum(each.token_scales for each in transforms)
        return f"{rotated} inputs are rotated, {scaled} have a scale for each token"

    def float_shares(self, component: str) -> dict[str, float]:
        """Return what stays in floating point, as shares of the component's parameters.

        Returns:
            Largest first, by name of the layer or parameter; nothing if that is not known.
        """
        others = self.others.get(component)
        if others is None:
            return {}
        layers = self.layers[component]
        counts = {n: each.num_weights for n, each in layers.items() if each.scheme.weight is None}
        total = sum(each.num_weights for each in layers.values()) + sum(others.values())
        shares = [(name, count / total) for name, count in {**counts, **others}.items()]
        return dict(sorted(shares, key=lambda item: -item[1]))

    def floats_in_words(self, component: str) -> str:
        """Say what stays in floating point, the largest by name; empty if that is not known."""
        shares = self.float_shares(component)
        named = [f"{name} {_percent(share)}" for name, share in shares.items() if name][:_NAMED]
        if "" in shares:
            named.append(f"biases and norms {_percent(shares[''])}")
        whole = f"{sum(shares.values()):.1%} of the parameters stay in floating point"
        return f"{whole}: {', '.join(named)}" if named else ""

    def steps_of(self, component: str, name: str) -> tuple[Tensor, Tensor | None]:
        """Return the scale and the multipliers of a layer's weight, see `step_sizes`."""
        return self.scales[component][name], self.multipliers.get(component, {}).get(name)

    def tunable(self) -> tuple[str, ...]:
        """List the components that have a layer to fine-tune."""
        return tuple(filter(self._is_tunable, self.layers))

    def _is_tunable(self, component: str) -> bool:
        return any(scheme.tunable for scheme in self.table(component).values())

    def identity(self) -> str:
        """Return a digest of what fine-tuning begins with: recording, schemes, scales, codes.

        The gains of lifted timesteps are measured, so their last digits are no part of it.
        """
        schemes = {component: _to_json(self.table(component)) for component in self.layers}
        settings = [self.source.to_json(), self.record.to_json(), schemes]
        if self.input_lifts:
            lifts = self.input_lifts.items()
            settings.append({component: lift.rows().tolist() for component, lift in lifts})
        text = json.dumps(settings, sort_keys=True) + digest(_flatten(self.scales))
        for tensors in (self.codes, self.multipliers):
            if flat := _flatten(tensors):
                text += digest(flat)
        return hashlib.sha256(text.encode()).hexdigest()

    def _refuse_misfit(self) -> None:
        """Refuse tensors that do not fit the layers' schemes.

        Raises:
            ValueError: a quantized weight has no scale, or tensors are of a wrong size.
        """
        for component in self.layers:
            scales = self.scales[component]
            codes = self.codes.get(component, {})
            multipliers = self.multipliers.get(component, {})
            for name, layer in self.layers[component].items():
                own = (scales.get(name), codes.get(name), multipliers.get(name))
                layer.refuse_misfit(name, *own)

    def save(self, directory: Path, *, overwrite: bool = False) -> None:
        """Write the calibration; the directory appears whole or not at all.

        Raises:
            RunError: it exists and `overwrite` is not set.
        """
        flat = _flatten(self.scales)
        codes = _flatten(self.codes)
        multipliers = _flatten(self.multipliers)
        document = {
            "schema": _SCHEMA,
            "scales_digest": digest(flat),
            "codes_digest": digest(codes) if codes else None,
            "multipliers_digest": digest(multipliers) if multipliers else None,
            "source": self.source.to_json(),
            "record": self.record.to_json(),
            "recipe": self.recipe.to_json(),
            "fingerprints": None if self.fingerprints is None else dict(self.fingerprints),
            "options": self.options,
            "input_lifts": {name: asdict(lift) for name, lift in self.input_lifts.items()},
            "held_out_error": dict(self.held_out_error),
            "clocks": {name: clock.to_json() for name, clock in (self.clocks or {}).items()},
            "unused": {component: list(names) for component, names in self.unused.items()},
            "others": {component: dict(counts) for component, counts in self.others.items()},
            "layers": {component: _to_json(layers) for component, layers in self.layers.items()},
        }
        with replace_directory(directory, overwrite=overwrite) as temporary:
            (temporary / _DOCUMENT).write_text(to_text(document, indent=1))
            save_file(flat, temporary / _SCALES)
            for tensors, place in ((codes, _CODES), (multipliers, _MULTIPLIERS)):
                if tensors:
                    save_file(tensors, temporary / place)

    @classmethod
    def load(cls, directory: Path) -> "Calibration":
        """Read a calibration.

        Raises:
            RunError: there is none.
            CheckpointError: it is damaged, or newer than this version of msfp.
        """
        if not directory.exists():
            raise RunError(f"no calibration in {directory}; run `msfp calibrate` first")
        places = {"scales": _SCALES, "codes": _CODES, "multipliers": _MULTIPLIERS}
        paths = {kind: directory / name for kind, name in places.items()}
        flat = {
            kind: read_tensors(path, redo=_REDO)
            for kind, path in paths.items()
            if kind == "scales" or path.exists()
        }

        def parse(document: Json) -> Calibration:
            for kind, path in paths.items():
                expected = document.get(f"{kind}_digest") or ""
                if expected or kind in flat:  # else it is not one of this calibration's files
                    refuse_altered(path, flat.get(kind, {}), expected, redo=_REDO)
            own = {key: value for key, value in document.items() if key not in _OF_THE_FILE}
            for key in ("input_lifts", "others"):  # files of earlier versions have none
                own.setdefault(key, {})
            layers = read_value(_LAYERS, own.pop("layers"))
            calibration = read_fields(
                cls,
                own,
                layers=layers,
                **{kind: _unflatten(flat.get(kind, {}), layers) for kind in paths},
            )
            calibration._refuse_misfit()
            return calibration

        return read_json(directory / _DOCUMENT, parse, redo=_REDO, schema=_SCHEMA)


_LAYERS: TypeAlias = dict[str, dict[str, LayerChoice]]


def _to_json(layers: Mapping[str, LayerChoice] | Mapping[str, LayerScheme]) -> dict[str, Json]:
    return {name: layer.to_json() for name, layer in layers.items()}


def _flatten(components: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name each tensor ``component/layer``."""
    flat = {}
    for component, layers in components.items():
        for name, tensor in layers.items():
            flat[f"{component}/{name}"] = tensor
    return flat


def _unflatten(
    flat: Mapping[str, Tensor], components: Iterable[str]
) -> dict[str, dict[str, Tensor]]:
    """Sort ``component/layer`` tensors by component."""
    tensors: dict[str, dict[str, Tensor]] = {component: {} for component in components}
    for path, tensor in flat.items():
        component, _, name = path.partition("/")
        if component in tensors:
            tensors[component][name] = tensor
    return tensors
