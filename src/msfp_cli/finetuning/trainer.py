"""One run of updates on one denoiser: the loop of `msfp finetune`, and how it stops and goes on.

An update takes rows from each lane, each at a timestep of its own; its loss is the mean squared
error of the output against the recorded one, times the timestep's weight. Gradients of all
processes are added up in one message, which also carries the loss and the wish to stop, so that all
processes agree on both. On a CPU a run that was killed and resumed ends bit for bit where an
uninterrupted one does.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from msfp_cli.errors import TrainingError, UsageError
from msfp_cli.finetuning.batches import Batches
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.result import FinetuneState, HeldOutMeasurement
from msfp_cli.finetuning.student import Student
from msfp_cli.pipelines.denoiser import DenoiserCall
from msfp_cli.pipelines.rows import JoinedCall
from msfp_cli.progress import SILENT, Progress
from msfp_cli.recording.compare import OutputError, SquaredError

_CLIP = 1.0  # of the gradient's norm, for each kind of parameter
_FLOAT16_SCALE = (
    2.0**16
)  # of the loss, while gradients pass through a denoiser in float16, whose least number is 6e-8
SAVE_EVERY = 50  # updates
_ROUTE_EVERY = (
    16  # updates: what each member would do to each row costs two thirds of an update to know
)


class Trainer:
    """Trains one student.

    Arguments:
        student: see `Student`.
        batches: what the updates see.
        weights: loss weight of each timestep.
        held_out: calls to measure on.
        recipe: rates, steps, calls per update.
        path: where the state is kept.
        calibration: identity of the calibration, kept with the state.
        accelerator: knows the processes and the device.

    Raises:
        UsageError: the processes cannot share the lanes evenly.
    """

    def __init__(
        self,
        student: Student,
        batches: Batches,
        weights: Mapping[float, float],
        held_out: list[DenoiserCall],
        recipe: FinetuneRecipe,
        path: Path,
        calibration: str,
        accelerator: Accelerator,
    ) -> None:
        if recipe.calls_per_update % accelerator.num_processes:
            raise UsageError(
                f"{accelerator.num_processes} processes cannot share {recipe.calls_per_update} calls per update evenly; "
                f"take as many as divide {recipe.calls_per_update}, or give another --calls-per-update and --restart"
            )
        self.student, self.batches, self.weights, self.held_out = (
            student,
            batches,
            weights,
            held_out,
        )
        self.recipe, self.path, self.calibration, self.accelerator = (
            recipe,
            path,
            calibration,
            accelerator,
        )
        rates = {
            "lora": recipe.learning_rate,
            "input": recipe.input_learning_rate,
            "router": recipe.router_learning_rate if recipe.hub_size > 1 else 0.0,
        }
        kinds = student.trainable()
        self.kinds = {
            kind: list(kinds[kind].values()) for kind, rate in rates.items() if rate and kinds[kind]
        }
        self.parameters = {name: p for kind in self.kinds for name, p in kinds[kind].items()}
        for kind in kinds:
            for parameter in kinds[kind].values():
                parameter.requires_grad_(kind in self.kinds)
        groups = [{"params": self.kinds[kind], "base": rates[kind]} for kind in self.kinds]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.step, self.history, self.best = 0, list[HeldOutMeasurement](), dict[str, Tensor]()
        self._losses: list[float] = []
        self._scale = _FLOAT16_SCALE if student.is_float16() else 1.0

    def train(
        self, *, progress: Progress = SILENT, stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Train to the end, or until `stop()` is true in some process; the state is saved at intervals and at the end.

        Returns:
            Whether all updates are done.

        Raises:
            TrainingError: the loss is no number any more; the last good state is kept.
        """
        if not self.history:
            self._evaluate(progress)
            self._save()
        with progress.task("Fine-tuning", self.recipe.steps) as advance:
            advance(self.step)
            stopping = False
            while self.step < self.recipe.steps and not stopping:
                loss, stopping = self.update(stop())
                advance(1, f"loss {loss:.1e}, error {self.history[-1].error:.5f}")
                measured = (
                    self.step == self.recipe.steps or self.step % self.recipe.evaluate_every == 0
                )
                if measured:
                    self._evaluate(progress)
                if measured or stopping or self.step % SAVE_EVERY == 0:
                    self._save()
        return self.step == self.recipe.steps

    def update(self, stop: bool = False) -> tuple[float, bool]:
        """Do one update.

        Returns:
            The loss over all lanes, and whether any process wishes to stop.

        Raises:
            TrainingError: the loss or its gradient is no number.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * (1 - self.step / self.recipe.steps)
        own = 0.0
        for lane in range(
            self.accelerator.process_index,
            self.recipe.calls_per_update,
            self.accelerator.num_processes,
        ):
            for call in self.batches.batch(self.step, lane):
                own += self._backward(call)
        if self._scale != 1:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.div_(self._scale)
        loss, stopping = self._share(own, stop)
        norms = [nn.utils.clip_grad_norm_(parameters, _CLIP) for parameters in self.kinds.values()]
        if not math.isfinite(loss) or not all(bool(norm.isfinite()) for norm in norms):
            raise TrainingError(
                f"training diverged: the loss is {loss:g} and its gradient {math.hypot(*norms):g} at update "
                f"{self.step + 1}; what was best so far is kept. "
                "Give a --learning-rate a third of this one, and --restart"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._losses.append(loss)
        return loss, stopping

    def _backward(self, call: JoinedCall) -> float:
        """Add the gradient of some rows, and return their share of the loss."""
        shares, rows = self.batches.shares, self.recipe.calls_per_update * self.recipe.batch_size
        learning = (
            "router" in self.kinds and self.step % _ROUTE_EVERY == 1
        )  # before the first update members are alike
        with self.student.at(call.timesteps, learning=learning):
            with self._precision():
                output = self.student(call)
            error = (
                (output.float() - call.output.to(output.device).float())
                .square()
                .flatten(1)
                .mean(dim=1)
            )
            weights = [self.weights[t] / (shares[t] * len(shares) * rows) for t in call.timesteps]
            loss = error @ error.new_tensor(weights)
            (loss * self._scale).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _precision(self) -> AbstractContextManager[object]:
        if self.recipe.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, torch.bfloat16)

    def _share(self, loss: float, stop: bool) -> tuple[float, bool]:
        """Add up gradients, loss and the wish to stop over all processes, in one message.

        A member has a gradient where some process has chosen it, and none where nobody has: AdamW
        leaves it alone then.
        """
        if self.accelerator.num_processes == 1:
            return loss, stop
        parameters = list(self.parameters.values())
        chosen = [float(p.grad is not None) for p in parameters]
        facts = torch.tensor([*chosen, loss, float(stop)], device=parameters[0].device)
        gradients = [
            (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters
        ]
        flat: Tensor = self.accelerator.reduce(torch.cat([*gradients, facts]), reduction="sum")
        *parts, facts = torch.split(flat, [p.numel() for p in parameters] + [len(facts)])
        *anywhere, loss, stopping = facts.tolist()
        for parameter, part, some in zip(parameters, parts, anywhere, strict=True):
            parameter.grad = part.view_as(parameter) if some else None
        return loss, stopping > 0

    def _evaluate(self, progress: Progress) -> None:
        """Measure the held-out error, and keep the state if it is the best."""
        measured = self._output_error()
        if not self.history:
            self._begin(measured)
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        now = HeldOutMeasurement(
            step=self.step,
            loss=loss,
            error=measured.relative(),
            by_timestep=tuple(measured.by_timestep()),
        )
        if not math.isfinite(now.error):
            advice = (
                "lower --learning-rate" if self.step else "calibrate again with --dtype float32"
            )
            raise TrainingError(
                f"the held-out error is {now.error:g} after {self.step} updates; {advice}"
            )
        if not self.history or now.error < min(evaluation.error for evaluation in self.history):
            self.best = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        self.history.append(now)
        shown = "before" if loss is None else f"update {self.step}: loss {loss:.2e},"
        progress.log(f"{shown} held-out error {now.error:.5f}")

    def _output_error(self) -> OutputError:
        """Measure this process's share of the held-out calls, and add up what all processes have measured."""
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        measured = self.student.output_error(self.held_out[index::count])
        if count == 1:
            return measured
        timesteps = sorted({call.timestep for call in self.held_out})
        sums = [measured.sums.get(timestep, SquaredError()) for timestep in timesteps]
        own = torch.tensor([(each.error, each.signal) for each in sums], dtype=torch.float64)
        total: Tensor = self.accelerator.reduce(own.to(self.accelerator.device), reduction="sum")
        totals = [SquaredError(error, signal) for error, signal in total.tolist()]
        return OutputError(dict(zip(timesteps, totals, strict=True)))

    def _begin(self, measured: OutputError) -> None:
        """Share out the rows among the timesteps, and the timesteps among the members of the hubs.

        Each member begins with a stretch of the schedule that gets an equal share of the rows.
        """
        if self.recipe.timesteps == "error":
            errors = measured.absolute()
            self.batches.share_out_(
                {t: self.weights[t] * errors.get(t, 0.0) for t in self.batches.timesteps}
            )
        before, members = 0.0, {}
        for timestep in self.batches.timesteps:
            share = self.batches.shares[timestep]
            members[timestep] = min(
                int((before + share / 2) * self.recipe.hub_size), self.recipe.hub_size - 1
            )
            before += share
        self.student.router.begin_(members)

    def _save(self) -> None:
        """Write everything that a resumed run needs."""
        if not self.accelerator.is_main_process:
            return
        now = {name: p.detach().cpu().contiguous() for name, p in self.parameters.items()}
        if not all(bool(t.isfinite().all()) for t in now.values()):
            raise TrainingError(
                f"parameters are not finite after {self.step} updates; what was saved before is kept. "
                "Give a lower --learning-rate, and --restart"
            )
        tensors = {f"now/{name}": t for name, t in now.items()} | {
            f"best/{n}": t for n, t in self.best.items()
        }
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}/{name}": value.cpu() for key, value in moments.items()}
        tuned = FinetuneState(
            recipe=self.recipe,
            calibration=self.calibration,
            unit=self.student.router.unit,
            timesteps=tuple(self.batches.timesteps),
            step=self.step,
            history=tuple(self.history),
            losses=tuple(self._losses),
            shares=tuple(self.batches.shares.items()),
            tensors=tensors,
        )
        tuned.save(self.path)

    def resume(self, tuned: FinetuneState) -> None:
        """Go on from a saved state of the same recipe."""
        self.step, self.history, self.best = tuned.step, list(tuned.history), tuned.state("best")
        self._losses, self.batches.shares = list(tuned.losses), dict(tuned.shares)
        now, kept = (
            tuned.state("now"),
            {kind: tuned.state(kind) for kind in ("step", "exp_avg", "exp_avg_sq")},
        )
        for name, parameter in self.parameters.items():
            parameter.data.copy_(now[name])
            if name in kept["step"]:  # a member that no update has chosen yet has none
                self.optimizer.state[parameter] = {
                    k: kept[k][name].to(parameter.device) for k in kept
                }
