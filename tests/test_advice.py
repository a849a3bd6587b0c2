"""What a message advises helps: every piece of advice is followed."""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from advice import BEYOND, ELSEWHERE, MODEL, RUN, TROUBLES, Step, Trouble
from conftest import Invoke
from kills import commands
from structure import SOURCE, modules

CHAIN = ("calibrate", "finetune", "export", "evaluate")
# A command with its program, an option in a sentence, or what is to be done by hand.
_ADVICE = re.compile(
    r"`(msfp|hf|pip) |(^|[ ;(])--[a-z]|check=False|the same command|delete it|move it away"
)


def strings(path: Path) -> Iterator[str]:
    """Yield the texts of a module that are no documentation, with {} for what is put in."""
    tree = ast.parse(path.read_text())
    parts = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr | ast.JoinedStr):
            parts |= {id(child) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                getattr(value, "value", "{}") if isinstance(value, ast.Constant) else "{}"
                for value in node.values
            )
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts
        ):
            yield node.value


def is_advice(text: str) -> bool:
    """Whether a text is a message that names a command or an option; help ends with a period."""
    is_help = text.endswith(".") or "\n" in text
    return _ADVICE.search(text) is not None and not is_help and " " in text


MESSAGES = sorted(
    {text for path in modules().values() for text in strings(path) if is_advice(text)}
)


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_with_advice_is_followed_somewhere(message: str) -> None:
    known = (*(trouble.says for trouble in TROUBLES), *ELSEWHERE, *BEYOND)
    assert any(part in message for part in known), "enter it in tests/advice.py"


@pytest.mark.parametrize("table", (ELSEWHERE, BEYOND))
def test_tables_name_messages_that_there_are(table: dict[str, str]) -> None:
    for part, place in table.items():
        assert any(part in message for message in MESSAGES), part
        assert not place.startswith("tests/") or (SOURCE.parents[1] / place).exists(), place


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a model and a run that has everything but a report."""
    from kills import start
    from tiny_pipelines import save_tiny

    place = tmp_path_factory.mktemp("advice")
    save_tiny("DDIMPipeline", place / MODEL)
    for title in CHAIN:
        ending = start(commands(place / MODEL, place / RUN)[title])()
        assert ending.code == 0, ending
    return place


def take(step: Step, msfp: Invoke) -> None:
    """Take a step of a user."""
    if callable(step):
        step(RUN)
        return
    result = msfp(*step)
    assert result.exit_code == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.says[:40])
def test_following_the_advice_ends_the_trouble(
    trouble: Trouble, finished: Path, msfp: Invoke, tmp_path: Path
) -> None:
    (tmp_path / MODEL).symlink_to(finished / MODEL)  # a recording names the place of its model
    shutil.copytree(finished / RUN, tmp_path / RUN)
    for step in trouble.prepare:
        take(step, msfp)
    result = msfp(*trouble.command)
    assert result.exit_code in (1, 2)
    assert trouble.says in result.stderr
    for step in trouble.follow:
        take(step, msfp)
    take(trouble.then or trouble.command, msfp)
