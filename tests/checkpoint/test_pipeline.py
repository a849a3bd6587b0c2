"""Reloading an export: the wrapper, and what both entry points say of a damaged one."""

import copy
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import msfp_cli
from conftest import Chained, Finetuned, Invoke
from msfp_cli.checkpoint import contents
from msfp_cli.checkpoint.contents import Contents
from msfp_cli.checkpoint.in_memory import quantize_
from msfp_cli.checkpoint.pipeline import MSFPPipeline, read_configs
from msfp_cli.checkpoint.quantizer import MSFPConfig
from msfp_cli.checkpoint.reseal import reseal
from msfp_cli.errors import CheckpointError, ModelError, MsfpError, RunError, UsageError
from msfp_cli.files.directories import refuse_foreign
from msfp_cli.files.documents import digest
from msfp_cli.files.seal import MARK
from msfp_cli.layers.quantized import QuantConv2d, QuantLinear
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.layers.routing import ROUTER
from msfp_cli.pipelines.loading import ModelSource, load_pipeline

Damage = Callable[[Path], None]


def tensors_of(denoiser: Path) -> Path:
    """Return the denoiser's safetensors file."""
    return denoiser / "diffusion_pytorch_model.safetensors"


def flip(path: Path, position: int, mask: int = 0xFF) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(content)


def truncate(denoiser: Path) -> None:
    """Cut the last byte off."""
    path = tensors_of(denoiser)
    path.write_bytes(path.read_bytes()[:-1])


def empty(denoiser: Path) -> None:
    """Leave a file of no bytes, as a full disk does."""
    tensors_of(denoiser).write_bytes(b"")


def flip_data_byte(denoiser: Path) -> None:
    """Change the last byte of the data."""
    flip(tensors_of(denoiser), -1)


def flip_scale_bit(denoiser: Path) -> None:
    """Change the lowest bit of the first weight scale."""
    path = tensors_of(denoiser)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name.endswith("weight_scale"))
    flip(path, 8 + length + header[name]["data_offsets"][0], 1)


def _rewrite(denoiser: Path, *, drop: str = "", digest: bool = True) -> None:
    """Write the file again without the first tensor whose name ends so, or without the digest."""
    path = tensors_of(denoiser)
    with safe_open(path, framework="pt") as file:
        metadata = {
            key: value for key, value in file.metadata().items() if digest or key != "msfp_digest"
        }
    tensors = load_file(path)
    if drop:
        del tensors[next(name for name in sorted(tensors) if name.endswith(drop))]
    save_file(tensors, path, metadata)


def lose_codes(denoiser: Path) -> None:
    """Leave one layer's codes out."""
    _rewrite(denoiser, drop="weight_codes")


def lose_bias(denoiser: Path) -> None:
    """Leave one float tensor out."""
    _rewrite(denoiser, drop=".bias")


def lose_digest(denoiser: Path) -> None:
    """Leave the digest out."""
    _rewrite(denoiser, digest=False)


def _change_config(denoiser: Path, change: Callable[[dict], object]) -> None:
    """Change the denoiser's quantization config."""
    path = denoiser / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def newer_schema(denoiser: Path) -> None:
    """Pretend that a later version wrote it, with keys that we do not know."""
    _change_config(denoiser, lambda config: config.update(schema_version=99, rotation="hadamard"))


def nameless_schema(denoiser: Path) -> None:
    """Write a schema version that is no number."""
    _change_config(denoiser, lambda config: config.update(schema_version="new"))


def unknown_key(denoiser: Path) -> None:
    """Add a key that this schema does not have."""
    _change_config(denoiser, lambda config: config.update(rotation="hadamard"))


def unknown_layer(denoiser: Path) -> None:
    """Name a layer that the denoiser does not have."""
    _change_config(
        denoiser, lambda config: config["layers"].update(nowhere=config["layers"]["conv_in"])
    )


def unknown_format(denoiser: Path) -> None:
    """Give a layer a format that there is not."""
    _change_config(denoiser, lambda config: config["layers"]["conv_in"].update(weight="e9"))


def lost_parameter(denoiser: Path) -> None:
    """Leave a layer's input out."""
    _change_config(denoiser, lambda config: config["layers"]["conv_in"].pop("input"))


def layers_no_table(denoiser: Path) -> None:
    """Write a list in place of the table."""
    _change_config(denoiser, lambda config: config.update(layers=["conv_in"]))


def another_input_scale(denoiser: Path) -> None:
    """Change a number that no tensor holds."""
    _change_config(denoiser, lambda config: config["layers"]["conv_in"]["input"].update(scale=0.5))


DAMAGES: dict[Damage, str] = {
    truncate: "damaged",
    empty: "damaged",
    flip_data_byte: "altered",
    flip_scale_bit: "altered",
    lose_codes: "altered",
    lose_bias: "altered",
    lose_digest: "no msfp digest|altered",
    newer_schema: "upgrade",
    nameless_schema: "layout",
    unknown_key: "rotation",
    unknown_layer: "altered|nowhere",
    unknown_format: "altered|damaged",
    lost_parameter: "altered|damaged",
    layers_no_table: "altered|damaged",
    another_input_scale: "altered",
}
HINTS = ("pip install -U msfp", "was this made from another model?")


def _from_wrapper(directory: Path) -> object:
    return MSFPPipeline.from_pretrained(directory, device="cpu")


ENTRY_POINTS = {
    "MSFPPipeline": _from_wrapper,
    "DiffusionPipeline": DiffusionPipeline.from_pretrained,
}


@pytest.mark.parametrize("entry", ENTRY_POINTS)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_broken_export_is_refused_in_one_helpful_line(
    tiny_chained: Chained, copied: Callable[..., Path], damage: Damage, entry: str
) -> None:
    directory = copied(tiny_chained.export)
    ENTRY_POINTS[entry](directory)
    damage(directory / "unet")
    if entry == "DiffusionPipeline" and damage in (truncate, empty):
        # diffusers opens the file before it asks our quantizer anything.
        with pytest.raises(OSError, match=tensors_of(directory / "unet").name):
            ENTRY_POINTS[entry](directory)
        return
    with pytest.raises(CheckpointError, match=DAMAGES[damage]) as caught:
        ENTRY_POINTS[entry](directory)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert any(
        hint in message
        for hint in (
            "export again",
            "export it again",
            "download it again, or export it again",
            *HINTS,
        )
    )


@pytest.mark.parametrize(
    "damage", [truncate, flip_scale_bit, newer_schema], ids=lambda damage: damage.__name__
)
def test_sampling_a_broken_export_fails_with_one_line(
    tiny_chained: Chained, copied: Callable[..., Path], msfp: Invoke, damage: Damage
) -> None:
    directory = copied(tiny_chained.export)
    damage(directory / "unet")
    result = msfp("sample", directory, "--out", "pictures")
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert DAMAGES[damage] in result.stderr
    assert not Path("pictures").exists()


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"quantization_config": 3}'])
def test_config_that_is_no_config_is_refused(
    tiny_chained: Chained, copied: Callable[..., Path], content: str
) -> None:
    directory = copied(tiny_chained.export)
    (directory / "unet" / "config.json").write_text(content)
    with pytest.raises(
        CheckpointError, match="config.json is damaged .*; download it again, or export it again"
    ):
        MSFPPipeline.from_pretrained(directory, device="cpu")


def test_float_pipeline_is_no_export(tiny: Callable[[str], Path]) -> None:
    model = tiny("DDIMPipeline")
    with pytest.raises(ModelError, match=f"msfp did not export it; run `msfp calibrate {model}`"):
        MSFPPipeline.from_pretrained(model)


def test_directory_without_an_index_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model_index.json; `msfp export` makes one"):
        MSFPPipeline.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def wrapper(prompted_chained: Chained) -> MSFPPipeline:
    """Load the text-to-image export."""
    return MSFPPipeline.from_pretrained(prompted_chained.export, device="cpu")


def test_wrapper_is_the_stock_pipeline(wrapper: MSFPPipeline) -> None:
    assert msfp_cli.MSFPPipeline is MSFPPipeline
    assert isinstance(wrapper, StableDiffusionPipeline)
    assert isinstance(wrapper, MSFPPipeline)
    assert type(wrapper).__name__ == "StableDiffusionPipeline"
    assert wrapper.pipe is wrapper
    pictures = [
        p("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
        for p in (wrapper, wrapper.pipe)
    ]
    assert np.array_equal(*pictures)
    with pytest.raises(AttributeError, match="no_such_part"):
        _ = wrapper.no_such_part


@pytest.mark.parametrize("options", [{}, {"safe_serialization": True}], ids=["ours", "stock"])
def test_what_our_pipeline_writes_names_the_stock_class(
    wrapper: MSFPPipeline, tmp_path: Path, options: dict[str, bool]
) -> None:
    wrapper.save_pretrained(tmp_path / "again", **options)
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(again) is StableDiffusionPipeline


def test_what_diffusers_writes_as_a_variant_is_read_as_one(
    wrapper: MSFPPipeline, tmp_path: Path
) -> None:
    wrapper.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ModelError, match="has weight files of a variant only; give --variant fp16"):
        MSFPPipeline.from_pretrained(tmp_path)
    again = MSFPPipeline.from_pretrained(tmp_path, variant="fp16")
    layers = quantized_layers(again.unet)
    assert layers.keys() == quantized_layers(wrapper.unet).keys()
    for name, layer in quantized_layers(wrapper.unet).items():
        assert torch.equal(layers[name].weight, layer.weight)


def test_pipelines_are_made_from_ours_and_from_copies_of_it(wrapper: MSFPPipeline) -> None:
    made = AutoPipelineForImage2Image.from_pipe(wrapper)
    assert type(made) is StableDiffusionImg2ImgPipeline
    assert made.unet is wrapper.unet
    twin = copy.deepcopy(wrapper)
    assert type(twin) is type(wrapper)
    assert twin.configs.keys() == wrapper.configs.keys() == {"unet"}


def test_description_names_the_source_and_the_formats(
    wrapper: MSFPPipeline, prompted_chained: Chained
) -> None:
    (line,) = wrapper.describe().splitlines()
    table = prompted_chained.calibration.table("unet").values()
    unsigned = sum(not p.input.format.signed for p in table)
    assert line.startswith(
        f"unet: {len(table)} quantized layers of {prompted_chained.calibration.source.model};"
    )
    assert {str(p.weight) for p in table} <= set(line.replace(";", "").split())
    assert {str(p.input.format) for p in table} <= set(line.replace(",", "").split())
    assert f", {unsigned} of them unsigned; run by cpu (" in line


def test_description_of_weights_alone_says_so(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny("DDIMPipeline"))
    quantize_(pipe.unet, MSFPConfig())
    pipe.save_pretrained(tmp_path)
    described = MSFPPipeline.from_pretrained(tmp_path).describe()
    assert "; inputs in floating point; run by " in described


@pytest.mark.parametrize(
    "other", [{"kernel": "reference"}, {"kernel": "cpu", "keep_packed": True}], ids=str
)
def test_kernels_in_integers_draw_the_same_picture(
    other: dict[str, Any], fashion_chained: Chained
) -> None:
    if other["kernel"] == "reference" and not torch.cpu._is_vnni_supported():
        pytest.skip("without VNNI the layers at 8 bits are simulated")
    pictures = []
    for options in ({"kernel": "cpu"}, other, {"kernel": "simulated"}):
        pipe = MSFPPipeline.from_pretrained(fashion_chained.export, device="cpu", **options)
        assert f"run by {options['kernel']} (" in pipe.describe()
        generator = torch.Generator().manual_seed(0)
        drawn = pipe("a red dress", num_inference_steps=4, guidance_scale=3.0, generator=generator)
        pictures.append(np.asarray(drawn.images[0]).astype(int))
    assert np.array_equal(pictures[0], pictures[1])
    assert (
        0 < np.abs(pictures[0] - pictures[2]).mean() < 10
    )  # sums in floating point move a code here and there


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="only Linux says which files are mapped"
)
def test_laid_out_weights_leave_the_file(tiny_chained: Chained, tmp_path: Path) -> None:
    shutil.copytree(tiny_chained.export, tmp_path / "export")

    def is_mapped(*, keep_packed: bool) -> bool:
        pipe = MSFPPipeline.from_pretrained(
            tmp_path / "export", device="cpu", keep_packed=keep_packed
        )
        assert len(quantized_layers(pipe.unet)) > 0
        return str(tmp_path / "export") in Path("/proc/self/maps").read_text()

    assert is_mapped(keep_packed=True)
    gc.collect()
    assert not is_mapped(keep_packed=False)


def test_unknown_kernel_is_refused(fashion_chained: Chained) -> None:
    with pytest.raises(UsageError, match="unknown kernel 'gpu'; choose one of auto, "):
        MSFPPipeline.from_pretrained(fashion_chained.export, device="cpu", kernel="gpu")


def test_configs_are_read_by_component(prompted_chained: Chained) -> None:
    configs = read_configs(prompted_chained.export)
    assert list(configs) == ["unet"]
    assert configs["unet"].table() == prompted_chained.calibration.table("unet")


@torch.no_grad()
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_half_precision_leaves_codes_and_scales_alone(argument: str, tiny_chained: Chained) -> None:
    full = MSFPPipeline.from_pretrained(tiny_chained.export, device="cpu")
    half = {argument: torch.bfloat16}
    pipe = MSFPPipeline.from_pretrained(tiny_chained.export, device="cpu", **half).pipe
    layers = {
        n: m for n, m in pipe.unet.named_modules() if isinstance(m, QuantLinear | QuantConv2d)
    }
    for name, layer in layers.items():
        assert layer.bias is None or layer.bias.dtype == torch.bfloat16
        assert layer.packed_codes().dtype == torch.uint8
        assert torch.equal(layer.weight_scale, tiny_chained.calibration.scales["unet"][name])
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, half = (p.unet(x.to(p.dtype), 500).sample.float() for p in (full, pipe))
    assert 0 < (half - whole).square().sum() < 0.05 * whole.square().sum()


def flip_table(denoiser: Path) -> None:
    """Let another member serve a timestep."""
    path = tensors_of(denoiser)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    flip(
        path,
        8 + length + json.loads(content[8 : 8 + length])[f"{ROUTER}.table"]["data_offsets"][0],
        1,
    )


def lose_table(denoiser: Path) -> None:
    """Leave the router out."""
    _rewrite(denoiser, drop=f"{ROUTER}.table")


def fewer_members(denoiser: Path) -> None:
    """Say that a layer that switches does not."""

    def forget_hub(config: dict) -> None:
        next(layer for layer in config["layers"].values() if layer["hub"] > 1)["hub"] = 1

    _change_config(denoiser, forget_hub)


def another_unit(denoiser: Path) -> None:
    """Read the timesteps as thousandths."""
    _change_config(denoiser, lambda config: config.update(timestep_unit=1000.0))


@pytest.mark.parametrize("entry", ENTRY_POINTS)
@pytest.mark.parametrize(
    "damage", [flip_table, lose_table, fewer_members, another_unit], ids=lambda d: d.__name__
)
def test_broken_router_is_refused_in_one_helpful_line(
    tiny_tuned: Finetuned, copied: Callable[..., Path], damage: Damage, entry: str
) -> None:
    directory = copied(tiny_tuned.export)
    ENTRY_POINTS[entry](directory)
    damage(directory / "unet")
    with pytest.raises(
        CheckpointError, match="altered.*export (or download )?(it )?again"
    ) as caught:
        ENTRY_POINTS[entry](directory)
    assert len(str(caught.value).splitlines()) == 1


@torch.no_grad()
def test_timestep_decides_which_set_of_weights_serves(tiny_tuned: Finetuned) -> None:
    unet = MSFPPipeline.from_pretrained(tiny_tuned.export, device="cpu").unet
    layers = [
        m for m in unet.modules() if isinstance(m, QuantLinear | QuantConv2d) and m.scheme.hub > 1
    ]
    seen: dict[float, list[list[int]]] = {}
    timesteps = tiny_tuned.tuned.timesteps
    for timestep in (*timesteps, *reversed(timesteps)):
        members: list[int] = []
        handles = [
            m.register_forward_pre_hook(lambda m, args, to=members: to.append(m.member()))
            for m in layers
        ]
        unet(torch.zeros(1, 3, 16, 16), torch.tensor(timestep))
        seen.setdefault(timestep, []).append(members)
        for handle in handles:
            handle.remove()
    assert all(first == second for first, second in seen.values())
    assert len({tuple(first) for first, _ in seen.values()}) > 1


def test_layer_that_switches_needs_its_denoiser_to_run(tiny_tuned: Finetuned) -> None:
    unet = MSFPPipeline.from_pretrained(tiny_tuned.export, device="cpu").unet
    layer = next(m for m in unet.modules() if isinstance(m, QuantLinear) and m.scheme.hub > 1)
    for _ in range(2):
        with pytest.raises(MsfpError, match="outside its denoiser"):
            layer(torch.zeros(1, layer.in_features))
        with pytest.raises(
            RuntimeError
        ):  # wrong number of channels: the denoiser fails within a call
            unet(torch.zeros(1, 5, 16, 16), 500)
    with pytest.raises(MsfpError, match="several timesteps at once"):
        unet(torch.zeros(2, 3, 16, 16), torch.tensor([1, 500]))


@torch.no_grad()
def test_half_precision_keeps_the_router(tiny_tuned: Finetuned) -> None:
    full = MSFPPipeline.from_pretrained(tiny_tuned.export, device="cpu")
    half = MSFPPipeline.from_pretrained(tiny_tuned.export, dtype=torch.bfloat16, device="cpu")
    tables = [pipe.unet.get_submodule(ROUTER).get_buffer("table") for pipe in (full, half)]
    assert torch.equal(*tables)
    assert tables[1].dtype == torch.uint8
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, less = (pipe.unet(x.to(pipe.pipe.dtype), 333).sample.float() for pipe in (full, half))
    assert 0 < (less - whole).square().sum() < 0.2 * whole.square().sum()


def test_sampling_a_fine_tuned_export_works(
    tiny_tuned: Finetuned, copied: Callable[..., Path], msfp: Invoke
) -> None:
    result = msfp("sample", copied(tiny_tuned.export), "--out", "pictures", "--device", "cpu")
    assert (result.exit_code, result.stdout) == (0, "pictures/sheet.png\n"), result.stderr


def change_model(directory: Path, key: str, value: object) -> None:
    """Change a setting of the denoiser's architecture."""
    path = directory / "unet" / "config.json"
    config = json.loads(path.read_text())
    assert key in config
    config[key] = value
    path.write_text(json.dumps(config))


ARCHITECTURE = {
    "norm_eps": 1e-3,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "act_fn": "gelu",
    "norm_num_groups": 2,
    "mid_block_scale_factor": 2,
    "center_input_sample": True,
    "downsample_padding": 0,
}


@pytest.mark.parametrize("entry", ENTRY_POINTS)
@pytest.mark.parametrize("key", ARCHITECTURE)
def test_altered_architecture_is_refused(
    tiny_chained: Chained, copied: Callable[..., Path], key: str, entry: str
) -> None:
    directory = copied(tiny_chained.export)
    change_model(directory, key, ARCHITECTURE[key])
    with pytest.raises(CheckpointError, match="altered.*msfp export --reseal"):
        ENTRY_POINTS[entry](directory)


def test_altered_parts_that_are_not_quantized_are_refused(
    prompted_chained: Chained, copied: Callable[..., Path]
) -> None:
    directory = copied(prompted_chained.export)
    names = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    assert len(names) > 8
    for name in names:
        before = (directory / name).read_bytes()
        flip(directory / name, -2, 1)
        for load in (_from_wrapper, _from_loader):
            with pytest.raises(CheckpointError, match=f"{name.name} is (altered|damaged)"):
                load(directory)
        (directory / name).write_bytes(before)
    _from_wrapper(directory)


def test_what_a_seal_covers_is_hashed_once(
    tiny_chained: Chained, copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copied(tiny_chained.export)
    hashed: list[Path] = []
    monkeypatch.setattr(contents, "refuse_altered", lambda path, *_, **__: hashed.append(path))
    _from_wrapper(directory)
    assert not hashed
    DiffusionPipeline.from_pretrained(directory)
    assert hashed == [tensors_of(directory / "unet")]
    (directory / MARK).unlink()
    _from_wrapper(directory)
    assert len(hashed) == 2


def _from_loader(directory: Path) -> object:
    """Load as the commands do, `msfp evaluate` say."""
    return load_pipeline(ModelSource(model=str(directory)), "cpu")


def test_a_change_on_purpose_is_loaded_unchecked_or_sealed_again(
    tiny_chained: Chained, copied: Callable[..., Path], msfp: Invoke
) -> None:
    directory = copied(tiny_chained.export)
    (directory / "README.md").write_text("mine")
    change_model(directory, "norm_eps", 1e-3)
    assert MSFPPipeline.from_pretrained(directory, check=False).unet.config["norm_eps"] == 1e-3
    result = msfp("export", "--reseal", directory)
    assert (result.exit_code, result.stdout) == (0, f"{directory}\n"), result.stderr
    for entry in ENTRY_POINTS.values():
        assert entry(directory).unet.config["norm_eps"] == 1e-3
    with pytest.raises(RunError, match="README.md was not written by msfp"):
        refuse_foreign(directory)


def test_resealing_what_is_unchanged_changes_nothing(
    tiny_chained: Chained, copied: Callable[..., Path]
) -> None:
    directory = copied(tiny_chained.export)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    reseal(directory)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def rewrite_signed(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors as a faulty writer would: with a digest that fits, and no seal."""
    path = tensors_of(directory / "unet")
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    change(tensors)
    save_file(tensors, path, {**header, "msfp_digest": digest(tensors)})
    (directory / "msfp.json").unlink()


def fill(ending: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    """Return what fills the first tensor with such a name."""
    return lambda tensors: tensors[next(n for n in tensors if n.endswith(ending))].fill_(value)


def drop(ending: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """Return what takes the first tensor with such a name out."""
    return lambda tensors: tensors.pop(next(n for n in tensors if n.endswith(ending)))


def as_float(tensors: dict[str, torch.Tensor]) -> None:
    """Write the router's table as floats."""
    tensors[f"{ROUTER}.table"] = tensors[f"{ROUTER}.table"].float()


SIGNED = {
    "scale NaN": (fill(".weight_scale", float("nan")), "not positive and finite"),
    "scale negative": (fill(".weight_scale", -1.0), "not positive and finite"),
    "scale 0": (fill(".weight_scale", 0.0), "not positive and finite"),
    "scale 1e38": (fill(".weight_scale", 1e38), "not positive and finite"),
    "bias NaN": (fill(".bias", float("nan")), "NaN or an infinity"),
    "codes gone": (drop(".weight_codes"), "weight_codes is missing"),
    "bias gone": (drop(".bias"), "bias is missing"),
    "table gone": (drop(".table"), "table is missing"),
    "table 255": (fill(".table", 255), "member that there is not"),
    "table float": (as_float, "is of type torch.float32"),
}


@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "scale_shift_table"])
def test_parameter_that_is_not_finite_is_refused_whatever_its_name(
    name: str, tmp_path: Path
) -> None:
    tensors = {"conv.weight": torch.ones(4), name: torch.full((4,), float("nan"))}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"msfp_digest": digest(tensors)})
    with pytest.raises(CheckpointError, match=f"{name} holds a NaN"):
        Contents.read([path])


@pytest.mark.parametrize("entry", ENTRY_POINTS)
@pytest.mark.parametrize("case", SIGNED)
def test_what_a_faulty_writer_signed_is_refused(
    tiny_tuned: Finetuned, copied: Callable[..., Path], case: str, entry: str
) -> None:
    change, message = SIGNED[case]
    directory = copied(tiny_tuned.export)
    rewrite_signed(directory, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        ENTRY_POINTS[entry](directory)
    assert len(str(caught.value).splitlines()) == 1
