"""What is said before a calibration begins: what it will take, and what it cannot do.

Nearly all of a calibration is calls of the denoiser, of which each stage needs a known number, and
one such call was timed. The search for each weight and its rounding do not depend on calls: the
seconds for a million weights are those of one CPU (`benchmarks/calibration_memory.py`).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from msfp_cli.calibration.denoiser_search import (
    calls_to_measure,
    num_observed,
    planned_layers,
)
from msfp_cli.calibration.keep import usual_role
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.samples import expected_groups
from msfp_cli.errors import UsageError
from msfp_cli.layers.replace import find_layers, quantized_layers
from msfp_cli.memory import peak_bytes, write_size
from msfp_cli.pipelines.denoiser import (
    find_denoisers,
    likely_denoisers,
    refuse_adapters,
    refuse_broken,
    refuse_changed,
)
from msfp_cli.pipelines.loading import Pipeline
from msfp_cli.progress import Progress
from msfp_cli.recording.probe import probe
from msfp_cli.recording.recipe import RecordRecipe

_SEARCH_SECONDS = 0.2  # for a million weights
_ROUNDING_SECONDS = 1.2
_LONG = 120  # seconds; whatever takes less is not announced
_LOWER = {
    "recording": "fewer --num-images or --steps",
    "observing": "fewer --num-images or --steps",
    "measuring layers alone": "--lift 0 leaves it out",
    "measuring timesteps": "--input-lift 0 leaves it out",
    "rounding": "--rounding nearest leaves it out",
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a calibration will take.

    Arguments:
        seconds: by stage.
        disk: bytes of the recordings.
        memory: bytes of each process.
        max_memory: bytes that it may take; None if weights do not stay in their files.
        num_processes: those that share the work.
    """

    seconds: Mapping[str, float]
    disk: int
    memory: int
    max_memory: int | None
    num_processes: int = 1

    def lines(self) -> Iterator[str]:
        """Yield what to say, and which options would lower it; nothing if it is little."""
        if self.max_memory is not None and self.memory > self.max_memory:
            yield (
                f"--max-memory {write_size(self.max_memory)} is too little: calling the model and "
                f"rounding one layer at a time takes about {self.memory / 2**30:.1f} GiB"
            )
        total = sum(self.seconds.values())
        if total < _LONG:
            return
        parts = [f"{stage} {_words(time)}" for stage, time in self.seconds.items() if time >= 1]
        shared = f" in {self.num_processes} processes" if self.num_processes > 1 else ""
        yield f"this will take about {_words(total)}{shared}: {', '.join(parts)}"
        longest = max(self.seconds, key=lambda stage: self.seconds[stage])
        if advice := _LOWER.get(longest):
            yield f"most of it is {longest}: {advice}"
        advice = "; --max-memory bounds it" if self.max_memory is None else ""
        yield (
            f"recordings take about {self.disk / 2**30:.1f} GiB on disk; memory "
            f"{self.memory / 2**30:.1f} GiB{' in each' if shared else ''}{advice}"
        )


def _words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(
    pipe: Pipeline,
    recording: RecordRecipe,
    held_out: RecordRecipe,
    recipe: CalibrateRecipe,
    max_memory: int | None,
    num_processes: int = 1,
) -> Estimate:
    """Call the denoiser once, and estimate a calibration.

    Arguments:
        recording: of the calls to choose on.
        held_out: of the calls to measure on.
        max_memory: bytes that this process may take; None if the model is loaded whole.
        num_processes: those that share the work. While weights are rounded each replays all that
            is observed for its own layers.
    """
    cost = probe(pipe, recording)
    run = cost.steps * cost.seconds
    num_runs = recording.num_shards + held_out.num_shards
    observing = num_observed(recording.num_shards, recording.batch_size) * run
    rounded = {}
    measured = 0.0
    for component, denoiser in likely_denoisers(pipe).items():
        planned = planned_layers(denoiser, recipe, usual_role)
        for name, each in planned.items():
            if each.is_rounded:
                rounded[component, name] = each.layer
        tried = sum(each.is_tried for each in planned.values())
        measured += tried * calls_to_measure(recipe, denoiser, cost.rows)
    millions = sum(layer.weight.numel() for layer in rounded.values()) / 1e6
    groups, memory = expected_groups(rounded, max_memory)
    seconds = {
        "recording": num_runs * run,
        "observing": observing,
        "searching": _SEARCH_SECONDS * millions,
        "measuring layers alone": measured * cost.seconds,
        "measuring timesteps": (1 + cost.steps) * run if recipe.input_lift else 0.0,
        "rounding": _ROUNDING_SECONDS * millions,
        "checking": held_out.num_shards * run,
    }
    seconds = {stage: time / num_processes for stage, time in seconds.items()}
    seconds["rounding"] += math.ceil(groups / num_processes) * observing
    if recipe.rounding == "nearest":
        seconds["rounding"] = 0.0
        memory = peak_bytes()
    return Estimate(
        seconds=seconds,
        disk=num_runs * cost.num_bytes,
        memory=memory,
        max_memory=max_memory,
        num_processes=num_processes,
    )


def check_layers(pipe: Pipeline, recipe: CalibrateRecipe, progress: Progress) -> None:
    """Refuse a pipeline that cannot be calibrated as the recipe says; say which rules are idle.

    Raises:
        UsageError: a denoiser is quantized already or offloaded, a part has adapters, the rules
            leave no layer to quantize, or the pipeline has no such text encoder.
        ModelError: a weight of a part is not finite.
    """
    texts = [name for name in pipe.components if name.startswith("text_encoder")]
    if unknown := sorted(recipe.text_encoders().keys() - set(texts)):
        raise UsageError(
            f"--also {unknown[0]!r} is not a text encoder of this pipeline; it has "
            f"{', '.join(texts) or 'none'}"
        )
    for name in recipe.text_encoders():
        if quantized_layers(pipe.components[name]):
            raise UsageError(f"--also {name!r} is quantized already; load it in full precision")
    names = list[str]()
    for component, denoiser in find_denoisers(pipe).items():
        refuse_changed(component, denoiser)
        if quantized_layers(denoiser):
            raise UsageError(
                f"{component} is quantized already; calibrate the full-precision model that it was "
                "made from"
            )
        names += find_layers(denoiser)
    for component, part in pipe.components.items():
        if isinstance(part, nn.Module):
            refuse_adapters(component, part)
            refuse_broken(component, part)
    for rule in recipe.idle_rules(names):
        some = ", ".join(sorted(names)[:3])
        progress.log(
            f"--keep {rule!r} matches no layer of this model; its layers have names such as {some}"
        )
