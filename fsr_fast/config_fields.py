"""Types of values in the configuration, and the base of its sections."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, le=1000.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=1, le=2**16)]
Iterations = Annotated[int, Field(ge=0)]
Scales = Annotated[tuple[Annotated[float, Field(ge=0.1, le=4.0)], ...], Field(min_length=1)]
Dilations = Annotated[tuple[Annotated[int, Field(ge=1, le=512)], ...], Field(min_length=1)]


def _split_window(value: Any) -> Any:
    """Read `auto`, `percentile LOW HIGH` and `LOW HIGH`, given as text or as a list."""
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    return "auto" if isinstance(words, list | tuple) and list(words) == ["auto"] else words


Window = Annotated[Literal["auto"] | tuple[Literal["percentile"] | float, ...], BeforeValidator(_split_window)]


def _plain_word(value: Any, kind: Any) -> Any:
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    words = {word for part in (kind, *parts) if get_origin(part) is Literal for word in get_args(part)}
    if value is False and "off" in words and bool not in parts:
        return "off"
    if value is not None and not (isinstance(value, str) and value.lower() in ("none", "null")):
        return value
    return "none" if "none" in words else None if NoneType in parts else value


class Section(BaseModel):
    """One section of the configuration: unknown keys are refused, values are fixed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _one_word_for_nothing(cls, values: Any) -> Any:
        """Treat `none`, `None`, `null` and an empty value alike, and YAML's `off`, a boolean there, as the word."""
        if not isinstance(values, dict):
            return values
        fields = {name: value for name, value in values.items() if name in cls.model_fields}
        return values | {name: _plain_word(value, cls.model_fields[name].annotation) for name, value in fields.items()}
