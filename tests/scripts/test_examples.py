"""Every script in examples/ runs on a few random pictures, to its last printed line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from conftest import Chained
from msfp_cli.evaluation.features.fashion import agreement, load_classifier
from scripts.run_script import ROOT, run_script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def clothing(tmp_path: Path) -> Path:
    """Return a file with forty pictures as those of Fashion-MNIST, all ten classes among them."""
    path = tmp_path / "clothing.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    np.savez(path, images=images, labels=np.arange(40, dtype=np.uint8) % 10)
    return path


def test_train_emoji_saves_a_pipeline(tmp_path: Path) -> None:
    data = tmp_path / "emoji.npz"
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    np.savez(data, images=images)
    out = tmp_path / "emoji"
    sizes = ("--steps", 1, "--batch-size", 2, "--sampler-steps", 1)
    lines = run_script("examples/train_emoji/train_emoji.py", "--data", data, "--out", out, *sizes)
    assert lines[-1] == f"pipeline and samples.png written to {out}"
    assert (out / "samples.png").exists()
    assert type(DiffusionPipeline.from_pretrained(out)).__name__ == "DDIMPipeline"


def test_train_fashion_saves_a_pipeline(clothing: Path, tmp_path: Path) -> None:
    out = tmp_path / "fashion"
    sizes = ("--steps", 1, "--autoencoder-steps", 1, "--batch-size", 2, "--sampler-steps", 1)
    script = "examples/train_fashion/train_fashion.py"
    lines = run_script(script, "--data", clothing, "--out", out, *sizes)
    assert lines[-1].startswith(f"pipeline and samples.png written to {out}")
    assert (out / "samples.png").exists()
    assert type(DiffusionPipeline.from_pretrained(out)).__name__ == "StableDiffusionPipeline"


def test_train_flow_saves_a_pipeline_and_goes_on_bit_for_bit(
    clothing: Path, tmp_path: Path
) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    sizes = ("--batch-size", 2, "--sampler-steps", 2)
    script = "examples/train_flow/train_flow.py"
    lines = run_script(script, "--data", clothing, "--out", once, "--steps", 2, *sizes)
    assert lines[-1] == f"pipeline and samples.png written to {once}"
    assert type(DiffusionPipeline.from_pretrained(once)).__name__ == "CogView4Pipeline"
    stopped = ("--data", clothing, "--out", twice, "--steps", 2, "--stop-after", 1)
    run_script(script, *stopped, *sizes)
    assert "; 1 done" in run_script(script, *stopped[:-2], *sizes)[0]
    states = [load_file(tmp_path / f"{name}.state.safetensors") for name in ("once", "twice")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_flow_pipeline_draws_what_is_asked_for() -> None:
    pipe = DiffusionPipeline.from_pretrained(ROOT / "examples/train_flow/flow", dtype=torch.float32)
    prompts = ["a red boot", "a blue t-shirt", "a green trousers", "a purple dress"]
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 10, "guidance_scale": 3.0, "generator": generator}
    pictures = pipe(prompts, output_type="pt", **settings).images
    assert agreement(load_classifier(), pictures, prompts) == (1.0, 1.0)


def test_train_classifier_and_make_reference_save_tensors(clothing: Path, tmp_path: Path) -> None:
    out = tmp_path / "classifier.safetensors"
    options = ("--data", clothing, "--test", clothing, "--out", out, "--steps", 1)
    lines = run_script("examples/train_fashion/train_classifier.py", *options, "--batch-size", 2)
    assert lines[0].startswith("1: loss ")
    assert lines[-1].startswith(f"{out} written")
    assert load_file(out)
    reference = tmp_path / "reference.safetensors"
    options = ("--test", clothing, "--out", reference, "--pictures", 4)
    lines = run_script("examples/train_fashion/make_reference.py", *options)
    assert lines == [f"{reference} written: (4, 64)"]
    assert load_file(reference)["features"].shape == (4, 64)


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("train_emoji/train_emoji.py", "--data"),
        ("train_fashion/train_fashion.py", "--data"),
        ("train_fashion/make_reference.py", "--test"),
        ("train_flow/train_flow.py", "--data"),
    ],
)
def test_missing_data_is_one_line_and_exit_code_one(
    script: str, option: str, tmp_path: Path
) -> None:
    options = (option, tmp_path / "nothing.npz", "--out", tmp_path / "out")
    lines = run_script(f"examples/{script}", *options, code=1)
    assert lines[-1].startswith(f"{tmp_path / 'nothing.npz'} does not exist; ")
    assert not (tmp_path / "out").exists()


USES = {
    "offload.py": ((), "one layer on cpu at a time"),
    "threads.py": ((), "two threads drew the same pictures as one"),
    "controlnet.py": (("--against", "MODEL"), "drawn beside a ControlNet"),
    "img2img.py": (("--out", "OUT"), "inpaint.png written"),
    "compiled.py": (("--backend", "eager"), "picture of 48 x 16"),
    "lora.py": (("--steps", 2, "--against", "MODEL"), "red above blue, loaded again on"),
}


@pytest.mark.parametrize("script", USES)
def test_what_is_done_with_an_export_works_on_a_tiny_one(
    script: str, prompted_chained: Chained, tmp_path: Path
) -> None:
    if script == "lora.py":
        pytest.importorskip("peft")
    options, last = USES[script]
    places = {"MODEL": prompted_chained.calibration.source.model, "OUT": tmp_path / "pictures"}
    words = [places.get(word, word) for word in options]
    lines = run_script(f"examples/use/{script}", prompted_chained.export, *words)
    assert last in lines[-1]
