"""What a request may ask for: one model of options, wherever the request gives them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from service.errors import InputError
from service.formats import FormatName
from service.settings import Settings


class Options(BaseModel):
    """Options of one segmentation; one that is left out takes the model's or the service's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(None, description="Name of the model, one of `/models`; the first where left out.")
    scales: tuple[float, ...] | None = Field(
        None,
        description="Scales to segment at and average, separated by commas, as in `0.75,1,1.25`. "
        "At scale s the picture's long side becomes base_size x s for the network; the mask keeps the picture's size.",
    )
    flip: bool | None = Field(None, description="Also segment the mirrored picture at every scale, and average.")
    max_side: int | None = Field(
        None, ge=1, description="Reduce the picture first until no side is longer, in pixels; the mask has that size."
    )
    window: int | None = Field(
        None,
        ge=32,
        description="For large pictures: segment windows of this many pixels a side as pictures of their own, and "
        "average where they overlap. Small things are found that vanish when the whole picture is reduced.",
    )
    stride: int | None = Field(None, ge=1, description="Pixels from one window to the next; two thirds of a window.")
    classes: tuple[str, ...] | None = Field(
        None,
        description="Answer only about these classes, names or ids separated by commas. "
        "Other pixels become `other`: 255 in the mask, 65535 in a 16-bit one.",
    )
    threshold: float | None = Field(None, ge=0, le=1, description="A class counts as present from this score on.")
    format: FormatName | None = Field(
        None,
        description="`json` (default: mask as PNG in base64, and presence), `png` (indexed mask), `overlay`, "
        "`rle` (COCO), `polygons` (GeoJSON), `npz` (label map and probabilities) or `multipart` (JSON and PNG). "
        "Wins over the Accept header.",
    )
    timeout_ms: int | None = Field(None, ge=1, description="Answer within this time or fail with 504.")
    dry_run: bool = Field(False, description="Do not segment: tell cost, predicted time and wait.")

    @field_validator("scales", mode="before")
    @classmethod
    def _read_scales(cls, value: Any, info: ValidationInfo) -> tuple[float, ...] | None:
        if value is None:
            return None
        settings = _settings(info)
        count = str(value).count(",") + 1  # before they are read: there may be millions
        if count > settings.max_scales:
            raise ValueError(f"has {count} scales, at most {settings.max_scales} are allowed")
        try:
            scales = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            raise ValueError("must be numbers separated by commas, as in 0.75,1,1.25") from None
        if not all(math.isfinite(scale) and settings.min_scale <= scale <= settings.max_scale for scale in scales):
            raise ValueError(f"must each be from {settings.min_scale:g} to {settings.max_scale:g}")
        return scales

    @field_validator("classes", mode="before")
    @classmethod
    def _read_classes(cls, value: Any) -> tuple[str, ...] | None:
        if value is None:
            return None
        classes = tuple(part.strip() for part in str(value).split(",") if part.strip())
        if not classes:
            raise ValueError("must be names or ids of classes separated by commas")
        return classes

    @field_validator("timeout_ms")
    @classmethod
    def _timeout_is_allowed(cls, value: int | None, info: ValidationInfo) -> int | None:
        longest = _settings(info).max_timeout_ms
        if value is not None and value > longest:
            raise ValueError(f"must be at most {longest}")
        return value

    @model_validator(mode="after")
    def _stride_fits(self) -> "Options":
        if self.stride is not None and self.window is None:
            raise ValueError("stride needs window")
        if self.stride is not None and self.window is not None and not self.stride <= self.window <= 8 * self.stride:
            raise ValueError(f"stride must be from {-(-self.window // 8)} (an eighth) to {self.window}, the window")
        return self


def _settings(info: ValidationInfo) -> Settings:
    assert isinstance(info.context, Settings)
    return info.context


def parse_options(pairs: Iterable[tuple[str, str]], settings: Settings) -> Options:
    """Names and texts, from wherever the request gives them -> Options.

    A blank text counts as not given, as browsers send blank form fields. An option may be repeated, say in the query
    and in the form, as long as it says the same: 1 and 1.0 do.

    Raises InputError with code unknown_option, contradicting_options or invalid_option.
    """
    given: dict[str, str] = {}
    repeated: dict[tuple[str, str], None] = {}
    for name, text in pairs:
        text = text.strip()
        if name not in Options.model_fields:
            known = ", ".join(Options.model_fields)
            raise InputError("unknown_option", f"unknown option {name[:64]!r}; the options are {known}")
        if not text:
            continue
        if given.setdefault(name, text) != text:
            repeated[name, text] = None
    try:
        options = Options.model_validate(given, context=settings)
    except ValidationError as error:
        text = "; ".join(_sentence(fault, given) for fault in error.errors(include_url=False))
        raise InputError("invalid_option", text) from None
    for name, text in repeated:
        if not _says_the_same(options, {**given, name: text}, settings):
            raise InputError(
                "contradicting_options", f"option {name} is given twice: {given[name][:64]!r} and {text[:64]!r}"
            )
    return options


def _says_the_same(options: Options, given: dict[str, str], settings: Settings) -> bool:
    try:
        return Options.model_validate(given, context=settings) == options
    except ValidationError:
        return False


def option_pairs(members: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Options as JSON gives them -> (name, text) pairs. Raises InputError for a value that no option can have."""
    pairs = []
    for name, value in members:
        if value is None:
            continue
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str | int | float) for part in parts):
            raise InputError("invalid_option", f"option {name[:64]!r} must be a text, a number, true, false or a list")
        pairs.append((name, ",".join(str(part) for part in parts)))
    return pairs


def chosen_classes(options: Options, classes: Sequence[str]) -> list[int] | None:
    """Ids of the classes asked for, in id order; None for all. Raises InputError for one that the model lacks."""
    if options.classes is None:
        return None
    known = {str(index): index for index in range(len(classes))} | {name: index for index, name in enumerate(classes)}
    for asked in options.classes:
        if asked not in known:
            some = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise InputError("invalid_option", f"option classes: the model has no class {asked[:64]!r}; it has {some}")
    return sorted({known[asked] for asked in options.classes})


def _sentence(fault: Any, given: dict[str, str]) -> str:
    reason = {
        "bool_parsing": "must be true or false",
        "int_parsing": "must be a whole number",
        "float_parsing": "must be a number",
        "literal_error": f"must be {fault.get('ctx', {}).get('expected', '')}",
        "greater_than_equal": f"must be at least {fault.get('ctx', {}).get('ge', '')}",
        "less_than_equal": f"must be at most {fault.get('ctx', {}).get('le', '')}",
    }.get(fault["type"], str(fault["msg"]).removeprefix("Value error, "))
    if not fault["loc"]:
        return f"option {reason}"
    name = str(fault["loc"][0])
    return f"option {name} {reason}; it was {given[name][:64]!r}"
