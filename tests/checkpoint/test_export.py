"""What an export holds, that it comes back whole, and that it appears whole or not at all."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import msfp_cli
from conftest import (
    FEW_UPDATES,
    QUICK,
    Chained,
    Finetuned,
    Invoke,
    chain,
    files_of,
    only_error,
    train,
)
from msfp_cli import __version__
from msfp_cli.calibration.calibrate import calibrate_denoisers_
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import export_, load_calibrated, save_pipeline
from msfp_cli.checkpoint.pipeline import MSFPPipeline, read_denoisers
from msfp_cli.checkpoint.quantizer import SCHEMA_VERSION
from msfp_cli.errors import CheckpointError, RunError
from msfp_cli.evaluation.metrics.denoisers import denoiser_bytes
from msfp_cli.files.documents import digest
from msfp_cli.finetuning.lora import tuned_names
from msfp_cli.finetuning.quantize import member_by_timestep
from msfp_cli.finetuning.result import FinetuneState
from msfp_cli.layers.prepare import prepare_
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.layers.routing import ROUTER
from msfp_cli.pipelines.denoiser import replay
from msfp_cli.pipelines.loading import ModelSource, built_in_directory, load_pipeline
from msfp_cli.pipelines.sampling import Sampling, call_pipeline
from msfp_cli.recording.compare import OutputError, output_error
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run
from tiny_pipelines import with_controlnet

# Loads an export with nothing but diffusers, then with our package imported, and draws a picture.
_CHILD = """
import hashlib, sys
import numpy, torch
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained(sys.argv[1])
except Exception as error:
    print(type(error).__name__, str(error).splitlines()[0])
assert "msfp_cli" not in sys.modules
import msfp_cli
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(3)
picture = pipe("a red dress", num_inference_steps=2, generator=generator, output_type="np")
print(hashlib.sha256(numpy.ascontiguousarray(picture.images).tobytes()).hexdigest())
"""


def draw(pipe: DiffusionPipeline) -> np.ndarray:
    """Draw two pictures with the smallest model."""
    return np.stack(call_pipeline(pipe, (None, None), Sampling(num_inference_steps=2, seed=3)))


@pytest.fixture(scope="module")
def fresh_process(fashion_chained: Chained) -> list[str]:
    """Return what a new process says that loads the built-in model's export."""
    command = [sys.executable, "-c", _CHILD, str(fashion_chained.export)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_without_our_package_diffusers_refuses_the_export(fresh_process: list[str]) -> None:
    assert fresh_process[0].startswith("ValueError Unknown quantization type")


def test_new_process_draws_the_in_memory_picture_bit_for_bit(
    fresh_process: list[str], fashion_chained: Chained
) -> None:
    pipe = load_calibrated(fashion_chained.calibration, "cpu")
    generator = torch.Generator().manual_seed(3)
    picture = pipe(
        "a red dress", num_inference_steps=2, generator=generator, output_type="np"
    ).images
    assert fresh_process[1] == hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()


def test_trained_denoiser_shrinks_to_less_than_a_third_of_half_precision(
    fashion_chained: Chained,
) -> None:
    # The built-in model is stored in half precision.
    half = (built_in_directory() / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    size = (fashion_chained.export / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size <= 0.32 * half
    assert fashion_chained.report.denoiser_bytes == size
    assert fashion_chained.report.half_precision_bytes == pytest.approx(half, rel=0.01)
    assert (
        fashion_chained.report.ratio
        == fashion_chained.report.to_json()["ratio"]
        == pytest.approx(size / half, 0.01)
    )


def test_network_beside_the_denoiser_does_not_count_as_one(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = ModelSource(model=str(tiny("StableDiffusionPipeline")))
    pipe = with_controlnet(load_pipeline(source, "cpu"))
    pipe.save_pretrained(tmp_path / "model")
    chained = chain(tmp_path / "model", tmp_path / "run")
    (path,) = (chained.export / "unet").glob("*.safetensors")
    half = 2 * sum(parameter.numel() for parameter in pipe.unet.parameters())
    assert chained.report.denoiser_bytes == path.stat().st_size
    assert chained.report.half_precision_bytes == pytest.approx(half, rel=0.01)
    exported = load_pipeline(ModelSource(model=str(chained.export)), "cpu")
    assert denoiser_bytes(exported, read_denoisers(chained.export)) < path.stat().st_size
    assert denoiser_bytes(pipe, read_denoisers(chained.export)) == half


def test_saving_what_was_loaded_gives_the_same_bytes(
    prompted_chained: Chained, tmp_path: Path
) -> None:
    MSFPPipeline.from_pretrained(prompted_chained.export, device="cpu").save_pretrained(
        tmp_path / "again"
    )
    assert files_of(tmp_path / "again") == files_of(prompted_chained.export)


def test_exporting_twice_gives_the_same_bytes(tiny_chained: Chained, tmp_path: Path) -> None:
    export_(tiny_chained.calibration, tmp_path / "again", device="cpu")
    assert files_of(tmp_path / "again") == files_of(tiny_chained.export)


def test_header_and_config_tell_every_layers_real_parameters(tiny_chained: Chained) -> None:
    directory = tiny_chained.export / "unet"
    with safe_open(directory / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["quantization_config"])
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert header == config
    table = tiny_chained.calibration.table("unet")
    assert config["layers"] == {name: scheme.to_json() for name, scheme in table.items()}
    assert config["schema_version"] == SCHEMA_VERSION
    assert config["tool_version"] == __version__
    assert config["source"] == tiny_chained.calibration.source.to_json()
    assert config["sampling"]["num_inference_steps"] == 2


def test_export_holds_codes_and_scales_in_place_of_weights(tiny_chained: Chained) -> None:
    tensors = load_file(tiny_chained.export / "unet" / "diffusion_pytorch_model.safetensors")
    for name, layer in tiny_chained.calibration.layers["unet"].items():
        assert f"{name}.weight" not in tensors
        bits = layer.scheme.weight.bits
        assert tensors[f"{name}.weight_codes"].nbytes == -(-layer.num_weights * bits // 8)
        assert torch.equal(
            tensors[f"{name}.weight_scale"], tiny_chained.calibration.scales["unet"][name]
        )


def test_exported_files_are_readable_by_others(tiny_chained: Chained) -> None:
    assert tiny_chained.export.stat().st_mode & 0o777 == 0o755
    assert {p.stat().st_mode & 0o444 for p in tiny_chained.export.rglob("*") if p.is_file()} == {
        0o444
    }


@pytest.mark.parametrize(("weights", "activations"), [(None, 4), (4, None), (2, 3), (6, 6), (8, 8)])
def test_every_width_and_kept_floats_come_back_bit_for_bit(
    weights: int | None,
    activations: int | None,
    tiny_pipe: DiffusionPipeline,
    tiny_recordings: tuple[Recording, Recording],
    tmp_path: Path,
) -> None:
    recipe = replace(QUICK, weights=weights, activations=activations, lift=0.0)
    calibration = calibrate_denoisers_(tiny_pipe, *tiny_recordings, recipe)
    default = [c.scheme for c in calibration.layers["unet"].values() if c.reason == "default"]
    assert {p.weight and p.weight.bits for p in default} == {weights}
    assert {p.input and p.input.format.bits for p in default} == {activations}
    export_(calibration, tmp_path / "export", device="cpu")
    reloaded = draw(MSFPPipeline.from_pretrained(tmp_path / "export", device="cpu").pipe)
    assert np.array_equal(reloaded, draw(tiny_pipe))
    assert not np.array_equal(reloaded, draw(load_pipeline(calibration.source, "cpu")))


@pytest.fixture
def sharded(tiny_chained: Chained, tmp_path: Path) -> Path:
    """Write the smallest model's export in several files."""
    pipe = MSFPPipeline.from_pretrained(tiny_chained.export, device="cpu").pipe
    pipe.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 1
    return tmp_path / "sharded"


def test_sharded_export_draws_the_same_pictures(sharded: Path, tiny_chained: Chained) -> None:
    whole, parts = (
        MSFPPipeline.from_pretrained(d, device="cpu").pipe for d in (tiny_chained.export, sharded)
    )
    assert np.array_equal(draw(parts), draw(whole))


def test_every_shard_of_an_export_is_verified(sharded: Path) -> None:
    for shard in sorted((sharded / "unet").glob("*.safetensors")):
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match="altered"):
            MSFPPipeline.from_pretrained(sharded, device="cpu")
        shard.write_bytes(content)
    MSFPPipeline.from_pretrained(sharded, device="cpu")


def test_existing_directory_is_refused_and_left_alone(
    tiny_chained: Chained, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(RunError, match="exists already; use --overwrite"):
        export_(tiny_chained.calibration, tmp_path / "mine", device="cpu")
    assert files_of(tmp_path) == {"mine/notes.txt": b"keep me"}


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_overwriting_never_deletes_what_is_not_ours(
    tiny_chained: Chained, tmp_path: Path, kind: str
) -> None:
    mine = tmp_path / "mine" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("keep me")
    with pytest.raises(RunError, match="was not written by msfp"):
        place = mine if kind == "file" else mine.parent
        export_(tiny_chained.calibration, place, device="cpu", overwrite=True)
    assert files_of(tmp_path) == {"mine/thesis.txt": b"keep me"}


def test_overwriting_replaces_the_whole_directory(
    tiny_chained: Chained, copied: Callable[..., Path], tmp_path: Path
) -> None:
    truncate = copied(tiny_chained.export, "old") / "unet" / "config.json"
    truncate.write_text(truncate.read_text()[:-9])
    export_(tiny_chained.calibration, tmp_path / "old", device="cpu", overwrite=True)
    assert files_of(tmp_path / "old") == files_of(tiny_chained.export)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("existing", [False, True])
def test_failed_save_leaves_nothing_new_and_nothing_lost(
    tiny_chained: Chained,
    copied: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    existing: bool,
) -> None:
    pipe = MSFPPipeline.from_pretrained(tiny_chained.export, device="cpu").pipe
    if existing:
        copied(tiny_chained.export, "export")

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("pulled the plug")

    # The scheduler is saved first, or the denoiser: whichever is second fails.
    monkeypatch.setattr(type(pipe.unet), "save_pretrained", fail)
    before = files_of(tmp_path)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        save_pipeline(pipe, tmp_path / "export", overwrite=True)
    assert files_of(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["export"] * existing


def now_as_best(tuned: FinetuneState) -> FinetuneState:
    """Return a state as if the last update had been the best."""
    return replace(
        tuned, tensors={f"best/{name}": tensor for name, tensor in tuned.tensors_of("now").items()}
    )


def held_out_errors(denoiser: torch.nn.Module, run: Run, component: str) -> OutputError:
    """Measure a denoiser on the held-out calls of a run."""
    return output_error(denoiser, Recording(run.held_out).calls(component))


@pytest.mark.parametrize(
    "name", ["DDIMPipeline", "StableDiffusionXLPipeline", "FluxPipeline", "DiTPipeline"]
)
def test_fine_tuned_export_computes_bit_for_bit_what_was_trained(
    name: str, fresh_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = fresh_run(name)
    tuned = now_as_best(train(run, replace(FEW_UPDATES, steps=2, evaluate_every=2)))
    calibration = Calibration.load(run.calibration)
    (component,) = calibration.layers
    export_(calibration, tmp_path / "export", tuned={component: tuned}, device="cpu")
    reloaded = getattr(DiffusionPipeline.from_pretrained(tmp_path / "export"), component)
    memory = getattr(load_calibrated(calibration, "cpu", {component: tuned}), component)
    for call in Recording(run.held_out).calls(component):
        assert torch.equal(replay(reloaded, call), replay(memory, call))
    rounded = held_out_errors(reloaded, run, component)
    prepare_(reloaded, "simulated")  # training computes in floating point, too
    error, last = held_out_errors(reloaded, run, component), tuned.history[-1]
    # A last digit, which differs between processors, moves some values to the next of 16 codes.
    assert rounded.relative() == pytest.approx(error.relative(), rel=2e-2)
    assert (error.relative(), tuple(error.by_timestep())) == (last.error, last.by_timestep)
    assert last.error != tuned.history[0].error
    assert tuned.clock.unit == (1000.0 if name == "FluxPipeline" else 1.0)


def test_best_state_is_exported_and_not_the_last(
    fresh_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = fresh_run("DDIMPipeline")
    tuned, calibration = train(run), Calibration.load(run.calibration)
    spoilt = {
        n: torch.full_like(t, 7) if n.startswith("now/") else t for n, t in tuned.tensors.items()
    }
    worse = replace(tuned.history[-1], step=99, error=tuned.best.error * 2)
    export_(
        calibration,
        tmp_path / "export",
        tuned={"unet": replace(tuned, history=(*tuned.history, worse), tensors=spoilt)},
        device="cpu",
    )
    reloaded = DiffusionPipeline.from_pretrained(tmp_path / "export").unet
    prepare_(reloaded, "simulated")
    assert held_out_errors(reloaded, run, "unet").relative() == tuned.best.error


def test_pipeline_that_was_calibrated_in_memory_is_saved_as_what_it_draws(
    tiny_pipe: DiffusionPipeline, tiny_recordings: tuple[Recording, Recording], tmp_path: Path
) -> None:
    msfp_cli.calibrate_(tiny_pipe, *tiny_recordings, QUICK)
    drawn = draw(tiny_pipe)
    tiny_pipe.save_pretrained(tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert quantized_layers(loaded.unet).keys() == quantized_layers(tiny_pipe.unet).keys()
    assert np.array_equal(draw(loaded), drawn)


def test_fine_tuned_export_draws_the_in_memory_pictures(tiny_tuned: Finetuned) -> None:
    memory = draw(load_calibrated(tiny_tuned.calibration, "cpu", {"unet": tiny_tuned.tuned}))
    assert np.array_equal(draw(DiffusionPipeline.from_pretrained(tiny_tuned.export)), memory)
    assert not np.array_equal(draw(load_calibrated(tiny_tuned.calibration, "cpu")), memory)


@pytest.fixture(scope="module")
def plain(tiny_tuned: Finetuned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the fine-tuned run's calibration alone."""
    directory = tmp_path_factory.mktemp("plain") / "export"
    export_(tiny_tuned.calibration, directory, device="cpu")
    return directory


def denoiser_of(export: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """Return the tensors and the layer table of the smallest model's export."""
    config = json.loads((export / "unet" / "config.json").read_text())["quantization_config"]
    return load_file(export / "unet" / "diffusion_pytorch_model.safetensors"), config["layers"]


def test_only_layers_that_switch_hold_several_sets_of_weights(tiny_tuned: Finetuned) -> None:
    names = tuned_names(tiny_tuned.calibration.table("unet"))
    members = {
        name: len(set(row)) for name, row in member_by_timestep(tiny_tuned.tuned, names).items()
    }
    tensors, layers = denoiser_of(tiny_tuned.export)
    assert {name: entry["hub"] for name, entry in layers.items()} == members
    assert all(len(tensors[f"{name}.weight_codes"]) == 1 for name in names)
    folded = {name for name in names if f"{name}.weight_changes" in tensors}
    assert folded == {name for name in names if members[name] > 1}
    loaded = quantized_layers(DiffusionPipeline.from_pretrained(tiny_tuned.export).unet)
    assert {name: len(loaded[name].packed_codes()) for name in names} == members
    assert all(members[name] == 1 for name in names[:5])  # see `settle`
    switching = sum(count > 1 for count in members.values())
    assert switching > 0
    assert tiny_tuned.report.switching_layers == switching
    rows = len(tensors[f"{ROUTER}.starts"])
    assert rows <= len(tiny_tuned.tuned.timesteps)  # a stretch for each, where members change
    assert tensors[f"{ROUTER}.table"].shape == (rows, switching)


def test_table_of_the_export_is_the_routers_choice_at_every_trained_timestep(
    tiny_tuned: Finetuned,
) -> None:
    denoiser = DiffusionPipeline.from_pretrained(tiny_tuned.export).unet
    names = tuned_names(tiny_tuned.calibration.table("unet"))
    members = member_by_timestep(tiny_tuned.tuned, names)
    switching = [name for name in sorted(names) if len(set(members[name])) > 1]
    router = denoiser.get_submodule(ROUTER)
    for position, timestep in enumerate(sorted(tiny_tuned.tuned.timesteps, reverse=True)):
        for name, choice in zip(switching, router(timestep), strict=True):
            assert sorted(set(members[name]))[choice] == members[name][position]


def test_hub_that_training_has_not_touched_costs_nothing(
    fresh_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = fresh_run("DDIMPipeline")
    tuned, calibration = train(run, stop=lambda: True), Calibration.load(run.calibration)
    first = replace(tuned, history=tuned.history[:1], tensors=untouched(tuned))
    report = export_(calibration, tmp_path / "tuned", tuned={"unet": first}, device="cpu")
    export_(calibration, tmp_path / "plain", device="cpu")
    assert (report.switching_layers, report.hub_bytes) == (0, 0)
    assert files_of(tmp_path / "tuned") == files_of(tmp_path / "plain")


def untouched(tuned: FinetuneState) -> dict[str, torch.Tensor]:
    """Return the best state before any update: all members alike, B and shifts at zero."""
    best = {n: t for n, t in tuned.tensors.items() if n.startswith("best/")}
    for name in best:
        kind = name.rpartition(".")[0]
        if ".lora_" in name or ".input_shift" in name:
            best[name] = best[f"{kind}.0"] if ".lora_a" in name else torch.zeros_like(best[name])
    return best


def test_hub_of_one_needs_no_router(fresh_run: Callable[..., Run], tmp_path: Path) -> None:
    run = fresh_run()
    tuned = train(run, replace(FEW_UPDATES, hub_size=1, steps=2, evaluate_every=2))
    report = export_(
        Calibration.load(run.calibration),
        tmp_path / "export",
        tuned={"transformer": tuned},
        device="cpu",
    )
    denoiser = DiffusionPipeline.from_pretrained(tmp_path / "export").transformer
    assert not hasattr(denoiser, ROUTER)
    assert {layer.scheme.hub for layer in quantized_layers(denoiser).values()} == {1}
    assert (report.hub_bytes, report.switching_layers) == (0, 0)
    assert not any(name.startswith("router") for name in tuned.tensors_of("now"))


def test_fine_tuning_adds_no_tensor_in_floating_point(tiny_tuned: Finetuned, plain: Path) -> None:
    ours, theirs = denoiser_of(tiny_tuned.export)[0], denoiser_of(plain)[0]
    added = {name for name in ours if not name.endswith(".weight_changes")} - theirs.keys()
    assert added == {f"{ROUTER}.table", f"{ROUTER}.starts"}
    assert theirs.keys() <= ours.keys()
    for name, tensor in ours.items():
        assert not tensor.is_floating_point() or torch.equal(tensor, theirs[name])


def test_hub_bytes_are_what_the_hub_takes_on_disk(tiny_tuned: Finetuned, plain: Path) -> None:
    def bytes_without_header(export: Path) -> int:
        content = (export / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        return len(content) - 8 - int.from_bytes(content[:8], "little")

    assert tiny_tuned.report.hub_bytes > 0
    assert tiny_tuned.report.hub_bytes == bytes_without_header(
        tiny_tuned.export
    ) - bytes_without_header(plain)


def test_members_are_what_fine_tuning_made_bit_for_bit(tiny_tuned: Finetuned) -> None:
    pipe = load_calibrated(tiny_tuned.calibration, "cpu", {"unet": tiny_tuned.tuned})
    expected = quantized_layers(pipe.unet)
    loaded = quantized_layers(DiffusionPipeline.from_pretrained(tiny_tuned.export).unet)
    for name, layer in expected.items():
        assert torch.equal(loaded[name].packed_codes(), layer.packed_codes())


def test_exports_of_the_first_layout_load_and_are_saved_as_they_are(
    tiny_tuned: Finetuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msfp_cli.checkpoint.in_memory.schema_of", lambda schemes: SCHEMA_VERSION)
    export_(
        tiny_tuned.calibration, tmp_path / "old", tuned={"unet": tiny_tuned.tuned}, device="cpu"
    )
    tensors, layers = denoiser_of(tmp_path / "old")
    for name, entry in layers.items():
        assert f"{name}.weight_changes" not in tensors
        assert len(tensors[f"{name}.weight_codes"]) == entry["hub"]
    pipe = MSFPPipeline.from_pretrained(tmp_path / "old", device="cpu")
    new = DiffusionPipeline.from_pretrained(tiny_tuned.export)
    for name, layer in quantized_layers(pipe.pipe.unet).items():
        same = new.unet.get_submodule(name)
        assert torch.equal(layer.packed_codes(), same.packed_codes())
    pipe.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "old")


@pytest.mark.parametrize("damage", ["short", "other"])
def test_damaged_changes_are_refused(tiny_tuned: Finetuned, tmp_path: Path, damage: str) -> None:
    export = tmp_path / "export"
    shutil.copytree(tiny_tuned.export, export)
    path = export / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.endswith(".weight_changes"))
    changes = tensors[name]
    tensors[name] = changes[:-1].clone() if damage == "short" else changes.clone().fill_(255)
    save_file(tensors, path, {**header, "msfp_digest": digest(tensors)})
    with pytest.raises(CheckpointError, match="weight_changes of the export is damaged"):
        MSFPPipeline.from_pretrained(export, device="cpu", check=False)


def test_run_that_may_only_be_read_is_exported_elsewhere(
    tiny_tuned: Finetuned,
    copied: Callable[..., Path],
    msfp: Invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = copied(tiny_tuned.run.directory, "theirs")
    before = {path: path.stat().st_mtime_ns for path in (run, *run.rglob("*"))}
    monkeypatch.setattr(Run, "is_writable", False)  # tests may run as root, who may write anywhere
    result = msfp("export", "--run", str(run), "--out", str(tmp_path / "mine"))
    assert result.stderr.splitlines()[-1] == f"next: msfp sample {tmp_path / 'mine'}"
    assert {path: path.stat().st_mtime_ns for path in (run, *run.rglob("*"))} == before
    assert files_of(tmp_path / "mine") == files_of(tiny_tuned.run.export)


@pytest.mark.parametrize("command", ["export", "sample", "evaluate", "report"])
def test_run_that_may_only_be_read_is_said_to_be_with_what_helps(
    command: str, tiny_tuned: Finetuned, msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_tuned.run
    monkeypatch.setattr(Run, "is_writable", False)
    line = only_error(msfp(command, "--run", str(run)), 1)
    assert line == f"{run} may only be read; give a directory of yours with --out"


def test_saving_a_fine_tuned_export_again_gives_the_same_bytes(
    tiny_tuned: Finetuned, tmp_path: Path
) -> None:
    MSFPPipeline.from_pretrained(tiny_tuned.export, device="cpu").save_pretrained(
        tmp_path / "again"
    )
    assert files_of(tmp_path / "again") == files_of(tiny_tuned.export)


def test_calibrated_leaves_the_fine_tuning_out(
    tiny_tuned: Finetuned, plain: Path, copied: Callable[..., Path], msfp: Invoke
) -> None:
    copied(tiny_tuned.run.directory, "msfp-run")
    for options, expected in ((("--calibrated",), plain), ((), tiny_tuned.export)):
        result = msfp("export", *options, "--out", "export", "--overwrite", "--device", "cpu")
        assert result.stdout == "export\n"
        assert files_of(Path("export")) == files_of(expected)
        assert ("fine-tuned, 6 of 6 updates" in result.stderr) == (expected != plain)
        assert ("layers have several members" in result.stderr) == (expected != plain)


def test_sharded_fine_tuned_export_draws_the_same_pictures(
    tiny_tuned: Finetuned, tmp_path: Path
) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_tuned.export)
    pipe.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 1
    assert np.array_equal(draw(DiffusionPipeline.from_pretrained(tmp_path / "sharded")), draw(pipe))
