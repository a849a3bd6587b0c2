"""What `test_guests` tries, with exports of other families: SDXL, SD 3, Flux, with hubs and not."""

import copy
import multiprocessing
import pickle
import shutil
import threading
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoModel, AutoPipelineForImage2Image, AutoPipelineForInpainting
from torch import Tensor, nn

from guests import (
    FAMILIES,
    LORA_FILE,
    SIZE,
    House,
    Pipe,
    add_lora,
    build,
    denoiser_of,
    edit_biases_,
    in_both_names,
    is_different,
    latents,
    load,
    round_like_,
)
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.errors import UsageError
from msfp_cli.layers.prepare import prepare_
from msfp_cli.layers.quantized import QuantConv2d, QuantLinear
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.layers.routing import ROUTER
from msfp_cli.run import Run

# PEFT warns of a second adapter.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
CPU = torch.device("cpu")
FLOAT, HALF = torch.float32, torch.bfloat16


def some(quick: list[Any], rest: list[Any]) -> list[Any]:
    """Return cases of which those that the quick tests can do without are marked as slow."""
    cases = [case if isinstance(case, tuple) else (case,) for case in rest]
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in cases)]


HOUSES = some(
    [("SDXL", 2), ("SD3", 1), ("Flux", 2)],
    [("SDXL", 1), ("SD3", 2), ("Flux", 1)],
)


@pytest.fixture(scope="module")
def house_of(
    calibrated: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], House]:
    """Return a function that gives the export of a family, each made once."""
    made = dict[tuple[str, int], House]()

    def house(name: str, hub: int) -> House:
        family = FAMILIES[name]
        if (name, hub) not in made:
            place = tmp_path_factory.mktemp("house") / "run"
            run = Run(shutil.copytree(calibrated(family.pipeline).directory, place))
            made[name, hub] = build(run, family, hub=hub)
        return made[name, hub]

    return house


@pytest.fixture
def house(request: pytest.FixtureRequest, house_of: Callable[[str, int], House]) -> House:
    """Return an export of a family."""
    return house_of(*request.param)


def houses(*cases: Any) -> Callable[[Any], Any]:  # noqa: ANN401 (cases of pytest)
    """Try a test with these exports, or with all."""
    names = [case.values if hasattr(case, "values") else case for case in cases or HOUSES]
    ids = [f"{name}-{hub}" for name, hub in names]
    params = [
        pytest.param(name, id=id_, marks=getattr(case, "marks", ()))
        for name, id_, case in zip(names, ids, cases or HOUSES, strict=True)
    ]
    return pytest.mark.parametrize("house", params, indirect=True)


@houses(("SDXL", 2), ("Flux", 2), pytest.param("SD3", 2, marks=pytest.mark.slow))
def test_members_of_a_hub_serve_different_timesteps(house: House) -> None:
    pipe = house.load()
    denoiser = denoiser_of(pipe)
    layers = quantized_layers(denoiser).values()
    assert sum(layer.scheme.hub > 1 for layer in layers) > len(layers) // 3
    clock = denoiser.get_submodule(ROUTER).clock
    rows = [
        denoiser.get_submodule(ROUTER)(clock.read(call[clock.argument]))
        for call in house.calls(pipe)
    ]
    assert len(rows) == 2 and rows[0] != rows[1]


@pytest.mark.parametrize(
    ("dora", "is_called", "dtype"),
    some(
        [(False, True, FLOAT), (True, False, HALF)],
        [(True, True, FLOAT), (False, False, FLOAT), (False, True, HALF), (True, True, HALF)],
    ),
    ids=str,
)
@houses()
def test_lora_changes_pictures_and_its_removal_restores_them(
    house: House, dora: bool, is_called: bool, dtype: torch.dtype
) -> None:
    pipe = house.load(dtype, is_called=is_called)
    add_lora(pipe, use_dora=dora, target_modules=house.family.targets)
    assert is_different(latents(pipe).float(), house.before(dtype).float())
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), house.before(dtype))


@pytest.mark.parametrize(
    ("name", "hub", "spelling"),
    some(
        [("SDXL", 2, "sgm"), ("Flux", 2, "fused")],
        [("SDXL", 2, "diffusers"), ("SDXL", 1, "sgm"), ("Flux", 1, "fused")],
    ),
)
def test_lora_in_kohyas_names_is_the_one_in_diffusers_names(
    house_of: Callable[[str, int], House], name: str, hub: int, spelling: str
) -> None:
    pytest.importorskip("peft")
    house = house_of(name, hub)
    pipe = house.load(is_called=True)
    component = "unet" if name == "SDXL" else "transformer"
    names = house.family.kohya[spelling]
    loras, drawn = in_both_names(denoiser_of(pipe), names, component), []
    for lora in loras:
        pipe.load_lora_weights(lora)
        wrapped = {n for n, m in denoiser_of(pipe).named_modules() if hasattr(m, "lora_A")}
        assert wrapped == {layer for layers in names.values() for layer in layers}
        drawn.append(latents(pipe))
        pipe.unload_lora_weights()
        assert torch.equal(latents(pipe), house.before())
    assert torch.equal(*drawn)
    assert is_different(drawn[0], house.before())
    for lora in loras:  # the second beside the first
        pipe.load_lora_weights(lora)
    adapters = pipe.get_list_adapters()[component]
    assert len(adapters) == 2
    for weights in ([1.0, 0.0], [0.0, 1.0]):
        pipe.set_adapters(adapters, weights)
        assert torch.equal(latents(pipe), drawn[0])
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), house.before())


@houses()
def test_several_adapters_are_chosen_scaled_and_deleted(house: House) -> None:
    pipe = house.load()
    targets = house.family.targets
    add_lora(pipe, "a", target_modules=targets)
    one = latents(pipe)
    add_lora(pipe, "b", seed=1, r=2, target_modules=["to_v", targets[-1]])
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    assert is_different(latents(pipe), one)
    pipe.delete_adapters("b")
    pipe.set_adapters("a")
    assert torch.equal(latents(pipe), one)
    pipe.disable_lora()
    assert torch.equal(latents(pipe), house.before())


def save_lora(pipe: Pipe, directory: Path, how: str) -> None:
    """Save the adapter x as diffusers' models do, or as its pipelines do."""
    denoiser = denoiser_of(pipe)
    if how == "of the model":
        denoiser.save_lora_adapter(directory, "x")
    else:
        from peft import get_peft_model_state_dict

        component = "unet" if hasattr(pipe, "unet") else "transformer"
        state = get_peft_model_state_dict(denoiser, adapter_name="x")
        pipe.save_lora_weights(directory, **{f"{component}_lora_layers": state})


def load_lora(pipe: Pipe, directory: Path, how: str, *, hotswap: bool) -> None:
    """Load an adapter that was saved, in the place of the one that is there, or as the first."""
    options = {"adapter_name": "x", "hotswap": hotswap}
    if how == "of the model":
        options |= {"prefix": None, "weight_name": LORA_FILE}
        denoiser_of(pipe).load_lora_adapter(directory, **options)
    else:
        pipe.load_lora_weights(directory, **options)


@pytest.mark.parametrize("how", some(["of the pipeline"], ["of the model"]))
@houses()
def test_lora_is_saved_loaded_and_swapped(house: House, how: str, tmp_path: Path) -> None:
    pipe = house.load()
    expected = []
    for seed in range(2):
        add_lora(pipe, "x", seed=seed, target_modules=house.family.targets, lora_alpha=4)
        expected.append(latents(pipe))
        save_lora(pipe, tmp_path / str(seed), how)
        pipe.delete_adapters("x")
    assert is_different(*expected)
    again = house.load(is_called=True)
    for seed in range(2):
        load_lora(again, tmp_path / str(seed), how, hotswap=seed > 0)
        assert (latents(again) - expected[seed]).abs().max() < 1e-5


@houses()
def test_ip_adapter_draws_and_leaves_no_trace(house: House) -> None:
    pipe = house.load(is_called=True)
    adapter = house.family.ip_adapter(denoiser_of(pipe))
    denoiser_of(pipe)._load_ip_adapter_weights(adapter.weights)
    assert is_different(latents(pipe, **adapter.options), house.before())
    pipe.unload_ip_adapter()
    assert torch.equal(latents(pipe), house.before())


@pytest.mark.parametrize("method", ["fuse_lora", "fuse_qkv_projections"])
@houses()
def test_fusing_is_refused_before_anything_changes(house: House, method: str) -> None:
    pipe = house.load()
    if method == "fuse_lora":
        add_lora(pipe)
    before = latents(pipe)
    owner = pipe if hasattr(pipe, method) else denoiser_of(pipe)
    with pytest.raises(UsageError, match=f"{method} would replace quantized weights"):
        getattr(owner, method)()
    assert torch.equal(latents(pipe), before)


@pytest.mark.parametrize(
    ("kind", "place", "is_called"),
    some(
        [("leaf_level", "disk", True), ("block_level", "memory", False)],
        [("block_level", "disk", True), ("leaf_level", "memory", False)],
    ),
)
@houses()
def test_group_offload_leaves_pictures_as_they_are(
    house: House, tmp_path: Path, kind: str, place: str, is_called: bool
) -> None:
    pipe = house.load(is_called=is_called)
    denoiser_of(pipe).enable_group_offload(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
        offload_to_disk_path=str(tmp_path) if place == "disk" else None,
    )
    for _ in range(2):
        assert torch.equal(latents(pipe), house.before())


@pytest.mark.parametrize(
    ("kind", "is_called", "dtype"),
    some(
        [("disk", True, HALF), ("memory", False, FLOAT)],
        [("disk", False, FLOAT), ("memory", True, HALF)],
    ),
    ids=str,
)
@houses()
def test_sequential_offload_leaves_pictures_as_they_are(
    house: House, tmp_path: Path, kind: str, is_called: bool, dtype: torch.dtype
) -> None:
    from accelerate import cpu_offload, disk_offload

    pipe = house.load(dtype, is_called=is_called)
    if kind == "disk":
        disk_offload(denoiser_of(pipe), tmp_path, CPU, offload_buffers=True)
    else:
        cpu_offload(denoiser_of(pipe), CPU, offload_buffers=True)
    for _ in range(2):
        assert torch.equal(latents(pipe), house.before(dtype))


@pytest.mark.parametrize(
    ("how", "is_called"),
    some([("copied", True), ("pickled", False)], [("copied", False), ("pickled", True)]),
)
@houses()
def test_copy_draws_the_same_pictures(house: House, how: str, is_called: bool) -> None:
    pipe = house.load(is_called=is_called)
    denoiser = denoiser_of(pipe)
    twin = (
        copy.deepcopy(denoiser) if how == "copied" else pickle.loads(ForkingPickler.dumps(denoiser))
    )
    pipe.register_modules(**{"unet" if hasattr(pipe, "unet") else "transformer": twin})
    assert denoiser_of(pipe) is twin
    assert torch.equal(latents(pipe), house.before())


def draw_from_a_picture(pipe: Pipe, **pictures: object) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, SIZE, SIZE, generator=generator)
    return latents(pipe, image=image, strength=1.0, **pictures)


@houses()
def test_img2img_is_made_from_an_export(house: House) -> None:
    pipe = house.load(is_called=True)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert denoiser_of(other) is denoiser_of(pipe)
    stock = type(other).from_pretrained(house.directory)
    assert torch.equal(draw_from_a_picture(other), draw_from_a_picture(stock))
    assert torch.equal(latents(pipe), house.before())


# Stock inpainting of SD 3 takes only transformers with the channels of the full-size one.
@houses(("SDXL", 2), pytest.param("Flux", 2, marks=pytest.mark.slow))
def test_inpainting_is_made_from_an_export(house: House) -> None:
    pipe = house.load(is_called=True)
    other = AutoPipelineForInpainting.from_pipe(pipe)
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., SIZE // 2 :] = 1
    stock = type(other).from_pretrained(house.directory)
    drawn = [draw_from_a_picture(each, mask_image=mask) for each in (other, stock)]
    assert torch.equal(*drawn)
    assert torch.equal(latents(pipe), house.before())


@houses()
def test_change_of_type_is_that_of_a_load_in_this_type(house: House) -> None:
    pipe = house.load(is_called=True)
    pipe.to(dtype=HALF)
    layers = quantized_layers(denoiser_of(pipe)).values()
    assert {layer.weight_scale.dtype for layer in layers} == {FLOAT}
    assert torch.equal(latents(pipe), house.before(HALF))


@pytest.mark.parametrize("is_called", some([True], [False]))
@houses()
def test_layerwise_casting_rounds_what_is_in_floating_point(house: House, is_called: bool) -> None:
    pipe, expected = house.load(is_called=is_called), house.load()
    denoiser_of(pipe).enable_layerwise_casting(HALF, FLOAT)
    round_like_(denoiser_of(expected), denoiser_of(pipe))
    assert torch.equal(latents(pipe), latents(expected))
    assert not torch.equal(latents(pipe), house.before())


@pytest.mark.parametrize("dtype", some([HALF], [FLOAT]), ids=str)
@houses()
def test_edited_bias_counts_at_the_next_call(house: House, dtype: torch.dtype) -> None:
    pipe, fresh = house.load(dtype, is_called=True), house.load(dtype)
    convolutions = set() if house.family is FAMILIES["Flux"] else {QuantConv2d}
    assert edit_biases_(pipe) == edit_biases_(fresh) == {QuantLinear} | convolutions
    assert torch.equal(latents(pipe), latents(fresh))
    assert is_different(latents(pipe).float(), house.before(dtype).float())


@houses()
def test_scheduler_set_on_our_pipeline_acts(house: House) -> None:
    ours, stock = MSFPPipeline.from_pretrained(house.directory, device="cpu"), house.load()
    for pipe in (ours, stock):
        config = {**pipe.scheduler.config, **house.family.scheduler}
        pipe.scheduler = type(pipe.scheduler).from_config(config)
    assert torch.equal(latents(ours), latents(stock))
    assert is_different(latents(ours), house.before())


@houses()
def test_callback_that_raises_leaves_nothing_behind(house: House) -> None:
    pipe = house.load()

    def fail(*_: object) -> dict:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        latents(pipe, callback_on_step_end=fail)
    assert torch.equal(latents(pipe), house.before())


@houses()
def test_threads_share_a_denoiser(house: House) -> None:
    pipe = house.load()
    denoiser, calls = denoiser_of(pipe), house.calls(pipe, num_inference_steps=3)

    @torch.no_grad()
    def answer(number: int) -> Tensor:
        return denoiser(**calls[number])[0]

    expected = [answer(number) for number in range(3)]
    assert not torch.equal(expected[0], expected[1])
    wrong = list[int]()

    def repeat(number: int) -> None:
        for _ in range(4):
            if not torch.equal(answer(number), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("where", ["whole", "part", "auto"])
@houses(("SD3", 1), ("Flux", 2))
def test_device_map_to_the_disk_is_refused(house: House, where: str, tmp_path: Path) -> None:
    maps: dict[str, object] = {
        "whole": {"": "disk"},
        "part": {"": "cpu", "transformer_blocks.0": "disk"},
        "auto": "auto",
    }
    with pytest.raises(UsageError, match="cannot leave quantized layers on the disk") as caught:
        AutoModel.from_pretrained(
            house.directory,
            subfolder="transformer",
            device_map=maps[where],
            max_memory={"cpu": "20KB"} if where == "auto" else None,
            offload_folder=tmp_path,
        )
    assert len(str(caught.value).splitlines()) == 1


Calls = list[dict[str, Any]]


@torch.no_grad()
def answers(denoiser: nn.Module, calls: Calls) -> list[np.ndarray]:
    """Return what a denoiser answers to each call."""
    return [denoiser(**call)[0].numpy() for call in calls]


def answer_elsewhere(queue: Any, denoisers: list[tuple[nn.Module, Calls]]) -> None:  # noqa: ANN401
    """Put what the denoisers answer; this runs in another process."""
    queue.put([answers(denoiser, calls) for denoiser, calls in denoisers])


@pytest.mark.slow
def test_spawned_process_draws_what_this_one_does(house_of: Callable[[str, int], House]) -> None:
    denoisers, expected = list[tuple[nn.Module, Calls]](), []
    for name, hub in (("SDXL", 2), ("SD3", 1), ("Flux", 2)):
        house = house_of(name, hub)
        calls = house.calls(house.load())
        for is_called in (False, True):
            denoisers.append((denoiser_of(house.load(is_called=is_called)), calls))
            expected.append(answers(denoiser_of(house.load()), calls))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answer_elsewhere, args=(queue, denoisers))
    process.start()
    got = queue.get(timeout=120)
    process.join()
    assert process.exitcode == 0
    np.testing.assert_equal(got, expected)
    np.testing.assert_equal([answers(*each) for each in denoisers], expected)


def graphs(denoiser: nn.Module, calls: Calls) -> list[int]:
    """Compile a denoiser for all sizes; return how many graphs there are after each call."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(denoiser, fullgraph=True, backend="eager", dynamic=True)
    numbers = list[int]()
    for call in calls:
        with torch.no_grad():
            compiled(**call)
        numbers.append(counters["stats"]["unique_graphs"])
    return numbers


@pytest.mark.slow
@houses(("Flux", 1), ("Flux", 2))
def test_new_sizes_make_no_more_graphs_than_a_float_denoiser(
    house: House, tiny: Callable[[str], Path]
) -> None:
    pipe, stock = house.load(), load(tiny(house.family.pipeline))
    sizes = [(32, 32), (48, 32), (64, 64)]
    calls = [house.calls(pipe, height=h, width=w, num_inference_steps=1)[0] for h, w in sizes]
    prepare_(denoiser_of(pipe))
    expected = graphs(denoiser_of(stock), calls)
    # The router's table is read in a graph of its own.
    more = int(hasattr(denoiser_of(pipe), ROUTER))
    assert graphs(denoiser_of(pipe), calls) == [number + more for number in expected]
    assert expected[-1] <= 2
