"""The router of a denoiser in training: which member of its hub serves each layer at each timestep.

The choice is hard in the forward pass and soft in the backward pass (straight-through; Zhao et al.
2025, arXiv:2505.21591). Because the router sees nothing but the timestep, it is exported as a
table. It rounds a timestep to the table's grid before it looks, so table and router agree on every
timestep, whole or continuous, by construction.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from msfp_cli.formats.rounding import Grid
from msfp_cli.layers.routing import TABLE_SIZE, table_index

_EMBEDDING = 64
_MARGIN = 1.0  # of the first choice's logit over the others


class Choice(NamedTuple):
    """A member of a layer's hub, and the rows of the batch that the router gives it.

    Arguments:
        member: of the layer's hub.
        rows: indices in ascending order; no two choices of a layer share a row, and together they
            have all.
        weights: 0 in value, ``(rows, hub)``: the gradients of the members' weights go here; None if
            nobody asks.
        input: where training has moved the member's input grid; None if nobody has looked yet.
    """

    member: int
    rows: tuple[int, ...] = (0,)
    weights: Tensor | None = None
    input: Grid | None = None


class Router(nn.Module):
    """Choose a hub member for every layer from the timestep alone.

    Arguments:
        num_layers, hub_size: shape of the choice.
        unit: what brings timesteps to 0..1000, see `routing.timestep_unit`.
        generator: draws the initial weights.
    """

    def __init__(
        self, num_layers: int, hub_size: int, unit: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.num_layers, self.hub_size, self.unit = num_layers, hub_size, unit
        self.hidden = nn.Linear(_EMBEDDING, _EMBEDDING)
        self.logits = nn.Linear(_EMBEDDING, num_layers * hub_size)
        for layer in (self.hidden, self.logits):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(_EMBEDDING), generator=generator)
            nn.init.zeros_(layer.bias)

    def _features(self, timesteps: Iterable[float]) -> Tensor:
        """Return what the logits are linear in, ``(timesteps, 64)``."""
        index = torch.tensor([float(table_index(timestep, self.unit)) for timestep in timesteps])
        embedding = get_timestep_embedding(index.to(self.hidden.weight.device), _EMBEDDING)
        return nn.functional.silu(self.hidden(embedding.to(self.hidden.weight)))

    def forward(self, timesteps: Sequence[float], *, learning: bool = False) -> list[list[Choice]]:
        """Choose for every layer and row.

        Arguments:
            timesteps: one per row.
            learning: whether the choices pass the gradient of the members' weights on to the
                router.

        Returns:
            For every layer a choice for each member that some row is given to, in the order of
            their first rows.
        """
        soft = (
            self.logits(self._features(timesteps))
            .view(-1, self.num_layers, self.hub_size)
            .softmax(dim=-1)
        )
        passing = (soft - soft.detach()).unbind(dim=1) if learning else None
        routed = []
        for slot, members in enumerate(soft.argmax(dim=-1).t().tolist()):
            rows: dict[int, list[int]] = {}
            for row, member in enumerate(members):
                rows.setdefault(member, []).append(row)
            routed.append(
                [
                    Choice(k, tuple(own), passing[slot][own] if passing else None)
                    for k, own in rows.items()
                ]
            )
        return routed

    @torch.no_grad()
    def begin_(self, members: Mapping[float, int]) -> None:
        """Let every layer begin with the given member at each timestep, by a margin that training can overturn.

        The last linear map is set to the least-squares solution on the hidden features of these
        timesteps.
        """
        features = self._features(members).double().cpu()
        wanted = (
            nn.functional.one_hot(torch.tensor(list(members.values())), self.hub_size).double()
            * _MARGIN
        )
        solution = torch.linalg.lstsq(features, wanted, driver="gelsd").solution.t().float()
        self.logits.weight.copy_(solution.repeat(self.num_layers, 1))

    @torch.no_grad()
    def table(self, timesteps: Sequence[float]) -> Tensor:
        """Return the chosen member for every row of the exported table, uint8 ``(1001, layers)``.

        Arguments:
            timesteps: those that the hub was trained at. A row between them gets the choice of the
                nearest: what the router would say there, no member was trained for.
        """
        known = sorted({table_index(timestep, self.unit) for timestep in timesteps})
        choices = {row: [choice.member for (choice,) in self([row / self.unit])] for row in known}
        rows = [choices[min(known, key=lambda k: (abs(k - row), k))] for row in range(TABLE_SIZE)]
        return torch.tensor(rows, dtype=torch.uint8)
