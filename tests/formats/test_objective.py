"""The damping is chosen on a sample of the outputs and inputs; the whole layer is rounded at it."""

from itertools import pairwise

import pytest
import torch

from msfp_cli.formats import objective as module
from msfp_cli.formats.compensation import compensated_steps
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.objective import DAMPINGS, CheckRows, RoundingObjective

E2M1 = FloatFormat.parse("e2m1")
OUTPUTS = 24
PARTS = {"one sum": [slice(0, 30)], "two sums": [slice(0, 18), slice(18, 30)]}


def objective_of(parts: list[slice]) -> RoundingObjective:
    """Return a layer of correlated inputs, whose sums and rows to check are of different rows."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(30, 30, generator=generator)
    scale = torch.rand(1, OUTPUTS, 1, generator=generator) + 0.1
    steps = torch.randn(1, OUTPUTS, 30, generator=generator) * 4
    x, other = (torch.randn(1, 60, 30, generator=generator) @ mixing for _ in range(2))
    rounded = x.round()
    lost = [(x - rounded)[..., part] @ (steps * scale)[..., part].mT for part in parts]
    return RoundingObjective(
        fmt=E2M1,
        scale=scale,
        steps=steps,
        factors=None,
        parts=parts,
        moments=[rounded[..., part].mT @ rounded[..., part] for part in parts],
        missing=[each.mT @ rounded[..., part] for each, part in zip(lost, parts, strict=True)],
        checks=CheckRows(other @ (steps * scale).mT, other.round()),
    )


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_all_outputs_are_rounded_at_the_damping_that_is_best_on_some(
    parts: list[slice], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = objective_of(parts)
    monkeypatch.setattr(module, "_OUTPUTS", 4)
    monkeypatch.setattr(module, "_FACTOR_BYTES", together * 4 * 30 * 30)
    damping, integers = whole.least()
    errors = {}
    for each in DAMPINGS:
        pieces = [
            compensated_steps(
                whole.steps[..., part],
                whole.moments[number],
                whole.missing[number] / whole.scale,
                E2M1,
                torch.tensor([each]),
            )[0]
            for number, part in enumerate(parts)
        ]
        if each == damping:
            assert torch.equal(integers, torch.cat(pieces, dim=-1))
        mixed = torch.cat([pieces[0], whole.steps[..., parts[0].stop :]], dim=-1)
        outputs = (whole.checks.rounded @ mixed.mT) * whole.scale.mT - whole.checks.outputs
        errors[each] = float(outputs[..., ::6].square().sum())
    rises = [b > a for a, b in pairwise(errors.values())]
    tried = len(DAMPINGS) if together > 1 or not any(rises) else rises.index(True) + 1
    best = min(list(errors.values())[:tried])
    assert errors[damping] == pytest.approx(best)


def test_a_layer_without_a_factor_has_no_integers() -> None:
    whole = objective_of(PARTS["one sum"])
    whole.moments[0].zero_()
    _, integers = whole.least()
    assert integers.isnan().all()
