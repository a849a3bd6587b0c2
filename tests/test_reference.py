"""Whatever can be typed is explained: in its help text, and in docs/reference.md."""

import re
from pathlib import Path

import pytest

from msfp_cli.calibration.recipe import FORMAT_SETS, CalibrateRecipe
from msfp_cli.errors import UsageError
from msfp_cli.evaluation.features.extractors import load_extractor
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.layers.kernels.registry import AUTO, KERNELS
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.recipe import Option, Recipe, options_of
from msfp_cli.recording.recipe import RecordOptions
from reference import FORMATS, PAGE, first_sentence, options, page

RECIPES: tuple[type[Recipe], ...] = (
    CalibrateRecipe,
    EvaluateRecipe,
    FinetuneRecipe,
    ModelSource,
    RecordOptions,
)
WITH_CHOICES = [
    pytest.param(option, id=f"{recipe.__name__}-{name}")
    for recipe in RECIPES
    for name, option in options_of(recipe).items()
    if option.choices
]


@pytest.mark.parametrize(
    ("command", "names", "text"), [pytest.param(*row, id=" ".join(row[:2])) for row in options()]
)
def test_every_option_has_a_help_text_of_whole_sentences(
    command: str, names: str, text: str
) -> None:
    assert re.fullmatch(r"[A-Z0-9].{10,}\.", text), f"{command} {names}: {text!r}"


def test_reference_is_what_the_program_says() -> None:
    assert PAGE.read_text() == page(), "run `python tests/reference.py`"


@pytest.mark.parametrize("option", WITH_CHOICES)
def test_choices_are_named_in_the_help(option: Option) -> None:
    for choice in option.choices:
        assert re.search(rf"\b{choice}\b", option.help), choice


def help_of(command: str, option: str) -> str:
    (text,) = [text for name, names, text in options() if (name, names) == (command, option)]
    return text


def test_kernels_are_named_in_the_help_and_say_what_they_are() -> None:
    for name in (AUTO, *KERNELS):
        assert re.search(rf"\b{name}\b", help_of("sample", "--kernel")), name
    for kernel in KERNELS.values():
        assert len(first_sentence(kernel.__doc__)) > 10


def test_sets_of_formats_are_named_in_the_help() -> None:
    assert set(FORMATS) == set(FORMAT_SETS)
    for name in FORMAT_SETS:
        assert re.search(rf"\b{name}\b", help_of("calibrate", "--formats")), name


def test_extractors_are_named_in_the_help_and_in_the_docs() -> None:
    with pytest.raises(UsageError) as error:
        load_extractor("?")
    names = re.findall(r"\b(squeezenet|fashion|inception|module:factory)\b", str(error.value))
    docs = Path(PAGE.parent, "evaluation.md").read_text()
    assert len(names) == 4
    for name in names:
        assert name in help_of("evaluate", "--extractor") and name in docs, name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_settings_of_python_alone_have_help_too(recipe: type[Recipe]) -> None:
    for option in options_of(recipe).values():
        assert re.fullmatch(r"[A-Z0-9].{10,}\.", option.help), option.name
