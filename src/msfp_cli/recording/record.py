"""Record the denoiser's calls while the stock pipeline runs."""

import inspect
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from msfp_cli.errors import CalibrationError, ModelError, RunError
from msfp_cli.pipelines.conditions import conditions_for, prompts_of
from msfp_cli.pipelines.denoiser import DenoiserCall, find_denoisers
from msfp_cli.pipelines.denoising_factor import denoising_factors
from msfp_cli.pipelines.discovery import (
    Argument,
    Clocks,
    learn_clocks,
    refuse_idle,
    watch_pipeline,
)
from msfp_cli.pipelines.loading import BUILT_IN, BUILT_IN_GUIDANCE, ModelSource, Pipeline
from msfp_cli.pipelines.sampling import (
    call_pipeline,
    refuse_settings,
    refuse_untaken,
    say_conditions,
)
from msfp_cli.processes import ALONE, Processes
from msfp_cli.recording.compare import output_error
from msfp_cli.recording.encode import tensor_sizes
from msfp_cli.recording.recipe import (
    DEFAULT_MAX_BYTES,
    LARGE,
    MAX_CONDITIONS,
    NUM_IMAGES,
    NUM_IMAGES_LARGE,
    RecordOptions,
    RecordRecipe,
    recorded_conditions,
)
from msfp_cli.recording.result import Factors, Recording
from msfp_cli.recording.settings import remove_other, settings_of
from msfp_cli.run import Run

_HELD_OUT_SEED = 1_000_003  # far from any calibration image's seed
# Relative error of a repeated call above which it is another function that is called: half
# precision with other rows in the batch is below 0.0001.
_REPEATED = 1e-3


class _Watcher:
    """Collects the calls of one pipeline run, and checks meanwhile how much all would take.

    Arguments:
        num_runs: of the recording, each like this one; 0: nothing is checked.
    """

    def __init__(self, pipe: Pipeline, recording: Recording, num_runs: int, max_bytes: int) -> None:
        self.pipe = pipe
        self.recording = recording
        self.num_runs = num_runs
        self.max_bytes = max_bytes
        self.calls: list[DenoiserCall] = []
        # By component: how many channels of its output reached a scheduler, and for each scheduler
        # our timesteps by the scheduler's own.
        self.channels: dict[str, set[int]] = {}
        self.timesteps: dict[str, dict[str, dict[float, float]]] = {}
        self.sizes: dict[str, int] = {}  # in bytes, of each tensor of the calls by its content
        self.totals: dict[str, int] = {}  # by scheduler: bytes of all calls before its last step

    def add_call(self, call: DenoiserCall) -> None:
        """Keep a call."""
        if not torch.isfinite(call.output).all():
            raise CalibrationError(
                f"the denoiser's output holds a NaN or infinity at timestep {call.timestep:g} "
                "before any quantization; the model overflows in this precision: "
                "try --dtype float32"
            )
        if self.num_runs:
            self._check_call(call)
        self.calls.append(call)

    def add_step(
        self,
        scheduler: str,
        timestep: Argument,
        model_output: Tensor,
        result: object,
    ) -> None:
        """Note what of the last call reached a scheduler, and at which timestep of that."""
        if not self.calls:
            return
        last = self.calls[-1]
        if model_output.ndim > 1:
            self.channels.setdefault(last.component, set()).add(model_output.shape[1])
        if timestep is not None:
            own = self.timesteps.setdefault(last.component, {}).setdefault(scheduler, {})
            time = float(torch.as_tensor(timestep).reshape(-1)[0])
            own[time] = last.timestep
            if self.num_runs:
                self._check_step(scheduler, time)

    def used_calls(self) -> list[DenoiserCall]:
        """Return the calls without output channels that the pipeline did not use.

        DiT, for one, predicts a variance as well. Such a denoiser returns twice the channels that
        reach the scheduler, and the pipelines keep the first half.
        """
        return [self._used(call) for call in self.calls]

    def _used(self, call: DenoiserCall) -> DenoiserCall:
        channels = self.channels.get(call.component, set())
        if len(channels) != 1 or call.output.shape[1] != 2 * min(channels):
            return call
        return replace(call, output=call.output[:, : min(channels)].contiguous())

    def factors(self) -> dict[str, Factors]:
        """Return the (timestep, denoising factor) pairs of each component."""
        return {component: self._factors_of(component) for component in self.timesteps}

    def _factors_of(self, component: str) -> Factors:
        """Return the pairs of one component; None: they are not known."""
        ((name, ours), *others) = self.timesteps[component].items()
        if others:
            return None
        try:
            timesteps, factors = denoising_factors(self.pipe.components[name])
        except (ModelError, AttributeError):
            return None
        pairs = zip(timesteps.tolist(), factors.tolist(), strict=True)
        return [(ours[timestep], factor) for timestep, factor in pairs if timestep in ours] or None

    def _check_call(self, call: DenoiserCall) -> None:
        """Count a call; refuse a recording that is too large by the first one already.

        What surely changes from step to step is the sample and the output.
        """
        self.sizes |= tensor_sizes([call])
        if not self.calls:
            per_step = call.output.nbytes * 2
            self._refuse_beyond(sum(self.sizes.values()) + per_step * (self.num_steps() - 1))

    def _check_step(self, scheduler: str, timestep: float) -> None:
        """Refuse a recording that is too large by what a step has added to it.

        What ControlNets make changes from step to step, too, and some pipelines call a denoiser
        twice for each. The first step of a schedule also adds what all share.
        """
        total = sum(self.sizes.values())
        grown = total - self.totals.get(scheduler, total)
        self.totals[scheduler] = total
        times = getattr(self.pipe.components[scheduler], "timesteps", None)
        known = torch.as_tensor(() if times is None else times).flatten()
        places: list[int] = (known == timestep).nonzero().flatten().tolist()
        is_later = bool(places) and places[-1] > 0
        left = len(known) - 1 - places[-1] if is_later else 0
        self._refuse_beyond(total + grown * left)

    def _refuse_beyond(self, num_bytes: int) -> None:
        """Refuse a recording that takes more than it may.

        Arguments:
            num_bytes: of one run.
        """
        estimate = self.num_runs * num_bytes
        free = shutil.disk_usage(self.recording.directory).free
        bound = min(self.max_bytes, free)
        if estimate > bound:
            limit = "the bound" if bound == self.max_bytes else "the disk has free"
            raise RunError(
                f"the recording would take about {estimate / 2**30:.1f} GiB, "
                f"more than {limit} ({bound / 2**30:.1f} GiB); "
                "give fewer --num-images or --steps, or raise --max-recording-gib"
            )

    def num_steps(self) -> int:
        """Return how many timesteps the sampler has, 1 if it does not say."""
        timesteps = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
        return 1 if timesteps is None else len(timesteps)


def record_calls(
    pipe: Pipeline,
    source: ModelSource,
    recipe: RecordRecipe,
    directory: Path,
    *,
    clocks: Clocks | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    processes: Processes = ALONE,
    description: str = "Recording",
) -> Recording:
    """Run the pipeline for every condition and store the calls of its denoiser.

    An interrupted recording goes on with the shards that are missing.

    Arguments:
        clocks: of its denoisers, where another recording has learned them.
        processes: those that record. Each writes shards of its own, and files and their bytes are
            those that one process writes.

    Raises:
        ModelError: the pipeline has no denoiser.
        RunError: the directory holds another recording, or this one would take more than
            `max_bytes` or the free disk.
        CalibrationError: the full-precision model itself gives a NaN or an infinity.
    """
    settings = settings_of(pipe, source.to_json(), recipe)
    with processes.first_goes_first():
        recording = Recording.create(directory, settings, recipe.num_shards)
    missing = processes.of_first(recording.missing_shards(), list[int])
    if missing:
        clocks = recording.clocks() or clocks or _learn_clocks(pipe, recipe, processes)
        own = processes.part(missing)
        with processes.progress.task(description, len(recipe.conditions)) as advance:
            advance(min((recipe.num_shards - len(own)) * recipe.batch_size, len(recipe.conditions)))
            for index in own:
                # Later the disk has less free, and less is missing.
                num_runs = len(missing) if index == own[0] else 0
                watcher = _Watcher(pipe, recording, num_runs, max_bytes)
                first = index * recipe.batch_size
                conditions = recipe.conditions[first : first + recipe.batch_size]
                with watch_pipeline(pipe, clocks, watcher.add_call, watcher.add_step):
                    call_pipeline(pipe, conditions, recipe, first=first, output_type="latent")
                refuse_idle(pipe, clocks, {call.component for call in watcher.calls})
                recording.write_shard(index, watcher.used_calls(), watcher.factors(), clocks)
                advance(len(conditions))
    processes.wait()
    if processes.is_first:
        recording.drop_repeated()  # also where it was stopped between the last shard and this
    processes.wait()
    return Recording(directory)


def _learn_clocks(pipe: Pipeline, recipe: RecordRecipe, processes: Processes) -> Clocks:
    """Watch how a first picture is made; one step alone would not tell which way time goes."""
    steps = recipe.num_inference_steps
    first = replace(recipe, num_inference_steps=None if steps is None else max(2, steps))

    def draw() -> None:
        with warnings.catch_warnings():  # a model that overflows is told so when it is recorded
            warnings.simplefilter("ignore", RuntimeWarning)
            call_pipeline(pipe, recipe.conditions[:1], first, output_type="latent")

    with processes.progress.task("Watching a first picture", None):
        return learn_clocks(pipe, draw)


def record_recipes(
    pipe: Pipeline, source: ModelSource, options: RecordOptions
) -> tuple[RecordRecipe, RecordRecipe]:
    """Return the recipes of the calibration recording and of the held-out one."""
    refuse_settings(pipe, options)
    refuse_untaken(pipe, options)
    given = prompts_of(options.prompts)
    count = options.num_images
    if count is None:
        count = _usual_num_images(pipe) if given is None else len(given)
    distinct = conditions_for(
        pipe, source, given, min(count, MAX_CONDITIONS) if given is None else count
    )
    chosen, held_out = recorded_conditions(distinct, count)

    sampling = options.or_else({"guidance_scale": _usual_guidance(pipe, source)})
    apart = replace(sampling, seed=sampling.seed + _HELD_OUT_SEED)
    return RecordRecipe.of(chosen, sampling), RecordRecipe.of(held_out, apart)


def _usual_guidance(pipe: Pipeline, source: ModelSource) -> float | None:
    """Return the guidance of a pipeline that is called without one; None if it takes none."""
    if source.model == BUILT_IN:
        return BUILT_IN_GUIDANCE
    parameter = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return None
    return cast("float | None", parameter.default)


def _usual_num_images(pipe: Pipeline) -> int:
    """Return how many pictures are recorded where nobody says how many."""
    size = sum(map(_count_parameters, find_denoisers(pipe).values()))
    return NUM_IMAGES if size < LARGE else NUM_IMAGES_LARGE


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def record_both(
    pipe: Pipeline,
    run: Run,
    source: ModelSource,
    options: RecordOptions,
    *,
    overwrite: bool = False,
    processes: Processes = ALONE,
    accepted: Callable[[], None] = lambda: None,
) -> tuple[Recording, Recording]:
    """Record the calibration calls and the held-out calls.

    Recordings that the run has with the same settings are reused, and completed if they were
    interrupted; with `overwrite`, others are replaced. Afterwards one call of each denoiser is
    repeated, and those are said that answer differently.

    Arguments:
        accepted: called by the first process when nothing of other settings is in the way.
    """
    recordings = list[Recording]()
    recipes = record_recipes(pipe, source, options)
    conditions = [*recipes[0].conditions, *recipes[1].conditions]
    say_conditions(pipe, conditions, options, processes.progress)
    places = (run.recording, run.held_out)
    with processes.first_goes_first():
        for recipe, directory in zip(recipes, places, strict=True):
            settings = settings_of(pipe, source.to_json(), recipe)
            if overwrite and processes.is_first and directory.exists():
                remove_other(directory, settings)
            if directory.exists():
                Recording.create(directory, settings, recipe.num_shards)  # refuses another one
    processes.wait()  # before the first one begins a recording
    if processes.is_first:
        accepted()
    titles = ("Recording", "Recording held-out")
    for recipe, directory, title in zip(recipes, places, titles, strict=True):
        recordings.append(
            record_calls(
                pipe,
                source,
                recipe,
                directory,
                clocks=recordings[0].clocks() if recordings else None,
                max_bytes=options.max_bytes,
                processes=processes,
                description=title,
            )
        )
    _say_changed(pipe, recordings[1], processes)
    return recordings[0], recordings[1]


def _say_changed(pipe: Pipeline, recording: Recording, processes: Processes) -> None:
    """Say, in the first process, which denoisers answer differently outside of the pipeline."""
    for component in (recording.clocks() or {}) if processes.is_first else ():
        calls = islice(recording.calls(component), 1)
        error = output_error(pipe.components[component], calls).relative()
        if error > _REPEATED:
            processes.progress.log(
                f"{component} answers a recorded call differently when it is called again "
                f"(relative error {error:.2g}), and every error below includes that difference. "
                f"{type(pipe).__name__} may change it while it draws; then calibrate with another "
                "--pipeline"
            )
