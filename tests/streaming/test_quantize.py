"""`msfp quantize`: a whole pipeline, part by part, as if it had been quantized at once."""

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from safetensors.torch import load_file, save_file

from conftest import Invoke, files_of, only_error
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.checkpoint.quantizer import MSFPConfig
from msfp_cli.errors import CheckpointError, ModelError, MsfpError, UsageError
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.streaming import parts
from msfp_cli.streaming.component import DenoiserJob, plan_of
from msfp_cli.streaming.quantize import quantize_pipeline
from msfp_cli.streaming.recipe import QuantizeRecipe
from msfp_cli.streaming.text_component import TextEncoderJob
from tiny_pipelines import CALL_ARGUMENTS, write_old_names

NAMES = {"FluxPipeline": "transformer", "DDIMPipeline": "unet", "StableDiffusion3Pipeline": ""}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make parts of a few tensors."""
    monkeypatch.setattr(parts, "_SIZE", 20_000)


def quantize(source: Path, out: Path, **settings: object) -> Path:
    quantize_pipeline(ModelSource(model=str(source)), out, QuantizeRecipe(**settings))
    return out


def draw(directory: Path, name: str, **options: object) -> torch.Tensor:
    pipe = DiffusionPipeline.from_pretrained(directory, **options)
    generator = torch.Generator().manual_seed(0)
    return pipe(**CALL_ARGUMENTS[name], output_type="pt", generator=generator).images


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_those_of_a_pipeline_that_is_quantized_while_it_loads(
    name: str, tiny: Callable[[str], Path], tmp_path: Path, small_parts: None
) -> None:
    out = quantize(tiny(name), tmp_path / "out", weights=5, max_shard_size="30KB")
    component = NAMES[name] or "transformer"
    config = PipelineQuantizationConfig(quant_mapping={component: MSFPConfig(weights=5)})
    assert torch.equal(draw(out, name), draw(tiny(name), name, quantization_config=config))
    assert len(list((out / component).glob("*.safetensors"))) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    wrapper = MSFPPipeline.from_pretrained(out)  # compares every file with the seal
    assert list(wrapper.configs) == [component]


def test_tensors_with_names_of_earlier_versions_of_diffusers_are_those_of_today(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny("DDIMPipeline"), old)
    write_old_names(old)
    out = quantize(old, tmp_path / "out")
    assert torch.equal(
        draw(out, "DDIMPipeline"),
        draw(quantize(tiny("DDIMPipeline"), tmp_path / "today"), "DDIMPipeline"),
    )


def test_other_components_are_the_same_files(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("FluxPipeline")
    out = files_of(quantize(source, tmp_path / "out"))
    for name, content in files_of(source).items():
        if name.partition("/")[0] not in ("transformer", "model_index.json"):
            assert out[name] == content


def test_pipeline_is_loaded_as_the_class_that_was_named(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model = str(tiny("StableDiffusionPipeline"))
    source = ModelSource(model=model, pipeline="StableDiffusionImg2ImgPipeline")
    quantize_pipeline(source, tmp_path / "out", QuantizeRecipe())
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "out")).__name__ == source.pipeline
    with pytest.raises(UsageError, match="'Nothing' is not a pipeline of diffusers"):
        quantize_pipeline(
            ModelSource(model=model, pipeline="Nothing"), tmp_path / "no", QuantizeRecipe()
        )
    assert not (tmp_path / "no").exists()


class KilledError(Exception):
    """Stands for a signal."""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("StableDiffusionControlNetPipeline", "needs controlnet, which the model does not have"),
        ("StableDiffusionXLPipeline", "needs text_encoder_2, tokenizer_2, which the model does"),
        ("DDPMPipeline", "has no use for the model's text_encoder, tokenizer, vae"),
    ],
)
def test_class_of_other_components_than_the_model_has_is_refused(
    name: str, message: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = ModelSource(model=str(tiny("StableDiffusionPipeline")), pipeline=name)
    with pytest.raises(UsageError, match=message):
        quantize_pipeline(source, tmp_path / "no", QuantizeRecipe())
    assert not (tmp_path / "no").exists()


def test_killed_command_goes_on_and_ends_with_the_same_bytes(
    tiny: Callable[[str], Path],
    tmp_path: Path,
    small_parts: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = quantize(tiny("FluxPipeline"), tmp_path / "whole")
    written = list[Path]()

    def write_three(path: Path, *rest: object) -> None:
        if len(written) == 3:
            raise KilledError
        written.append(path)
        write_part(path, *rest)

    write_part = parts._write_part
    monkeypatch.setattr(parts, "_write_part", write_three)
    with pytest.raises(KilledError):
        quantize(tiny("FluxPipeline"), tmp_path / "out")
    monkeypatch.setattr(parts, "_write_part", write_part)
    work = tmp_path / ".out.msfp-parts" / "transformer"
    times = {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert len(times) == 3
    (work / ".00003.safetensors.msfp-tmp").write_bytes(b"half")
    made = list[Path]()
    monkeypatch.setattr(
        parts, "_write_part", lambda path, *rest: (made.append(path), write_part(path, *rest))
    )
    out = quantize(tiny("FluxPipeline"), tmp_path / "out")
    assert not {path.name for path in made} & times.keys()
    assert files_of(out) == files_of(whole)


@pytest.mark.parametrize("name", ["plan.json", "00000.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", None])
def test_damaged_parts_are_made_again(
    name: str,
    content: bytes | None,
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = quantize(tiny("DDIMPipeline"), tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(parts.Parts, "fill_", stop)
        quantize(tiny("DDIMPipeline"), tmp_path / "out")
    damaged = tmp_path / ".out.msfp-parts" / "unet" / name
    damaged.unlink()
    if content is not None:
        damaged.write_bytes(content)
    assert files_of(quantize(tiny("DDIMPipeline"), tmp_path / "out")) == files_of(whole)


def stop(*arguments: object) -> None:
    raise KilledError


@pytest.mark.parametrize("change", ["nothing", "recipe", "size", "time", "place"])
def test_plan_tells_models_and_recipes_apart(change: str, tmp_path: Path) -> None:
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "model.safetensors").write_bytes(b"weights")
        os.utime(tmp_path / place / "model.safetensors", (1, 1))
    file = tmp_path / "one" / "model.safetensors"
    before = plan_of([file], QuantizeRecipe())
    if change == "size":
        file.write_bytes(b"more weights")
        os.utime(file, (1, 1))
    elif change == "time":
        os.utime(file, (2, 2))
    elif change == "place":
        file = tmp_path / "other" / "model.safetensors"
    after = plan_of([file], QuantizeRecipe(weights=5 if change == "recipe" else 4))
    assert (after == before) == (change == "nothing")


@pytest.mark.parametrize("change", ["recipe", "file"])
def test_parts_of_another_recipe_or_model_are_made_again(
    change: str, tiny: Callable[[str], Path], copied: Callable[..., Path], tmp_path: Path
) -> None:
    source = copied(tiny("DDIMPipeline"), "source")
    out = tmp_path / "out"
    work = parts.Parts(tmp_path / ".out.msfp-parts" / "unet")
    quantize(source, out)
    shutil.rmtree(out)
    work.begin({"another": "plan"})
    (work.directory / "00000.safetensors").write_bytes(b"of another plan")
    if change == "file":
        (path,) = (source / "unet").glob("*.safetensors")
        os.utime(path)
    quantize(source, out, weights=4 if change == "file" else 6)
    assert MSFPPipeline.from_pretrained(out).configs


def test_files_of_a_variant_are_read_and_copied_without_it(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    name = "StableDiffusionPipeline"
    source = tmp_path / "source"
    pipe = DiffusionPipeline.from_pretrained(tiny(name), dtype=torch.float16)
    pipe.save_pretrained(source, variant="fp16", max_shard_size="40KB")
    out = tmp_path / "out"
    quantize_pipeline(ModelSource(model=str(source), variant="fp16"), out, QuantizeRecipe())
    assert not [path for path in out.rglob("*fp16*")]
    again = DiffusionPipeline.from_pretrained(out, dtype=torch.float16)
    for part in ("vae", "text_encoder"):
        expected = getattr(pipe, part).state_dict()
        assert all(
            torch.equal(tensor, expected[key])
            for key, tensor in getattr(again, part).state_dict().items()
        )


def test_layers_have_the_bits_of_the_rules(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    out = quantize(
        tiny("DDIMPipeline"), tmp_path / "out", keep=("*attentions*:6", "mid_block.res*:none")
    )
    config = json.loads((out / "unet" / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    bits = {name: FloatFormat.parse(entry["weight"]).bits for name, entry in layers.items()}
    assert {count for name, count in bits.items() if "attentions" in name} == {6}
    assert not [name for name in bits if name.startswith(("mid_block.res", "conv_in"))]
    assert {count for name, count in bits.items() if "resnets" in name} == {4}


def test_unreadable_sources_are_one_line(
    tiny: Callable[[str], Path], copied: Callable[..., Path], tmp_path: Path, msfp: Invoke
) -> None:
    out = quantize(tiny("DDIMPipeline"), tmp_path / "out")
    with pytest.raises(UsageError, match="unet is quantized already"):
        quantize(out, tmp_path / "again")
    source = copied(tiny("DDIMPipeline"), "source")
    (path,) = (source / "unet").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="download the model again"):
        quantize(source, tmp_path / "again")
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(ModelError, match="no safetensors files"):
        quantize(source, tmp_path / "again")
    assert "exists already" in only_error(msfp("quantize", source, "--out", out), 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "scheduler/scheduler_config.json",
            b'{"beta_start": 0.0',
            "scheduler_config.json is damaged",
        ),
        ("scheduler/scheduler_config.json", None, "scheduler_config.json is a link to nothing"),
        ("tokenizer/vocab.json", b"\xff", "vocab.json is damaged"),
        ("tokenizer/tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json is damaged"),
        ("text_encoder/config.json", b"{", "text_encoder/config.json is damaged"),
    ],
)
def test_files_beside_the_weights_are_looked_at_before_anything_is_encoded(
    name: str,
    content: bytes | None,
    message: str,
    tiny: Callable[[str], Path],
    copied: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = copied(tiny("StableDiffusionPipeline"), "broken")
    path = broken / name
    if content is not None:
        path.write_bytes(content)
    else:
        path.unlink()
        path.symlink_to("nowhere")  # as in a cache whose blobs were deleted
    monkeypatch.setattr(DenoiserJob, "encode", lambda job, progress: pytest.fail("encoded"))
    for also in ((), ("text_encoder",)):
        with pytest.raises(MsfpError, match=message) as caught:
            quantize(broken, tmp_path / "out", also=also)
        assert len(str(caught.value).splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_command_prints_path_sizes_and_speed(tiny: Callable[[str], Path], msfp: Invoke) -> None:
    result = msfp("quantize", tiny("FluxPipeline"), "--out", "out", "--json", "--keep", "nothing:8")
    report = json.loads(result.stdout)
    size = sum(len(load) for load in map(Path.read_bytes, Path("out/transformer").glob("*.saf*")))
    assert report["components"]["transformer"]["after"] == size
    assert report["parameters_per_second"] > 0
    (file,) = (tiny("FluxPipeline") / "transformer").glob("*.safetensors")
    assert report["num_parameters"] == sum(each.numel() for each in load_file(file).values())
    assert "million a second" in result.stderr
    assert "'nothing:8' matches no layer" in result.stderr
    assert "next: msfp sample out" in result.stderr


def test_command_says_no_speed_where_a_killed_one_has_encoded_everything(
    tiny: Callable[[str], Path], msfp: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DenoiserJob, "write", Mock(side_effect=KeyboardInterrupt))
        assert msfp("quantize", tiny("DDIMPipeline"), "--out", "out").exit_code
    result = msfp("quantize", tiny("DDIMPipeline"), "--out", "out", "--json")
    report = json.loads(result.stdout)
    assert (report["num_parameters"], report["components"].keys()) == (0, {"unet"})
    assert "a second" not in result.stderr


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("FluxPipeline", " --prompt 'a red dress'"),
        ("DiTPipeline", " --prompt 1"),
        ("DDIMPipeline", ""),
    ],
)
def test_command_that_is_next_works(
    name: str, option: str, tiny: Callable[[str], Path], msfp: Invoke
) -> None:
    done = msfp("quantize", tiny(name), "--out", "q")
    *_, line = done.stderr.splitlines()
    assert line == f"next: msfp sample q{option}"
    options = (
        ("--steps", 1, "--height", 32, "--width", 32) if name == "FluxPipeline" else ("--steps", 2)
    )
    drawn = msfp(*shlex.split(line)[2:], *options)
    assert drawn.exit_code == 0, drawn.stderr


def test_text_encoders_are_quantized_if_asked_for(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    also = ("text_encoder", "text_encoder_2")
    name = "FluxPipeline"
    mapping = PipelineQuantizationConfig(
        quant_mapping={part: MSFPConfig() for part in ("transformer", *also)}
    )
    expected = draw(tiny(name), name, quantization_config=mapping)
    with pytest.raises(KilledError), monkeypatch.context() as patch:
        patch.setattr("msfp_cli.streaming.quantize.replace_directory", _kill)
        quantize(tiny(name), tmp_path / "out", also=also)
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoderJob, "_write_whole", _kill)  # it is finished already
        out = quantize(tiny(name), tmp_path / "out", also=also)
    assert torch.equal(draw(out, name), expected)
    assert MSFPPipeline.from_pretrained(out).configs.keys() == {"transformer", *also}
    for part in also:
        sizes = [(each / part / "model.safetensors").stat().st_size for each in (tiny(name), out)]
        assert sizes[1] < sizes[0] / 2


def _kill(*arguments: object, **options: object) -> None:
    raise KilledError


@pytest.mark.parametrize("also", [(), ("text_encoder_2",)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "transformer_blocks.0.attn.to_q.weight"),
        ("transformer", "single_transformer_blocks.0.proj_out.bias"),
        ("transformer", "transformer_blocks.0.attn.norm_q.weight"),
        ("text_encoder", "encoder.layers.0.self_attn.q_proj.weight"),
        ("text_encoder", "encoder.layers.1.self_attn.k_proj.bias"),
        ("text_encoder", "final_layer_norm.weight"),
        ("vae", "decoder.conv_in.weight"),
    ],
)
def test_tensor_that_is_not_finite_is_named(
    part: str,
    name: str,
    value: float,
    also: tuple[str, ...],
    tiny: Callable[[str], Path],
    copied: Callable[..., Path],
    tmp_path: Path,
) -> None:
    broken = copied(tiny("FluxPipeline"), "broken")
    (path,) = (broken / part).glob("*.safetensors")
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})
    for quantized in (also, (*also, "text_encoder")):  # or copied as it is
        with pytest.raises(CheckpointError, match=rf"{name} holds a NaN or infinity") as caught:
            quantize(broken, tmp_path / "out", also=quantized)
        assert len(str(caught.value).splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_text_encoder_that_lacks_a_tensor_is_refused(
    tiny: Callable[[str], Path], copied: Callable[..., Path], tmp_path: Path
) -> None:
    model = copied(tiny("FluxPipeline"))
    path = model / "text_encoder" / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("final_layer_norm.bias"))
    del state[name]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ModelError, match=f"text_encoder lack the tensor {name}"):
        quantize(model, tmp_path / "out", also=("text_encoder",))


def test_other_components_are_not_text_encoders(tiny: Callable[[str], Path], msfp: Invoke) -> None:
    result = msfp("quantize", tiny("FluxPipeline"), "--also", "vae")
    assert "it has text_encoder, text_encoder_2" in only_error(result, 2)
