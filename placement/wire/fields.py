"""What the fields of a declaration may hold, and the base of all its parts."""

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
"""What may be shown where a key might have been pasted: no key looks like this."""

STANDS = {"stands": True}
"""Validation context for what stands already: rules for new requests do not apply to it."""

MOST = 100_000
"""A count above this is a slip of the pen, not a deployment."""
LEAST = 0.001
"""An amount below this would count as none: 1 MiB, a thousandth of a CPU or of a GB/s."""


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
    """A validator that refuses a name that there is not, and says which there are."""

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
    """Validates how many GPUs somebody asks for: a whole number, or a share of one."""
    if isinstance(value, float) and not (value >= 1 and value.is_integer()):
        if value > 1:
            raise ValueError(
                f"{value!r} GPUs is more than one and not whole, and a share cannot span two GPUs; "
                "use a whole number, or a share below 1"
            )
        fits = value * WHOLE >= 0.5 and math.isclose(value * WHOLE, round(value * WHOLE), abs_tol=1e-6)
        if not fits:
            raise ValueError(f"{value!r} is no share of a GPU; use 0.001 to 0.999, in thousandths")
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value < 1:
        raise ValueError(
            f"{value} is too small; use at least 1, or leave gpus out on a remote deployment, and where cpus is set"
        )
    return _whole(value)


def check_name(value: str, what: str) -> str:
    """Validates the name of a deployment, or of ``what`` else has one."""
    if not value:
        raise ValueError(f"is empty; give the {what} a name")
    if not NAME_PATTERN.fullmatch(value):
        raise ValueError(
            f"{value[:80]!r} is not a name Ray groups can carry; use letters, digits, '.', '_' and '-', "
            "start with a letter or digit, at most 63 characters"
        )
    return value


def stands(info: ValidationInfo) -> bool:
    """Whether what is read stands already."""
    return info.context == STANDS


MOST_NAME = Field(max_length=253)
"""No name in DNS is longer; nor is one of a node, an accelerator or a deployment."""
MOST_LABEL = Field(max_length=317)
"""No label of Kubernetes is longer: a name in DNS, a slash, and 63 characters."""

Named = Annotated[str, MOST_NAME]
Count = Annotated[int, BeforeValidator(_whole)]
Amount = Annotated[float, AfterValidator(_amount)]


class Declared(Model):
    """What somebody wrote. Others will read it on their terminals, so that it holds no control characters.

    But for ``options``, which nobody here reads: JSON shows them escaped.
    """

    path: ClassVar[str | None] = None
    """Begins the full names of its fields, from the deployment on; ``None`` where nobody means them by mistake."""

    @model_validator(mode="wrap")
    @classmethod
    def _says_what_was_meant(cls, value: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Of an unknown field, says what there is instead, also where no file or service stands between."""
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
    """Field -> its name from the deployment on, of all there are; the outermost of two."""
    parts = [(part.path, part) for part in Declared.__subclasses__() if part.path is not None]
    inmost_first = sorted(parts, key=lambda one: one[0].count("."), reverse=True)
    return {name: path + name for path, part in inmost_first for name in part.model_fields}
