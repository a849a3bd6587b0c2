"""What a denoiser's safetensors files hold, and whether it fits the model that is to take it.

The header has two texts and a digest: the ``quantization_config``, the rest of the model's config,
and the SHA-256 of all tensors. So both loaders, ours and stock ``from_pretrained``, refuse a config
or a tensor that was altered, one that is missing, and a value that cannot be (a scale of NaN, a
timestep's member that the hub does not have).
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msfp_cli.errors import CheckpointError
from msfp_cli.files.documents import Json, digest, open_tensors, read_json, refuse_altered
from msfp_cli.files.seal import REDO, is_checked, is_compared
from msfp_cli.formats.multipliers import refuse_multipliers, unpack_multipliers
from msfp_cli.formats.rounding import are_scales
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.layers.routing import ROUTER

CONFIG, MODEL, DIGEST = "quantization_config", "model_config", "msfp_digest"  # header keys


def model_text(config: Mapping[str, Any]) -> str:
    """Return a model's config as it lies in the header: without the part that is ours.

    Arguments:
        config: as in ``config.json``; keys with an underscore are of no model, but its class.
    """
    own = {key: value for key, value in config.items() if key[0] != "_" and key != CONFIG}
    return json.dumps({"_class_name": config.get("_class_name"), **own}, sort_keys=True)


def header_of(tensors: Mapping[str, Tensor], config: str, model: str) -> dict[str, str]:
    """Return what the header of a denoiser's files holds."""
    return {CONFIG: config, MODEL: model, DIGEST: digest(tensors)}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a denoiser's files hold.

    Arguments:
        path: the first of them, for errors.
        header: see `header_of`; files of earlier versions lack `MODEL`.
        tensors: by name, mapped from the files.
    """

    path: Path
    header: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> "Contents":
        """Read the files and compare their tensors with the digest.

        Files whose every byte is being compared with a seal are not hashed a second time.

        Raises:
            CheckpointError: a file is truncated, altered, or was not written by msfp.
        """
        header: dict[str, str] = {}
        tensors: dict[str, Tensor] = {}
        for path in paths:
            with open_tensors(path, redo=REDO) as file:
                header |= file.metadata() or {}
                tensors |= {name: file.get_tensor(name) for name in sorted(file.keys())}
        if DIGEST not in header:
            raise CheckpointError(
                f"{paths[0] if paths else 'the checkpoint'} has no msfp digest; export it again, "
                "or, if its weights are in full precision, take quantization_config out of its "
                "config.json"
            )
        if is_checked() and not all(map(is_compared, paths)):
            refuse_altered(paths[0], tensors, header[DIGEST], redo=REDO)
        contents = cls(path=paths[0], header=header, tensors=tensors)
        contents._refuse_bad_values()
        return contents

    def _refuse_bad_values(self) -> None:
        """Refuse scales that are none, and what is not finite."""
        for name, tensor in self.tensors.items():
            is_scale = name.endswith(".weight_scale")
            if is_scale and not are_scales(tensor):
                raise self._error(f"{name} holds a scale that is not positive and finite")
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise self._error(f"{name} holds a NaN or an infinity")

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged ({reason}); {REDO}")

    def refuse_other_config(self, config: str) -> None:
        """Compare the header with the ``quantization_config`` that diffusers read."""
        if is_checked() and self.header.get(CONFIG) != config:
            raise CheckpointError(
                f"{self.path} and its config.json disagree: one of them is altered; {REDO}"
            )

    def refuse_other_model(self, model: Any) -> None:  # noqa: ANN401 (diffusers is untyped)
        """Compare the header with the config of a model that was just built, on any device.

        A key that the header lacks is of a later diffusers, and has its default. Whoever loads the
        model may give another value than the one in its ``config.json``.
        """
        if not is_checked() or MODEL not in self.header:
            return
        expected = self._model_config()
        actual = json.loads(model.to_json_string())
        for key, default in _defaults(type(model)).items():
            wanted = expected.get(key, default)
            differs = key in actual and actual[key] != wanted
            if differs and self._stored(key, default) != wanted:
                raise self._other_model(key)
        if expected["_class_name"] != type(model).__name__:
            raise self._other_model("_class_name")

    def _stored(self, key: str, default: Json) -> Json:
        """Return a value of the ``config.json`` beside the files; None if there is no such file."""
        path = self.path.with_name("config.json")
        return read_json(path, dict, redo=REDO).get(key, default) if path.exists() else None

    def _model_config(self) -> dict[str, Json]:
        """Return the model's config that the header has, which names the model's class."""
        try:
            config: dict[str, Json] = json.loads(self.header[MODEL])
            config["_class_name"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._error(f"the {MODEL} in its header cannot be read: {error}") from None
        return config

    def _other_model(self, key: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} and its config.json disagree on {key!r}: one of them is altered; {REDO}"
        )

    def refuse_misfit(self, model: nn.Module) -> None:
        """Refuse files that lack a tensor of the model, or have it in another shape or kind."""
        for name, place in model.state_dict().items():
            tensor = self.tensors.get(name)
            if tensor is None:
                raise self._error(f"{name} is missing")
            if tensor.shape != place.shape:
                raise self._error(f"{name} is of another shape")
            if _kind(tensor) != _kind(place):
                raise self._error(f"{name} is of type {tensor.dtype}")
        self._refuse_unknown_members(model)
        self._refuse_wrong_multipliers(model)

    def _refuse_unknown_members(self, model: nn.Module) -> None:
        """Refuse a router's table that names a variant which a layer does not have."""
        table = self.tensors.get(f"{ROUTER}.table")
        layers = quantized_layers(model)
        counts = [layers[name].scheme.variants for name in sorted(layers)]
        counts = [count for count in counts if count > 1]
        if table is not None and (table >= torch.tensor(counts, dtype=torch.int16)).any():
            raise self._error(f"{ROUTER}.table names a member that there is not")

    def _refuse_wrong_multipliers(self, model: nn.Module) -> None:
        """Refuse multipliers whose integers would not be signed bytes."""
        for name, layer in quantized_layers(model).items():
            groups = layer.scheme.weight_groups
            if not groups:
                continue
            shape = (layer.weight_shape[0], groups)
            multipliers = unpack_multipliers(self.tensors[f"{name}.weight_multipliers"], shape)
            try:
                refuse_multipliers(name, multipliers, layer.weight_format(), shape)
            except ValueError as error:
                raise self._error(str(error)) from None


def _kind(tensor: Tensor) -> str:
    """Return the type of whole numbers; floating-point types are converted into each other."""
    return "float" if tensor.is_floating_point() else str(tensor.dtype)


def _defaults(model_class: type) -> dict[str, Json]:
    """Return the settings of a class of models, with their defaults as JSON values."""
    parameters = inspect.signature(model_class).parameters
    return {name: _as_json(each.default) for name, each in parameters.items()}


def _as_json(value: Any) -> Json:  # noqa: ANN401 (a default of any kind)
    """Return a value as it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


def exported_tensors(directory: Path, kind: str) -> dict[str, Tensor]:
    """Read a kind of tensor of an exported denoiser, by layer.

    Arguments:
        kind: ``weight_scale``, ``weight_codes`` or ``weight_changes``.

    Raises:
        CheckpointError: a file is truncated.
    """
    ending = f".{kind}"
    tensors = dict[str, Tensor]()
    for path in sorted(directory.glob("*.safetensors")):
        with open_tensors(path, redo=REDO) as file:
            for name in sorted(file.keys()):
                if name.endswith(ending):
                    tensors[name.removesuffix(ending)] = file.get_tensor(name)
    return tensors
