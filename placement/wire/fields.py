"""The allowed values of a declaration's fields, and the base of all its parts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from placement.core.needs import WHOLE
from placement.wire.base import Model
from placement.wire.unknown import unknown_field

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_WORD_PATTERN = re.compile(r"[A-Za-z_-]{1,31}\d?")
"""A value that an error may show even where a key might have been pasted: no key looks like this."""

STANDS = {"stands": True}
"""Validation context for deployments that are placed already: rules for new requests do not apply to them."""

MOST = 100_000
"""A count above this is a typing error."""
LEAST = 0.001
"""An amount below this would be rounded to zero: 1 MiB, a thousandth of a CPU or of a GB/s."""


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as spreadsheets and other programs write whole numbers: 8.0
    if isinstance(value, bool) or not isinstance(value, int):
        fractional = isinstance(value, float) and math.isfinite(value)
        raise ValueError(
            f"{value!r} is {'fractional' if fractional else 'not a number'}; use a whole number of at least 1"
        )
    if value < 1:
        raise ValueError(f"{value} is too small; use a whole number of at least 1")
    if value > MOST:
        raise ValueError(f"{value if value < 10**18 else 'it'} is too large; use at most {MOST}")
    return value


def one_of(what: str, known: tuple[str, ...]) -> Callable[[Any], Any]:
    """A validator that refuses an unknown name, and lists the known ones."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value not in known:
            named = f"{value!r} is" if _WORD_PATTERN.fullmatch(value) else "is"
            raise ValueError(f"{named} no {what}; there are {', '.join(known)}")
        return value

    return check


def _amount(value: float, info: ValidationInfo) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a number; leave it out for no limit")
    if stands(info):
        return value
    if value < LEAST:
        raise ValueError(f"{value:g} is too small; use at least {LEAST}, or leave it out")
    if value > MOST:
        raise ValueError(f"{value:g} is too large; use at most {MOST}")
    return value


def gpu_amount(value: Any) -> Any:
    """Validates a number of GPUs: a whole number, or a share of one."""
    if isinstance(value, float) and not (value >= 1 and value.is_integer()):
        if value > 1:
            raise ValueError(
                f"{value!r} GPUs is more than one and not whole, and a share cannot span two GPUs; "
                "use a whole number, or a share below 1"
            )
        fits = value * WHOLE >= 0.5 and math.isclose(value * WHOLE, round(value * WHOLE), abs_tol=1e-6)
        if not fits:
            raise ValueError(f"{value!r} is not a share of a GPU; use 0.001 to 0.999, in thousandths")
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value < 1:
        raise ValueError(
            f"{value} is too small; use at least 1, or leave gpus out on a remote deployment, and where cpus is set"
        )
    return _whole(value)


def check_name(value: str, what: str) -> str:
    """Validates the name of a deployment, or of ``what``."""
    if not value:
        raise ValueError(f"is empty; give the {what} a name")
    if not NAME_PATTERN.fullmatch(value):
        raise ValueError(
            f"{value[:80]!r} is not a name Ray groups can carry; use letters, digits, '.', '_' and '-', "
            "start with a letter or digit, at most 63 characters"
        )
    return value


def stands(info: ValidationInfo) -> bool:
    """Whether the deployment that is read is placed already."""
    return info.context == STANDS


MOST_NAME = Field(max_length=253)
"""The longest name in DNS; names of nodes, accelerators and deployments are no longer."""
MOST_LABEL = Field(max_length=317)
"""The longest label of Kubernetes: a name in DNS, a slash, and 63 characters."""

Named = Annotated[str, MOST_NAME]
Count = Annotated[int, BeforeValidator(_whole)]
Amount = Annotated[float, AfterValidator(_amount)]


class Declared(Model):
    """A part of a declaration. Its texts hold no control characters, as others will see them on their terminals.

    ``options`` is an exception: it is only shown as JSON, which escapes them.
    """

    path: ClassVar[str | None] = None
    """The prefix of its fields' full names, from the deployment on; ``None`` if its fields are not to be suggested."""

    @model_validator(mode="wrap")
    @classmethod
    def _says_what_was_meant(cls, value: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """For an unknown field, suggests the right one, also when a model is created directly in Python."""
        try:
            return validate(value)
        except ValidationError as error:
            problems = error.errors(include_url=False)
            if not any(problem["type"] == "extra_forbidden" for problem in problems):
                raise
            told = [cls._told(problem) for problem in problems]
            raise ValidationError.from_exception_data(cls.__name__, told, hide_input=True) from None

    @classmethod
    def _told(cls, problem: ErrorDetails) -> InitErrorDetails:
        kind: str | PydanticCustomError = problem["type"]
        if kind == "extra_forbidden" and len(problem["loc"]) == 1:
            message = unknown_field(str(problem["loc"][0]), list(cls.model_fields), _full_names())
            kind = PydanticCustomError("unknown_field", "{message}", {"message": message})
        elif kind == "unknown_field":
            kind = PydanticCustomError(kind, "{message}", problem["ctx"])
        return InitErrorDetails(
            type=kind, loc=problem["loc"], input=problem["input"], ctx=problem.get("ctx", {})
        )

    @field_validator("*", mode="after")
    @classmethod
    def _is_printable(cls, value: Any, info: ValidationInfo) -> Any:
        texts: Iterable[Any] = ()
        if isinstance(value, str):
            texts = (value,)
        elif isinstance(value, (list, tuple)):
            texts = value
        elif isinstance(value, dict) and info.field_name != "options":
            texts = (*value.keys(), *value.values())
        for text in texts:
            if isinstance(text, str) and not text.isprintable():
                odd = next(character for character in text if not character.isprintable())
                raise ValueError(f"contains the character U+{ord(odd):04X}, which cannot be shown; remove it")
        return value


def _full_names() -> Mapping[str, str]:
    """Field -> its full name from the deployment on; of two with the same name, the outermost."""
    parts = [(part.path, part) for part in Declared.__subclasses__() if part.path is not None]
    inmost_first = sorted(parts, key=lambda one: one[0].count("."), reverse=True)
    return {name: path + name for path, part in inmost_first for name in part.model_fields}
