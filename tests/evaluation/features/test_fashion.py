from pathlib import Path

import numpy as np
import pytest
import torch

from msfp_cli.errors import UsageError
from msfp_cli.evaluation.features.fashion import (
    COLOURS,
    GARMENTS,
    agreement,
    colour_in,
    garment_in,
    load_classifier,
)
from msfp_cli.pipelines.loading import (
    BUILT_IN,
    BUILT_IN_GUIDANCE,
    BUILT_IN_STEPS,
    ModelSource,
    load_pipeline,
)
from msfp_cli.pipelines.sampling import Sampling, call_pipeline


@pytest.mark.parametrize(
    ("prompt", "garment", "colour"),
    [
        ("a red dress", "dress", "red"),
        ("a photo of a White T-shirt", "t-shirt", "white"),
        ("cyan, boot", "boot", "cyan"),
        ("a shirt", "shirt", None),
        ("something blue", None, "blue"),
        ("", None, None),
    ],
)
def test_prompt_names_garment_and_colour(
    prompt: str, garment: str | None, colour: str | None
) -> None:
    assert garment_in(prompt) == (GARMENTS.index(garment) if garment else None)
    assert colour_in(prompt) == (COLOURS.index(colour) if colour else None)


def test_agreement_counts_only_what_a_prompt_names() -> None:
    def answer(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.eye(10)[[3, 3, 0]], torch.eye(8)[[1, 0, 0]]

    pictures = torch.zeros(3, 3, 32, 32)
    assert agreement(answer, pictures, ["a red dress", "a coat", "white"]) == (0.5, 1.0)  # type: ignore[arg-type]
    assert agreement(answer, pictures, ["", "", ""]) == (None, None)  # type: ignore[arg-type]


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(UsageError, match="32 by 32, not"):
        load_classifier()(torch.zeros(1, 3, 64, 64))


def test_the_built_in_pipeline_draws_what_the_classifier_sees() -> None:
    prompts = [
        f"a {colour} {garment}"
        for colour in ("red", "blue")
        for garment in ("dress", "trousers", "bag", "boot")
    ]
    sampling = Sampling(num_inference_steps=BUILT_IN_STEPS, guidance_scale=BUILT_IN_GUIDANCE)
    drawn = call_pipeline(load_pipeline(ModelSource(model=BUILT_IN), "cpu"), prompts, sampling)
    pictures = (
        torch.from_numpy(np.stack([np.asarray(each) for each in drawn])).permute(0, 3, 1, 2) / 255
    )
    garment, colour = agreement(load_classifier(), pictures, prompts)
    assert garment is not None and garment >= 0.75
    assert colour is not None and colour >= 0.75
    wrong = agreement(load_classifier(), pictures.flip(0), prompts)
    assert wrong[0] is not None and wrong[0] < garment
    assert wrong[1] is not None and wrong[1] < colour


TEST_PICTURES = Path(__file__).parents[4] / "shared/data/fashion_mnist/fashion_mnist_test.npz"


@pytest.mark.skipif(
    not TEST_PICTURES.exists(), reason="Fashion-MNIST's test pictures are not beside the project"
)
def test_it_knows_real_pictures() -> None:
    with np.load(TEST_PICTURES) as arrays:
        images, labels = (
            torch.from_numpy(arrays["images"]),
            torch.from_numpy(arrays["labels"]).long(),
        )
    grey = torch.nn.functional.pad(images[::20], (2, 2, 2, 2))[:, None] / 255
    garment, colour = load_classifier()(grey.repeat(1, 3, 1, 1))
    assert float((garment.argmax(1) == labels[::20]).float().mean()) > 0.85
    assert float((colour.argmax(1) == COLOURS.index("white")).float().mean()) > 0.97
