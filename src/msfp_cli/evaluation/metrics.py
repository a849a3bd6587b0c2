"""The figures of an evaluation in the order, words and digits in which people see them."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

from msfp_cli.evaluation.result import Measured


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a model.

    Arguments:
        key, title: its name, for programs and for people.
        digits: after the point.
        better: ``higher``, ``lower``, or None for what is neither.
        value: reads it off a model, None where it was not measured.
    """

    key: str
    title: str
    digits: int
    better: str | None
    value: Callable[[Measured], float | None]

    def text(self, value: float) -> str:
        """Write a value."""
        return f"{value:.{self.digits}f}"


def _mean(values: tuple[float, ...]) -> float | None:
    return mean(values) if values else None


def _output(model: Measured) -> float | None:
    return max((noise.error for noise in model.noise.values()), default=None)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


FIGURES = (
    Figure(key="output", title="output error", digits=5, better="lower", value=_output),
    Figure(
        key="latents",
        title="final latents' error",
        digits=5,
        better="lower",
        value=lambda m: m.latents,
    ),
    Figure(key="psnr", title="PSNR, dB", digits=2, better="higher", value=lambda m: _mean(m.psnr)),
    Figure(key="ssim", title="SSIM", digits=4, better="higher", value=lambda m: _mean(m.ssim)),
    Figure(
        key="deep",
        title="deep-feature distance",
        digits=4,
        better="lower",
        value=lambda m: _mean(m.deep),
    ),
    Figure(
        key="frechet_full",
        title="Fréchet distance to full precision",
        digits=3,
        better="lower",
        value=lambda m: None if m.to_full is None else m.to_full.frechet,
    ),
    Figure(
        key="frechet",
        title="Fréchet distance to reference",
        digits=3,
        better="lower",
        value=lambda m: None if m.to_reference is None else m.to_reference.frechet,
    ),
    Figure(
        key="kernel",
        title="kernel distance to reference",
        digits=4,
        better="lower",
        value=lambda m: None if m.to_reference is None else m.to_reference.kernel,
    ),
    Figure(
        key="precision",
        title="precision",
        digits=3,
        better="higher",
        value=lambda m: None if m.to_reference is None else m.to_reference.precision,
    ),
    Figure(
        key="recall",
        title="recall",
        digits=3,
        better="higher",
        value=lambda m: None if m.to_reference is None else m.to_reference.recall,
    ),
    Figure(
        key="garment",
        title="right garment, %",
        digits=1,
        better="higher",
        value=lambda m: _percent(m.garment),
    ),
    Figure(
        key="colour",
        title="right colour, %",
        digits=1,
        better="higher",
        value=lambda m: _percent(m.colour),
    ),
    Figure(key="clip", title="CLIP score", digits=2, better="higher", value=lambda m: m.clip),
    Figure(
        key="size",
        title="denoiser, MiB (16 bits or packed)",
        digits=2,
        better="lower",
        value=lambda m: None if m.denoiser_bytes is None else m.denoiser_bytes / 2**20,
    ),
    Figure(
        key="seconds",
        title="seconds a picture",
        digits=3,
        better="lower",
        value=lambda m: None if m.cost is None else m.cost.seconds_per_picture,
    ),
    Figure(
        key="memory",
        title="peak memory, MiB",
        digits=0,
        better="lower",
        value=lambda m: None if m.cost is None else m.cost.peak_memory_bytes / 2**20,
    ),
)
DISTANCES = (
    "frechet_full",
    "frechet",
    "kernel",
    "precision",
    "recall",
)  # of sets: too few pictures do not rank models
