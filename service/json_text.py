"""JSON -> values, as the standard library reads it but for numbers that would take it too long."""

import json
from collections.abc import Callable
from typing import Any

from service.errors import InputError

MOST_DIGITS = 500  # of a whole number: reading and writing it takes the square of them; floats end at 309

_DIGITS_AS_ZEROS = bytes(not 0x30 <= byte <= 0x39 for byte in range(256))


def load_json(
    text: bytes,
    *,
    parse_constant: Callable[[str], Any] | None = None,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """`json.loads`. Raises InputError for a whole number of more than MOST_DIGITS digits."""
    digits = text.translate(_DIGITS_AS_ZEROS, b"\0")  # no NULs, as UTF-16 has them
    may_be_long = bytes(MOST_DIGITS + 1) in digits  # Python's own way is three times as fast
    return json.loads(
        text,
        parse_int=_short_integer if may_be_long else None,
        parse_constant=parse_constant,
        object_pairs_hook=object_pairs_hook,
    )


def _short_integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise InputError("invalid_body", f"a number in the JSON has too many digits, more than {MOST_DIGITS}")
    return int(text)
