"""All metrics of an evaluation in one table: what each is called, how it is shown and computed.

A metric is one row of `METRICS`. The JSON file, the table of ``msfp evaluate`` and the page of
``msfp report`` read their metrics from here, in this order; so a new one is a new row, with a
function in `compute` if none there fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from msfp_cli.evaluation.metrics import compute
from msfp_cli.evaluation.metrics.compute import Compute, PerPicture
from msfp_cli.evaluation.metrics.distances import (
    NEIGHBOURS,
    frechet_distance,
    kernel_distance,
    precision,
    recall,
)
from msfp_cli.evaluation.metrics.evidence import Evidence
from msfp_cli.evaluation.result import Measurements


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric.

    Arguments:
        key, title: its name, for programs and for people.
        help: what it tells, in one sentence.
        kind: ``picture`` (one value for each picture), ``model`` (one value), or ``sets`` (a
            distance between two sets of pictures, which few pictures make uncertain). Where
            pictures are only drawings of something else, neither they nor their sets are compared.
        better: which values are better; None if neither is.
        digits: after the point.
        json_only: whether it is left out of tables.
        compute: computes it; None if the evidence that it needs is missing.
    """

    key: str
    title: str
    help: str
    kind: Literal["picture", "model", "sets"]
    better: Literal["higher", "lower"] | None
    digits: int
    json_only: bool = False
    compute: Compute

    def text(self, value: float | None) -> str:
        """Write a value with the digits that are shown; nothing for None."""
        return "" if value is None else f"{value:.{self.digits}f}"


def compute_metrics(evidence: Evidence) -> tuple[dict[str, float], dict[str, PerPicture]]:
    """Compute every metric that the evidence allows.

    Returns:
        Single values, and values for each picture, both by the metric's key.
    """
    values = dict[str, float]()
    per_picture = dict[str, PerPicture]()
    for metric in METRICS:
        if evidence.own.are_drawings and metric.kind != "model":
            continue
        value = metric.compute(evidence)
        if isinstance(value, tuple):
            per_picture[metric.key] = value
        elif value is not None:
            values[metric.key] = value
    return values, per_picture


def metrics_for(models: Sequence[Measurements]) -> list[Metric]:
    """Return the metrics to show people: those that at least one model has."""
    return [metric for metric in METRICS if not metric.json_only and _is_known(metric, models)]


def _is_known(metric: Metric, models: Sequence[Measurements]) -> bool:
    """Whether at least one model has a value of a metric."""
    return any(model.value(metric.key) is not None for model in models)


METRICS: tuple[Metric, ...] = (
    Metric(
        key="output",
        title="output error",
        help="Relative squared error of the denoiser's output on calls recorded of full precision.",
        kind="model",
        better="lower",
        digits=5,
        compute=compute.output_error,
    ),
    Metric(
        key="latents",
        title="final latents' error",
        help="Relative squared error of the last sample of the scheduler.",
        kind="model",
        better="lower",
        digits=5,
        compute=compute.latents_error,
    ),
    Metric(
        key="psnr",
        title="PSNR, dB",
        help="Peak signal-to-noise ratio of each picture to the same one by full precision.",
        kind="picture",
        better="higher",
        digits=2,
        compute=compute.psnr,
    ),
    Metric(
        key="ssim",
        title="SSIM",
        help="Structural similarity of each picture to the same one by full precision.",
        kind="picture",
        better="higher",
        digits=4,
        compute=compute.ssim,
    ),
    Metric(
        key="deep",
        title="deep-feature distance",
        help="Distance of each picture to full precision's, in SqueezeNet's features.",
        kind="picture",
        better="lower",
        digits=4,
        compute=compute.deep_distance,
    ),
    Metric(
        key="frechet_full",
        title="Fréchet distance to full precision",
        help="Fréchet distance between the features of its pictures and of full precision's.",
        kind="sets",
        better="lower",
        digits=3,
        compute=compute.between_sets(frechet_distance, "full"),
    ),
    Metric(
        key="kernel_full",
        title="kernel distance to full precision",
        help="Kernel distance between the features of its pictures and of full precision's.",
        kind="sets",
        better="lower",
        digits=4,
        json_only=True,
        compute=compute.between_sets(kernel_distance, "full"),
    ),
    Metric(
        key="precision_full",
        title="precision to full precision",
        help="Share of its pictures whose features lie among those of full precision's.",
        kind="sets",
        better="higher",
        digits=3,
        json_only=True,
        compute=compute.between_sets(precision, "full", at_least=NEIGHBOURS + 1),
    ),
    Metric(
        key="recall_full",
        title="recall of full precision",
        help="Share of full precision's pictures whose features lie among those of its own.",
        kind="sets",
        better="higher",
        digits=3,
        json_only=True,
        compute=compute.between_sets(recall, "full", at_least=NEIGHBOURS + 1),
    ),
    Metric(
        key="frechet",
        title="Fréchet distance to reference",
        help="Fréchet distance between the features of its pictures and of real ones.",
        kind="sets",
        better="lower",
        digits=3,
        compute=compute.between_sets(frechet_distance, "reference"),
    ),
    Metric(
        key="kernel",
        title="kernel distance to reference",
        help="Kernel distance between the features of its pictures and of real ones.",
        kind="sets",
        better="lower",
        digits=4,
        compute=compute.between_sets(kernel_distance, "reference"),
    ),
    Metric(
        key="precision",
        title="precision",
        help="Share of its pictures whose features lie among those of real ones.",
        kind="sets",
        better="higher",
        digits=3,
        compute=compute.between_sets(precision, "reference", at_least=NEIGHBOURS + 1),
    ),
    Metric(
        key="recall",
        title="recall",
        help="Share of real pictures whose features lie among those of its own.",
        kind="sets",
        better="higher",
        digits=3,
        compute=compute.between_sets(recall, "reference", at_least=NEIGHBOURS + 1),
    ),
    Metric(
        key="garment",
        title="right garment, %",
        help="Share of pictures that show the garment that their prompt names.",
        kind="model",
        better="higher",
        digits=1,
        compute=lambda evidence: compute.agreement(evidence, 0),
    ),
    Metric(
        key="colour",
        title="right colour, %",
        help="Share of pictures that show the colour that their prompt names.",
        kind="model",
        better="higher",
        digits=1,
        compute=lambda evidence: compute.agreement(evidence, 1),
    ),
    Metric(
        key="clip",
        title="CLIP score",
        help="How well the pictures fit their prompts, by a CLIP model.",
        kind="model",
        better="higher",
        digits=2,
        compute=compute.clip,
    ),
    Metric(
        key="size",
        title="denoiser, MiB (16 bits or packed)",
        help="Size of the denoisers' tensors: of an export as in its files, otherwise with 16 bits "
        "per number.",
        kind="model",
        better="lower",
        digits=2,
        compute=compute.size,
    ),
    Metric(
        key="seconds",
        title="seconds a picture",
        help="Time per picture in a fresh process, the median of three calls.",
        kind="model",
        better="lower",
        digits=3,
        compute=compute.seconds_per_picture,
    ),
    Metric(
        key="memory",
        title="peak memory, MiB",
        help="Largest memory of a fresh process, or of what torch held on an accelerator.",
        kind="model",
        better="lower",
        digits=0,
        compute=compute.peak_memory,
    ),
)
