"""Record the denoiser's calls while the stock pipeline runs."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msfp_cli.denoiser import DenoiserCall, find_denoisers, watch_calls, watch_steps
from msfp_cli.denoising import denoising_factors
from msfp_cli.digest import fingerprint
from msfp_cli.errors import CalibrationError, ModelError, RunError
from msfp_cli.generation import Sampling, call_pipeline
from msfp_cli.progress import SILENT, Progress
from msfp_cli.recipe import ModelSource, RecordRecipe
from msfp_cli.recording import Recording, size_bytes

DEFAULT_MAX_BYTES = 8 << 30


class _Watcher:
    """Collects the calls of one pipeline run; checks the first against the bound before anything is written."""

    def __init__(self, pipe: Any, recording: Recording, num_runs: int, max_bytes: int) -> None:  # noqa: ANN401
        self.pipe, self.recording, self.num_runs, self.max_bytes = pipe, recording, num_runs, max_bytes
        self.calls: list[DenoiserCall] = []
        self.channels: set[int] = set()  # of what reached the scheduler
        self.checked = False

    def __call__(self, call: DenoiserCall) -> None:
        if not torch.isfinite(call.output).all():
            raise CalibrationError(
                f"the denoiser's output holds a NaN or infinity at timestep {call.timestep:g} before any quantization; "
                "the model overflows in this precision: try --dtype float32"
            )
        self.calls.append(call)
        if not self.checked:
            self.checked = True
            self._check_size(call)

    def see_used(self, model_output: Tensor) -> None:
        """Note how many channels reach the scheduler."""
        self.channels.add(model_output.shape[1])

    def used_calls(self) -> list[DenoiserCall]:
        """Return the calls without what the pipeline threw away: the variance that DiT, for one, predicts as well.

        Such a denoiser returns twice the channels that reach the scheduler, and the pipelines keep the first half.
        """
        if len(self.channels) != 1:
            return self.calls
        (used,) = self.channels
        return [
            replace(call, output=call.output[:, :used].contiguous()) if call.output.shape[1] == 2 * used else call
            for call in self.calls
        ]

    def _check_size(self, call: DenoiserCall) -> None:
        """Estimate the whole recording from its first call: what changes at each step is the sample and the output."""
        per_step = call.output.nbytes * 2
        estimate = self.num_runs * (size_bytes([call]) + per_step * (self.num_steps() - 1))
        free = shutil.disk_usage(self.recording.directory).free
        bound = min(self.max_bytes, free)
        if estimate > bound:
            raise RunError(
                f"the recording would take about {estimate / 2**30:.1f} GiB, more than "
                f"{'the bound' if bound == self.max_bytes else 'the disk has free'} ({bound / 2**30:.1f} GiB); "
                "give fewer --num-images or --steps, or raise --max-recording-gib"
            )

    def num_steps(self) -> int:
        """Return how many timesteps the sampler has, 1 if it does not say."""
        timesteps = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
        return 1 if timesteps is None else len(timesteps)


def _factors(pipe: Any) -> list[tuple[float, float]] | None:  # noqa: ANN401 (a pipeline's class is the user's)
    """Return the denoising factors of the sampler as the pipeline has just used it, None where they are not known."""
    try:
        timesteps, factors = denoising_factors(pipe.scheduler)
    except (ModelError, AttributeError):
        return None
    return list(zip(timesteps.tolist(), factors.tolist(), strict=True))


def asked_for(pipe: Any, source: ModelSource, recipe: RecordRecipe) -> dict[str, Any]:  # noqa: ANN401
    """Return what a recording's manifest says it is a recording of; another model of the same name differs."""
    prints = {component: fingerprint(module) for component, module in find_denoisers(pipe).items()}
    return {"source": source.to_json(), "record": recipe.to_json(), "fingerprint": prints}


def record_calls(
    pipe: Any,  # noqa: ANN401 (a pipeline's class is the user's)
    source: ModelSource,
    recipe: RecordRecipe,
    directory: Path,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    progress: Progress = SILENT,
    description: str = "Recording",
) -> Recording:
    """Run the pipeline for every condition and store what its denoiser was called with and returned.

    An interrupted recording goes on with the first shard that is missing.

    Raises:
        RunError: the directory holds another recording, or this one would take more than `max_bytes` or the free disk.
        CalibrationError: the full-precision model itself gives a NaN or an infinity.
    """
    denoisers = find_denoisers(pipe)
    asked = asked_for(pipe, source, recipe)
    recording = Recording.create(directory, asked, recipe.num_shards)
    missing = recording.missing_shards()
    sampling = Sampling(
        num_inference_steps=recipe.num_inference_steps,
        guidance_scale=recipe.guidance_scale,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
    )
    with progress.task(description, len(recipe.conditions)) as advance:
        advance(min((recipe.num_shards - len(missing)) * recipe.batch_size, len(recipe.conditions)))
        for index in missing:
            watcher = _Watcher(pipe, recording, len(missing), max_bytes)
            first = index * recipe.batch_size
            conditions = recipe.conditions[first : first + recipe.batch_size]
            with watch_calls(denoisers, watcher), watch_steps(getattr(pipe, "scheduler", None), watcher.see_used):
                call_pipeline(pipe, conditions, sampling, first=first, output_type="latent")
            recording.write_shard(index, watcher.used_calls(), _factors(pipe))
            advance(len(conditions))
    return recording
