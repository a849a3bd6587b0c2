"""Win the quality back: train the LoRA hubs and the router against the recording.

The workflow of `msfp finetune`. It is data-free distillation: the teacher's outputs lie in the
recording, so the teacher is not in memory. The student is the denoiser with `TunedLayer`s, which
computes exactly what the export will. The loss is the mean squared error of the output times the
weight of the row's timestep (`task`). Held-out calls say which state is best, and that one
is exported.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from msfp_cli.calibration.quantize import move_weights_
from msfp_cli.errors import MsfpError, TrainingError, UsageError
from msfp_cli.finetuning.load import Material, load_denoisers, load_material
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.result import FinetuneReport, report_of
from msfp_cli.finetuning.student import Student
from msfp_cli.finetuning.task import refuse_different_replay, training_task
from msfp_cli.finetuning.trainer import Trainer
from msfp_cli.pipelines.loading import choose_device
from msfp_cli.processes import meeting
from msfp_cli.progress import SILENT, Progress
from msfp_cli.run import Run, locked


@locked
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
            model, or its fine-tuning has different settings.
        TrainingError: training diverged, or ran out of memory.
    """
    material = load_material(run, recipe, restart=restart)
    # accelerate does not find out about a CPU by itself, and numbers the accelerator there is.
    place = choose_device(device)
    with meeting(place):
        accelerator = Accelerator(cpu=place == "cpu")
        own = "cpu" if place == "cpu" else device or str(accelerator.device)
        denoisers = load_denoisers(material, own)
        reports = list[FinetuneReport]()
        for component in material.calibration.tunable():
            denoiser = denoisers.pop(component)
            if gradient_checkpointing:
                _enable_checkpointing_(denoiser)
            with _explain_memory():
                trainer = _trainer(run, material, component, denoiser, recipe, accelerator)
                _say_rank(component, recipe.rank, trainer.student.largest_rank, progress)
                _say_factor(component, material, progress)
                # Only now: a --restart that one of the checks above refuses keeps the old states.
                if restart and not reports:
                    _delete_states(run, material, accelerator)
                finished = trainer.train(progress=progress, stop=stop)
            # The main process may still be writing what the others are about to read.
            accelerator.wait_for_everyone()
            reports.append(report_of(component, run.finetuned(component)))
            if not finished:
                break
        return reports


def _trainer(
    run: Run,
    material: Material,
    component: str,
    denoiser: nn.Module,
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
) -> Trainer:
    """Put together what trains one denoiser, where it was stopped if it was."""
    task = training_task(material, component, recipe)
    refuse_different_replay(denoiser, component, task.batches)
    calibration = material.calibration
    move_weights_(denoiser, calibration, component)
    lift = calibration.input_lifts.get(component)
    student = Student(
        denoiser,
        calibration.table(component),
        calibration.scales[component],
        recipe,
        calibration.multipliers.get(component, {}),
        lift.at if lift else None,
    )
    trainer = Trainer(student, task, run.finetuned(component), accelerator)
    if component in material.states:
        trainer.resume(material.states[component])
    return trainer


def _say_rank(component: str, rank: int, largest: int, progress: Progress) -> None:
    """Say that a rank which was asked for is larger than all weights."""
    if rank > max(largest, FinetuneRecipe().rank):
        progress.log(
            f"{component}: no weight has a rank of {rank}; {largest} is the largest that is trained"
        )


def _say_factor(component: str, material: Material, progress: Progress) -> None:
    """Say that the denoising factor is not known, where it is not."""
    if material.recording.factors(component) is None:
        progress.log(
            f"{component}: the denoising factor of its scheduler is not known, so all timesteps "
            "weigh alike in the loss"
        )


def _delete_states(run: Run, material: Material, accelerator: Accelerator) -> None:
    """Delete the saved states of all denoisers of the run."""
    if not accelerator.is_main_process:
        return
    for component in material.calibration.layers:
        run.finetuned(component).unlink(missing_ok=True)


def _enable_checkpointing_(denoiser: nn.Module) -> None:
    """Let a denoiser compute activations twice instead of keeping them.

    Raises:
        UsageError: it cannot.
    """
    try:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]  # diffusers' method
    except (AttributeError, ValueError):
        raise UsageError(
            f"{type(denoiser).__name__} cannot checkpoint gradients; "
            "leave --gradient-checkpointing out"
        ) from None


@contextmanager
def _explain_memory() -> Iterator[None]:
    """Say which options help when memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MsfpError) or not _is_out_of_memory(error):
            raise
        raise TrainingError(
            "out of memory; give --gradient-checkpointing, or --restart with half --batch-size and "
            "twice --calls-per-update"
        ) from None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error is about memory; torch's CPU allocator says so in its message only."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(
        re.search("out of memory|not enough memory|allocate memory", str(error))
    )
