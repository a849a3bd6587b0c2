"""Options: those made from the fields of recipes, and those that several commands share."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar, get_origin

import typer

from msfp_cli.errors import UsageError
from msfp_cli.files.documents import Json
from msfp_cli.memory import read_size
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.recipe import Option, Recipe, options_of
from msfp_cli.run import DEFAULT_DIRECTORY, Run

R = TypeVar("R", bound=Recipe)
Command = Callable[..., None]
_KEYWORD = inspect.Parameter.KEYWORD_ONLY

DEFAULT_RUN = Run(DEFAULT_DIRECTORY)
RunOption = Annotated[
    Run,
    typer.Option(
        "--run",
        parser=lambda place: Run(Path(str(place))),
        metavar="PATH",
        help="Run directory: where the commands find each other's results.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="Device to compute on, such as cpu or cuda. Default: an accelerator, if any."
    ),
]
DtypeOption = Annotated[str | None, typer.Option(help=options_of(ModelSource)["dtype"].help)]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory to take at most, such as 8GiB, in each process: weights are read from the "
        "model's files when their layers run. The result is the same. Default: the model is loaded "
        "whole.",
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace a result that exists already.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result on stdout as JSON instead of text.")
]


def read_memory(text: str | None) -> int | None:
    """Return the bytes that ``--max-memory`` allows; None if it was not typed.

    Raises:
        UsageError: it is not a size.
    """
    if text is None:
        return None
    try:
        return read_size(text)
    except UsageError as error:
        raise UsageError(f"--max-memory {error}") from None


@dataclass(frozen=True)
class Options:
    """The options that a user typed, by the field that they set."""

    values: Mapping[str, Any]

    def recipe(self, kind: type[R], **rest: Json) -> R:
        """Return a recipe of what was typed, and the defaults.

        Arguments:
            rest: fields that are not options.
        """
        return kind(**self._of(kind), **rest)

    def over(self, recipe: R) -> R:
        """Return a recipe with what was typed in place of its own settings."""
        return replace(recipe, **self._of(type(recipe)))

    def _of(self, kind: type[Recipe]) -> dict[str, Any]:
        return {key: self.values[key] for key in options_of(kind).keys() & self.values.keys()}


def with_options(*recipes: type[Recipe]) -> Callable[[Command], Command]:
    """Give a command the options of these recipes; it gets them as its first argument, `Options`.

    A field that several recipes have is one option. An option that is not typed is not in there:
    its default may depend on what the command finds. Where a recipe has presets, ``--preset`` names
    one, and what is typed comes before it.
    """
    presets = dict[str, dict[str, Json]]()
    for recipe in recipes:
        for name, settings in recipe.PRESETS.items():
            presets.setdefault(name, {}).update(settings)
    options = dict[str, Option]()
    parameters = dict[str, inspect.Parameter]()
    for recipe in recipes:
        described = options_of(recipe)
        for each in fields(recipe):
            if each.name in described and described[each.name].is_typed:
                options.setdefault(each.name, described[each.name])
                parameters.setdefault(each.name, _parameter(each, described[each.name]))

    def decorate(command: Command) -> Command:
        @wraps(command)
        def wrapper(**arguments: Json) -> None:
            typed = {name: arguments.pop(name) for name in options}
            values = {
                name: _setting(options[name], value)
                for name, value in typed.items()
                if value is not None and value != []
            }
            preset = _preset(presets, arguments.pop("preset")) if presets else {}
            command(Options({**preset, **values}), **arguments)

        _, *own = inspect.signature(command).parameters.values()
        if presets:
            parameters["preset"] = _preset_parameter(presets)
        everything = [*parameters.values(), *(each.replace(kind=_KEYWORD) for each in own)]
        wrapper.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
        return wrapper

    return decorate


def _preset_parameter(presets: Collection[str]) -> inspect.Parameter:
    """Return the parameter of a command that names a preset."""
    help_text = (
        f"Settings to begin with: {', '.join(presets)}, the conditions of the paper (Zhao et al. "
        "2025), to compare with. Options that are given as well come first. Default: those shown "
        "here."
    )
    annotation = Annotated[str | None, typer.Option(help=help_text)]
    return inspect.Parameter("preset", _KEYWORD, default=None, annotation=annotation)


def _preset(presets: Mapping[str, Mapping[str, Json]], name: str | None) -> Mapping[str, Json]:
    """Return the settings of a preset; none for None.

    Raises:
        UsageError: there is no such preset.
    """
    if name is None:
        return {}
    if name not in presets:
        raise UsageError(f"unknown --preset {name!r}; choose {', '.join(presets)}")
    return presets[name]


def _parameter(each: "Field[Any]", described: Option) -> inspect.Parameter:
    """Return the parameter of a command that Typer makes an option of."""
    kind: Any = each.type
    if described.read is not None:
        kind = str
    elif get_origin(kind) is tuple:
        kind = list[str]
    help_text = described.help
    if "Default:" not in help_text:
        help_text += f" Default: {described.write(each.default)}."
    option = typer.Option(*described.names, help=help_text)
    annotation = Annotated[Optional[kind], option]  # noqa: UP045 (a type made at run time)
    return inspect.Parameter(each.name, _KEYWORD, default=None, annotation=annotation)


def _setting(each: Option, value: Json) -> Json:
    """Return the value of a field for what Typer read."""
    if each.read is not None:
        return each.read(value)
    return tuple(value) if isinstance(value, list) else value
