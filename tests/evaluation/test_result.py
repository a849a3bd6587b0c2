"""The result of an evaluation goes to JSON and back, and says in one line what is wrong with it."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistyped import mistyped, read_unsigned, write_signed
from msfp_cli.errors import CheckpointError, RunError
from msfp_cli.evaluation.cost import Cost
from msfp_cli.evaluation.metrics.table import METRICS
from msfp_cli.evaluation.result import (
    DenoiserError,
    Evaluation,
    Histogram,
    Measurements,
    SetSizes,
)
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.recording.recipe import RecordRecipe

few = settings(max_examples=25, deadline=None, derandomize=True)
numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 10**12)
some = st.lists(numbers, max_size=4).map(tuple)
words = st.text(max_size=8)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


sizes = st.builds(SetSizes, num_pictures=st.tuples(counts, counts), few=st.booleans())
histograms = st.builds(
    Histogram, minimum=numbers, maximum=numbers, counts=st.lists(counts, max_size=4).map(tuple)
)
denoisers = st.builds(
    DenoiserError,
    error=numbers,
    by_timestep=st.lists(st.tuples(numbers, numbers), max_size=3).map(tuple),
    layers=st.dictionaries(words, numbers, max_size=2),
    inputs=st.dictionaries(words, histograms, max_size=2),
)
costs = st.builds(Cost, load_seconds=numbers, seconds_per_picture=numbers, peak_memory_bytes=counts)
models = st.builds(
    Measurements,
    key=words,
    title=words,
    values=st.dictionaries(words, numbers, max_size=4),
    per_picture=st.dictionaries(words, some, max_size=3),
    sets=st.dictionaries(words, sizes, max_size=2),
    denoisers=st.dictionaries(words, denoisers, max_size=2),
    denoiser_bytes=maybe(counts),
    cost=maybe(costs),
)
SETTINGS = {
    "export": "export",
    "against": ModelSource(model="model").to_json(),
    "record": RecordRecipe(conditions=("a cat", None), seed=3).to_json(),
    "models": ["full", "export"],
    "num_trajectories": 2,
    "extractor": "squeezenet",
    "reference": None,
    "clip": None,
    "layers": True,
    "cost": False,
}


def evaluation(directory: Path, *measured: Measurements) -> Evaluation:
    return Evaluation(
        directory=directory,
        settings=SETTINGS,
        machine={"device": "cpu"},
        models=measured,
        notes=("few",),
    )


@given(models)
@few
def test_what_was_measured_survives_json(measured: Measurements) -> None:
    again = Measurements.from_json(json.loads(json.dumps(measured.to_json())))
    assert again == measured
    assert again.to_json() == measured.to_json()


@given(st.lists(models, max_size=3))
@few
def test_evaluation_survives_the_file(measured: list[Measurements]) -> None:
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


MEASUREMENTS = Measurements(key="full", title="full").to_json()


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
        json.dumps({**json.loads(without("models")), "models": [{**MEASUREMENTS, "odd": 1}]}),
        json.dumps(
            {
                **json.loads(without("models")),
                "models": [{k: v for k, v in MEASUREMENTS.items() if k != "per_picture"}],
            }
        ),
        json.dumps(
            {
                **json.loads(without("models")),
                "models": [{**MEASUREMENTS, "sets": {"full": {"num_pictures": [1], "few": True}}}],
            }
        ),
        json.dumps(
            {
                **json.loads(without("models")),
                "models": [{**MEASUREMENTS, "denoisers": {"unet": 3}}],
            }
        ),
        json.dumps({**json.loads(without("schema")), "schema": "one"}),
    ],
)
def test_damaged_evaluation_says_what_to_type(text: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(
        CheckpointError,
        match=r"evaluation\.json is damaged \(.*\); run the same `msfp evaluate` again",
    ):
        Evaluation.load(tmp_path)


def test_undecodable_evaluation_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(CheckpointError, match="evaluation.json is damaged"):
        Evaluation.load(tmp_path)


def test_newer_evaluation_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"schema": 3, "unknown": True}))
    with pytest.raises(
        CheckpointError,
        match="written by a newer msfp; upgrade msfp, or run the same `msfp evaluate` again",
    ):
        Evaluation.load(tmp_path)


DISTANCES = ("frechet", "kernel", "precision", "recall")
EARLIER = Path(__file__).parents[1] / "data" / "evaluation-schema-1.json"


def test_evaluation_of_an_earlier_msfp_is_read_with_equal_values(tmp_path: Path) -> None:
    document = json.loads(EARLIER.read_text())
    (tmp_path / "evaluation.json").write_text(EARLIER.read_text())
    loaded = Evaluation.load(tmp_path)
    assert (loaded.settings, loaded.machine) == (document["asked"], document["machine"])
    assert loaded.notes == tuple(document["notes"])
    assert [(model.key, model.title) for model in loaded.models] == [
        ("full", "full precision"),
        ("export", "MSFP, fine-tuned"),
    ]
    full, export = loaded.models
    before = document["models"][1]
    assert (full.per_picture, full.denoisers, list(full.sets)) == ({}, {}, ["reference"])
    assert export.per_picture == {key: tuple(before[key]) for key in ("psnr", "ssim", "deep")}
    noise = before["noise"]["unet"]
    assert export.denoisers["unet"].layers == noise["layers"]
    assert [list(pair) for pair in export.denoisers["unet"].by_timestep] == noise["by_timestep"]
    assert export.denoisers["unet"].inputs.keys() == noise["inputs"].keys()
    assert export.sets["full"] == SetSizes(num_pictures=(8, 8), few=True)
    assert export.values == {
        "output": noise["error"],
        "latents": before["latents"],
        **{f"{key}_full": before["to_full"][key] for key in DISTANCES},
        **{key: before["to_reference"][key] for key in DISTANCES},
        "garment": 100 * before["garment"],
        "colour": 100 * before["colour"],
        "size": before["denoiser_bytes"] / 2**20,
        "seconds": 0.25,
        "memory": 900000000 / 2**20,
    }
    assert {metric.key for metric in METRICS} - {"clip"} == {*export.values, *export.per_picture}
    loaded.save()
    assert Evaluation.load(tmp_path) == loaded


def test_metric_that_an_earlier_file_lacks_is_absent() -> None:
    earlier = json.loads(EARLIER.read_text())["models"][1]
    least = Measurements.from_json({"key": earlier["key"], "title": earlier["title"]})
    assert least == Measurements(key="export", title="MSFP, fine-tuned")
    for key in earlier.keys() - {"key", "title"}:
        lacking = {name: value for name, value in earlier.items() if name != key}
        assert Measurements.from_json(lacking).title == earlier["title"]


def test_signed_values_of_another_type_are_refused(tmp_path: Path) -> None:
    measured = Measurements(
        key="full",
        title="full",
        values={"psnr": 1.0},
        per_picture={"psnr": (1.0,)},
        sets={"full": SetSizes(num_pictures=(1, 2), few=True)},
        denoisers={
            "unet": DenoiserError(
                error=0.5,
                by_timestep=((1.0, 0.5),),
                layers={"x": 1.0},
                inputs={"x": Histogram(minimum=0.0, maximum=1.0, counts=(1,))},
            )
        },
        denoiser_bytes=3,
        cost=Cost(load_seconds=1.0, seconds_per_picture=1.0, peak_memory_bytes=1),
    )
    evaluation(tmp_path, measured).save()
    document = tmp_path / "evaluation.json"
    places = list(mistyped(read_unsigned(document)))
    assert len(places) > 40
    for place, changed in places:
        write_signed(document, changed)
        with pytest.raises(CheckpointError, match="evaluation.json is"):
            pytest.fail(f"{place} was read as {Evaluation.load(tmp_path)}")
