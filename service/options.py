"""What a request may ask for: one model of options, shared by the query, the form and the command line."""

import math
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from service.errors import InputError
from service.settings import Settings


class Options(BaseModel):
    """Options of one segmentation; one that is left out takes the model's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scales: tuple[float, ...] | None = Field(
        None,
        description="Scales to segment at and average, separated by commas, as in `0.75,1,1.25`. "
        "At scale s the picture's long side becomes base_size x s for the network; the mask keeps the picture's size.",
    )
    flip: bool | None = Field(None, description="Also segment the mirrored picture at every scale, and average.")
    format: Literal["json", "png"] | None = Field(
        None,
        description="`json` (default) or `png`, the bare mask. Wins over the Accept header.",
    )

    @field_validator("scales", mode="before")
    @classmethod
    def _read_scales(cls, value: Any, info: ValidationInfo) -> tuple[float, ...] | None:
        if value is None:
            return None
        settings = info.context
        assert isinstance(settings, Settings)
        try:
            scales = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            raise ValueError("must be numbers separated by commas, as in 0.75,1,1.25") from None
        if len(scales) > settings.max_scales:
            raise ValueError(f"has {len(scales)} scales, at most {settings.max_scales} are allowed")
        if not all(math.isfinite(scale) and settings.min_scale <= scale <= settings.max_scale for scale in scales):
            raise ValueError(f"must each be from {settings.min_scale:g} to {settings.max_scale:g}")
        return scales


def parse_options(pairs: Iterable[tuple[str, str]], settings: Settings) -> Options:
    """Names and texts, from wherever the request gives them -> Options.

    A blank text counts as not given, as browsers send blank form fields. An option may be repeated, say in the query
    and in the form, as long as it says the same.

    Raises InputError with code unknown_option, contradicting_options or invalid_option.
    """
    given: dict[str, str] = {}
    for name, text in pairs:
        text = text.strip()
        if name not in Options.model_fields:
            known = ", ".join(Options.model_fields)
            raise InputError("unknown_option", f"unknown option {name[:64]!r}; the options are {known}")
        if not text:
            continue
        if given.setdefault(name, text) != text:
            raise InputError(
                "contradicting_options", f"option {name} is given twice: {given[name][:64]!r} and {text[:64]!r}"
            )
    try:
        return Options.model_validate(given, context=settings)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise InputError("invalid_option", "; ".join(_sentence(fault, given) for fault in faults)) from None


def _sentence(fault: Any, given: dict[str, str]) -> str:
    name = str(fault["loc"][0])
    reason = {
        "bool_parsing": "must be true or false",
        "literal_error": f"must be {fault.get('ctx', {}).get('expected', '')}",
    }.get(fault["type"], str(fault["msg"]).removeprefix("Value error, "))
    return f"option {name} {reason}; it was {given[name][:64]!r}"
