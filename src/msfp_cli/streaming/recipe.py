"""What `msfp quantize` is asked for; nothing here needs torch."""

from dataclasses import dataclass

from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.formats.float_format import MAX_BITS, MIN_BITS
from msfp_cli.memory import read_size
from msfp_cli.recipe import Recipe, option


@dataclass(frozen=True, kw_only=True)
class QuantizeRecipe(Recipe):
    """How a pipeline is quantized without a calibration."""

    weights: int = option(
        4, f"Bits of the weights, {MIN_BITS} to {MAX_BITS}.", at_least=MIN_BITS, at_most=MAX_BITS
    )
    keep: tuple[str, ...] = option(
        (),
        "PATTERN:BITS sets the bits of the layers whose name matches (none: floating point); "
        "repeatable, the last match wins. Default: as in `msfp calibrate`.",
    )
    also: tuple[str, ...] = option(
        (),
        "A text encoder to quantize beside the denoiser, such as text_encoder_2; repeatable. "
        "Default: none.",
    )
    max_shard_size: str = option(
        "10GB", "Size of a file of weights, at most; a larger component has several files."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rules()
        self.shard_bytes()

    def shard_bytes(self) -> int:
        """Return the bytes of a file of weights, at most.

        Raises:
            UsageError: `max_shard_size` is not a size.
        """
        return read_size(self.max_shard_size)

    def rules(self) -> CalibrateRecipe:
        """Return which layers get how many bits, in the terms of a calibration."""
        return CalibrateRecipe(weights=self.weights, activations=None, keep=self.keep)
