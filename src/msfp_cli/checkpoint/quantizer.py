"""How diffusers reads and writes our models: a config and a quantizer for its registry.

A model in full precision is quantized while it loads (`weight_only`): weights only, without a
calibration, tensor by tensor, so that it is never whole in full precision.

With these two registered, ``DiffusionPipeline.from_pretrained(export)`` returns the stock pipeline
with quantized layers, and ``save_pretrained`` writes it again. The float weights never exist:
layers are replaced while the model is on the meta device. `contents` compares the files with the
digest and the config in their header before anything is loaded, so an altered one is refused rather
than sampled from. Without the import of `msfp_cli`, diffusers does not know the
method ``msfp`` and refuses by itself.
"""

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from msfp_cli.checkpoint.contents import Contents, exported_tensors, header_of, model_text
from msfp_cli.checkpoint.hubs import fold, make_room_, unfold_
from msfp_cli.checkpoint.weight_only import WeightEncoder
from msfp_cli.errors import CheckpointError, MsfpError, UsageError
from msfp_cli.layers.clock import Clock
from msfp_cli.layers.replace import replace_layers_
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.version import __version__

DiffusersModel: TypeAlias = Any  # diffusers is untyped
Argument: TypeAlias = Any  # whatever diffusers passes

SCHEMA_VERSION = 1
FOLDED_SCHEMA = 2  # layers have several variants, whose members are folded (`hubs`), or groups
NEWEST_SCHEMA = 3  # inputs of layers are transformed before they are rounded
METHOD = "msfp"
IDLE_RULE = "a rule of MSFPConfig's keep matches no layer of"  # how this warning begins


class _Method(str, Enum):
    """diffusers asks for ``quant_method.value``."""

    MSFP = METHOD


@dataclass
class MSFPConfig(QuantizationConfigMixin):  # type: ignore[misc]  # diffusers is untyped
    """The ``quantization_config`` of a quantized model, or the wish for one.

    ``AutoModel.from_pretrained(..., quantization_config=MSFPConfig(weights=4))`` quantizes the
    weights of a model in full precision while it loads.

    Arguments:
        weights: bits of the weights of a model that is quantized while it loads, 2 to 8.
        keep: of such a model, rules ``PATTERN:BITS`` as in ``--keep`` of `msfp calibrate`.
        layers: per layer name, the JSON of `LayerScheme`: every layer's real formats, scale and
            zero point.
        timestep_unit: what brings the denoiser's argument ``timestep`` to 0..1000, the rows of the
            router's table; where no unit does, `clock` says how.
        clock: the JSON of `Clock`.
        source: model, revision, variant and dtype that were quantized.
        is_tuned: whether fine-tuning has changed the layers; earlier versions do not say.
        sampling: steps and guidance that it was calibrated with, defaults for `msfp sample`.
        tool_version: version of msfp that wrote it.
        schema_version: version of this layout.

    Raises:
        CheckpointError: the layout is newer than this version of msfp, or not ours.
    """

    weights: int = 4
    keep: Sequence[str] = ()
    layers: dict[str, Any] = field(default_factory=dict)
    timestep_unit: float = 1.0
    clock: dict[str, Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    is_tuned: bool = False
    tool_version: str = ""
    schema_version: int = SCHEMA_VERSION
    quant_method: Any = _Method.MSFP

    def __post_init__(self) -> None:
        self.quant_method = _Method.MSFP
        if not isinstance(self.schema_version, int) or self.schema_version > NEWEST_SCHEMA:
            raise CheckpointError(
                f"the export has layout {self.schema_version}, "
                f"this msfp reads up to {NEWEST_SCHEMA}; "
                "upgrade with `pip install -U msfp`"
            )

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Argument
    ) -> Argument:
        """Read the config; a newer layout is named before its unknown keys are."""
        if (
            isinstance(config_dict.get("schema_version"), int)
            and config_dict["schema_version"] > NEWEST_SCHEMA
        ):
            cls(schema_version=config_dict["schema_version"])
        try:
            config = cls(**config_dict)
        except TypeError as error:
            raise CheckpointError(
                f"the export's quantization_config is damaged ({error}); export again"
            ) from None
        return (config, kwargs) if return_unused_kwargs else config

    def encoder(self, model: nn.Module) -> WeightEncoder:
        """Return what quantizes the weights of a model, one after another.

        Raises:
            UsageError: see `refuse_mistyped`, and `WeightEncoder`.
        """
        self.refuse_mistyped()
        encoder = WeightEncoder.of_bits(model, self.weights, tuple(self.keep))
        warn_of_idle_rules(encoder, model, self.keep)
        return encoder

    def refuse_mistyped(self) -> None:
        """Refuse bits that are not a whole number, and rules that are not several texts.

        Raises:
            UsageError: the message shows the value, and what is expected.
        """
        if not isinstance(self.weights, int) or isinstance(self.weights, bool):
            raise UsageError(
                f"MSFPConfig(weights={self.weights!r}) does not say a number of bits; "
                "give one such as 4"
            )
        is_list = isinstance(self.keep, Sequence) and not isinstance(self.keep, str)
        if not is_list or not all(isinstance(rule, str) for rule in self.keep):
            raise UsageError(
                f"MSFPConfig(keep={self.keep!r}) is not a list of rules; give one such as "
                "['*attn*:8', 'proj_in:none']"
            )

    def read_clock(self) -> Clock:
        """Return what reads the timestep of a call.

        Raises:
            ValueError: it is damaged.
        """
        return (
            Clock.of_unit(self.timestep_unit) if self.clock is None else Clock.from_json(self.clock)
        )

    def table(self) -> dict[str, LayerScheme]:
        """Return the layers' schemes.

        Raises:
            CheckpointError: an entry is damaged.
        """
        try:
            self.read_clock()
            return {name: LayerScheme.from_json(entry) for name, entry in self.layers.items()}
        except (KeyError, TypeError, ValueError, AttributeError, MsfpError) as error:
            raise CheckpointError(
                f"the export's layer table is damaged ({error}); export again"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: what was done, not what was asked for."""
        values = {
            "quant_method": METHOD,
            "schema_version": self.schema_version,
            "tool_version": self.tool_version,
            "source": self.source,
            "sampling": self.sampling,
            "timestep_unit": self.timestep_unit,
            "layers": self.layers,
        }
        if self.clock is not None:
            values["clock"] = self.clock
        return {**values, "is_tuned": True} if self.is_tuned else values


class MSFPQuantizer(DiffusersQuantizer):  # type: ignore[misc]  # diffusers is untyped
    """Loads and saves quantized models for diffusers, and quantizes others while they load."""

    use_keep_in_fp32_modules = True
    requires_calibration = False
    quantization_config: MSFPConfig
    pre_quantized: bool

    def __init__(self, quantization_config: MSFPConfig, **kwargs: Argument) -> None:
        """Take the config that diffusers read, or that the user gave, which stays as it is."""
        super().__init__(replace(quantization_config), **kwargs)

    def validate_environment(
        self, *args: object, device_map: object = None, **kwargs: Argument
    ) -> None:
        """Refuse to leave layers on the disk; codes are buffers, which accelerate does not load.

        Raises:
            UsageError: the device map names the disk.
        """
        refuse_disk(device_map, "enable_group_offload(..., offload_to_disk_path=...)")

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str] | str | None
    ) -> list[str]:
        """Check the files' digest before anything is loaded; diffusers calls this first."""
        if not self.pre_quantized:
            return loaded_keys
        paths = (
            [checkpoint_files]
            if isinstance(checkpoint_files, str)
            else list(checkpoint_files or [])
        )
        self._contents = Contents.read([Path(path) for path in paths])
        self._contents.refuse_other_config(to_text(self.quantization_config))
        return loaded_keys

    def _process_model_before_weight_loading(
        self,
        model: DiffusersModel,
        keep_in_fp32_modules: list[str] | None = None,
        **kwargs: Argument,
    ) -> None:
        config: MSFPConfig = self.quantization_config
        self.note_model(model)
        if not self.pre_quantized:
            self._encoder = config.encoder(model)
            return
        self._contents.refuse_other_model(model)
        replace_layers_(model, config.table(), clock=config.read_clock())
        make_room_(model, self._contents.tensors)
        self._contents.refuse_misfit(model)
        del self._contents  # which keeps the files open
        if keep_in_fp32_modules is not None:
            keep_in_fp32_modules.append("weight_scale")
        model.register_to_config(quantization_config=config)

    def note_model(self, model: DiffusersModel) -> None:
        """Remember the model's config, which is written beside its tensors."""
        self._model_text = model_text(json.loads(model.to_json_string()))

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        *args: Argument,
        **kwargs: Argument,
    ) -> bool:
        """Whether a tensor that was read is a weight to quantize."""
        return not self.pre_quantized and param_name in self._encoder.weights

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: str | torch.device,
        *args: Argument,
        **kwargs: Argument,
    ) -> None:
        """Quantize a weight that was read; it is let go of before the next one."""
        self._encoder.encode_(model, param_name, param_value.to(target_device))

    def _process_model_after_weight_loading(
        self, model: DiffusersModel, **kwargs: Argument
    ) -> DiffusersModel:
        if not self.pre_quantized:
            self._encoder.refuse_damaged(model)
            origin = self.quantization_config.source
            self.quantization_config = weight_only_config(self._encoder.table, origin)
            model.register_to_config(quantization_config=self.quantization_config)
            self.pre_quantized = True
            del self._encoder
        unfold_(model)
        _adapt_(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors as files hold them, and for their header the config and the digest.

        Raises:
            UsageError: the files are to be pickled, or the denoiser has adapters.
        """
        if not safe_serialization:
            raise UsageError("an export is not pickled; leave safe_serialization=False out")
        tensors = self.as_saved(state_dict)
        return tensors, header_of(tensors, to_text(self.quantization_config), self._model_text)

    def as_saved(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a state dict as files hold them.

        Raises:
            UsageError: the denoiser has adapters.
        """
        if any(".base_layer." in name for name in state_dict):  # PEFT's name for what it wraps
            raise UsageError(
                "an export has no place for adapters; keep them with `save_lora_adapter`, take "
                "them off with `unload_lora_weights`, and save again"
            )
        config = self.quantization_config
        if config.schema_version < FOLDED_SCHEMA:
            return state_dict
        schemes = config.table()
        formats = {name: each.weight for name, each in schemes.items() if each.weight}
        return fold(state_dict, formats)

    def _dequantize(self, model: DiffusersModel) -> DiffusersModel:
        raise no_float_weights(self.quantization_config)

    @property
    def is_serializable(self) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on top: codes are frozen, but gradients pass through."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` may be used."""
        return True


def warn_of_idle_rules(encoder: WeightEncoder, model: nn.Module, keep: Sequence[str]) -> None:
    """Warn of those rules that match no layer: of another model, or misspelt."""
    for rule in encoder.idle_rules():
        if rule in keep:
            warnings.warn(f"{IDLE_RULE} {type(model).__name__}: {rule!r}", stacklevel=2)


def refuse_disk(device_map: object, instead: str) -> None:
    """Refuse a map that leaves layers on the disk.

    Arguments:
        instead: the call that does so afterwards.

    Raises:
        UsageError: the map names the disk.
    """
    if isinstance(device_map, dict) and "disk" in device_map.values():
        raise UsageError(
            "device_map cannot leave quantized layers on the disk; load them, then call "
            f"`{instead}`"
        )


def no_float_weights(config: MSFPConfig) -> UsageError:
    """Return the error that says where full precision is."""
    origin = config.source.get("model", "the one that was quantized")
    return UsageError(
        f"quantized weights do not become full precision again; load that model ({origin})"
    )


def schema_of(schemes: Iterable[LayerScheme]) -> int:
    """Return the oldest layout that can hold layers like these."""
    layouts = [SCHEMA_VERSION]
    for scheme in schemes:
        if scheme.variants > 1 or scheme.weight_groups:
            layouts.append(FOLDED_SCHEMA)
        if not scheme.transform.is_identity:
            layouts.append(NEWEST_SCHEMA)
    return max(layouts)


def clock_settings(clock: Clock) -> dict[str, Any]:
    """Return the fields of a config that say how a denoiser is told the time."""
    if clock.unit is None:
        return {"clock": clock.to_json()}
    return {"timestep_unit": clock.unit}


def weight_only_config(schemes: dict[str, Any], origin: dict[str, Any] | None = None) -> MSFPConfig:
    """Return the config of a model that was quantized without a calibration.

    Arguments:
        schemes: of its layers, as JSON.
        origin: what it was loaded from, as JSON.
    """
    return MSFPConfig(layers=schemes, source=origin or {}, tool_version=__version__)


def mark_quantized_(denoiser: DiffusersModel, config: MSFPConfig) -> None:
    """Mark an in-memory denoiser as quantized, so that ``save_pretrained`` writes it as such."""
    quantizer = MSFPQuantizer(config, pre_quantized=True)
    quantizer.note_model(denoiser)
    denoiser.hf_quantizer = quantizer
    denoiser.register_to_config(quantization_config=config)
    _adapt_(denoiser)


def saved_tensors(denoiser: DiffusersModel) -> dict[str, Tensor]:
    """Return the tensors that the files of a denoiser hold, quantized or not."""
    state: dict[str, Tensor] = denoiser.state_dict()
    quantizer = getattr(denoiser, "hf_quantizer", None)
    return quantizer.as_saved(state) if isinstance(quantizer, MSFPQuantizer) else state


def bytes_of_members(directory: Path) -> int:
    """Return what a denoiser's router and the further members of its hubs take on disk."""
    whole = exported_tensors(directory, "weight_codes").values()
    size = sum(codes[1:].nbytes for codes in whole)
    for kind in ("weight_changes", "table", "starts"):
        size += sum(tensor.nbytes for tensor in exported_tensors(directory, kind).values())
    return size


def _adapt_(denoiser: DiffusersModel) -> None:
    """Tell diffusers what our layers can do that others cannot, and the other way round.

    ``is_quantized`` forbids to change the type of what is in floating point, which `from_pipe`
    does; our scales keep theirs. A fused layer would be in floating point. No two blocks have the
    same formats, so that each would be a graph of its own: the denoiser is compiled as a whole, the
    one repeated block. Its config may change until it is saved, which takes its state.

    Nothing here refers to the denoiser, which so is freed with its last user.
    """
    denoiser.is_quantized = False
    denoiser._repeated_blocks = [type(denoiser).__name__]
    denoiser.register_state_dict_post_hook(_note_model)
    for method in ("fuse_lora", "fuse_qkv_projections"):
        if hasattr(denoiser, method):
            setattr(denoiser, method, partial(_refuse_fusing, method))


def _note_model(denoiser: DiffusersModel, state: object, prefix: str, metadata: object) -> None:
    """Remember the config of a denoiser whose state is taken."""
    quantizer = getattr(denoiser, "hf_quantizer", None)
    if isinstance(quantizer, MSFPQuantizer):
        quantizer.note_model(denoiser)


def _refuse_fusing(method: str, *args: object, **kwargs: object) -> None:
    raise UsageError(
        f"{method} would replace quantized weights by others in floating point; leave it out (a "
        "LoRA works as an adapter), or fuse the full-precision pipeline and run `msfp calibrate` "
        "on that"
    )


def to_text(config: MSFPConfig) -> str:
    """Return the config as it lies in the safetensors header."""
    return json.dumps(config.to_dict(), sort_keys=True)


# diffusers has no function for this: its registry is two plain dicts.
AUTO_QUANTIZER_MAPPING.setdefault(METHOD, MSFPQuantizer)
AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, MSFPConfig)
