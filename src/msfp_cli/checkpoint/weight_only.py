"""Quantize the weights of a model as they are read: no calibration, and never the whole model.

Which layers, and with how many bits, is said by the rules that a calibration follows too, so first
and last layers stay in floating point; which ones they are is known by their usual names, because
the model does not run. Inputs of layers stay in floating point as well: how large
they get is known only from recorded calls.
"""

from typing import Any

import torch
from torch import Tensor, nn

from msfp_cli.calibration.keep import usual_role
from msfp_cli.calibration.layer_search import bits_of
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.errors import CheckpointError, UsageError
from msfp_cli.formats.weights import CodedWeight, encode_weight, is_finite
from msfp_cli.layers.quantized import kind_of
from msfp_cli.layers.replace import (
    find_layers,
    quantized_layers,
    replace_by_codes_,
    replace_layers_,
)
from msfp_cli.layers.scheme import LayerScheme


class WeightEncoder:
    """Turns weights into codes, one after another, and layers into quantized ones.

    Arguments:
        model: in floating point; it may be on the meta device.
        recipe: its bits of weights, and its rules.

    Raises:
        UsageError: the model is quantized already, or no layer is to be quantized.
    """

    def __init__(self, model: nn.Module, recipe: CalibrateRecipe) -> None:
        if quantized_layers(model):
            raise UsageError("the model is quantized already; give the one in full precision")
        self._recipe = recipe
        self._bits = dict[str, int]()
        self._layers = find_layers(model)
        self._kinds = {name: kind_of(layer) for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            _, bits, _ = bits_of(name, layer, recipe, usual_role(name))
            if bits is not None:
                self._bits[name] = bits
        if not self._bits:
            raise UsageError(f"{type(model).__name__} has no layer to quantize with these rules")
        self.weights = frozenset(f"{name}.weight" for name in self._bits)
        self.table = dict[str, dict[str, Any]]()  # schemes of the layers that are done, as JSON
        self.errors = list[CheckpointError]()  # of weights that could not be encoded, for later
        replace_layers_(model, {})  # so that the model answers for weights that it does not have

    @classmethod
    def of_bits(cls, model: nn.Module, weights: int, keep: tuple[str, ...]) -> "WeightEncoder":
        """Return the encoder of a model's weights that have so many bits, but for rules."""
        return cls(model, CalibrateRecipe(weights=weights, activations=None, keep=keep))

    def idle_rules(self) -> list[str]:
        """Return the rules that match no layer: of another model, or misspelt."""
        return self._recipe.idle_rules(self._kinds.keys())

    def encode(self, name: str, weight: Tensor) -> CodedWeight:
        """Choose format and scales of one of `weights`, and round it.

        Raises:
            CheckpointError: it holds a NaN or an infinity.
        """
        refuse_not_finite(name, weight)
        formats = self._recipe.weight_formats(self._bits[name.removesuffix(".weight")])
        return encode_weight(weight, formats)

    @torch.no_grad()
    def encode_(self, model: nn.Module, name: str, weight: Tensor) -> None:
        """Encode a weight and replace its layer."""
        coded = self.encode(name, weight)
        layer_name = name.removesuffix(".weight")
        scheme = self.scheme_of(layer_name, coded)
        layer = self._layers.pop(layer_name)
        replace_by_codes_(model, layer_name, layer, scheme, coded.scale, coded.codes)
        self.table[layer_name] = scheme.to_json()

    def scheme_of(self, layer_name: str, coded: CodedWeight) -> LayerScheme:
        """Return the scheme of a layer whose weight was encoded."""
        return LayerScheme(weight=coded.format, lookup=self._kinds[layer_name].is_table)

    def refuse_damaged(self, model: nn.Module) -> None:
        """Refuse a model whose files lacked a weight to quantize, or whose other tensors are bad.

        Raises:
            CheckpointError: the message names the tensor.
        """
        if self.errors:
            raise self.errors[0]
        missing = sorted(self._bits.keys() - self.table.keys())
        if missing:
            raise CheckpointError(f"the model's files lack {missing[0]}.weight; download it again")
        for name, parameter in model.named_parameters():
            refuse_not_finite(name, parameter)


def refuse_not_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor of a model's file that holds a NaN or an infinity.

    Raises:
        CheckpointError: the message names it.
    """
    if not is_finite(tensor):
        raise CheckpointError(
            f"{name} holds a NaN or infinity, so the model's file is broken; download it again"
        )
