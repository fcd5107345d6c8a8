"""The formats of an answer: their media types, and which one a request gets."""

import re
from dataclasses import dataclass
from typing import Literal

from service.errors import InputError

FormatName = Literal["json", "png", "overlay", "rle", "polygons", "npz", "multipart"]


@dataclass(frozen=True)
class Format:
    """One way to answer.

    `media_types`: what it is sent as, the usual one first. `carries_labels`: whether the label map can be read from it,
    bit for bit. `by_accept`: whether an Accept header alone can ask for it by its usual media type.
    """

    media_types: tuple[str, ...]
    carries_labels: bool
    by_accept: bool = True


# In the order of preference where an Accept header likes several equally.
FORMATS: dict[FormatName, Format] = {
    "json": Format(("application/json",), carries_labels=True),
    "png": Format(("image/png",), carries_labels=True),
    "overlay": Format(("image/jpeg", "image/png"), carries_labels=False),
    "rle": Format(("application/json",), carries_labels=True, by_accept=False),
    "polygons": Format(("application/geo+json",), carries_labels=True),
    "npz": Format(("application/x-npz",), carries_labels=True),
    "multipart": Format(("multipart/mixed",), carries_labels=True),
}

_RANGE = re.compile(r"[\w!#$%&'*+.^`|~-]+/[\w!#$%&'*+.^`|~-]+")
_WEIGHT = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?")


def choose_format(accept: str, format: FormatName | None) -> tuple[FormatName, str]:
    """The format and the media type to answer with; for multipart, its boundary is still to be added.

    `format` decides where it is given, and the Accept header only between the media types of that format, if one
    pleases. Otherwise it decides by RFC 9110: the most specific range that matches gives a media type's quality, the
    highest quality wins, ties go to the first in FORMATS. Ranges that cannot be read are passed over; a header without
    any other counts as none, and without a header the answer is JSON.

    Raises InputError with code not_acceptable where the header admits none of the formats.
    """
    ranges = {name: weight for name, weight in weights(accept).items() if _RANGE.fullmatch(name)}
    if format is not None:
        types = FORMATS[format].media_types
        return format, max(types, key=lambda media_type: _quality(ranges, media_type))
    offers = {known.media_types[0]: name for name, known in FORMATS.items() if known.by_accept}
    best = max(offers, key=lambda media_type: _quality(ranges, media_type))
    if ranges and not _quality(ranges, best):
        had = ", ".join(f"{media_type} ({name})" for media_type, name in offers.items())
        raise InputError("not_acceptable", f"the Accept header admits none of what can be had: {had}")
    return offers[best], best


def weights(header: str) -> dict[str, float]:
    """The entries of a header like Accept, in lower case, with their weights, 0..1 (RFC 9110, 12.4.2).

    Parameters other than q are left aside; an entry whose q cannot be read is passed over.
    """
    found: dict[str, float] = {}
    for entry in header.lower().split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        weight = next((text.removeprefix("q=") for text in parameters if text.startswith("q=")), "1")
        if _WEIGHT.fullmatch(weight):
            found[name] = max(float(weight), found.get(name, 0.0))
    return found


def _quality(ranges: dict[str, float], media_type: str) -> float:
    """The quality of a media type by the most specific range that matches it; 0 where none does."""
    kind = media_type.partition("/")[0]
    return next((ranges[name] for name in (media_type, f"{kind}/*", "*/*") if name in ranges), 0.0)
