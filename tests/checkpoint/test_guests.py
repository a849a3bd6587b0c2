"""What diffusers' users do to a loaded export: adapters, offload, copies, threads."""

import copy
import gc
import json
import pickle
import threading
import weakref
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from torch import Tensor

from conftest import Chained, Finetuned
from guests import (
    LORA_FILE,
    Pipe,
    add_lora,
    edit_biases_,
    is_different,
    load,
    round_like_,
    unet_ip_adapter,
)
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.errors import CheckpointError, UsageError
from msfp_cli.layers.quantized import QuantConv2d, QuantLinear
from msfp_cli.layers.replace import quantized_layers

# PEFT warns of a second adapter.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@pytest.fixture(
    scope="module", params=["prompted_chained", "prompted_tuned", "prompted_transformed"]
)
def export(request: pytest.FixtureRequest) -> Path:
    """Return a text-to-image export: plain, with layers that switch, with transformed inputs."""
    chained: Chained | Finetuned = request.getfixturevalue(request.param)
    return chained.export


def draw(pipe: Pipe, **options: object) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 2, "output_type": "np", **options}
    return pipe("a cat", generator=generator, **arguments).images


def kohya(name: str, *shapes: tuple[int, ...]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    down, up = shapes
    return {
        f"{name}.lora_down.weight": torch.randn(down),
        f"{name}.lora_up.weight": torch.randn(up),
        f"{name}.alpha": torch.tensor(4.0),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_called", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_changes_pictures_and_its_removal_restores_them(
    export: Path, dora: bool, is_called: bool, dtype: torch.dtype
) -> None:
    before = draw(load(export, dtype=dtype), output_type="latent").float().numpy()
    pipe = load(export, dtype=dtype)
    if is_called:
        draw(pipe, output_type="latent")
    add_lora(pipe, use_dora=dora)
    assert is_different(draw(pipe, output_type="latent").float().numpy(), before)
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe, output_type="latent").float().numpy(), before)


def test_several_adapters_are_chosen_scaled_and_deleted(export: Path) -> None:
    pipe = load(export)
    before = draw(pipe)
    add_lora(pipe, "a")
    one = draw(pipe)
    add_lora(pipe, "b", seed=1, r=2)
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    assert is_different(draw(pipe), one)
    pipe.set_adapters(["a", "b"], [0.0, 0.0])
    assert np.abs(draw(pipe) - before).max() < 1e-5
    pipe.delete_adapters("b")
    pipe.set_adapters("a")
    assert np.array_equal(draw(pipe), one)
    pipe.disable_lora()
    assert np.array_equal(draw(pipe), before)


# Layers of the tiny UNet in kohya's names, with the shapes of the two factors: a convolution of one
# pixel and one of nine, a linear layer of another rank, and one that is not quantized.
KOHYA = {
    "down_blocks_0_attentions_0_proj_in": ((4, 16, 1, 1), (16, 4, 1, 1)),
    "down_blocks_0_resnets_0_conv1": ((4, 16, 3, 3), (16, 4, 1, 1)),
    "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": ((2, 16), (16, 2)),
    "conv_in": ((4, 4, 3, 3), (16, 4, 1, 1)),
}


@pytest.mark.parametrize("name", [*KOHYA, "all"])
def test_lora_in_kohyas_names_is_loaded(export: Path, name: str) -> None:
    pytest.importorskip("peft")
    pipe = load(export)
    before = draw(pipe)
    lora = dict[str, Tensor]()
    for each in KOHYA if name == "all" else [name]:
        lora |= kohya(f"lora_unet_{each}", *KOHYA[each])
    pipe.load_lora_weights(lora)
    assert is_different(draw(pipe), before)
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe), before)


def test_lora_is_saved_and_loaded_again(export: Path, tmp_path: Path) -> None:
    pipe = load(export)
    add_lora(pipe)
    with_lora = draw(pipe)
    pipe.unet.save_lora_adapter(tmp_path, "a")
    again = load(export)
    again.unet.load_lora_adapter(tmp_path, prefix=None, weight_name=LORA_FILE)
    assert np.array_equal(draw(again), with_lora)


def test_gradients_reach_a_lora(export: Path) -> None:
    pipe = load(export)
    add_lora(pipe, init_lora_weights=True)
    pipe.unet.requires_grad_(False)
    trained = [p for n, p in pipe.unet.named_parameters() if "lora_B" in n]
    for parameter in trained:
        parameter.requires_grad_(True)
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 32)
    pipe.unet(sample, torch.tensor(500), encoder_hidden_states=text)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_checkpointing_leaves_gradients_as_they_are(export: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        pipe = load(export)
        add_lora(pipe)
        unet = pipe.unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(1, 4, 16, 16, generator=generator)
        text = torch.randn(1, 5, 32, generator=generator)
        loss = sum(unet(sample, timestep, text)[0].square().sum() for timestep in (999, 1))
        loss.backward()
        gradients.append([p.grad for n, p in unet.named_parameters() if "lora" in n])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert all(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("method", ["fuse_lora", "fuse_qkv_projections"])
def test_fusing_is_refused_before_anything_changes(export: Path, method: str) -> None:
    pipe = load(export)
    if method == "fuse_lora":
        add_lora(pipe)
    before = draw(pipe)
    with pytest.raises(UsageError, match=f"{method} would replace quantized weights"):
        getattr(pipe, method)()
    assert np.array_equal(draw(pipe), before)


def test_saving_with_an_adapter_in_place_is_refused(export: Path, tmp_path: Path) -> None:
    pipe = load(export)
    add_lora(pipe)
    with pytest.raises(UsageError, match="keep them with `save_lora_adapter`"):
        pipe.save_pretrained(tmp_path / "with")
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "without")
    assert np.array_equal(draw(load(tmp_path / "without")), draw(pipe))


def test_pickling_an_export_is_refused(prompted_chained: Chained, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave safe_serialization=False out"):
        load(prompted_chained.export).save_pretrained(tmp_path, safe_serialization=False)


def test_config_may_change_between_loading_and_saving(
    prompted_chained: Chained, tmp_path: Path
) -> None:
    folder = {"subfolder": "unet", "sample_size": 8}
    unet = UNet2DConditionModel.from_pretrained(prompted_chained.export, **folder)
    assert unet.config.sample_size == 8
    unet = copy.deepcopy(unet)
    unet.register_to_config(sample_size=4)
    unet.save_pretrained(tmp_path)
    assert UNet2DConditionModel.from_pretrained(tmp_path).config.sample_size == 4


def test_new_network_of_its_config_is_loaded_without_our_part_of_it(
    prompted_chained: Chained, tmp_path: Path
) -> None:
    export = prompted_chained.export
    new = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(export / "unet"))
    new.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="take quantization_config out of its config.json$"):
        UNet2DConditionModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert again.state_dict().keys() == new.state_dict().keys()


def test_export_is_freed_with_its_last_user(export: Path) -> None:
    pipe = load(export)
    draw(pipe)
    unet = weakref.ref(pipe.unet)
    gc.disable()
    try:
        del pipe
        assert unet() is None
    finally:
        gc.enable()


def test_full_precision_is_not_made_of_quantized_weights(prompted_chained: Chained) -> None:
    source = prompted_chained.calibration.source.model
    with pytest.raises(UsageError, match=f"load that model .{source}."):
        load(prompted_chained.export).unet.dequantize()


def test_compiling_the_blocks_compiles_the_whole(export: Path) -> None:
    for unet in (load(export).unet, copy.deepcopy(load(export).unet)):
        unet.compile_repeated_blocks(backend="eager")
        compiled = [module for module in unet.modules() if module._compiled_call_impl is not None]
        assert compiled == [unet]


@pytest.mark.parametrize("is_called", [False, True])
def test_new_model_from_float_weights_that_are_not_there_is_refused(
    export: Path, is_called: bool
) -> None:
    pipe = load(export)
    before = draw(pipe) if is_called else None
    for make in (ControlNetModel.from_unet, UNetMotionModel.from_unet2d):
        with pytest.raises(UsageError, match="of the full-precision pipeline"):
            make(pipe.unet)
    assert pipe.unet.state_dict().keys() == load(export).unet.state_dict().keys()
    assert before is None or np.array_equal(draw(pipe), before)


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("is_called", [False, True])
def test_group_offload_leaves_pictures_as_they_are(
    export: Path, tmp_path: Path, kind: str, place: str, is_called: bool
) -> None:
    pipe, cpu = load(export), torch.device("cpu")
    before = draw(load(export))
    if is_called:
        draw(pipe)
    pipe.unet.enable_group_offload(
        onload_device=cpu,
        offload_device=cpu,
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
        offload_to_disk_path=str(tmp_path) if place == "disk" else None,
    )
    for _ in range(2):
        assert np.array_equal(draw(pipe), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_called", [False, True])
def test_disk_offload_leaves_pictures_as_they_are(
    export: Path, tmp_path: Path, is_called: bool, dtype: torch.dtype
) -> None:
    from accelerate import disk_offload

    pipe = load(export, dtype=dtype)
    before = draw(load(export, dtype=dtype), output_type="latent")
    if is_called:
        draw(pipe, output_type="latent")
    disk_offload(pipe.unet, tmp_path, torch.device("cpu"), offload_buffers=True)
    for _ in range(2):
        assert torch.equal(draw(pipe, output_type="latent"), before)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_sequential_offload_leaves_pictures_as_they_are(
    export: Path, offload_buffers: bool
) -> None:
    from accelerate import cpu_offload

    pipe = load(export)
    before = draw(load(export))
    cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=offload_buffers)
    for _ in range(2):
        assert np.array_equal(draw(pipe), before)


def test_adapters_are_chosen_while_layers_are_offloaded(prompted_tuned: Finetuned) -> None:
    from accelerate import cpu_offload

    pipe = load(prompted_tuned.export)
    before = draw(pipe)
    for seed, name in enumerate("ab"):
        add_lora(pipe, name, seed=seed)
    expected = []
    for weights in ([1.0, 0.5], [0.2, 1.0]):
        pipe.set_adapters(["a", "b"], weights)
        expected.append(draw(pipe))
    cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=True)
    assert np.array_equal(draw(pipe), expected[1])
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    assert np.array_equal(draw(pipe), expected[0])
    pipe.disable_lora()
    assert np.array_equal(draw(pipe), before)


def test_pipelines_are_made_from_an_export(export: Path) -> None:
    pipe = load(export)
    before = draw(pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 32, 32)
    assert other("a cat", image=picture, num_inference_steps=2, output_type="np").images.shape
    assert np.array_equal(draw(pipe), before)


def test_change_of_type_is_that_of_a_load_in_this_type(export: Path) -> None:
    converted = load(export)
    draw(converted)
    converted.to(dtype=torch.bfloat16)
    scales = [layer.weight_scale.dtype for layer in quantized_layers(converted.unet).values()]
    assert set(scales) == {torch.float32}
    loaded = load(export, dtype=torch.bfloat16)
    one, other = draw(converted, output_type="latent"), draw(loaded, output_type="latent")
    assert torch.equal(one, other)


@pytest.mark.parametrize("is_called", [False, True])
def test_layerwise_casting_rounds_what_is_in_floating_point(export: Path, is_called: bool) -> None:
    pipe, expected = load(export), load(export)
    if is_called:
        draw(pipe)
    pipe.unet.enable_layerwise_casting(torch.bfloat16, torch.float32)
    round_like_(expected.unet, pipe.unet)
    assert np.array_equal(draw(pipe), draw(expected))
    assert not np.array_equal(draw(pipe), draw(load(export)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_edited_bias_counts_at_the_next_call(export: Path, dtype: torch.dtype) -> None:
    pipe, fresh = load(export, dtype=dtype), load(export, dtype=dtype)
    before = draw(pipe, output_type="latent").float()
    assert edit_biases_(pipe) == edit_biases_(fresh) == {QuantLinear, QuantConv2d}
    after = draw(pipe, output_type="latent").float()
    assert torch.equal(after, draw(fresh, output_type="latent").float())
    assert is_different(after, before)


@pytest.mark.parametrize("is_called", [False, True])
def test_copy_draws_the_same_pictures(export: Path, is_called: bool) -> None:
    pipe = load(export)
    before = draw(load(export))
    if is_called:
        draw(pipe)
    pipe.unet = copy.deepcopy(pipe.unet)
    assert np.array_equal(draw(pipe), before)


@pytest.mark.parametrize("is_called", [False, True])
def test_denoiser_is_sent_to_another_process(export: Path, is_called: bool) -> None:
    pipe = load(export)
    before = draw(load(export))
    if is_called:
        draw(pipe)
    pipe.unet = pickle.loads(ForkingPickler.dumps(pipe.unet))
    assert np.array_equal(draw(pipe), before)


def test_our_pipeline_is_sent_to_another_process(export: Path) -> None:
    pipe = MSFPPipeline.from_pretrained(export)
    before = draw(pipe)
    for sent in (pickle.loads(ForkingPickler.dumps(pipe)), copy.deepcopy(pipe)):
        assert isinstance(sent, MSFPPipeline) and sent.unet is not pipe.unet
        assert np.array_equal(draw(sent), before)
        assert sent.describe() == pipe.describe()


def adapter_file(export: Path, place: Path, seed: int) -> np.ndarray:
    """Save a LoRA, and return what the pipeline draws with it."""
    pipe = load(export)
    add_lora(pipe, "a", seed)
    pipe.unet.save_lora_adapter(place, "a")
    return draw(pipe)


def test_lora_is_swapped_for_another_while_it_is_in_place(export: Path, tmp_path: Path) -> None:
    expected = [adapter_file(export, tmp_path / str(seed), seed) for seed in range(2)]
    pipe = load(export)
    options = {"prefix": None, "weight_name": LORA_FILE}
    for seed in range(2):
        place = tmp_path / str(seed)
        pipe.unet.load_lora_adapter(place, adapter_name="x", hotswap=seed > 0, **options)
        assert np.abs(draw(pipe) - expected[seed]).max() < 1e-5
    assert is_different(*expected)


def test_ip_adapter_draws_and_leaves_no_trace(export: Path) -> None:
    pipe = load(export)
    before = draw(pipe)
    adapter = unet_ip_adapter(pipe.unet)
    pipe.unet._load_ip_adapter_weights(adapter.weights)
    assert is_different(draw(pipe, **adapter.options), before)
    pipe.unload_ip_adapter()
    assert np.array_equal(draw(pipe), before)


def test_callback_that_raises_leaves_nothing_behind(export: Path) -> None:
    pipe = load(export)
    before = draw(pipe)

    def fail(*_: object) -> dict:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        draw(pipe, callback_on_step_end=fail)
    assert np.array_equal(draw(pipe), before)


def test_scheduler_set_on_our_pipeline_acts(export: Path) -> None:
    ours, stock = MSFPPipeline.from_pretrained(export, device="cpu"), load(export)
    for pipe in (ours, stock):
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert ours.pipe.scheduler is ours.scheduler
    assert np.array_equal(draw(ours), draw(stock))
    assert is_different(draw(ours), draw(load(export)))


def test_device_map_to_the_disk_is_refused(export: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot leave quantized layers on the disk"):
        UNet2DConditionModel.from_pretrained(
            export, subfolder="unet", device_map={"": "disk"}, offload_folder=tmp_path
        )


def test_threads_share_a_denoiser(prompted_tuned: Finetuned) -> None:
    unet = load(prompted_tuned.export).unet
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 32)

    @torch.no_grad()
    def call(timestep: int) -> Tensor:
        return unet(sample, torch.tensor(timestep), encoder_hidden_states=text)[0]

    timesteps = (999, 1, 500, 250)
    expected = {timestep: call(timestep) for timestep in timesteps}
    wrong = list[int]()

    def repeat(timestep: int) -> None:
        for _ in range(10):
            if not torch.equal(call(timestep), expected[timestep]):
                wrong.append(timestep)

    threads = [threading.Thread(target=repeat, args=(t,)) for t in timesteps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_may_make_the_first_call_together(prompted_tuned: Finetuned) -> None:
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 32)
    timesteps = (999, 1, 500, 250)
    expected = load(prompted_tuned.export).unet
    for _ in range(3):
        unet = load(prompted_tuned.export).unet
        barrier = threading.Barrier(len(timesteps))
        outputs = dict[int, Tensor]()

        def call(timestep: int, unet: Pipe, barrier: threading.Barrier, to: dict) -> None:
            barrier.wait()
            with torch.no_grad():
                to[timestep] = unet(sample, timestep, text)[0]

        threads = [
            threading.Thread(target=call, args=(t, unet, barrier, outputs)) for t in timesteps
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with torch.no_grad():
            for timestep in timesteps:
                assert torch.equal(outputs[timestep], expected(sample, timestep, text)[0])
