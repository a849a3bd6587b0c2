"""Text encoders that are quantized beside a calibrated denoiser."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from conftest import QUICK, Invoke, only_error
from msfp_cli.calibration.estimate import check_layers
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.checkpoint.in_memory import quantize_
from msfp_cli.checkpoint.quantizer import MSFPConfig
from msfp_cli.errors import UsageError
from msfp_cli.evaluation.provenance import provenance_of
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.progress import SILENT
from msfp_cli.run import Run
from tiny_pipelines import CALL_ARGUMENTS

NAME = "FluxPipeline"
SIZES = ("--num-images", 2, "--steps", 1, "--lift", 0, "--rounding", "nearest")


def draw(pipe: DiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(**CALL_ARGUMENTS[NAME], output_type="pt", generator=generator).images


def test_a_text_encoder_is_exported_with_its_bits_and_loads_as_it_was(
    msfp: Invoke, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    also = ("--also", "text_encoder_2:weights=5", "--also", "text_encoder")
    assert msfp("calibrate", tiny(NAME), *SIZES, *also).exit_code == 0
    assert msfp("export").exit_code == 0
    pipe = DiffusionPipeline.from_pretrained("msfp-run/export")
    bits = {"text_encoder": 4, "text_encoder_2": 5}
    for component, expected in bits.items():
        layers = quantized_layers(getattr(pipe, component)).values()
        assert expected in {layer.scheme.weight.bits for layer in layers}
    assert quantized_layers(pipe.transformer)
    pipe.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(draw(again), draw(pipe))
    assert msfp("status").stdout.count("text_encoder") >= 2


def test_kernels_are_named_for_the_denoiser_alone(
    msfp: Invoke, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("MSFP_CACHE", str(tmp_path / "cache"))
    also = ("--also", "text_encoder", "--guidance-scale", 2.5)
    assert msfp("calibrate", tiny("StableDiffusionPipeline"), *SIZES, *also).exit_code == 0
    exported = msfp("export", "--engine", "openvino")
    assert exported.exit_code == 0, exported.stderr
    for kernel in ("cpu", "openvino"):
        drawn = msfp("sample", "--prompt", "a cat", "--kernel", kernel)
        assert drawn.exit_code == 0, drawn.stderr
    # Settings of the sampler are the denoiser's, and the run knows its export.
    here = msfp("sample", "--prompt", "a cat", "--out", "here")
    elsewhere = msfp(
        "sample", "msfp-run/export", "--prompt", "a cat", "--run", "other", "--out", "elsewhere"
    )
    assert (here.exit_code, elsewhere.exit_code) == (0, 0), elsewhere.stderr
    assert Path("here/sheet.png").read_bytes() == Path("elsewhere/sheet.png").read_bytes()
    run = Run(Path("msfp-run"))
    assert provenance_of(run, run.export).calibration is not None


def test_a_component_that_is_no_text_encoder_is_refused(
    msfp: Invoke, tiny: Callable[[str], Path]
) -> None:
    result = msfp("calibrate", tiny(NAME), *SIZES, "--also", "vae:weights=4")
    assert "has text_encoder, text_encoder_2" in only_error(result, 2)


def test_a_text_encoder_that_is_quantized_already_is_refused_before_anything_is_recorded(
    tiny: Callable[[str], Path],
) -> None:
    pipe = load_pipeline(ModelSource(model=str(tiny(NAME))), "cpu")
    recipe = replace(QUICK, also=("text_encoder_2",))
    check_layers(pipe, recipe, SILENT)
    quantize_(pipe.text_encoder_2, MSFPConfig())
    with pytest.raises(UsageError, match="'text_encoder_2' is quantized already; load it in full"):
        check_layers(pipe, recipe, SILENT)


@pytest.mark.parametrize(
    "text", ["", ":weights=4", "text_encoder:bits=4", "text_encoder:weights=none"]
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--also"):
        CalibrateRecipe(also=(text,))


def test_recipes_of_earlier_versions_have_none() -> None:
    values = QUICK.to_json()
    del values["also"]
    assert CalibrateRecipe.from_json(values) == QUICK
