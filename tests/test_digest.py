import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from msfp_cli.digest import digest, fingerprint


def model(seed: int = 0) -> nn.Module:
    net = nn.Sequential(
        nn.Linear(6, 5), nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(80, 70, bias=False)
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter, generator=generator)
    return net


def scaled(net: nn.Module) -> None:
    net[3].weight.data.mul_(1 + 2.0**-20)


def one_weight(net: nn.Module) -> None:
    net[0].weight.data[2, 3] += 1e-3


def one_bias(net: nn.Module) -> None:
    net[1].bias.data[3] = -net[1].bias.data[3]


def one_norm(net: nn.Module) -> None:
    net[2].weight.data[1] = 0


def reshaped(net: nn.Module) -> None:
    net[0].weight = nn.Parameter(net[0].weight.data.view(5, 3, 2))


def transposed_shape(net: nn.Module) -> None:
    net[3].weight = nn.Parameter(net[3].weight.data.view(80, 70))


def longer(net: nn.Module) -> None:
    net.append(nn.Linear(1, 1))


def renamed(net: nn.Module) -> None:
    net[0].other = net[0].bias
    del net[0].bias


def half(net: nn.Module) -> None:
    net.half()


CHANGES = [
    scaled,
    one_weight,
    one_bias,
    one_norm,
    reshaped,
    transposed_shape,
    longer,
    renamed,
    half,
]


def test_equal_models_have_one_fingerprint() -> None:
    assert fingerprint(model()) == fingerprint(model()) == fingerprint(copy.deepcopy(model()))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_model_has_another_fingerprint(change: Callable[[nn.Module], None]) -> None:
    net = model()
    change(net)
    assert fingerprint(net) != fingerprint(model())


def test_other_training_has_another_fingerprint() -> None:
    assert len({fingerprint(model(seed)) for seed in range(5)}) == 5


def test_fingerprint_is_of_the_values_and_not_of_how_they_lie_or_are_used() -> None:
    net = model().eval().requires_grad_(False)
    net[1].weight.data = net[1].weight.data.contiguous(memory_format=torch.channels_last)
    net[3].weight.data = net[3].weight.data.t().contiguous().t()
    assert not net[3].weight.is_contiguous()
    assert fingerprint(net) == fingerprint(model())


def test_fingerprint_changes_no_weight() -> None:
    net, untouched = model(), model()
    fingerprint(net)
    assert all(
        torch.equal(one, other)
        for one, other in zip(net.parameters(), untouched.parameters(), strict=True)
    )


@pytest.mark.parametrize("shape", [(), (0,), (1,), (255,), (256,), (257,), (1000, 7)], ids=str)
def test_parameters_of_any_size_are_sampled_from_their_first_element(
    shape: tuple[int, ...],
) -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(shape))
    before = fingerprint(net)
    if net.weight.numel():
        net.weight.data.view(-1)[0] = 1
        assert fingerprint(net) != before
    else:
        assert fingerprint(nn.Module()) != before


tensors = st.dictionaries(
    st.sampled_from("abc"),
    st.lists(st.integers(0, 3), max_size=3).map(
        lambda numbers: torch.tensor(numbers, dtype=torch.uint8)
    ),
    max_size=3,
)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@given(tensors, tensors)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_digests_are_equal_just_where_the_tensors_are(
    one: dict[str, Tensor], other: dict[str, Tensor]
) -> None:
    assert (digest(one) == digest(other)) == same(one, other)
    assert digest(dict(reversed(one.items()))) == digest(one)


def test_digest_tells_types_and_shapes_of_equal_bytes_apart() -> None:
    zeros = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(8, dtype=torch.bfloat16),
    ]
    assert len({digest({"a": tensor}) for tensor in zeros}) == len(zeros)
