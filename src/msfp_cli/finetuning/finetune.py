"""Win the quality back: train the LoRA hubs and the router against the recording. The workflow of `msfp finetune`.

Data-free distillation: the teacher's outputs lie in the recording, so the teacher is not in memory.
The student is the denoiser with `TunedLayer`s, which computes exactly what the export will. The
loss is the mean squared error of the output times the denoising factor of the row's timestep (DFA,
Zhao et al. 2025, arXiv:2505.21591), normalised to mean 1 over the sampler's steps. Held-out calls
say which state is best, and that one is exported.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from msfp_cli.calibration.result import Calibration
from msfp_cli.errors import MsfpError, RunError, TrainingError, UsageError
from msfp_cli.finetuning.batches import Batches
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.result import FinetuneState, load_finetunings
from msfp_cli.finetuning.student import Student
from msfp_cli.finetuning.trainer import Trainer
from msfp_cli.layers.routing import timestep_unit
from msfp_cli.pipelines.denoiser import call_with, find_denoisers, fingerprint
from msfp_cli.pipelines.denoising_factor import loss_weights
from msfp_cli.pipelines.loading import choose_device, load_pipeline
from msfp_cli.progress import SILENT, Progress
from msfp_cli.recipe import options_of
from msfp_cli.recording.compare import relative_error
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

_UNLIKE = 0.01  # relative squared error that no order of summing explains, in any precision


@dataclass(frozen=True, kw_only=True)
class FinetuneReport:
    """How the fine-tuning of one denoiser stands.

    Arguments:
        component: the pipeline's name for it.
        file: where its state is.
        step, steps: updates done, and asked for.
        before, after: relative squared error on the held-out calls, of the calibrated and of the
            best state.
        best_step: updates done when it was best; 0 says that training did not help.
    """

    component: str
    file: str
    step: int
    steps: int
    before: float
    after: float
    best_step: int

    @property
    def finished(self) -> bool:
        """Whether all updates are done."""
        return self.step >= self.steps

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "finished": self.finished}


def finetune_run(
    run: Run,
    recipe: FinetuneRecipe,
    *,
    device: str | None = None,
    restart: bool = False,
    gradient_checkpointing: bool = False,
    progress: Progress = SILENT,
    stop: Callable[[], bool] = lambda: False,
) -> list[FinetuneReport]:
    """Fine-tune every calibrated denoiser of a run; a run that was stopped goes on where it was.

    Arguments:
        device: None takes an accelerator if there is one.
        restart: begin again, whatever is there.
        gradient_checkpointing: compute activations twice instead of keeping them.
        stop: asked after each update; when true, the state is saved and training ends.

    Raises:
        RunError: the run has no calibration or no quantized weight, its recording is of another
            model, or its fine-tuning has other settings.
        TrainingError: training diverged, or ran out of memory.
    """
    run.require()
    calibration = Calibration.load(run.calibration)
    recording, held_out = Recording(run.recording), Recording(run.held_out)
    for each in (recording, held_out):
        _refuse_incomplete(each)
    _refuse_other_recording(recording, calibration)
    known = {} if restart else _saved(run, calibration, recipe)
    on_cpu = (
        choose_device(device) == "cpu"
    )  # accelerate does not find out by itself, and numbers the one there is
    accelerator = Accelerator(cpu=on_cpu)
    denoisers = _load_denoisers(
        calibration, recording, "cpu" if on_cpu else device or str(accelerator.device)
    )
    reports = list[FinetuneReport]()
    for component in calibration.tunable():
        denoiser = denoisers.pop(component)
        if gradient_checkpointing:
            _enable_checkpointing_(denoiser)
        with _explain_memory():
            trainer = _trainer(
                run, component, denoiser, calibration, recording, held_out, recipe, accelerator
            )
            if (
                restart and not reports and accelerator.is_main_process
            ):  # what is refused costs nobody the old state
                for name in calibration.layers:
                    run.finetuned(name).unlink(missing_ok=True)
            if component in known:
                trainer.resume(known[component])
            finished = trainer.train(progress=progress, stop=stop)
        accelerator.wait_for_everyone()  # the main process may still be writing what the others are about to read
        reports.append(
            report_of(
                component, run.finetuned(component), FinetuneState.load(run.finetuned(component))
            )
        )
        if not finished:
            break
    return reports


def _load_denoisers(
    calibration: Calibration, recording: Recording, device: str
) -> dict[str, nn.Module]:
    """Load the denoisers in the type they were recorded in: if nobody chose it, that of the device of that time.

    Raises:
        RunError: there is nothing to train, or one is not the model that was recorded.
    """
    if not calibration.tunable():
        raise RunError(
            "no layer has a quantized weight, so there is nothing to train; run `msfp export`"
        )
    dtype = calibration.source.dtype or str(recording.shard(0)[0].output.dtype).removeprefix(
        "torch."
    )
    denoisers = find_denoisers(load_pipeline(replace(calibration.source, dtype=dtype), device))
    for component in calibration.tunable():
        denoiser = denoisers.get(component)
        if denoiser is None or fingerprint(denoiser) != recording.recipe.get("fingerprint", {}).get(
            component
        ):
            raise RunError(
                f"{recording.directory} is of another model than {calibration.source.model} is now; "
                "run `msfp calibrate --overwrite`"
            )
    return denoisers


def _trainer(
    run: Run,
    component: str,
    denoiser: nn.Module,
    calibration: Calibration,
    recording: Recording,
    held_out: Recording,
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
) -> Trainer:
    """Put together what trains one denoiser."""
    batches = Batches(
        recording,
        component,
        batch_size=recipe.batch_size,
        lanes=recipe.calls_per_update,
        seed=recipe.seed,
    )
    _refuse_unlike_answer(denoiser, component, batches)
    unit = timestep_unit(batches.timesteps)
    return Trainer(
        Student(
            denoiser, calibration.table(component), calibration.scales[component], recipe, unit
        ),
        batches,
        timestep_weights(batches.timesteps, recording.factors(), recipe, unit),
        list(held_out.calls(component)),
        recipe,
        run.finetuned(component),
        calibration.identity(),
        accelerator,
    )


def report_of(component: str, path: Path, tuned: FinetuneState) -> FinetuneReport:
    """Sum up a saved state."""
    return FinetuneReport(
        component=component,
        file=str(path),
        step=tuned.step,
        steps=tuned.recipe.steps,
        before=tuned.history[0].error,
        after=tuned.best.error,
        best_step=tuned.best.step,
    )


def _refuse_incomplete(recording: Recording) -> None:
    if missing := recording.missing_shards():
        raise RunError(
            f"{recording.directory} lacks {len(missing)} of {recording.num_shards} shards; "
            "run `msfp calibrate` again to complete it"
        )


def _refuse_other_recording(recording: Recording, calibration: Calibration) -> None:
    """Refuse a recording that the calibration was not made from."""
    made_from = {"source": calibration.source.to_json(), "record": calibration.record.to_json()}
    if any(recording.recipe.get(key) != value for key, value in made_from.items()):
        raise RunError(
            f"{recording.directory} is not the recording that the calibration was made from; "
            "run `msfp calibrate --overwrite`"
        )


@torch.no_grad()
def _refuse_unlike_answer(denoiser: nn.Module, component: str, batches: Batches) -> None:
    """Refuse a denoiser that does not answer the rows of an update as it did when they were recorded.

    Rows are told by the shapes of the arguments; where that fails it would be trained on another
    row's prompt.
    """
    for call in batches.batch(0, 0):
        answer = call_with(denoiser, call.arguments, call.output)
        error = relative_error(answer, call.output)
        if error > _UNLIKE:
            raise RunError(
                f"{component} does not answer recorded rows, taken from several calls, as it did before (relative "
                f"error {error:.2g}), so it cannot be trained on them; please report the pipeline"
            )


def _saved(run: Run, calibration: Calibration, recipe: FinetuneRecipe) -> dict[str, FinetuneState]:
    """Load the states that the run has.

    Raises:
        RunError: they began with another calibration, or with other settings; the message names the
            difference.
    """
    found = load_finetunings(run, calibration)
    for tuned in found.values():
        for name, option in options_of(FinetuneRecipe).items():
            then, now = getattr(tuned.recipe, name), getattr(recipe, name)
            if then != now:
                raise RunError(
                    f"the fine-tuning of this run was begun with {option.name} {then}, not {now}; "
                    f"give {option.name} {then} to go on, or --restart to begin again"
                )
    return found


def _enable_checkpointing_(denoiser: Any) -> None:  # noqa: ANN401 (a diffusers model)
    try:
        denoiser.enable_gradient_checkpointing()
    except (AttributeError, ValueError):
        raise UsageError(
            f"{type(denoiser).__name__} cannot checkpoint gradients; leave --gradient-checkpointing out"
        ) from None


@contextmanager
def _explain_memory() -> Iterator[None]:
    """Say which options help when memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MsfpError):
            raise
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not re.search(
            "out of memory|not enough memory|allocate memory", str(error)
        ):
            raise
        raise TrainingError(
            "out of memory; give --gradient-checkpointing, or --restart with half --batch-size and twice "
            "--calls-per-update"
        ) from None


def timestep_weights(
    timesteps: Sequence[float],
    factors: Sequence[tuple[float, float]] | None,
    recipe: FinetuneRecipe,
    unit: float,
) -> dict[float, float]:
    """Return the loss weight of each recorded timestep, of mean 1.

    Arguments:
        timesteps: in the denoiser's own unit.
        factors: the sampler's (timestep, denoising factor) pairs, see `Recording.factors`.
        recipe: its loss is ``plain`` for equal weights, ``dfa`` for weights proportional to a power
            of the factor.
        unit: what brings the denoiser's timesteps to the sampler's.

    Raises:
        RunError: the loss is ``dfa`` and the factors are not known.
    """
    if recipe.loss == "plain":
        return dict.fromkeys(timesteps, 1.0)
    if factors is None:
        raise RunError(
            "the denoising factor of this pipeline's scheduler is not known; use --loss plain"
        )
    known = torch.tensor([timestep for timestep, _ in factors], dtype=torch.float64)
    wanted = torch.tensor(timesteps, dtype=torch.float64) * unit
    nearest = (wanted[:, None] - known).abs().argmin(dim=1)
    chosen = torch.tensor([factor for _, factor in factors], dtype=torch.float64)[nearest]
    weights = loss_weights(chosen, power=recipe.loss_power)
    return dict(zip(timesteps, weights.tolist(), strict=True))
