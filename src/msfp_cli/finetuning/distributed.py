"""The processes of a run: their shares of an update, and sums over them.

With one process nothing is sent.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from msfp_cli.errors import UsageError
from msfp_cli.pipelines.denoiser import DenoiserCall
from msfp_cli.recording.compare import OutputError, SquaredError


class UpdateSum(NamedTuple):
    """What an update comes to over all processes.

    Arguments:
        loss: the sum of the processes' losses.
        stopping: whether any process is to stop.
    """

    loss: float
    stopping: bool


def refuse_uneven_share(accelerator: Accelerator, calls_per_update: int) -> None:
    """Refuse processes that cannot share the calls of an update evenly.

    Raises:
        UsageError: their number does not divide that of the calls.
    """
    count = accelerator.num_processes
    if calls_per_update % count:
        raise UsageError(
            f"{count} processes cannot share {calls_per_update} calls per update evenly; take as "
            f"many as divide {calls_per_update}, or give another --calls-per-update and "
            "--restart"
        )


def sum_gradients_(
    accelerator: Accelerator, parameters: Sequence[nn.Parameter], loss: float, stop: bool
) -> UpdateSum:
    """Add up gradients, losses and requests to stop over all processes, in one message.

    A parameter gets a gradient where some process has one, and keeps None where none has: AdamW
    then leaves it alone. Therefore the message also says who has which gradient:

        [every gradient, zeros where there is none | 1 or 0 for every parameter | loss | 1 or 0]
    """
    if accelerator.num_processes == 1:
        return UpdateSum(loss, stop)
    presence = [float(parameter.grad is not None) for parameter in parameters]
    facts = torch.tensor([*presence, loss, float(stop)], device=parameters[0].device)
    gradients = [_flat_gradient(parameter) for parameter in parameters]
    message: Tensor = accelerator.reduce(torch.cat([*gradients, facts]), reduction="sum")
    sizes = [parameter.numel() for parameter in parameters]
    *sums, facts = torch.split(message, [*sizes, len(facts)])
    *counts, loss, stopping = facts.tolist()
    for parameter, gradient, count in zip(parameters, sums, counts, strict=True):
        parameter.grad = gradient.view_as(parameter) if count else None
    return UpdateSum(loss, stopping > 0)


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.reshape(-1)


def shared_error(
    accelerator: Accelerator,
    measure: Callable[[Sequence[DenoiserCall]], OutputError],
    calls: Sequence[DenoiserCall],
) -> OutputError:
    """Measure the error of the output on calls, of which each process takes an equal part."""
    own = measure(calls[accelerator.process_index :: accelerator.num_processes])
    return sum_errors(accelerator, own, sorted({call.timestep for call in calls}))


def sum_errors(
    accelerator: Accelerator, error: OutputError, timesteps: Sequence[float]
) -> OutputError:
    """Add up what all processes have measured.

    Arguments:
        timesteps: those of all processes, in the same order everywhere.
    """
    if accelerator.num_processes == 1:
        return error
    own = [error.sums.get(timestep, SquaredError()) for timestep in timesteps]
    sums = [(each.error, each.signal) for each in own]
    message = torch.tensor(sums, dtype=torch.float64).to(accelerator.device)
    total: Tensor = accelerator.reduce(message, reduction="sum")
    totals = [SquaredError(error_sum, signal_sum) for error_sum, signal_sum in total.tolist()]
    return OutputError(dict(zip(timesteps, totals, strict=True)))
