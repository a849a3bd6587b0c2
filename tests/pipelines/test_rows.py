from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2KVLayerCache
from torch import Tensor

from conftest import record_few
from msfp_cli.pipelines.denoiser import DenoiserCall, call_with
from msfp_cli.pipelines.rows import join_rows, take_rows


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def denoise(
    sample: Tensor,
    timestep: Tensor | float,
    text: Tensor | None = None,
    added: dict[str, Tensor] | None = None,
    residuals: list[Tensor] | None = None,
    img_ids: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, ...] = (),
    encoder_hidden_states: Tensor | None = None,
    strength: float = 1.0,
    encoder_hidden_states_llama3: Tensor | None = None,
    down_block_additional_residuals: Tensor | None = None,
) -> Tensor:
    """Takes every kind of argument that diffusers' denoisers take; rows do not mix."""
    moment = torch.as_tensor(timestep)
    output = sample * (moment if moment.ndim > 1 else moment.reshape(-1, 1)) * strength
    for extra in (text, (added or {}).get("text"), *(residuals or [])):
        output = output if extra is None else output + extra
    for folded in (encoder_hidden_states, down_block_additional_residuals):
        if folded is not None:  # one or several for each row
            output = output + folded.reshape(len(sample), -1, 4).sum(dim=1)
    for shared in (img_ids, *image_rotary_emb):
        output = output if shared is None else output + shared.sum()
    return output


def call(seed: int, timestep: Tensor | float, rows: int = 3, **arguments: Any) -> DenoiserCall:  # noqa: ANN401 (any argument)
    arguments = {"sample": draw(rows, 4, seed=seed), "timestep": timestep, **arguments}
    moment = float(torch.as_tensor(timestep).reshape(-1)[0])
    return DenoiserCall(
        component="unet", timestep=moment, arguments=arguments, output=denoise(**arguments)
    )


def everything(seed: int, timestep: Tensor | float, rows: int = 3) -> DenoiserCall:
    text, *residuals = (draw(rows, 4, seed=100 * seed + i) for i in range(3))
    ids = draw(rows, 2)  # as many positions as there are rows
    return call(
        seed,
        timestep,
        rows,
        added={"text": text},
        residuals=residuals,
        img_ids=ids,
        image_rotary_emb=(ids, ids + 1),
        encoder_hidden_states=draw(2 * rows, 4, seed=seed),
        strength=0.5,
    )


def test_rows_of_a_call_give_the_rows_of_its_output() -> None:
    whole = everything(1, torch.tensor([7, 7, 7]))
    for rows in ([1], [1, 0], [0, 2]):
        part = take_rows(whole, torch.tensor(rows))
        assert torch.equal(part.output, whole.output[rows])
        torch.testing.assert_close(denoise(**part.arguments), part.output)
    assert (part.component, part.timestep) == (whole.component, whole.timestep)


def test_hidden_states_of_several_layers_have_their_rows_second() -> None:
    layers = draw(3, 3, 4)  # as many layers as rows
    whole = call(1, torch.tensor(7), encoder_hidden_states_llama3=layers)
    part = take_rows(whole, torch.tensor([2, 0]))
    assert torch.equal(part.arguments["encoder_hidden_states_llama3"], layers[:, [2, 0]])
    (joined,) = join_rows([(whole, 1), (whole, 2)])
    assert torch.equal(joined.arguments["encoder_hidden_states_llama3"], layers[:, [1, 2]])


def test_what_has_no_batch_is_left_whole_by_taking_rows() -> None:
    whole = call(1, torch.tensor(7), text=draw(4))
    part = take_rows(whole, torch.tensor([1]))
    assert torch.equal(part.arguments["text"], draw(4))
    assert part.arguments["timestep"] is whole.arguments["timestep"]


@pytest.mark.parametrize(
    "moments",
    [
        (7.0, 3.0),
        (7, 3),
        (torch.tensor(7), torch.tensor(3)),
        (torch.tensor([7.5] * 3), torch.tensor([2.5] * 3)),
    ],
    ids=["float", "int", "shared", "of each row"],
)
def test_rows_of_several_timesteps_are_one_call(moments: tuple[Any, Any]) -> None:
    one, other = (everything(seed, moment) for seed, moment in enumerate(moments))
    (joined,) = join_rows([(one, 2), (other, 0), (one, 0)])
    assert joined.timesteps == (one.timestep, other.timestep, one.timestep)
    assert joined.arguments["timestep"].tolist() == list(joined.timesteps)
    assert joined.arguments["timestep"].dtype == torch.as_tensor(moments[0]).dtype
    assert torch.equal(joined.output, torch.stack([one.output[2], other.output[0], one.output[0]]))
    torch.testing.assert_close(denoise(**joined.arguments), joined.output)


def test_timestep_of_each_token_stays_one_of_each_token() -> None:
    one, other = (call(seed, torch.full((3, 4), moment)) for seed, moment in enumerate((7.0, 3.0)))
    (joined,) = join_rows([(one, 1), (other, 2)])
    assert joined.timesteps == (7.0, 3.0)
    assert torch.equal(joined.arguments["timestep"], torch.tensor([[7.0] * 4, [3.0] * 4]))
    torch.testing.assert_close(denoise(**joined.arguments), joined.output)


def test_calls_that_pack_one_picture_with_a_time_for_each_token_stay_apart() -> None:
    calls = [
        DenoiserCall(
            component="transformer",
            timestep=moment,
            arguments={"tokens": [draw(1, 4)], "timestep": torch.full((5,), moment)},
            output=draw(1, 4),
        )
        for moment in (7.0, 7.0, 3.0)
    ]
    joined = join_rows([(each, 0) for each in calls])
    assert [each.timesteps for each in joined] == [(7.0,), (7.0,), (3.0,)]
    for before, after in zip(calls, joined, strict=True):
        assert torch.equal(after.arguments["timestep"], before.arguments["timestep"])
        assert torch.equal(after.arguments["tokens"][0], before.arguments["tokens"][0])
        assert torch.equal(after.output, before.output)


@pytest.mark.parametrize("name", ["encoder_hidden_states", "down_block_additional_residuals"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_entries_of_a_row_stay_with_it(rows: int, name: str) -> None:
    """As the text of a video, and what a ControlNet adds to it, for each frame."""
    one, other = (call(s, 7.0 - s, rows, **{name: draw(5 * rows, 4, seed=9 + s)}) for s in range(2))
    (joined,) = join_rows([(one, rows - 1), (other, 0), (one, 0)])
    assert joined.arguments[name].shape == (15, 4)
    torch.testing.assert_close(denoise(**joined.arguments), joined.output)


def test_calls_of_other_batches_are_joined() -> None:
    (joined,) = join_rows([(call(0, 7.0, rows=3), 2), (call(1, 3.0, rows=1), 0)])
    torch.testing.assert_close(denoise(**joined.arguments), joined.output)


@pytest.mark.parametrize(
    ("mine", "others"),
    [
        ({"text": draw(3, 4)}, {"text": draw(3, 1)}),
        ({"text": draw(3, 4)}, {"text": draw(3, 4).double()}),
        ({"text": draw(3, 4)}, {}),
        ({"text": draw(3, 4)}, {"text": None}),
        ({"text": draw(4)}, {"text": draw(4, seed=1)}),
        ({"text": draw(4)}, {"text": draw(4).double()}),
        ({"added": {"text": draw(3, 4)}}, {"added": {"other": draw(3, 4)}}),
        ({"residuals": [draw(3, 4)]}, {"residuals": [draw(3, 4)] * 2}),
        ({"img_ids": draw(3, 2)}, {"img_ids": draw(3, 2, seed=1)}),
        ({"strength": 0.5}, {"strength": 0.25}),
        ({"strength": 1.0}, {"strength": 1}),
    ],
    ids=str,
)
def test_calls_that_differ_in_more_than_rows_stay_apart(
    mine: dict[str, Any], others: dict[str, Any]
) -> None:
    one, other = call(0, 7.0, **mine), call(1, 3.0, **others)
    first, second = join_rows([(one, 0), (other, 1), (one, 2)])
    assert (first.timesteps, second.timesteps) == ((7.0, 7.0), (3.0,))
    assert torch.equal(first.output, one.output[[0, 2]]) and torch.equal(
        second.output, other.output[[1]]
    )
    for joined in (first, second):
        torch.testing.assert_close(denoise(**joined.arguments), joined.output)


PIPELINES = (
    "DDIM",
    "DiT",
    "Flux",
    "PixArtSigma",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
)


@pytest.mark.parametrize("name", [f"{kind}Pipeline" for kind in PIPELINES])
def test_denoisers_answer_joined_rows_as_they_did_before(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    _, denoiser, calls = record_few(tiny(name), tmp_path, num_images=4, batch_size=3)
    assert len({call.timestep for call in calls}) > 1 and len(calls[0].output) >= 3
    picked = [(call, (3 * i + 1) % len(call.output)) for i, call in enumerate(calls)]
    (joined,) = join_rows(picked)
    with torch.no_grad():
        torch.testing.assert_close(
            call_with(denoiser, joined.arguments, joined.output),
            joined.output,
            rtol=1e-4,
            atol=1e-4,
        )


def cached(seed: int, rows: int = 3) -> DenoiserCall:
    cache = Flux2KVLayerCache()
    cache.k_ref = draw(rows, 2, seed=100 + seed)
    arguments = {"sample": draw(rows, 4, seed=seed), "timestep": 5.0, "kv_cache": cache}
    return DenoiserCall(
        component="transformer", timestep=5.0, arguments=arguments, output=draw(rows, 4, seed=seed)
    )


def test_rows_of_a_cache_go_with_the_rows_of_the_sample() -> None:
    calls = [cached(1), cached(2)]
    (joined,) = join_rows([(calls[0], 2), (calls[1], 0)])
    keys = [call.arguments["kv_cache"].k_ref for call in calls]
    assert torch.equal(joined.arguments["kv_cache"].k_ref, torch.stack([keys[0][2], keys[1][0]]))
    assert len(keys[0]) == 3  # the recorded call is as it was
    assert torch.equal(
        take_rows(calls[0], torch.tensor([1])).arguments["kv_cache"].k_ref, keys[0][1:2]
    )
