"""The document of the format, and a reader that was written from it, against msfp."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoModel

from checkpoint import numpy_reader
from conftest import Chained, Finetuned, files_of
from msfp_cli import MSFPConfig
from msfp_cli.checkpoint.export import export_run
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.errors import MsfpError
from msfp_cli.formats.float_format import FloatFormat, formats_of_width
from msfp_cli.formats.packing import pack
from msfp_cli.formats.rounding import Grid, dequantize, per_channel, quantize
from msfp_cli.formats.transform import InputTransform
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.layers.routing import ROUTER
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.run import Run
from msfp_cli.streaming.quantize import quantize_pipeline
from msfp_cli.streaming.recipe import QuantizeRecipe

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
GOLDEN = re.findall(r"^\| (u?e\dm\d) \| ([-\d ]+) \| ([0-9a-f ]+) \|$", DOCUMENT.read_text(), re.M)


def compare(component: numpy_reader.Component, model: torch.nn.Module) -> int:
    """Compare every weight of a loaded component, and return how many members there were."""
    assert component.digest() == component.header["msfp_digest"]
    layers = quantized_layers(model)
    assert layers.keys() == component.config["layers"].keys()
    count = 0
    for name, layer in layers.items():
        members = component.weights(name, tuple(layer.weight_shape))
        assert len(members) == layer.scheme.hub
        for member, weight in enumerate(members):
            scale = per_channel(layer.get_buffer("weight_scale"), weight.ndim)
            multipliers = layer.multipliers()
            if multipliers is not None:
                scale = scale * multipliers.float()
            expected = dequantize(layer.codes(member), Grid(layer.weight_format(), scale))
            if rotation := layer.scheme.transform.rotation:
                expected = InputTransform(rotation=rotation).rotate(expected)
                np.testing.assert_allclose(weight, expected.numpy(), rtol=1e-4, atol=1e-6)
            else:
                assert (weight == expected.numpy()).all(), name
            count += 1
    return count


@pytest.mark.parametrize(
    "name",
    ["prompted_chained", "prompted_tuned", "prompted_transformed", "tiny_grouped", "tiny_lifting"],
)
def test_reader_reproduces_every_weight_of_an_export(
    name: str, request: pytest.FixtureRequest
) -> None:
    export: Chained | Finetuned = request.getfixturevalue(name)
    pipe = MSFPPipeline.from_pretrained(export.export, device="cpu", keep_packed=True)
    component = numpy_reader.Component(export.export / "unet")
    count = compare(component, pipe.unet)
    has_hubs = name == "prompted_tuned"
    assert (count > len(component.config["layers"])) == has_hubs
    has_groups = any("weight_groups" in layer for layer in component.config["layers"].values())
    assert has_groups == (name == "tiny_grouped")
    is_rotated = any("rotation" in layer for layer in component.config["layers"].values())
    assert is_rotated == (name == "prompted_transformed")
    if has_hubs:
        assert any(tensor.endswith("weight_changes") for tensor in component.tensors)
    if has_hubs or name == "tiny_lifting":
        table = pipe.unet.get_submodule(ROUTER).get_buffer("table")
        assert np.array_equal(component.table(), table.numpy())


def test_export_in_several_files_is_the_same_model(
    prompted_tuned: Finetuned, copied: Callable[..., Path], tmp_path: Path
) -> None:
    whole = MSFPPipeline.from_pretrained(prompted_tuned.export, device="cpu", keep_packed=True)
    directory = tmp_path / "sharded"
    run = Run(copied(prompted_tuned.run.directory))
    export_run(run, directory, max_shard_size="30KB")
    files = sorted((directory / "unet").glob("*.safetensors"))
    assert len(files) > 1
    compare(numpy_reader.Component(directory / "unet"), whole.unet)
    sharded = MSFPPipeline.from_pretrained(directory, device="cpu", keep_packed=True)
    expected = whole.unet.state_dict()
    state = sharded.unet.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    sharded.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    assert files_of(tmp_path / "again") == files_of(directory)
    files[0].unlink()
    with pytest.raises(MsfpError, match="is missing"):
        MSFPPipeline.from_pretrained(directory, device="cpu")


def test_reader_reproduces_formats_of_2_to_8_bits_tables_and_text_encoders(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    rules = tuple(f"*{ending}:{bits}" for bits, ending in enumerate(("q", "k", "v"), start=2))
    rules += ("*to_q:5", "*to_k:6", "*to_v:7", "*fc1:8", "*wi_0:3")
    source = ModelSource(model=str(tiny("FluxPipeline")))
    also = ("text_encoder", "text_encoder_2")
    recipe = QuantizeRecipe(keep=rules, also=also, max_shard_size="20KB")
    quantize_pipeline(source, tmp_path / "out", recipe)
    pipe = MSFPPipeline.from_pretrained(tmp_path / "out", device="cpu", keep_packed=True)
    bits = set[int]()
    for name in ("transformer", *also):
        component = numpy_reader.Component(tmp_path / "out" / name)
        assert compare(component, getattr(pipe, name))
        for entry in component.config["layers"].values():
            bits.add(FloatFormat.parse(entry["weight"]).bits)
    assert bits == set(range(2, 9))


@pytest.mark.parametrize(("name", "values", "content"), GOLDEN)
def test_golden_bytes_are_those_of_both(name: str, values: str, content: str) -> None:
    fmt = FloatFormat.parse(name)
    steps = [int(value) for value in values.split()]
    data = np.frombuffer(bytes.fromhex(content), np.uint8)
    codes = quantize(torch.tensor(steps, dtype=torch.float32), Grid(fmt, 1.0))
    assert pack(codes, fmt.bits).numpy().tobytes() == data.tobytes()
    read = numpy_reader.unpack(data, fmt.bits, len(steps))
    assert numpy_reader.code_book(name)[read].tolist() == steps


def test_golden_bytes_cover_every_width() -> None:
    assert {FloatFormat.parse(name).bits for name, *_ in GOLDEN} == set(range(2, 9))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_code_books_are_those_of_the_document(bits: int, signed: bool) -> None:
    for fmt in formats_of_width(bits, signed=signed):
        assert numpy_reader.code_book(fmt.name).tolist() == list(fmt.code_book)


def test_document_names_every_key(tiny: Callable[[str], Path]) -> None:
    text = DOCUMENT.read_text()
    model = AutoModel.from_pretrained(
        str(tiny("DDIMPipeline") / "unet"), quantization_config=MSFPConfig()
    )
    config = model.config.quantization_config.to_dict()
    keys = (
        config.keys() | next(iter(config["layers"].values())).keys() | {"lookup", "weight_groups"}
    )
    assert [key for key in sorted(keys) if f"| `{key}` |" not in text] == []
