from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from msfp_cli.errors import ModelError
from msfp_cli.evaluation.features.clip import clip_score
from tiny_pipelines import SEED, _clip_config, _clip_tokenizer

PROMPTS = tuple(f"a {animal} of {place}" for animal in ("cat", "dog", "cow") for place in "abcdef")
SIDE = 16


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny CLIP model with its processor."""
    directory, tokenizer = tmp_path_factory.mktemp("clip"), _clip_tokenizer()
    text = _clip_config(tokenizer)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": SIDE, "patch_size": 8, "projection_dim": text.projection_dim}
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision, projection_dim=text.projection_dim
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = CLIPModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 8  # as drawn they are too small for the input to matter
    model.save_pretrained(directory)
    crop = {"height": SIDE, "width": SIDE}
    CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop), tokenizer
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Draw a picture of one size for each prompt, no two of a colour."""
    generator = torch.Generator().manual_seed(1)
    ground = torch.randint(0, 256, (len(PROMPTS), 3, 1, 1), generator=generator)
    noise = torch.randint(-60, 60, (len(PROMPTS), 3, SIDE, SIDE), generator=generator)
    return (ground + noise).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def cosines(directory: Path, pictures: Tensor, prompts: tuple[str, ...]) -> list[float]:
    """Return the cosine of each picture and its prompt, by the model's towers, one at a time."""
    model, tokenizer = CLIPModel.from_pretrained(directory).eval(), _clip_tokenizer()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    found = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        pixels = (picture / 255 - mean) / std  # of the size that the model takes
        seen = model.visual_projection(model.vision_model(pixel_values=pixels[None]).pooler_output)[
            0
        ]
        ids = tokenizer(prompt, return_tensors="pt", truncation=True).input_ids
        read = model.text_projection(model.text_model(input_ids=ids).pooler_output)[0]
        found.append(float(seen @ read / seen.norm() / read.norm()))
    return found


def test_score_is_the_mean_cosine_that_is_not_negative(clip: Path, pictures: Tensor) -> None:
    expected = cosines(clip, pictures, PROMPTS)
    assert min(expected) < 0 < max(expected)
    score = clip_score(str(clip), pictures, PROMPTS, "cpu")
    assert score == pytest.approx(
        100 * sum(max(0.0, value) for value in expected) / len(PROMPTS), rel=1e-3
    )


def test_order_of_the_pairs_does_not_matter_and_their_pairing_does(
    clip: Path, pictures: Tensor
) -> None:
    score = clip_score(str(clip), pictures, PROMPTS, "cpu")
    assert clip_score(str(clip), pictures.flip(0), PROMPTS[::-1], "cpu") == pytest.approx(
        score, rel=1e-5
    )
    assert clip_score(str(clip), pictures.flip(0), PROMPTS, "cpu") != pytest.approx(score, rel=1e-3)


def test_prompt_that_is_too_long_is_cut_off(clip: Path, pictures: Tensor) -> None:
    long = (PROMPTS[0] + " the dog" * 100,)
    expected = max(0.0, *cosines(clip, pictures[:1], long))
    assert clip_score(str(clip), pictures[:1], long, "cpu") == pytest.approx(
        100 * expected, rel=1e-3, abs=1e-6
    )


def test_pictures_of_another_size_than_the_models_are_scored(clip: Path) -> None:
    large = torch.randint(
        0, 256, (2, 3, 40, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert 0 <= clip_score(str(clip), large, PROMPTS[:2], "cpu") <= 100


def test_missing_directory_is_one_clear_line(tmp_path: Path, pictures: Tensor) -> None:
    with pytest.raises(ModelError) as caught:
        clip_score(str(tmp_path / "nowhere"), pictures, PROMPTS, "cpu")
    message = str(caught.value)
    assert message.startswith(f"cannot load the CLIP model {str(tmp_path / 'nowhere')!r}: ")
    assert "\n" not in message
    assert "repo_type" not in message  # an argument of nobody here; the directory is not there


def test_directory_without_a_model_is_one_line(tmp_path: Path, pictures: Tensor) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load the CLIP model") as caught:
        clip_score(str(tmp_path), pictures, PROMPTS, "cpu")
    assert "\n" not in str(caught.value)


def test_model_that_is_not_on_this_machine_is_one_line(pictures: Tensor) -> None:
    with pytest.raises(ModelError, match="cannot load the CLIP model 'nobody/no-clip'") as caught:
        clip_score("nobody/no-clip", pictures, PROMPTS, "cpu")
    assert "\n" not in str(caught.value)


def test_model_that_lacks_a_tensor_is_refused(
    clip: Path, copied: Callable[..., Path], pictures: Tensor
) -> None:
    model = copied(clip)
    state = load_file(model / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lack the tensor visual_projection.weight"):
        clip_score(str(model), pictures, PROMPTS, "cpu")
