import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from msfp_cli.errors import CheckpointError, ModelError
from msfp_cli.pipelines.bounds import refuse_missing_parts
from msfp_cli.pipelines.loading import ModelSource, load_pipeline


def change(path: Path, **values: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def model(tiny: Callable[[str], Path], copied: Callable[..., Path]) -> Path:
    return copied(tiny("StableDiffusionPipeline"))


@pytest.mark.parametrize(
    ("component", "key"),
    [("text_encoder", "num_hidden_layers"), ("unet", "layers_per_block"), ("vae", "sample_size")],
)
@pytest.mark.parametrize("value", [10**9, 2**63, [8, 10**9]])
def test_size_that_no_file_can_hold_is_refused_at_once(
    model: Path, component: str, key: str, value: object
) -> None:
    change(model / component / "config.json", **{key: value})
    with pytest.raises(ModelError, match=rf"{component}/config.json asks for {key} = \d+, more"):
        load_pipeline(ModelSource(model=str(model)), "cpu")


def test_config_that_is_a_pipe_is_refused_at_once(model: Path) -> None:
    path = model / "unet" / "config.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="unet/config.json is damaged .it is not a regular"):
        load_pipeline(ModelSource(model=str(model)), "cpu")


def test_tokenizer_that_pads_beyond_its_encoder_is_refused(model: Path) -> None:
    change(model / "tokenizer" / "tokenizer_config.json", model_max_length=10**9)
    with pytest.raises(
        ModelError, match="tokenizer pads prompts to 1000000000 tokens, .* takes 77"
    ):
        load_pipeline(ModelSource(model=str(model)), "cpu")


@pytest.mark.parametrize("length", [[], "77", -1, 0, 77.5, True, {}])
def test_tokenizer_without_a_number_of_tokens_is_refused(model: Path, length: object) -> None:
    change(model / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    with pytest.raises(ModelError, match="not a whole number of at least 1; set model_max_length"):
        load_pipeline(ModelSource(model=str(model)), "cpu")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_tensor_that_a_part_lacks_is_named(model: Path, component: str) -> None:
    stock = PreTrainedModel.__dict__["from_pretrained"]
    (path,) = (model / component).glob("*.safetensors")
    state = load_file(path)
    name = min(name for name in state if name.endswith("bias"))
    del state[name]
    save_file(state, path, {"format": "pt"})
    message = f"/{component} lack the tensor {re.escape(name)}; download it again"
    with pytest.raises(ModelError, match=message):
        load_pipeline(ModelSource(model=str(model)), "cpu")
    assert PreTrainedModel.__dict__["from_pretrained"] is stock


def test_setting_that_is_a_list_of_numbers_is_not_a_component(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    index = {"unet": ["diffusers", "UNet2DModel"], "text_encoder_select_layers": [2, 5, 8]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    refuse_missing_parts(tmp_path)
    (tmp_path / "unet").rmdir()
    with pytest.raises(ModelError, match="lacks the folder of its unet"):
        refuse_missing_parts(tmp_path)


def test_folder_that_may_not_be_read_is_not_one_without_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    monkeypatch.setattr(
        os, "access", lambda path, _mode: path != tmp_path / "unet"
    )  # tests of root
    with pytest.raises(ModelError, match=f"^{tmp_path}/unet may not be read; check your rights"):
        refuse_missing_parts(tmp_path)


def test_part_that_a_pipeline_makes_itself_needs_no_folder(tmp_path: Path) -> None:
    index = {
        "_class_name": "LongCatAudioDiTPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    refuse_missing_parts(tmp_path)
