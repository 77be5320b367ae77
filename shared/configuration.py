"""Frozen configuration read from TOML: unknown keys are errors that name the nearest known key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from bract.shared.errors import UnknownName, UsageError

# Patterns of ours, which an error tells in words.
_HEXADECIMAL = re.compile(r"\^\[0-9a-f\]\{(\d+)\}\$")
_NAME = re.compile(r"\^\[A-Za-z0-9\]\[A-Za-z0-9(\S+)\]\{0,(\d+)\}\$")


class Frozen(BaseModel):
    """A value: immutable, strict about its keys, finite in its numbers.

    What is computed of it may be kept (`cached_property`); a changed copy computes it anew.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Returns a copy with other values; nothing that was kept of the old ones is in it."""
        copied = super().model_copy(update=update, deep=deep)
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied


def host_and_port(address: str) -> tuple[str, int]:
    """Returns the parts of HOST:PORT, an IPv6 address without its brackets.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"([^\s/:\[\]]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})", address)
    if found is None or int(found[2]) > 65535:
        raise ValueError("must be HOST:PORT, as in 127.0.0.1:8443")
    return found[1].strip("[]"), int(found[2])


def _is_address(address: str) -> str:
    host_and_port(address)
    return address


HostPort = Annotated[str, AfterValidator(_is_address)]
Model = TypeVar("Model", bound=BaseModel)


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the tables of a TOML file; what some editors put before UTF-8 is no part of it.

    Raises:
        UsageError: where the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of what it says, how, and how deep
        raise UsageError(f"{path} is not TOML: {error}") from error


def parse(model: type[Model], value: Any, *, source: str) -> Model:
    """Returns `value` as a `model`, or raises one line that names the first bad key.

    Raises:
        UnknownName: for a key that does not exist, naming the nearest that does.
        UsageError: for a value of the wrong type or out of range.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _one_line(model, error, source) from error


def _one_line(model: type[BaseModel], error: ValidationError, source: str) -> UsageError:
    errors = error.errors(include_url=False)
    # A misspelt key is missing under its right name too: the misspelling says more.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = [".".join([*path[:-1], name]) for name in _fields_at(model, path[:-1])]
        return UnknownName(f"key of {source},", ".".join(path), known)
    message = _in_words(first)
    where = f"{'.'.join(path)}: " if path else ""
    shown = first.get("input")
    value = f" (got {shown!r})" if isinstance(shown, str | int | float | bool) else ""
    return UsageError(f"{source}: {where}{message}{value}")


def _in_words(fault: ErrorDetails) -> str:
    if fault["type"] == "string_pattern_mismatch":
        pattern = fault["ctx"]["pattern"]
        if found := _HEXADECIMAL.fullmatch(pattern):
            return f"must be {found[1]} hexadecimal digits, lower case"
        if found := _NAME.fullmatch(pattern):
            return (
                "must begin with a letter or a digit, and go on with these and "
                f"{' '.join(found[1])} alone, up to {int(found[2]) + 1} in all"
            )
    return fault["msg"].removeprefix("Value error, ")


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    models = [model]
    for part in path:
        fields = [one.model_fields[part] for one in models if part in one.model_fields]
        if fields:
            models = [found for field in fields for found in _models_in(field.annotation)] or models
        else:  # a place in a list, or the word that chose one of several models
            models = [one for one in models if part in _defaults(one)] or models
    return list(models[0].model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def _defaults(model: type[BaseModel]) -> list[Any]:
    return [field.default for field in model.model_fields.values()]


def first_fault(error: ValidationError) -> str:
    """Returns the first fault of a nested model in words, for a validator that wraps it."""
    return _in_words(error.errors(include_url=False)[0])
