"""Recording: it can be stopped at any time, is bounded, and keeps its two parts apart."""

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPAGPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

import tiny_pipelines
from conftest import Invoke, Lines, record_few
from msfp_cli.errors import CalibrationError, ModelError, RunError
from msfp_cli.pipelines.denoiser import replay
from msfp_cli.pipelines.loading import ModelSource, default_prompts, load_pipeline
from msfp_cli.pipelines.pictures import digest_of_pictures
from msfp_cli.processes import LEFT_ALONE, Processes, meeting
from msfp_cli.recording.encode import tensor_sizes
from msfp_cli.recording.recipe import RecordOptions, RecordRecipe
from msfp_cli.recording.record import record_both, record_calls, record_recipes
from msfp_cli.recording.result import Recording, is_same
from msfp_cli.run import Run
from together import run_together

THREE_BATCHES = RecordRecipe(conditions=(None,) * 5, num_inference_steps=2, seed=3, batch_size=2)


class Stopped(BaseException):
    """What ends a process from outside."""


def stop_before_call(
    monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException]
) -> None:
    """Let the pipeline's calls from `number` on raise."""
    original, calls = DDIMPipeline.__call__, iter(range(1000))

    @wraps(original)
    def stopped(*args: object, **kwargs: object) -> object:
        if next(calls) >= number - 1:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(DDIMPipeline, "__call__", stopped)


def shards_of(directory: Path) -> dict[str, bytes]:
    """Return the files of a recording."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_stopped_recording_goes_on_to_the_same_bytes(
    tiny_pipe: DiffusionPipeline,
    tiny_source: ModelSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_before_call(patched, 3, Stopped)  # the first is watched only
        with pytest.raises(Stopped):
            record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "stopped")
    assert Recording(tmp_path / "stopped").missing_shards() == [1, 2]
    first = (tmp_path / "stopped" / "00000.safetensors").stat().st_mtime_ns
    record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "00000.safetensors").stat().st_mtime_ns == first
    assert shards_of(tmp_path / "stopped") == shards_of(tmp_path / "whole")


def test_recording_stopped_inside_a_batch_goes_on_to_the_same_bytes(
    tiny_pipe: DiffusionPipeline, tiny_source: ModelSource, tmp_path: Path
) -> None:
    calls = iter(range(1000))

    def stop_in_the_fourth_call(*_: object) -> None:
        if next(calls) == 3:
            raise Stopped

    handle = tiny_pipe.unet.register_forward_hook(stop_in_the_fourth_call)
    with pytest.raises(Stopped):
        record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "stopped")
    handle.remove()
    record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "stopped")
    record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "whole")
    assert shards_of(tmp_path / "stopped") == shards_of(tmp_path / "whole")


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_record_the_bytes_of_one(
    count: int, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    # The conditions of two batches come twice, and their embeddings are stored once.
    conditions = ("a cat", "a dog", "a hat", "a bag") * 2
    recipe = RecordRecipe(conditions=conditions, num_inference_steps=2, batch_size=2)
    source = ModelSource(model=str(tiny("StableDiffusionPipeline")))
    pipe = load_pipeline(source, "cpu")

    def record(index: int) -> None:
        with meeting("cpu") as processes:
            record_calls(pipe, source, recipe, tmp_path / "shared", processes=processes)
            assert not Recording(tmp_path / "shared").missing_shards()

    ends = run_together(record, tmp_path, count)
    assert [end.code for end in ends] == [0] * count, ends
    record_calls(pipe, source, recipe, tmp_path / "whole")
    assert shards_of(tmp_path / "shared") == shards_of(tmp_path / "whole")


def test_recording_that_lost_a_process_goes_on_to_the_same_bytes(
    tiny_pipe: DiffusionPipeline,
    tiny_source: ModelSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def record(index: int) -> None:
        if index == 0:
            monkeypatch.setattr(Recording, "write_shard", lambda *_: os._exit(7))
        with meeting("cpu") as processes:
            place = tmp_path / "shared"
            record_calls(tiny_pipe, tiny_source, THREE_BATCHES, place, processes=processes)

    first, second = run_together(record, tmp_path)
    assert first.code == 7 and second.code in (LEFT_ALONE, 99)  # told of it, or waiting for it
    assert Recording(tmp_path / "shared").missing_shards() in ([0, 2], [0, 1, 2])
    record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "shared")
    record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "whole")
    assert shards_of(tmp_path / "shared") == shards_of(tmp_path / "whole")


def test_recording_that_stopped_after_its_last_shard_goes_on_to_the_same_bytes(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RecordRecipe(conditions=("a cat", "a dog") * 2, num_inference_steps=2, batch_size=2)
    source = ModelSource(model=str(tiny("StableDiffusionPipeline")))
    pipe = load_pipeline(source, "cpu")
    record_calls(pipe, source, recipe, tmp_path / "whole")
    with monkeypatch.context() as patched:
        # A shard that is written before an earlier one holds what that one holds.
        patched.setattr(Recording, "missing_shards", lambda _: [1, 0])
        patched.setattr(Recording, "drop_repeated", lambda _: raise_(Stopped()))
        with pytest.raises(Stopped):
            record_calls(pipe, source, recipe, tmp_path / "stopped")
    assert shards_of(tmp_path / "stopped") != shards_of(tmp_path / "whole")
    record_calls(pipe, source, recipe, tmp_path / "stopped")
    assert shards_of(tmp_path / "stopped") == shards_of(tmp_path / "whole")


def raise_(error: BaseException) -> None:
    raise error


def test_every_call_of_every_picture_is_recorded(
    tiny_pipe: DiffusionPipeline, tiny_source: ModelSource, tmp_path: Path
) -> None:
    recording = record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "recording")
    calls = list(recording.calls("unet"))
    assert [call.timestep for call in calls] == [500, 0] * 3
    assert [call.output.shape[0] for call in calls] == [2, 2, 2, 2, 1, 1]
    assert recording.num_calls() == len(calls)
    with torch.no_grad():
        for call in calls:
            assert torch.equal(tiny_pipe.unet(**call.arguments).sample, call.output)


@pytest.mark.parametrize(
    ("name", "channels", "recorded"),
    [
        ("DiTPipeline", 8, 4),
        ("PixArtSigmaPipeline", 8, 4),
        ("StableDiffusionPipeline", 4, 4),
        ("FluxPipeline", None, None),
    ],
)
def test_variance_that_the_pipeline_throws_away_is_not_recorded(
    name: str,
    channels: int | None,
    recorded: int | None,
    tiny: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    pipe, denoiser, calls = record_few(tiny(name), tmp_path, num_images=2)
    for call in calls:
        whole = denoiser(**call.arguments, return_dict=False)[0]
        assert (whole.shape[1], call.output.shape[1]) == (
            channels or whole.shape[1],
            recorded or whole.shape[1],
        )
        torch.testing.assert_close(replay(denoiser, call), call.output)
        torch.testing.assert_close(whole[:, : call.output.shape[1]], call.output)
    assert "step" not in vars(pipe.scheduler)


def test_pictures_are_recorded_alike_in_any_batch(
    tiny_pipe: DiffusionPipeline, tiny_source: ModelSource, tmp_path: Path
) -> None:
    first = record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "twos").shard(1)
    alone = record_calls(
        tiny_pipe, tiny_source, replace(THREE_BATCHES, batch_size=1), tmp_path / "ones"
    ).shard(3)
    assert torch.equal(first[0].arguments["sample"][1:], alone[0].arguments["sample"])
    assert torch.allclose(first[1].arguments["sample"][1:], alone[1].arguments["sample"], atol=1e-4)


def test_recording_beyond_the_bound_is_refused_before_any_shard_is_written(
    tiny_pipe: DiffusionPipeline, tiny_source: ModelSource, tmp_path: Path
) -> None:
    with pytest.raises(
        RunError, match=r"more than the bound .* give fewer --num-images or --steps"
    ):
        record_calls(
            tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "recording", max_bytes=10_000
        )
    assert not list(tmp_path.rglob("*.safetensors"))


def test_bound_counts_every_batch(
    tiny_pipe: DiffusionPipeline, tiny_source: ModelSource, tmp_path: Path
) -> None:
    # 2 calls of 2 pictures, input and output of 3 x 16 x 16 float32 values each: about 24 kB a
    # batch.
    one = replace(THREE_BATCHES, conditions=(None,) * 2)
    record_calls(tiny_pipe, tiny_source, one, tmp_path / "one", max_bytes=40_000)
    with pytest.raises(RunError, match="more than the bound"):
        record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "three", max_bytes=40_000)
    record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "three", max_bytes=80_000)


def test_bound_counts_what_a_controlnet_makes_at_each_step(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = ModelSource(model=str(tiny("StableDiffusionPipeline")))
    pipe = tiny_pipelines.with_controlnet(load_pipeline(source, "cpu"))
    recipe = RecordRecipe(conditions=("a cat",) * 2, num_inference_steps=6, batch_size=1)
    whole = record_calls(pipe, source, recipe, tmp_path / "whole")
    sizes = [whole.shard_path(i).stat().st_size for i in range(2)]
    first = next(iter(whole.calls()))
    assert sum(tensor_sizes([first]).values()) < 0.25 * sizes[0]
    with pytest.raises(RunError, match="more than the bound"):
        record_calls(pipe, source, recipe, tmp_path / "run", max_bytes=int(0.8 * sum(sizes)))
    assert not list((tmp_path / "run").glob("*.safetensors"))
    record_calls(pipe, source, recipe, tmp_path / "run", max_bytes=int(1.1 * sum(sizes)))


@pytest.fixture
def set_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Path], int]], None]:
    """Return what sets how many bytes the disk of a directory has free."""
    usage = shutil.disk_usage(tmp_path)

    def set_free(free: Callable[[Path], int]) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=free(place)))

    return set_free


def test_disk_that_holds_all_is_enough_while_it_fills(
    tiny_pipe: DiffusionPipeline,
    tiny_source: ModelSource,
    tmp_path: Path,
    set_free: Callable[[Callable[[Path], int]], None],
) -> None:
    set_free(lambda place: 90_000 - sum(p.stat().st_size for p in place.glob("*.safetensors")))
    recording = record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "recording")
    assert recording.num_calls() == 6


def test_full_disk_is_foreseen(
    tiny_pipe: DiffusionPipeline,
    tiny_source: ModelSource,
    tmp_path: Path,
    set_free: Callable[[Callable[[Path], int]], None],
) -> None:
    set_free(lambda place: 10_000)
    with pytest.raises(RunError, match="more than the disk has free"):
        record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "recording")


def test_refused_recording_can_be_made_smaller_as_the_message_says(
    tiny_pipe: DiffusionPipeline, tiny_source: ModelSource, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="give fewer --num-images"):
        record_calls(
            tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "recording", max_bytes=40_000
        )
    smaller = replace(THREE_BATCHES, conditions=(None,) * 2)
    assert (
        record_calls(
            tiny_pipe, tiny_source, smaller, tmp_path / "recording", max_bytes=40_000
        ).num_calls()
        == 2
    )


def test_recording_of_other_settings_is_not_mixed_in(
    tiny_pipe: DiffusionPipeline, tiny_source: ModelSource, tmp_path: Path
) -> None:
    record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "recording")
    before = shards_of(tmp_path / "recording")
    with pytest.raises(RunError, match="recorded with other settings; use --overwrite"):
        record_calls(tiny_pipe, tiny_source, replace(THREE_BATCHES, seed=4), tmp_path / "recording")
    assert shards_of(tmp_path / "recording") == before


def test_recording_of_another_scheduler_or_other_pictures_is_not_reused(
    tiny_pipe: DiffusionPipeline, tiny_source: ModelSource, tmp_path: Path
) -> None:
    run, options = Run(tmp_path / "run"), RecordOptions(num_images=2, num_inference_steps=2)
    recording, _ = record_both(tiny_pipe, run, tiny_source, options)
    before = recording.recipe
    tiny_pipe.scheduler = DDIMScheduler.from_config(
        tiny_pipe.scheduler.config, prediction_type="v_prediction"
    )
    with pytest.raises(RunError, match="recorded with other settings"):
        record_both(tiny_pipe, run, tiny_source, options)
    recording, _ = record_both(tiny_pipe, run, tiny_source, options, overwrite=True)
    changed = {key for key in before if recording.recipe[key] != before[key]}
    assert changed == {"schedulers"}


def test_recordings_of_earlier_versions_noted_less() -> None:
    settings = {"source": 1, "schedulers": {"scheduler": {"class": "DDIMScheduler"}}}
    assert is_same({"source": 1}, settings) and is_same(settings, settings)
    assert not is_same({"source": 2}, settings)
    assert not is_same({}, settings)
    assert not is_same({**settings, "pictures": "digest"}, settings)


def test_digest_of_pictures_is_that_of_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    first = digest_of_pictures(tmp_path)
    (tmp_path / "notes.txt").write_bytes(b"b")
    assert digest_of_pictures(tmp_path) == first
    for name, content in (("a-mask.png", b"m"), ("a.png", b"c")):
        (tmp_path / name).write_bytes(content)
        assert digest_of_pictures(tmp_path) != first


@pytest.mark.parametrize("is_changed", [False, True])
def test_denoiser_that_does_not_repeat_its_answers_is_said(
    is_changed: bool, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = ModelSource(model=str(tiny("StableDiffusionPipeline")))
    pipe = load_pipeline(source, "cpu")
    if is_changed:  # by the attention of perturbed-attention guidance
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its class is going to move
            pipe = StableDiffusionPAGPipeline(**pipe.components)
    options = RecordOptions(num_images=1, num_inference_steps=2, batch_size=1)
    said = Lines()
    record_both(pipe, Run(tmp_path), source, options, processes=Processes(progress=said))
    differing = [line for line in said.lines if "answers a recorded call differently" in line]
    assert len(differing) == is_changed


def test_overwriting_keeps_a_matching_recording_and_replaces_any_other(
    tiny_pipe: DiffusionPipeline, tiny_source: ModelSource, tmp_path: Path
) -> None:
    run, options = Run(tmp_path / "run"), RecordOptions(num_images=2, num_inference_steps=2)

    def stamps(options: RecordOptions) -> list[int]:
        record_both(tiny_pipe, run, tiny_source, options, overwrite=True)
        return [(d / "00000.safetensors").stat().st_mtime_ns for d in (run.recording, run.held_out)]

    first = stamps(options)
    assert stamps(options) == first
    (run.held_out / "recording.json").write_text("{")
    kept, replaced = stamps(options)
    assert kept == first[0]
    assert replaced != first[1]
    assert not set(stamps(replace(options, seed=1))) & {kept, replaced}


def test_held_out_calls_are_of_other_seeds_and_prompts(
    tiny: Callable[[str], Path], tiny_recordings: tuple[Recording, Recording]
) -> None:
    from msfp_cli.pipelines.loading import load_pipeline

    source = ModelSource(model=str(tiny("StableDiffusionPipeline")))
    pipe = load_pipeline(source, "cpu")
    chosen, held_out = record_recipes(pipe, source, RecordOptions(num_images=40))
    assert (len(chosen.conditions), len(held_out.conditions)) == (32, 8)
    assert not set(chosen.conditions) & set(held_out.conditions)
    assert set(chosen.conditions) | set(held_out.conditions) == set(
        default_prompts(source.model)[:40]
    )
    seeds = [
        range(recipe.seed, recipe.seed + len(recipe.conditions)) for recipe in (chosen, held_out)
    ]
    assert not set(seeds[0]) & set(seeds[1])
    noises = [next(recording.calls()).arguments["sample"] for recording in tiny_recordings]
    assert not torch.equal(*noises)


def test_model_that_overflows_by_itself_is_told_so(
    tiny_pipe: DiffusionPipeline, tiny_source: ModelSource, tmp_path: Path
) -> None:
    tiny_pipe.unet.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(CalibrationError, match="before any quantization; .* try --dtype float32"):
        record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "recording")


def test_pipeline_without_a_denoiser_is_refused_by_its_parts(
    tiny_pipe: DiffusionPipeline, tiny_source: ModelSource, tmp_path: Path
) -> None:
    tiny_pipe.register_modules(unet=None)
    with pytest.raises(ModelError, match=r"DDIMPipeline has no denoiser: .* \(it has scheduler\)"):
        record_calls(tiny_pipe, tiny_source, THREE_BATCHES, tmp_path / "recording")


def two_transformers() -> WanPipeline:
    """Return a pipeline with a denoiser for much noise and one for little."""
    settings = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32}
    sizes = {"in_channels": 16, "out_channels": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 1}
    tokenizer = tiny_pipelines._t5_tokenizer()
    torch.manual_seed(0)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_pipelines._t5_encoder(tokenizer),
        transformer=WanTransformer3DModel(**settings, **sizes),
        transformer_2=WanTransformer3DModel(**settings, **sizes),
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        boundary_ratio=0.875,
    )


def test_of_two_denoisers_both_are_recorded_or_the_one_that_never_ran_is_named(
    tmp_path: Path,
) -> None:
    pipe = two_transformers()
    source = ModelSource(model="wan")
    one = RecordRecipe(
        conditions=("a cat",), num_inference_steps=1, height=16, width=16, num_frames=5
    )
    with pytest.raises(CalibrationError, match="^transformer_2 never ran .*; give more --steps"):
        record_calls(pipe, source, one, tmp_path / "one")
    two = replace(one, num_inference_steps=2)
    recording = record_calls(pipe, source, two, tmp_path / "two")
    assert recording.num_calls("transformer") == recording.num_calls("transformer_2") == 2


def test_interrupt_keeps_finished_shards_and_says_how_to_go_on(
    msfp: Invoke, tiny_source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "calibrate",
        tiny_source.model,
        "--num-images",
        5,
        "--steps",
        2,
        "--batch-size",
        2,
        "--lift",
        0,
    ]
    with monkeypatch.context() as patched:
        # The first two are to estimate, and to learn what the denoiser is.
        stop_before_call(patched, 4, KeyboardInterrupt)
        result = msfp(*command)
    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        result.stderr
        == "error: stopped; what was finished is kept, run the same command to go on\n"
    )
    recording = Recording(Run(Path("msfp-run")).recording)
    assert recording.missing_shards() == [1]
    finished = recording.shard_path(0).stat().st_mtime_ns
    assert msfp(*command).exit_code == 0
    assert recording.missing_shards() == []
    assert recording.shard_path(0).stat().st_mtime_ns == finished


def test_bound_is_an_option(msfp: Invoke, tiny_source: ModelSource) -> None:
    result = msfp(
        "calibrate", tiny_source.model, "--num-images", 2, "--steps", 2, "--max-recording-gib", 1e-6
    )
    assert result.exit_code == 1
    assert "--max-recording-gib" in result.stderr
    assert len(result.stderr.splitlines()) == 1
