"""How transformers reads, quantizes and writes text encoders: a quantizer for its registry.

Weights of Linear layers and tables get their bits, and inputs stay in floating point. Two tables
that share their weight (T5's ``shared`` and ``encoder.embed_tokens``) are one quantized table, and
the other one looks rows up in it. A table that shares its weight with a Linear layer (the head of
many language models) stays in floating point, as does that layer.

It is a module of its own because the registry and the models of transformers are imported for it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, revert_weight_conversion
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from msfp_cli.checkpoint.contents import CONFIG, DIGEST, Contents
from msfp_cli.checkpoint.quantizer import (
    METHOD,
    MSFPConfig,
    no_float_weights,
    refuse_disk,
    to_text,
    warn_of_idle_rules,
    weight_only_config,
)
from msfp_cli.checkpoint.weight_only import WeightEncoder
from msfp_cli.errors import CheckpointError
from msfp_cli.files.documents import digest
from msfp_cli.layers.quantized import kind_of
from msfp_cli.layers.replace import find_layers, replace_layers_, replace_module_

TransformersModel: TypeAlias = Any  # a PreTrainedModel, which mypy cannot follow
Argument: TypeAlias = Any  # whatever transformers passes

# Tables of tokens have the bits of the weights; those of positions are small, and T5's table of
# distances is added to what the softmax gets.
_TOKENS = ("shared", "*embed_tokens", "*token_embedding", "*tok_embeddings", "*word_embeddings")
_KEEP = ("*relative_attention_bias:none",)


class SharedTable(nn.Module):
    """A table that looks rows up in another one of the model.

    Arguments:
        model: which has both.
        name: of the other table.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self._owner = (model,)  # in a tuple, so that torch does not take it for a part
        self._name = name

    def settle_(self) -> None:
        """Refer to the other table, which is not replaced any more, and no longer to the model.

        A model that its parts refer to is not freed with its last user.
        """
        self._owner = (self._table(),)
        self._name = ""

    @property
    def weight(self) -> Tensor:
        """The other table's weight."""
        weight = self._table().weight
        assert isinstance(weight, Tensor), "it is a table"
        return weight

    def _table(self) -> nn.Module:
        return self._owner[0].get_submodule(self._name)

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up."""
        rows: Tensor = self._table()(input)
        return rows


class MSFPTextQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Loads and saves quantized text encoders, and quantizes others while they load."""

    quantization_config: MSFPConfig
    pre_quantized: bool

    def __init__(self, quantization_config: MSFPConfig, **kwargs: Argument) -> None:
        """Take the config that transformers read, or that the user gave, which stays as it is."""
        super().__init__(replace(quantization_config), **kwargs)

    def validate_environment(
        self, *args: object, device_map: object = None, **kwargs: Argument
    ) -> None:
        """Refuse to leave layers on the disk, as for denoisers.

        Raises:
            UsageError: the device map names the disk.
        """
        refuse_disk(device_map, "apply_group_offloading(..., offload_to_disk_path=...)")

    def _dequantize(self, model: TransformersModel, dtype: object = None) -> TransformersModel:
        raise no_float_weights(self.quantization_config)

    def _process_model_before_weight_loading(
        self,
        model: TransformersModel,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Argument,
    ) -> None:
        tied = _ties(model)
        if self.pre_quantized:
            contents = Contents.read([Path(path) for path in checkpoint_files or ()])
            contents.refuse_other_config(to_text(self.quantization_config))
            table = self.quantization_config.table()
            _share_tables_(model, {one: other for one, other in tied.items() if other in table})
            replace_layers_(model, table)
            return
        self._encoder = text_encoder(model, self.quantization_config)

    def param_needs_quantization(
        self, model: TransformersModel, param_name: str, **kwargs: Argument
    ) -> bool:
        """Whether a tensor that is read is a weight to quantize."""
        return not self.pre_quantized and param_name in self._encoder.weights

    def get_quantize_ops(self) -> ConversionOps:
        """Return what quantizes a weight."""
        return _Encode(self._encoder)

    def _process_model_after_weight_loading(
        self, model: TransformersModel, **kwargs: Argument
    ) -> TransformersModel:
        if not self.pre_quantized:
            self._encoder.refuse_damaged(model)
            origin = self.quantization_config.source
            self.quantization_config = weight_only_config(self._encoder.table, origin)
            self.pre_quantized = True
            del self._encoder
        mark_text_encoder_(model, self)
        return model

    def get_state_dict_and_metadata(
        self, model: TransformersModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors, and for their header the config and the digest."""
        # This module is imported on the way to that one.
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        state = model.state_dict()
        named = remove_tied_weights_from_state_dict(dict(state), model)
        for name in model._keys_to_ignore_on_save or ():
            named.pop(name, None)
        header = {
            CONFIG: to_text(self.quantization_config),
            DIGEST: digest(revert_weight_conversion(model, named)),
        }
        return state, header

    def is_serializable(self) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` may be used."""
        return True


class _Encode(ConversionOps):  # type: ignore[misc]  # transformers is untyped
    """Quantizes one weight: transformers gives it, and gets nothing back to set."""

    def __init__(self, encoder: WeightEncoder) -> None:
        self._encoder = encoder

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: TransformersModel,
        missing_keys: set[str],
        **kwargs: Argument,
    ) -> dict[str, Tensor]:
        """Replace the layer of a weight."""
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        try:
            self._encoder.encode_(model, full_layer_name, weight)
        except CheckpointError as error:  # transformers would say something else in its place
            self._encoder.errors.append(error)
            return {}
        missing_keys.discard(full_layer_name)
        return {}


def text_encoder(model: TransformersModel, config: MSFPConfig) -> WeightEncoder:
    """Return what quantizes a text encoder in floating point, whose tied tables become one.

    Raises:
        UsageError: see `MSFPConfig.encoder`.
    """
    config.refuse_mistyped()
    layers = find_layers(model)
    tied = {one: other for one, other in _ties(model).items() if {one, other} <= layers.keys()}
    tables = {
        one: other
        for one, other in tied.items()
        if kind_of(layers[one]).is_table and kind_of(layers[other]).is_table
    }
    _share_tables_(model, tables)
    others = {name for one in tied.keys() - tables.keys() for name in (one, tied[one])}
    rules = (
        *(f"{name}:{config.weights}" for name in _TOKENS),
        *_KEEP,
        *config.keep,
        *(f"{name}:none" for name in sorted(others)),
    )
    encoder = WeightEncoder.of_bits(model, config.weights, rules)
    warn_of_idle_rules(encoder, model, config.keep)
    return encoder


def mark_text_encoder_(model: TransformersModel, quantizer: MSFPTextQuantizer) -> None:
    """Mark a model as quantized, so that ``save_pretrained`` writes it as such."""
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized = False  # that would forbid to change the type of what is in floating point
    for module in model.modules():
        if isinstance(module, SharedTable):
            module.settle_()


def _ties(model: TransformersModel) -> dict[str, str]:
    """Return layers that have no weight of their own, and those whose weight they have."""
    ties = model.all_tied_weights_keys.items()
    return {one.removesuffix(".weight"): other.removesuffix(".weight") for one, other in ties}


def _share_tables_(model: TransformersModel, tied: dict[str, str]) -> None:
    """Let tables look up in others."""
    for one, other in tied.items():
        replace_module_(model, one, SharedTable(model, other))
        model.all_tied_weights_keys.pop(f"{one}.weight", None)


AUTO_QUANTIZER_MAPPING.setdefault(METHOD, MSFPTextQuantizer)
AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, MSFPConfig)
