"""The router of a denoiser in training: which member of its hub serves each layer at each timestep.

One small network for the whole denoiser, timestep embedding to one logit for each layer and member.
The choice is hard in the forward pass and soft in the backward pass (straight-through; Zhao et al.
2025, arXiv:2505.21591). Because the router sees nothing but the timestep, it is exported as a
table. It rounds a timestep to the table's grid before it looks, so table and router agree on every
timestep, whole or continuous, by construction.

How the router is trained, and where:

1. It begins with a stretch of the schedule for each member, all with equal shares of the rows:
   `equal_stretches` and `Router.begin_`, called by `trainer` before the first update.
2. It learns in every sixteenth update only: `learns_in_update`, asked by `trainer`.
3. In such an update `Router.forward` adds to each choice weights that are 0 in value and have the
   gradient of the softmax: `Choice.weights`.
4. Each layer's backward pass gives these weights their gradient, from what every member would have
   changed in the layer's output: `TellRouter`.
5. Its rate is `router_learning_rate` of the recipe.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from msfp_cli.finetuning.recipe import ROUTER_WIDTH
from msfp_cli.formats.rounding import Context, Grid
from msfp_cli.layers.routing import TABLE_SIZE, table_index

# How far the logit of the first choice lies above the others: with two members the choice begins
# with a probability of 0.73, which training can overturn.
_MARGIN = 1.0
# The router learns in every 16th update only: to try every member on every row costs two thirds of
# an update.
_LEARNS_EVERY = 16


class Choice(NamedTuple):
    """A member of a layer's hub, and the rows of the batch that the router gives it.

    Arguments:
        member: of the layer's hub.
        rows: indices in ascending order; no two choices of a layer share a row, and together they
            have all.
        weights: 0 in value, ``(rows, hub)``: the gradients of the members' weights go here; None if
            nobody asks.
        input: where training has moved the member's input grid; None if nobody has looked yet.
        is_lifted: whether inputs are lifted at the timesteps of these rows.
    """

    member: int
    rows: tuple[int, ...] = (0,)
    weights: Tensor | None = None
    input: Grid | None = None
    is_lifted: bool = False


def learns_in_update(step: int) -> bool:
    """Whether the router learns in an update.

    Arguments:
        step: updates done before. Not in the first update, before which all members are alike.
    """
    return step % _LEARNS_EVERY == 1


def equal_stretches(shares: Mapping[float, float], hub_size: int) -> dict[float, int]:
    """Divide the schedule into one stretch for each member, all with equal shares of the rows.

    Arguments:
        shares: each timestep's share of the rows, in the order of the schedule; their sum is 1.

    Returns:
        The member of each timestep: the one in whose stretch the middle of the share lies.
    """
    members = {}
    before = 0.0
    for timestep, share in shares.items():
        members[timestep] = min(int((before + share / 2) * hub_size), hub_size - 1)
        before += share
    return members


class Router(nn.Module):
    """Choose a hub member for every layer from the timestep alone.

    Arguments:
        num_layers, hub_size: shape of the choice.
        generator: draws the initial weights.
    """

    def __init__(self, num_layers: int, hub_size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.hub_size = hub_size
        self.hidden = nn.Linear(ROUTER_WIDTH, ROUTER_WIDTH)
        self.logits = nn.Linear(ROUTER_WIDTH, num_layers * hub_size)
        for layer in (self.hidden, self.logits):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(ROUTER_WIDTH), generator=generator)
            nn.init.zeros_(layer.bias)

    def _features(self, timesteps: Iterable[float]) -> Tensor:
        """Return what the logits are linear in, ``(timesteps, 64)``."""
        index = torch.tensor([float(table_index(timestep)) for timestep in timesteps])
        embedding = get_timestep_embedding(index.to(self.hidden.weight.device), ROUTER_WIDTH)
        return nn.functional.silu(self.hidden(embedding.to(self.hidden.weight)))

    def forward(
        self,
        timesteps: Sequence[float],
        *,
        learning: bool = False,
        lifted: Sequence[bool] | None = None,
    ) -> list[list[Choice]]:
        """Choose for every layer and row.

        Arguments:
            timesteps: one per row.
            lifted: of each row, whether inputs are lifted at its timestep; None for nowhere.
            learning: whether the choices pass the gradient of the members' weights on to the
                router.

        Returns:
            For every layer a choice for each member that some row is given to, in the order of
            their first rows; two for a member with rows whose inputs are lifted and others.
        """
        soft = (
            self.logits(self._features(timesteps))
            .view(-1, self.num_layers, self.hub_size)
            .softmax(dim=-1)
        )
        # Zero in value; the gradient is that of the softmax.
        passing = (soft - soft.detach()).unbind(dim=1) if learning else None
        members = soft.argmax(dim=-1).t().tolist()
        return [
            _choices(of_layer, lifted, None if passing is None else passing[slot])
            for slot, of_layer in enumerate(members)
        ]

    @torch.no_grad()
    def begin_(self, members: Mapping[float, int]) -> None:
        """Let every layer begin with the same member at each timestep.

        The last linear map is set to the least-squares solution on the hidden features of these
        timesteps, in which the member's logit lies above the others by a margin that training can
        overturn.

        Arguments:
            members: the member of each timestep.
        """
        features = self._features(members).double().cpu()
        chosen = torch.tensor(list(members.values()))
        logits = nn.functional.one_hot(chosen, self.hub_size).double() * _MARGIN
        solution = torch.linalg.lstsq(features, logits, driver="gelsd").solution.t().float()
        self.logits.weight.copy_(solution.repeat(self.num_layers, 1))

    @torch.no_grad()
    def table(self, timesteps: Sequence[float]) -> Tensor:
        """Return the chosen member for every row of the exported table, uint8 ``(1001, layers)``.

        Arguments:
            timesteps: those that the hub was trained at. A row between them gets the choice of the
                nearest, because no member was trained for what the router would say there.
        """
        trained = sorted({table_index(timestep) for timestep in timesteps})
        members = {row: [choice.member for (choice,) in self([row])] for row in trained}
        rows = [members[_nearest(trained, row)] for row in range(TABLE_SIZE)]
        return torch.tensor(rows, dtype=torch.uint8)


class TellRouter(torch.autograd.Function):
    """Return a layer's output as it is, and give the router a gradient for its choice.

    Backward takes the mixture ``sum_k weights[row, k] * changes_k(x)[row]`` for what was added to
    the output: the straight-through gradient of a choice. Say a row has output gradient ``[1, 2]``,
    and member 0 would add ``[3, 0]`` to its output, member 1 ``[0, -1]``::

        gradient of weights[row, 0] = 1 * 3 + 2 * 0 = 3        (member 0 makes the loss larger)
        gradient of weights[row, 1] = 1 * 0 + 2 * (-1) = -2    (member 1 makes it smaller)

    so the router learns to prefer member 1 for this row's timestep. The changes are computed from
    the input, which is kept anyway, so this costs no memory.

    Arguments:
        y: the layer's output, the one member's that serves.
        weights: the router's, ``(rows, members)``.
        x: the layer's input; its first dimension is a multiple of the rows.
        changes: yields for each member what it adds to the output.
    """

    @staticmethod
    def forward(  # noqa: D102 (torch's)
        ctx: Context,
        y: Tensor,
        weights: Tensor,
        x: Tensor,
        changes: Callable[[Tensor], Iterator[Tensor]],
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.changes = changes
        ctx.num_rows = len(weights)
        if y._is_view():
            return y.clone()
        ctx.mark_dirty(y)  # though it is as it was: no view, so whoever has it may add to it
        return y

    @staticmethod
    def backward(  # noqa: D102 (torch's)
        ctx: Context, grad: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        of_members = []
        for change in ctx.changes(x):
            by_row = (grad * change).reshape(ctx.num_rows, -1)
            of_members.append(by_row.float().sum(dim=1))
        return grad, torch.stack(of_members, dim=1), None, None


def _choices(
    members: Sequence[int], lifted: Sequence[bool] | None, weights: Tensor | None
) -> list[Choice]:
    """Return one layer's choices, in the order of their first rows.

    Arguments:
        members: the member of each row.
        lifted: of each row, whether its input is; None for nowhere.
        weights: ``(rows, hub)``, see `Choice`.
    """
    rows_of: dict[tuple[int, bool], list[int]] = {}
    for row, member in enumerate(members):
        is_lifted = lifted is not None and lifted[row]
        rows_of.setdefault((member, is_lifted), []).append(row)
    return [
        Choice(
            member,
            tuple(rows),
            None if weights is None else weights[rows],
            is_lifted=is_lifted,
        )
        for (member, is_lifted), rows in rows_of.items()
    ]


def _nearest(rows: Sequence[int], row: int) -> int:
    """Return the nearest of `rows`, the lower one of two."""
    return min(rows, key=lambda other: (abs(other - row), other))
