import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msfp_cli.errors import ModelError, UsageError
from msfp_cli.pipelines.denoiser import (
    DenoiserCall,
    denoiser_names,
    find_denoisers,
    fingerprint,
    refuse_changed,
    replay,
)
from tiny_pipelines import build_tiny


class Denoiser(nn.Module):
    """Has arguments of every kind that diffusers' denoisers take."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(seed))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        added: dict[str, Tensor] | None = None,
        residuals: list[Tensor] | None = None,
        return_dict: bool = True,
    ) -> Any:  # noqa: ANN401 (as diffusers' own)
        if not sample.isfinite().all():
            raise ValueError("not finite")
        output = self.layer(sample) * torch.as_tensor(timestep).reshape(-1)[0]
        for extra in (encoder_hidden_states, (added or {}).get("text"), *(residuals or [])):
            output = output if extra is None else output + extra
        return SimpleOutput(output) if return_dict else (output,)


class SimpleOutput(tuple):
    """Like diffusers' outputs: its first item is the sample."""

    def __new__(cls, sample: Tensor) -> "SimpleOutput":
        return super().__new__(cls, (sample, "something else"))


def draw(seed: int) -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))


def pipe(**components: object) -> SimpleNamespace:
    return SimpleNamespace(components=components)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def test_models_of_diffusers_that_decode_nothing_may_be_denoisers(name: str) -> None:
    parts = build_tiny(name).components
    denoiser = parts.get("unet") or parts["transformer"]
    assert list(find_denoisers(pipe(**parts)).values()) == [denoiser]
    assert find_denoisers(pipe(odd=denoiser, text_encoder=None)) == {"odd": denoiser}


@pytest.mark.parametrize("wrong", [None, "unet", nn.Linear(2, 2), object()])
def test_what_is_not_a_model_of_diffusers_is_no_denoiser(wrong: object) -> None:
    with pytest.raises(ModelError):
        find_denoisers(pipe(unet=wrong))


def test_no_denoiser_names_what_the_pipeline_has() -> None:
    with pytest.raises(
        ModelError, match=r"SimpleNamespace has no denoiser.*it has scheduler, vae\)"
    ):
        find_denoisers(pipe(vae=nn.Linear(1, 1), scheduler=object(), safety_checker=None))
    with pytest.raises(ModelError, match="it has nothing"):
        find_denoisers(pipe())


UNET = ["diffusers", "UNet2DModel"]


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ({"unet": UNET, "controlnet": ["diffusers", "ControlNetModel"]}, ["unet"]),
        ({"transformer_2": UNET, "transformer": UNET}, ["transformer", "transformer_2"]),
        ({"super_res_first": UNET, "vqvae": ["diffusers", "VQModel"]}, ["super_res_first"]),
        ({"prior_prior": UNET, "unet": UNET}, ["unet", "prior_prior"]),  # Kandinsky
        ({"decoder": UNET, "prior_prior": UNET}, ["prior_prior", "decoder"]),  # Stable Cascade
        (
            {"transformer": UNET, "unconditional_transformer": UNET},
            ["transformer", "unconditional_transformer"],  # Ideogram 4
        ),
        (
            {"prior": UNET, "decoder": UNET, "super_res_first": UNET, "super_res_last": UNET},
            ["prior", "decoder", "super_res_first", "super_res_last"],  # unCLIP
        ),
        ({"odd": UNET, "unet": [None, None]}, ["odd"]),
        ({"unet": UNET, "text_encoder_select_layers": [2, 5, 8]}, ["unet"]),
    ],
)
def test_names_of_denoisers_are_known_without_loading_them(
    parts: dict[str, list[str]], names: list[str]
) -> None:
    assert denoiser_names({"_class_name": "Some", "force_zeros": True, **parts}) == names


def test_index_without_a_denoiser_names_what_it_has() -> None:
    parts = {"unet": ["transformers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    with pytest.raises(ModelError, match=r"Some has no denoiser.*it has scheduler, unet\)"):
        denoiser_names({"_class_name": "Some", **parts})


def test_replay_repeats_the_output_without_gradients() -> None:
    denoiser = Denoiser()
    arguments = {
        "sample": draw(1),
        "timestep": torch.tensor(7),
        "added": {"text": draw(3)},
        "residuals": [draw(4)],
    }
    call = DenoiserCall.of("unet", arguments, denoiser(**arguments))
    again = replay(denoiser, call)
    assert torch.equal(again, call.output)
    assert not again.requires_grad
    assert not torch.equal(replay(Denoiser(seed=1), call), call.output)


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


class Guests:
    """What people do to a pipeline before they calibrate it, and what undoes it."""

    @staticmethod
    def adapters(pipe: Any) -> None:  # noqa: ANN401 (a pipeline)
        config = pytest.importorskip("peft").LoraConfig
        pipe.unet.add_adapter(config(target_modules=["to_q"]), "style")

    @staticmethod
    def offload(pipe: Any) -> None:  # noqa: ANN401 (a pipeline)
        cpu = torch.device("cpu")
        pipe.unet.enable_group_offload(cpu, cpu, offload_type="leaf_level")


@pytest.mark.parametrize(
    ("guest", "message"),
    [(Guests.adapters, "unet has adapters .style.; call"), (Guests.offload, "is not offloaded")],
)
def test_denoiser_with_guests_is_refused(guest: Callable[..., None], message: str) -> None:
    pipe = build_tiny("StableDiffusionPipeline")
    refuse_changed("unet", pipe.unet)
    guest(pipe)
    with pytest.raises(UsageError, match=message):
        refuse_changed("unet", pipe.unet)


def test_denoiser_whose_hooks_were_removed_is_not_refused() -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    unet = cpu_offload(build_tiny("StableDiffusionPipeline").unet, torch.device("cpu"))
    with pytest.raises(UsageError, match="not offloaded"):
        refuse_changed("unet", unet)
    remove_hook_from_submodules(unet)
    refuse_changed("unet", unet)
