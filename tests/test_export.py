"""What an export holds, that it comes back whole, and that it appears whole or not at all."""

import hashlib
import json
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
from safetensors.torch import load_file

from conftest import QUICK, Chained
from msfp_cli import __version__
from msfp_cli.calibrate import calibrate_
from msfp_cli.errors import CheckpointError, RunError
from msfp_cli.export import export_, load_calibrated, save_pipeline
from msfp_cli.generation import Sampling, call_pipeline
from msfp_cli.loading import built_in_directory, load_pipeline
from msfp_cli.pipeline import MSFPPipeline
from msfp_cli.quantizer import SCHEMA_VERSION
from msfp_cli.recording import Recording

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
picture = pipe("a red dress", num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="np")
print(hashlib.sha256(numpy.ascontiguousarray(picture.images).tobytes()).hexdigest())
"""


def files_of(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory, hidden ones too."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


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
    picture = pipe("a red dress", num_inference_steps=2, generator=generator, output_type="np").images
    assert fresh_process[1] == hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()


def test_trained_denoiser_shrinks_to_less_than_a_third_of_half_precision(fashion_chained: Chained) -> None:
    # The built-in model is stored in half precision.
    half = (built_in_directory() / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    size = (fashion_chained.export / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size <= 0.32 * half
    assert fashion_chained.report.denoiser_bytes == size
    assert fashion_chained.report.half_precision_bytes == pytest.approx(half, rel=0.01)
    assert fashion_chained.report.ratio == fashion_chained.report.to_json()["ratio"] == pytest.approx(size / half, 0.01)


def test_saving_what_was_loaded_gives_the_same_bytes(prompted_chained: Chained, tmp_path: Path) -> None:
    MSFPPipeline.from_pretrained(prompted_chained.export, device="cpu").save_pretrained(tmp_path / "again")
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
    assert config["layers"] == {name: parameters.to_json() for name, parameters in table.items()}
    assert config["schema_version"] == SCHEMA_VERSION
    assert config["tool_version"] == __version__
    assert config["source"] == tiny_chained.calibration.source.to_json()
    assert config["sampling"]["num_inference_steps"] == 2


def test_export_holds_codes_and_scales_in_place_of_weights(tiny_chained: Chained) -> None:
    tensors = load_file(tiny_chained.export / "unet" / "diffusion_pytorch_model.safetensors")
    for name, layer in tiny_chained.calibration.layers["unet"].items():
        assert f"{name}.weight" not in tensors
        bits = layer.parameters.weight.bits
        assert tensors[f"{name}.weight_codes"].nbytes == -(-layer.num_weights * bits // 8)
        assert torch.equal(tensors[f"{name}.weight_scale"], tiny_chained.calibration.scales["unet"][name])


def test_exported_files_are_readable_by_others(tiny_chained: Chained) -> None:
    assert tiny_chained.export.stat().st_mode & 0o777 == 0o755
    assert {p.stat().st_mode & 0o444 for p in tiny_chained.export.rglob("*") if p.is_file()} == {0o444}


@pytest.mark.parametrize(("weights", "activations"), [(None, 4), (4, None), (2, 3), (6, 6), (8, 8)])
def test_every_width_and_kept_floats_come_back_bit_for_bit(
    weights: int | None,
    activations: int | None,
    tiny_pipe: DiffusionPipeline,
    tiny_recordings: tuple[Recording, Recording],
    tmp_path: Path,
) -> None:
    recipe = replace(QUICK, weights=weights, activations=activations, lift=0.0)
    calibration = calibrate_(tiny_pipe, *tiny_recordings, recipe)
    default = [c.parameters for c in calibration.layers["unet"].values() if c.reason == "default"]
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
    whole, parts = (MSFPPipeline.from_pretrained(d, device="cpu").pipe for d in (tiny_chained.export, sharded))
    assert np.array_equal(draw(parts), draw(whole))


def test_every_shard_of_an_export_is_verified(sharded: Path) -> None:
    for shard in sorted((sharded / "unet").glob("*.safetensors")):
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match="altered"):
            MSFPPipeline.from_pretrained(sharded, device="cpu")
        shard.write_bytes(content)
    MSFPPipeline.from_pretrained(sharded, device="cpu")


def test_existing_directory_is_refused_and_left_alone(tiny_chained: Chained, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(RunError, match="exists already; use --overwrite"):
        export_(tiny_chained.calibration, tmp_path / "mine", device="cpu")
    assert files_of(tmp_path) == {"mine/notes.txt": b"keep me"}


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_overwriting_never_deletes_what_is_not_ours(tiny_chained: Chained, tmp_path: Path, kind: str) -> None:
    mine = tmp_path / "mine" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("keep me")
    with pytest.raises(RunError, match="nothing that msfp wrote"):
        place = mine if kind == "file" else mine.parent
        export_(tiny_chained.calibration, place, device="cpu", overwrite=True)
    assert files_of(tmp_path) == {"mine/thesis.txt": b"keep me"}


def test_overwriting_replaces_the_whole_directory(
    tiny_chained: Chained, copied: Callable[..., Path], tmp_path: Path
) -> None:
    (copied(tiny_chained.export, "old") / "stale.bin").write_text("stale")
    export_(tiny_chained.calibration, tmp_path / "old", device="cpu", overwrite=True)
    assert files_of(tmp_path / "old") == files_of(tiny_chained.export)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("existing", [False, True])
def test_failed_save_leaves_nothing_new_and_nothing_lost(
    tiny_chained: Chained, copied: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
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
