"""Promise: a request gets the format it asks for, by name or by Accept header, or hears which ones there are."""

import pytest

from service.errors import InputError
from service.formats import FORMATS, FormatName, choose_format


@pytest.mark.parametrize(
    ("accept", "format"),
    [
        ("", "json"),
        ("*/*", "json"),
        ("application/*", "json"),
        ("application/json", "json"),
        ("application/json; charset=utf-8", "json"),
        ("APPLICATION/JSON", "json"),
        ("image/png", "png"),
        ("image/*", "png"),
        ("image/jpeg", "overlay"),
        ("application/geo+json", "polygons"),
        ("application/x-npz", "npz"),
        ("multipart/mixed", "multipart"),
        ("multipart/*", "multipart"),
        ("image/png, application/json", "json"),
        ("application/json;q=0.5, image/png", "png"),
        ("image/png;q=0.1, application/json", "json"),
        ("image/*;q=0.5, image/png;q=0.1", "overlay"),
        ("*/*, application/json;q=0", "png"),
        ("*/*;q=0.1, multipart/mixed ; q=0.200", "multipart"),
        ("text/html, */*;q=0.8", "json"),
        ("image/avif,image/webp,*/*", "json"),
        ("application/json;q=0.1, application/json;v=2;q=1, image/png;q=0.5", "json"),
        ("image/png;q=x", "json"),
        ("image/png;q=2", "json"),
        ("image/png;q=nan", "json"),
        ("image/png;q=-1, image/jpeg;q=0.1", "overlay"),
        (",;,/,png", "json"),
    ],
)
def test_accept_chooses(accept: str, format: FormatName) -> None:
    assert choose_format(accept, None) == (format, FORMATS[format].media_types[0])


@pytest.mark.parametrize("accept", ["", "*/*", "image/png", "text/html", "application/json;q=0"])
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "overlay"])
def test_format_wins_over_accept(accept: str, format: FormatName) -> None:
    assert choose_format(accept, format) == (format, FORMATS[format].media_types[0])


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", "image/jpeg"),
        ("image/*", "image/jpeg"),
        ("text/html", "image/jpeg"),
        ("image/png", "image/png"),
        ("image/jpeg;q=0.5, image/*", "image/png"),
    ],
)
def test_accept_chooses_the_file_type_of_an_overlay(accept: str, media_type: str) -> None:
    assert choose_format(accept, "overlay") == ("overlay", media_type)


@pytest.mark.parametrize("accept", ["text/html", "image/webp", "*/*;q=0", "application/octet-stream, video/*"])
def test_nothing_acceptable_is_an_error_that_lists_what_can_be_had(accept: str) -> None:
    with pytest.raises(InputError) as caught:
        choose_format(accept, None)
    assert caught.value.code == "not_acceptable"
    for name, format in FORMATS.items():
        assert (f"{format.media_types[0]} ({name})" in caught.value.message) == format.by_accept
