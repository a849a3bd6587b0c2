"""The result of an evaluation goes to JSON and back, and says in one line what is wrong with it."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msfp_cli.errors import CheckpointError, RunError
from msfp_cli.evaluation.cost import Cost
from msfp_cli.evaluation.result import Distance, Evaluation, Histogram, Measured, OutputNoise
from msfp_cli.recording.recipe import RecordRecipe

few = settings(max_examples=25, deadline=None, derandomize=True)
numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 10**12)
some = st.lists(numbers, max_size=4).map(tuple)
words = st.text(max_size=8)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


distances = st.builds(
    Distance,
    frechet=numbers,
    kernel=numbers,
    precision=maybe(numbers),
    recall=maybe(numbers),
    num_pictures=st.tuples(counts, counts),
    few=st.booleans(),
)
histograms = st.builds(
    Histogram, minimum=numbers, maximum=numbers, counts=st.lists(counts, max_size=4).map(tuple)
)
noises = st.builds(
    OutputNoise,
    error=numbers,
    by_timestep=st.lists(st.tuples(numbers, numbers), max_size=3).map(tuple),
    layers=st.dictionaries(words, numbers, max_size=2),
    inputs=st.dictionaries(words, histograms, max_size=2),
)
costs = st.builds(Cost, load_seconds=numbers, seconds_per_picture=numbers, peak_memory_bytes=counts)
models = st.builds(
    Measured,
    key=words,
    title=words,
    denoiser_bytes=maybe(counts),
    noise=st.dictionaries(words, noises, max_size=2),
    latents=maybe(numbers),
    psnr=some,
    ssim=some,
    deep=some,
    to_full=maybe(distances),
    to_reference=maybe(distances),
    garment=maybe(numbers),
    colour=maybe(numbers),
    clip=maybe(numbers),
    cost=maybe(costs),
)
SETTINGS = {
    "record": RecordRecipe(conditions=("a cat", None), seed=3).to_json(),
    "reference": None,
    "layers": True,
}


def evaluation(directory: Path, *measured: Measured) -> Evaluation:
    return Evaluation(
        directory=directory,
        settings=SETTINGS,
        machine={"device": "cpu"},
        models=measured,
        notes=("few",),
    )


@given(models)
@few
def test_what_was_measured_survives_json(measured: Measured) -> None:
    again = Measured.from_json(json.loads(json.dumps(measured.to_json())))
    assert again == measured
    assert again.to_json() == measured.to_json()


@given(st.lists(models, max_size=3))
@few
def test_evaluation_survives_the_file(measured: list[Measured]) -> None:
    with tempfile.TemporaryDirectory() as name:
        whole = evaluation(Path(name), *measured)
        whole.save()
        assert Evaluation.load(Path(name)) == whole
        before = (Path(name) / "evaluation.json").read_bytes()
        Evaluation.load(Path(name)).save()
        assert (Path(name) / "evaluation.json").read_bytes() == before
        assert [path.name for path in Path(name).iterdir()] == ["evaluation.json"]


def test_gallery_is_found_with_its_recipe(tmp_path: Path) -> None:
    gallery = evaluation(tmp_path).gallery("full")
    assert gallery.directory == tmp_path / "pictures" / "full"
    assert gallery.recipe == RecordRecipe(conditions=("a cat", None), seed=3)


def test_missing_evaluation_says_what_to_type(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match="no evaluation in .*; run `msfp evaluate` first"):
            Evaluation.load(place)


def test_file_in_the_place_of_the_directory_is_no_evaluation(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(RunError, match=r"no evaluation in .*prompts.txt"):
        Evaluation.load(tmp_path / "prompts.txt")


def without(key: str) -> str:
    return json.dumps(
        {name: value for name, value in evaluation(Path("x")).to_json().items() if name != key}
    )


MEASURED = Measured(key="full", title="full").to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "3",
        "[]",
        "null",
        *(without(key) for key in ("schema", "asked", "machine", "models", "notes")),
        json.dumps({**json.loads(without("models")), "models": [3]}),
        json.dumps({**json.loads(without("models")), "models": [{**MEASURED, "odd": 1}]}),
        json.dumps(
            {
                **json.loads(without("models")),
                "models": [{k: v for k, v in MEASURED.items() if k != "psnr"}],
            }
        ),
        json.dumps(
            {
                **json.loads(without("models")),
                "models": [{**MEASURED, "to_full": {"num_pictures": [1]}}],
            }
        ),
        json.dumps(
            {**json.loads(without("models")), "models": [{**MEASURED, "noise": {"unet": 3}}]}
        ),
        json.dumps({**json.loads(without("schema")), "schema": "one"}),
    ],
)
def test_damaged_evaluation_says_what_to_type(text: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(
        CheckpointError,
        match=r"evaluation\.json is damaged \(.*\); run `msfp evaluate --overwrite`",
    ):
        Evaluation.load(tmp_path)


def test_undecodable_evaluation_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(CheckpointError, match="evaluation.json is damaged"):
        Evaluation.load(tmp_path)


def test_newer_evaluation_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"schema": 2, "unknown": True}))
    with pytest.raises(
        CheckpointError,
        match="written by a newer msfp; upgrade msfp, or run `msfp evaluate --overwrite`",
    ):
        Evaluation.load(tmp_path)
