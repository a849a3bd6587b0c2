"""Options that are made from the fields of recipes, on a toy command."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.commands import console
from msfp_cli.errors import UsageError
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.options import Options, with_options
from msfp_cli.recipe import Recipe, option


def doubled(half: int) -> str:
    """Undo `halved`."""
    return str(2 * half)


def halved(text: str) -> int:
    """Read an even number."""
    if int(text) % 2:
        raise UsageError(f"--double {text} is odd")
    return int(text) // 2


@dataclass(frozen=True, kw_only=True)
class Paint(Recipe):
    """How to paint."""

    title: str
    coats: int = option(2, "Coats of paint.", names=("--coats", "--layers"), at_least=1)
    colours: tuple[str, ...] = option((), "Colours. Default: white.", names=("--colour",))
    dry: bool = option(True, "Whether to wait. Default: --dry.", names=("--dry/--wet",))
    plan: Path | None = option(None, "Plan. Default: none.")
    half: int = option(1, "An even number.", names=("--double",), read=halved, write=doubled)
    secret: int = option(7, "Known to Python alone.", is_typed=False)


@dataclass(frozen=True, kw_only=True)
class Frame(Recipe):
    """How to frame; it has one option in common."""

    coats: int = 3
    wood: str = option("oak", "Wood.", choices=("oak", "ash"))


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run() -> tuple[Run, list[Options]]:
    """Return what runs a toy command, and the options that it got."""
    got = list[Options]()
    app = typer.Typer(rich_markup_mode=None)

    @with_options(Paint, Frame)
    def paint(options: Options, loud: bool = False) -> None:
        got.append(options)

    app.command()(console.guarded(paint))

    def invoke(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(words))
        return result.exit_code, result.output

    return invoke, got


def test_what_was_typed_makes_recipes(run: tuple[Run, list[Options]]) -> None:
    invoke, got = run
    words = "--layers 4 --colour red --colour blue --wet --plan p.txt --double 8 --wood ash --loud"
    assert invoke(*words.split()) == (0, "")
    paint = got[0].recipe(Paint, title="x")
    assert (paint.coats, paint.colours, paint.dry) == (4, ("red", "blue"), False)
    assert (paint.plan, paint.half, paint.secret) == (Path("p.txt"), 4, 7)
    assert paint.words() == words.replace("--layers", "--coats").split()[:-3]
    assert got[0].recipe(Frame).wood == "ash"


def test_what_was_not_typed_keeps_what_there_is(run: tuple[Run, list[Options]]) -> None:
    invoke, got = run
    assert invoke("--coats", "2") == (0, "")
    assert got[0].recipe(Paint, title="x") == Paint(title="x")
    there = Paint(title="x", coats=9, dry=False, colours=("red",))
    assert got[0].over(there) == Paint(title="x", coats=2, dry=False, colours=("red",))


@pytest.mark.parametrize(
    ("words", "message"),
    [("--double 3", "--double 3 is odd"), ("--secret 3", "secret"), ("--coats x", "--coats")],
)
def test_what_is_wrong_is_a_wrong_command_line(
    words: str, message: str, run: tuple[Run, list[Options]]
) -> None:
    invoke, got = run
    code, output = invoke(*words.split())
    assert (code, got) == (2, []) and message in output


def test_help_has_each_option_once_with_its_default(run: tuple[Run, list[Options]]) -> None:
    _, output = run[0]("--help")
    text = " ".join(output.split())
    assert text.count("Coats of paint. Default: 2.") == 1
    assert "Default: white. Default" not in text
    assert "--secret" not in text


def test_preset_is_where_settings_begin_and_what_is_typed_comes_first() -> None:
    @with_options(CalibrateRecipe, FinetuneRecipe)
    def command(options: Options) -> None:
        seen.append(options)

    seen = list[Options]()
    app = typer.Typer()
    app.command()(command)
    runner = CliRunner()
    assert runner.invoke(app, ["--preset", "paper", "--lift", "0.1"]).exit_code == 0
    recipe = seen[0].recipe(CalibrateRecipe)
    assert (recipe.lift, recipe.rounding) == (0.1, "nearest")
    assert recipe.kept_bits("any", "first") == (True, 8)
    assert seen[0].recipe(FinetuneRecipe).loss_power == 1.0
    unknown = runner.invoke(app, ["--preset", "papers"])
    assert isinstance(unknown.exception, UsageError)
    assert str(unknown.exception) == "unknown --preset 'papers'; choose paper"
