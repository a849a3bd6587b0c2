"""What is gathered of a model knows how many pictures its distances rest on."""

import pytest
import torch

from msfp_cli.evaluation.metrics.evidence import Evidence, PictureSet
from msfp_cli.evaluation.result import SetSizes


def evidence_of(ours: int, theirs: int) -> Evidence:
    return Evidence(
        own=PictureSet(pictures=torch.empty(0), latents=torch.empty(0)),
        features=torch.zeros(ours, 4),
        feature_sets={"reference": torch.zeros(theirs, 4)},
        extractor="squeezenet",
        denoiser_bytes=0,
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "few"), [(7, 100, True), (100, 7, True), (8, 8, False), (100, 100, False)]
)
def test_too_few_pictures_in_either_set_are_told(ours: int, theirs: int, few: bool) -> None:
    sizes = evidence_of(ours, theirs).set_sizes()
    assert sizes == {"reference": SetSizes(num_pictures=(ours, theirs), few=few)}


@pytest.mark.parametrize(("ours", "theirs"), [(1, 9), (9, 1), (0, 9), (1, 1)])
def test_one_picture_is_not_a_set(ours: int, theirs: int) -> None:
    assert evidence_of(ours, theirs).set_sizes() == {}
