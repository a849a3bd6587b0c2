"""What a user asked for, as frozen values that go to JSON and back; nothing here needs torch."""

from dataclasses import asdict, fields
from typing import Any, TypeVar

from msfp_cli.errors import UsageError

T = TypeVar("T", bound="Recipe")


class Recipe:
    """A frozen dataclass that survives JSON; unknown and missing keys are errors."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[T], data: dict[str, Any]) -> T:
        """Undo `to_json`.

        Raises:
            ValueError: a key is unknown or missing; whoever reads the file says which and what to
                do.
        """
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if set(data) != known:
            odd = sorted(set(data) ^ known)
            raise ValueError(f"settings do not fit this version of msfp: key {odd[0]!r}")
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in data.items()})


def at_least(what: str, value: int, least: int) -> None:
    """Refuse a number below the least that makes sense.

    Raises:
        UsageError: it is below.
    """
    if value < least:
        raise UsageError(f"{what} must be at least {least}, got {value}")
