"""One run of updates on one denoiser: the loop of `msfp finetune`, and how it stops and goes on.

An update takes some calls of the denoiser, and every row of a call has a timestep of its own. Its
loss is the mean squared error of the output against the recorded one, times the timestep's weight.
Processes share the calls of an update; their gradients are added up in one message, which also
carries the loss and the request to stop, so that all processes agree on both. On a CPU a run that
was killed and resumed ends bit for bit where an uninterrupted one does.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from msfp_cli.errors import RunError, TrainingError
from msfp_cli.finetuning.distributed import refuse_uneven_share, shared_error, sum_gradients_
from msfp_cli.finetuning.result import FinetuneState, HeldOutMeasurement
from msfp_cli.finetuning.router import equal_stretches, learns_in_update
from msfp_cli.finetuning.student import (
    ParameterGroup,
    Student,
    parameter_groups,
    train_only_,
)
from msfp_cli.finetuning.task import TrainingTask
from msfp_cli.pipelines.rows import JoinedCall
from msfp_cli.progress import SILENT, Progress

SAVE_EVERY = 50  # updates: what a killed run loses at most

# The norm to which the gradient of each kind of parameter is clipped.
_LARGEST_NORM = 1.0
# AdamW averages gradients over some 10 updates and their squares over some 100: torch's 0.999 would
# take half of a run of 2,000 updates to forget how it began.
_BETAS = (0.9, 0.99)
# The loss is multiplied by this while gradients pass through a denoiser in float16, whose smallest
# number is 6e-8; a power of two, so that dividing by it loses nothing.
_FLOAT16_SCALE = 2.0**16


class Trainer:
    """Trains one student.

    Arguments:
        student: see `Student`.
        task: what it is trained on, and by which recipe.
        path: where the state is kept.
        accelerator: knows the processes and the device.

    Raises:
        UsageError: the processes cannot share the calls of an update evenly.
    """

    def __init__(
        self, student: Student, task: TrainingTask, path: Path, accelerator: Accelerator
    ) -> None:
        refuse_uneven_share(accelerator, task.recipe.calls_per_update)
        self.student = student
        self.task = task
        self.recipe = task.recipe
        self.batches = task.batches
        self.path = path
        self.accelerator = accelerator
        self.groups = parameter_groups(student, task.recipe)
        train_only_(student, self.groups)
        self.parameters: dict[str, nn.Parameter] = {}
        for group in self.groups:
            self.parameters |= group.parameters
        self.optimizer = _optimizer(self.groups)
        self.step = 0
        self.history: list[HeldOutMeasurement] = []
        self.best: dict[str, Tensor] = {}
        self._losses: list[float] = []
        self._scale = _FLOAT16_SCALE if student.is_float16() else 1.0

    def train(
        self, *, progress: Progress = SILENT, stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Train to the end, or until `stop()` is true in some process.

        The state is saved at intervals and at the end.

        Returns:
            Whether all updates are done.

        Raises:
            TrainingError: the loss is not finite any more; the last good state is kept.
        """
        if not self.history:
            with self.student.as_calibrated():
                line = self._evaluate()
            self._save()
            progress.log(line)
        with progress.task("Fine-tuning", self.recipe.steps) as advance:
            advance(self.step)
            stopping = False
            while self.step < self.recipe.steps and not stopping:
                loss, stopping = self.update(stop())
                advance(1, f"loss {loss:.1e}, error {self.history[-1].error:.5f}")
                line = self._evaluate() if self._is_time_to_evaluate() else ""
                if line or stopping or self.step % SAVE_EVERY == 0:
                    self._save()
                if line:  # whoever reads it may be gone
                    progress.log(line)
        return self.step == self.recipe.steps

    def _is_time_to_evaluate(self) -> bool:
        return self.step == self.recipe.steps or self.step % self.recipe.evaluate_every == 0

    def update(self, stop: bool = False) -> tuple[float, bool]:
        """Do one update.

        Returns:
            The loss over all calls of the update, and whether any process is to stop.

        Raises:
            TrainingError: the loss or its gradient is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * (1 - self.step / self.recipe.steps)
        own_loss = self._compute_gradients()
        parameters = list(self.parameters.values())
        loss, stopping = sum_gradients_(self.accelerator, parameters, own_loss, stop)
        self._clip_gradients(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._losses.append(loss)
        return loss, stopping

    def _compute_gradients(self) -> float:
        """Compute the gradients of this process's calls, and return their part of the loss."""
        first = self.accelerator.process_index
        loss = 0.0
        for index in range(first, self.recipe.calls_per_update, self.accelerator.num_processes):
            for call in self.batches.batch(self.step, index):
                loss += self._backward(call)
        if self._scale != 1:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.div_(self._scale)
        return loss

    def _backward(self, call: JoinedCall) -> float:
        """Add the gradient of some rows, and return their part of the loss."""
        learning = any(group.kind == "router" for group in self.groups)
        with self.student.at(call.timesteps, learning=learning and learns_in_update(self.step)):
            with self._precision():
                output = self.student(call)
            difference = output.float() - call.output.to(output.device).float()
            error = difference.square().flatten(1).mean(dim=1)
            loss = error @ error.new_tensor(self.task.row_weights(call.timesteps))
            (loss * self._scale).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _precision(self) -> AbstractContextManager[object]:
        if self.recipe.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, torch.bfloat16)

    def _clip_gradients(self, loss: float) -> None:
        """Clip the gradient of each kind of parameter.

        Raises:
            TrainingError: a gradient or the loss is not finite.
        """
        norms = [
            nn.utils.clip_grad_norm_(list(group.parameters.values()), _LARGEST_NORM)
            for group in self.groups
        ]
        if not math.isfinite(loss) or not all(bool(norm.isfinite()) for norm in norms):
            raise TrainingError(
                f"training diverged: the loss is {loss:g} and its gradient {math.hypot(*norms):g} "
                f"at update {self.step + 1}; what was best so far is kept. "
                "Give a --learning-rate a third of this one, and --restart"
            )

    def _evaluate(self) -> str:
        """Measure the held-out error, and keep the parameters if they are the best so far.

        Returns:
            A line that says so.
        """
        error = shared_error(self.accelerator, self.student.output_error, self.task.held_out)
        if not self.history:
            self._share_out(error.absolute())
        measurement = self._measurement(error.relative(), tuple(error.by_timestep()))
        if all(measurement.error < earlier.error for earlier in self.history):
            self.best = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        self.history.append(measurement)
        loss = measurement.loss
        start = "before" if loss is None else f"update {self.step}: loss {loss:.2e},"
        return f"{start} held-out error {measurement.error:.5f}"

    def _share_out(self, squared: Mapping[float, float]) -> None:
        """Share out the rows among the timesteps, and the timesteps among the members of the hubs.

        Arguments:
            squared: the squared error of the calibrated model at each timestep.
        """
        if self.recipe.timesteps == "error":
            weights = self.task.weights
            self.batches.share_out_(
                {t: weights[t] * squared.get(t, 0.0) for t in self.batches.timesteps}
            )
        shares = {timestep: self.batches.shares[timestep] for timestep in self.batches.timesteps}
        self.student.router.begin_(equal_stretches(shares, self.recipe.hub_size))

    def _measurement(
        self, relative: float, by_timestep: tuple[tuple[float, float], ...]
    ) -> HeldOutMeasurement:
        """Sum up a measurement and the losses since the one before.

        Raises:
            TrainingError: the error is not finite.
        """
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        if not math.isfinite(relative):
            advice = (
                "lower --learning-rate" if self.step else "calibrate again with --dtype float32"
            )
            raise TrainingError(
                f"the held-out error is {relative:g} after {self.step} updates; {advice}"
            )
        return HeldOutMeasurement(
            step=self.step, loss=loss, error=relative, by_timestep=by_timestep
        )

    def _save(self) -> None:
        """Write the state, in the main process only.

        Raises:
            TrainingError: a parameter is not finite; the state before is kept.
        """
        if not self.accelerator.is_main_process:
            return
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters.values()):
            raise TrainingError(
                f"parameters are not finite after {self.step} updates; what was saved before is "
                "kept. Give a lower --learning-rate, and --restart"
            )
        self.state().save(self.path)

    def state(self) -> FinetuneState:
        """Return everything that a resumed run and an export need."""
        return FinetuneState(
            recipe=self.recipe,
            calibration=self.task.calibration,
            clock=self.task.clock,
            timesteps=tuple(self.batches.timesteps),
            step=self.step,
            history=tuple(self.history),
            losses=tuple(self._losses),
            shares=tuple(self.batches.shares.items()),
            tensors=self._tensors(),
        )

    def _tensors(self) -> dict[str, Tensor]:
        """Return parameters, best parameters and AdamW's moments by their names in the file."""
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.parameters.items():
            tensors[f"now/{name}"] = parameter.detach().cpu().contiguous()
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{kind}/{name}": moment.cpu() for kind, moment in moments.items()}
        return tensors

    def resume(self, state: FinetuneState) -> None:
        """Go on from a saved state of the same recipe.

        Raises:
            RunError: it was trained on other timesteps.
        """
        if set(state.timesteps) != set(self.batches.timesteps):
            raise RunError(
                f"{self.path} was trained on other timesteps than the recording has; "
                "run `msfp finetune --restart`"
            )
        self.step = state.step
        self.history = list(state.history)
        self.best = state.tensors_of("best")
        self._losses = list(state.losses)
        self.batches.shares = dict(state.shares)
        parameters = state.tensors_of("now")
        moments = {kind: state.tensors_of(kind) for kind in ("step", "exp_avg", "exp_avg_sq")}
        for name, parameter in self.parameters.items():
            parameter.data.copy_(parameters[name])
            if name in moments["step"]:  # a member that no update has chosen yet has none
                self.optimizer.state[parameter] = {
                    kind: tensors[name].to(parameter.device) for kind, tensors in moments.items()
                }


def _optimizer(groups: list[ParameterGroup]) -> torch.optim.AdamW:
    """Return the optimizer; ``base`` in its groups is the rate at the first update."""
    return torch.optim.AdamW(
        [{"params": list(group.parameters.values()), "base": group.rate} for group in groups],
        betas=_BETAS,
        weight_decay=0.0,
        fused=True,
    )
