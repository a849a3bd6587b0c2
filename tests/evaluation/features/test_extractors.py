import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from msfp_cli.errors import UsageError
from msfp_cli.evaluation.features.extractors import Extractor, in_batches, load_extractor
from msfp_cli.evaluation.features.fashion import load_classifier
from msfp_cli.evaluation.features.squeezenet import load_squeezenet

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
PICTURES = (
    torch.arange(5 * 3 * 32 * 32, dtype=torch.int64)
    .mul(37)
    .remainder(256)
    .to(torch.uint8)
    .view(5, 3, 32, 32)
)

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that makes an importable module of a user's and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write_module(text: str) -> str:
        name = f"user_module_{len(list(tmp_path.iterdir()))}_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write_module


def test_squeezenet_and_fashion_come_with_msfp() -> None:
    expected = load_squeezenet()(PICTURES / 255)
    torch.testing.assert_close(load_extractor("squeezenet").features(PICTURES), expected)
    torch.testing.assert_close(
        load_extractor("fashion").features(PICTURES), load_classifier().embed(PICTURES / 255)
    )
    assert [load_extractor(name).name for name in ("squeezenet", "fashion")] == [
        "squeezenet",
        "fashion",
    ]


def test_pictures_go_in_batches_in_their_order_and_between_zero_and_one() -> None:
    seen: list[Tensor] = []

    def embed(pictures: Tensor) -> Tensor:
        seen.append(pictures)
        return pictures.double().flatten(1)

    pictures = torch.randint(
        0, 256, (150, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    features = Extractor("own", embed).features(pictures)
    assert len(seen) > 1 and sum(len(batch) for batch in seen) == 150
    assert all(batch.dtype == torch.float32 for batch in seen)
    assert features.dtype == torch.float32
    assert torch.equal((features * 255).round().to(torch.uint8), pictures.flatten(1))


def test_extractor_of_the_users_own_is_imported_and_set_to_evaluate(write: Write) -> None:
    name = write(
        "from torch import nn\n"
        "class Model(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.drop, self.layer = nn.Dropout(0.9), nn.Linear(3, 7)\n"
        "    def forward(self, pictures):\n"
        "        return self.layer(self.drop(pictures.mean(dim=(2, 3))))\n"
        "def make():\n"
        "    return Model()\n"
    )
    extractor = load_extractor(f"{name}:make")
    assert extractor.name == f"{name}:make"
    model = extractor.embed
    assert isinstance(model, nn.Module)
    features = extractor.features(PICTURES)
    assert features.shape == (5, 7) and not features.requires_grad
    torch.testing.assert_close(features, model.layer((PICTURES / 255).mean(dim=(2, 3))))


@pytest.mark.parametrize("name", ["", "resnet", "SqueezeNet", "squeezenet "])
def test_unknown_name_lists_the_choices(name: str) -> None:
    with pytest.raises(
        UsageError, match="choose squeezenet, fashion, inception, or give module:factory"
    ) as caught:
        load_extractor(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "factory",
    [
        pytest.param("absent", id="no-such-function"),
        pytest.param("number", id="not-callable"),
        pytest.param("takes_one", id="takes-arguments"),
        pytest.param("gives_none", id="gives-none"),
        pytest.param("gives_function", id="gives-a-function"),
        pytest.param("fails", id="raises"),
        pytest.param("lacks_file", id="lacks-a-file"),
        pytest.param("", id="no-name"),
    ],
)
def test_wrong_factory_is_one_line_that_names_it(factory: str, write: Write) -> None:
    module = write(
        "number = 3\n"
        "def takes_one(size): return None\n"
        "def gives_none(): return None\n"
        "def gives_function(): return len\n"
        "def fails(): raise RuntimeError('no weights here')\n"
        "def lacks_file(): return open('/nowhere/weights')\n"
    )
    with pytest.raises(UsageError) as caught:
        load_extractor(f"{module}:{factory}")
    assert repr(f"{module}:{factory}") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["no_such_module:make", "no.such.module:make", ":make", ".relative:make", ":"]
)
def test_missing_module_is_one_line_that_names_it(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_extractor(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["def make(:\n", "1 / 0\n", "import no_such_module\n"], ids=["syntax", "zero", "import"]
)
def test_module_that_cannot_be_imported_is_one_line_that_names_it(text: str, write: Write) -> None:
    name = write(text)
    with pytest.raises(UsageError) as caught:
        load_extractor(f"{name}:make")
    assert f"{name}:make" in str(caught.value)


class Gives(nn.Module):
    """Returns what it is told to."""

    def __init__(self, make: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.make = make

    def forward(self, pictures: Tensor) -> object:
        return self.make(pictures)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda pictures: pictures, id="maps"),
        pytest.param(lambda pictures: pictures.mean(dim=(1, 2, 3)), id="one-number-each"),
        pytest.param(lambda pictures: pictures.mean(dim=(0, 2, 3))[None], id="one-row-in-all"),
        pytest.param(lambda pictures: (pictures.flatten(1),), id="tuple"),
        pytest.param(lambda pictures: None, id="nothing"),
    ],
)
def test_extractor_that_gives_no_row_a_picture_is_one_line_that_names_it(
    make: Callable[[Tensor], object],
) -> None:
    with pytest.raises(
        UsageError, match=r"extractor 'own:make' gives .*it must give one row a picture"
    ):
        Extractor("own:make", Gives(make)).features(PICTURES)  # type: ignore[arg-type]


def test_inception_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UsageError, match=r"needs torch-fidelity: pip install 'msfp\[inception\]'"):
        load_extractor("inception")


def test_the_extra_that_is_named_exists() -> None:
    extras = (
        PYPROJECT.read_text("utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0]
    )
    assert re.search(r'^inception = \[[^\]]*"torch-fidelity', extras, re.MULTILINE)


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put a stand-in for torch-fidelity where it would be imported from."""
    package, module = (
        ModuleType("torch_fidelity"),
        ModuleType("torch_fidelity.feature_extractor_inceptionv3"),
    )
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_inception_gets_the_very_bytes(fidelity: ModuleType) -> None:
    seen: list[Tensor] = []

    class Inception(nn.Module):
        def __init__(self, name: str, features: list[str]) -> None:
            super().__init__()
            assert (name, features) == ("inception-v3-compat", ["2048"])

        def forward(self, pictures: Tensor) -> tuple[Tensor]:
            seen.append(pictures)
            return (pictures.flatten(1).float(),)

    fidelity.FeatureExtractorInceptionV3 = Inception  # type: ignore[attr-defined]
    pictures = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)
    features = load_extractor("inception").features(pictures)
    assert torch.equal(torch.cat(seen), pictures)
    assert torch.equal(features, pictures.flatten(1).float())


def test_inception_whose_weights_cannot_be_fetched_says_so(fidelity: ModuleType) -> None:
    def fail(name: str, features: list[str]) -> nn.Module:
        raise ConnectionError("no network")

    fidelity.FeatureExtractorInceptionV3 = fail  # type: ignore[attr-defined]
    with pytest.raises(
        UsageError, match=r"cannot be fetched \(no network\); use --extractor squeezenet"
    ):
        load_extractor("inception")


@pytest.mark.parametrize(
    ("height", "width", "sizes"),
    [(32, 32, [32, 8]), (512, 512, [32, 8]), (1024, 1024, [8] * 5), (480, 33 * 832, [1] * 40)],
)
def test_large_pictures_go_in_smaller_batches(height: int, width: int, sizes: list[int]) -> None:
    pictures = torch.zeros(1, dtype=torch.uint8).expand(40, 3, height, width)
    assert [len(batch) for batch in in_batches(pictures, 32)] == sizes
