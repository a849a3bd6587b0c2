from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from msfp_cli.evaluation.features.squeezenet import (
    SqueezeNet,
    deep_distance,
    load_squeezenet,
)

WEIGHTS = Path(str(files("msfp_cli") / "data" / "squeezenet.safetensors"))
ORIGINAL = Path(__file__).parents[4] / "shared/data/squeezenet/squeezenet1_1_features.safetensors"


@pytest.fixture(scope="module")
def network() -> SqueezeNet:
    return load_squeezenet()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def plain_maps(pictures: Tensor) -> list[Tensor]:
    """SqueezeNet 1.1 layer by layer, as in its paper and Caffe model; names as in the file."""
    weights = {name: weight.float() for name, weight in load_file(WEIGHTS).items()}

    def conv(x: Tensor, name: str, **options: int) -> Tensor:
        return functional.conv2d(
            x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options
        ).clamp(min=0)

    def fire(x: Tensor, name: str) -> Tensor:
        squeezed = conv(x, f"{name}.squeeze")
        wide = conv(squeezed, f"{name}.expand3x3", padding=1)
        return torch.cat([conv(squeezed, f"{name}.expand1x1"), wide], dim=1)

    def pool(x: Tensor) -> Tensor:
        return functional.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)

    red, green, blue = (
        255 * functional.interpolate(pictures, (224, 224), mode="bilinear", antialias=True)
    ).unbind(1)
    first = conv(
        torch.stack([blue - 103.939, green - 116.779, red - 123.68], dim=1), "features.0", stride=2
    )
    fire3 = fire(fire(pool(first), "features.3"), "features.4")
    fire5 = fire(fire(pool(fire3), "features.6"), "features.7")
    fire6 = fire(pool(fire5), "features.9")
    fire7 = fire(fire6, "features.10")
    fire8 = fire(fire7, "features.11")
    return [first, fire3, fire5, fire6, fire7, fire8, fire(fire8, "features.12")]


@pytest.mark.parametrize("size", [(16, 16), (224, 224), (40, 300)], ids=str)
def test_maps_and_features_are_those_of_the_architecture(
    size: tuple[int, int], network: SqueezeNet
) -> None:
    pictures = draw(2, 3, *size)
    wanted = plain_maps(pictures)
    for ours, theirs in zip(network.maps(pictures), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    features = network(pictures)
    assert features.shape == (2, 512)
    torch.testing.assert_close(features, wanted[-1].mean(dim=(2, 3)), rtol=1e-4, atol=1e-3)


def test_every_weight_of_the_file_is_used(network: SqueezeNet) -> None:
    weights = load_file(WEIGHTS)
    assert network.state_dict().keys() == weights.keys()
    assert sum(weight.numel() for weight in weights.values()) == 722_496
    assert all(
        torch.equal(parameter, weights[name].float())
        for name, parameter in network.named_parameters()
    )
    assert not network.training and not any(
        parameter.requires_grad for parameter in network.parameters()
    )


@pytest.mark.skipif(
    not ORIGINAL.exists(),
    reason="the authors' weights in full precision are not beside the project",
)
def test_weights_are_the_authors_rounded_to_half_precision() -> None:
    original, kept = load_file(ORIGINAL), load_file(WEIGHTS)
    assert original.keys() == kept.keys()
    assert all(torch.equal(weight.half(), kept[name]) for name, weight in original.items())


def test_red_is_not_blue(network: SqueezeNet) -> None:
    pictures = draw(1, 3, 32, 32)
    assert float(deep_distance(network, pictures, pictures.flip(1))) > 0.01


def scene() -> Tensor:
    """Edges of several directions and sizes on a coloured ground."""
    picture = Image.new("RGB", (96, 96), (200, 180, 120))
    draw = ImageDraw.Draw(picture)
    for i in range(8):
        draw.ellipse((6 * i, 40, 6 * i + 40, 80), outline=(30 * i, 40, 250 - 30 * i), width=2)
        draw.line((12 * i, 0, 95 - 12 * i, 95), fill=(10, 30 * i, 60), width=1)
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.view(96, 96, 3).permute(2, 0, 1)[None] / 255


def blurred(picture: Tensor, width: int) -> Tensor:
    return functional.avg_pool2d(
        functional.pad(picture, (width // 2,) * 4, mode="reflect"), width, stride=1
    )


def test_distance_grows_with_the_blur(network: SqueezeNet) -> None:
    picture = scene()
    distances = [
        float(deep_distance(network, blurred(picture, width), picture))
        for width in (1, 3, 5, 9, 17)
    ]
    assert distances[0] == 0
    assert all(less < more for less, more in zip(distances[:-1], distances[1:], strict=True))
    assert distances[1] > 0.01


def test_distance_is_zero_for_equal_pictures_symmetric_and_one_a_picture(
    network: SqueezeNet,
) -> None:
    x, y = draw(3, 3, 24, 24), draw(3, 3, 24, 24, seed=1)
    y[1] = x[1]
    there, back = deep_distance(network, x, y), deep_distance(network, y, x)
    assert there.dtype == torch.float64 and there.shape == (3,)
    assert torch.equal(there, back)
    assert there[1] == 0 and there[0] > 0 and there[2] > 0
    alone = torch.cat([deep_distance(network, x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(there, alone, rtol=1e-4, atol=1e-8)


def test_distance_is_the_mean_of_squared_differences_of_unit_features(network: SqueezeNet) -> None:
    x, y = draw(1, 3, 24, 24), draw(1, 3, 24, 24, seed=1)
    stages = []
    for ours, theirs in zip(plain_maps(x), plain_maps(y), strict=True):
        ours, theirs = ours[0].flatten(1).double(), theirs[0].flatten(1).double()
        norms = ours.norm(dim=0) * theirs.norm(dim=0)
        cosine = (ours * theirs).sum(dim=0)[norms > 0] / norms[norms > 0]
        assert len(cosine) == ours.shape[1]  # of these pictures no place is without features
        stages.append(float((2 - 2 * cosine).mean()))
    assert float(deep_distance(network, x, y)) == pytest.approx(sum(stages) / 7, rel=1e-5)


def test_black_pictures_have_a_distance_too(network: SqueezeNet) -> None:
    black, white = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    assert float(deep_distance(network, black, black)) == 0
    assert 0 < float(deep_distance(network, black, white)) < 2
