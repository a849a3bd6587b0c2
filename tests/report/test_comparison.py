"""The models side by side are those of the evaluation."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from msfp_cli.evaluation.result import Evaluation


def test_every_picture_is_that_of_the_gallery(
    document: dict[str, Any], evaluated: Evaluation
) -> None:
    assert [model["key"] for model in document["models"]] == [
        "full",
        "signed",
        "calibrated",
        "export",
    ]
    for i, entry in enumerate(document["pictures"]):
        assert entry["seed"] == evaluated.settings["record"]["seed"] + i
        for key, address in entry["images"].items():
            shown = Image.open(
                io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,")))
            )
            assert np.array_equal(
                np.asarray(shown), evaluated.gallery(key).pictures()[i].permute(1, 2, 0).numpy()
            )
        assert entry["psnr"] == {
            model.key: model.per_picture["psnr"][i] for model in evaluated.models[1:]
        }


def test_distances_of_few_pictures_do_not_name_a_best(document: dict[str, Any]) -> None:
    telling = {column["key"]: column["telling"] for column in document["comparison"]["columns"]}
    assert telling["psnr"] and telling["output"] and not telling["frechet_full"]
