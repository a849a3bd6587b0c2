"""What a user asked for, as frozen values that go to JSON and back; nothing here needs torch.

A field of a recipe carries its option: help text, names, bounds and choices. The command line is
made from it (`options`), wrong values are refused in its words, and a report prints the
commands of a run with it. So a setting is described in one place, where its default is::

    steps: int = option(2000, "Updates.", at_least=1)
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from msfp_cli.errors import UsageError
from msfp_cli.files.documents import Json
from msfp_cli.files.typed import read_fields

T = TypeVar("T", bound="Recipe")


@dataclass(frozen=True, kw_only=True)
class Option:
    """How a setting appears to the user.

    Arguments:
        help: what it does, in its unit; the default is added by whoever prints it.
        names: as typed, the first one is printed; without any it is ``--`` and the field's name.
        at_least, above, at_most: bounds of a number.
        choices: all that a text may be, or each of several.
        read: turns the text that was typed into the setting; None leaves that to the field's type.
        write: undoes `read`.
        is_typed: whether commands offer it; otherwise only Python does.
        formerly: its key in files of earlier versions.
        before: what held in versions that did not have it, whose files lack it; None makes its
            absence an error.
        later: whether files lack it where it is None, as those of versions that did not have it.
    """

    help: str
    names: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    read: Callable[[str], Any] | None = None
    write: Callable[[Any], str] = str
    is_typed: bool = True
    formerly: str | None = None
    before: str | int | tuple[()] | None = None
    later: bool = False

    @property
    def name(self) -> str:
        """The name to print."""
        return self.names[0]

    def check(self, value: Json) -> None:
        """Refuse a value that is out of bounds or not one of the choices.

        Raises:
            UsageError: the message names the option and what it allows.
        """
        if value is None:
            return
        for bound in self._broken_bounds(value):
            raise UsageError(f"{self.name} must be {bound}, got {_written(value)}")
        for item in value if isinstance(value, tuple) else (value,):
            if self.choices and item not in self.choices:
                allowed = ", ".join(self.choices)
                raise UsageError(f"unknown {self.name} {item!r}; choose one of {allowed}")

    def _broken_bounds(self, value: float) -> Iterator[str]:
        """Yield the bounds that a number breaks, in words; a NaN or an infinity breaks all."""
        bounds = (self.at_least, self.above, self.at_most)
        if bounds == (None, None, None):
            return
        is_finite = math.isfinite(value)
        if self.at_least is not None and not (is_finite and value >= self.at_least):
            yield f"at least {_written(self.at_least)}"
        if self.above is not None and not (is_finite and value > self.above):
            yield "positive" if self.above == 0 else f"above {_written(self.above)}"
        if self.at_most is not None and not (is_finite and value <= self.at_most):
            yield f"at most {_written(self.at_most)}"


def _written(value: Json) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def option(default: Json, help: str, **details: Json) -> Any:  # noqa: ANN401 (as dataclasses.field)
    """Return a recipe's field with its option; the details are those of `Option`."""
    return field(default=default, metadata={"option": Option(help=help, **details)})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A frozen dataclass that survives JSON; unknown and missing keys are errors.

    ``PRESETS`` has settings that belong together, by the name that ``--preset`` gives them.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Json]]] = {}

    def __post_init__(self) -> None:
        for name, each in options_of(type(self)).items():
            each.check(getattr(self, name))

    def to_json(self) -> dict[str, Json]:
        """Return plain JSON values."""
        values = asdict(self)
        for name, each in options_of(type(self)).items():
            if each.later and values[name] is None:
                del values[name]
        return {key: _plain(value) for key, value in values.items()}

    @classmethod
    def from_json(cls: type[T], data: dict[str, Json]) -> T:
        """Undo `to_json`, also of an earlier version.

        Raises:
            ValueError: a key is unknown or missing, or a value is of another type; whoever reads
                the file says which and what to do.
        """
        options = options_of(cls)
        renamed = {each.formerly: name for name, each in options.items()}
        values: dict[str, Json] = {
            n: each.before for n, each in options.items() if each.before is not None
        }
        values |= {renamed.get(key, key): value for key, value in data.items()}
        for name, each in options.items():
            if each.later:
                values.setdefault(name, None)
        if odd := sorted(values.keys() ^ {each.name for each in fields(cls)}):
            raise ValueError(f"settings do not fit this version of msfp: key {odd[0]!r}")
        return read_fields(cls, values)

    def differences(self: T, changed: T) -> Iterator[tuple[str, Json, Json]]:
        """Yield each option that has another value in `changed`: its name and both values."""
        for name, each in options_of(type(self)).items():
            ours = getattr(self, name)
            theirs = getattr(changed, name)
            if ours != theirs:
                yield each.name, ours, theirs

    def words(self) -> list[str]:
        """Return the command line's words for all that differs from its default."""
        words = list[str]()
        for name, each in options_of(type(self)).items():
            value = getattr(self, name)
            if each.is_typed and value != default_of(type(self), name):
                words += _words(each, value)
        return words


def _plain(value: Json) -> Json:
    """Return the value of a field as JSON has it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def options_of(recipe: type[Recipe]) -> dict[str, Option]:
    """Return the options of a recipe by field.

    A subclass that gives a field another default keeps its option.
    """
    options = dict[str, Option]()
    for base in reversed(recipe.__mro__):
        for name, each in vars(base).get("__dataclass_fields__", {}).items():
            if "option" in each.metadata:
                options[name] = _named(each.metadata["option"], name)
    return options


def default_of(recipe: type[Recipe], name: str) -> Json:
    """Return the default of a field, `dataclasses.MISSING` if it has none."""
    return next((each.default for each in fields(recipe) if each.name == name), MISSING)


def _named(each: Option, field_name: str) -> Option:
    """Return the option with a name."""
    if each.names:
        return each
    return replace(
        each, names=(f"--{field_name.replace('_', '-')}" if each.is_typed else field_name,)
    )


def _words(each: Option, value: Json) -> list[str]:
    """Return the words that set an option: a switch stands alone, several values repeat it."""
    if isinstance(value, bool):
        on, _, off = each.name.partition("/")
        return [on if value else off]
    words = list[str]()
    for item in value if isinstance(value, tuple) and each.read is None else [value]:
        words += [each.name, each.write(item)]
    return words
