"""Promise: an option is understood, or refused with a sentence that says what would be."""

import gc
import weakref

import pytest

from service.errors import InputError
from service.options import Options, parse_options
from service.settings import Settings


def parse(*pairs: tuple[str, str]) -> Options:
    return parse_options(pairs, Settings())


def refusal(*pairs: tuple[str, str]) -> InputError:
    with pytest.raises(InputError) as caught:
        parse(*pairs)
    return caught.value


def test_nothing_given_leaves_everything_to_the_model() -> None:
    assert parse() == Options(scales=None, flip=None, format=None)


def test_all_given() -> None:
    options = parse(("scales", "0.75, 1,1.25"), ("flip", "true"), ("format", "png"))
    assert options.scales == (0.75, 1.0, 1.25)
    assert options.flip is True
    assert options.format == "png"


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("1", True), ("False", False), ("0", False), ("no", False)]
)
def test_flip(text: str, value: bool) -> None:
    assert parse(("flip", text)).flip is value


def test_blank_is_not_given() -> None:
    assert parse(("scales", ""), ("flip", " "), ("format", "")) == Options()


def test_unknown_option_is_named_and_the_known_ones_listed() -> None:
    error = refusal(("sclaes", "1"))
    assert error.code == "unknown_option"
    assert "'sclaes'" in error.message
    assert "the options are model, scales, flip, max_side, window" in error.message


@pytest.mark.parametrize("name", ["sclaes", ""])
def test_unknown_option_is_refused_even_when_blank(name: str) -> None:
    assert refusal((name, "")).code == "unknown_option"


@pytest.mark.parametrize("text", ["0.2", "3.1", "1,4", "0", "-1", "nan", "inf", "1e400"])
def test_scales_out_of_range_name_the_range(text: str) -> None:
    error = refusal(("scales", text))
    assert error.code == "invalid_option"
    assert "scales" in error.message
    assert "0.25 to 3" in error.message


@pytest.mark.parametrize("text", ["big", "1,,2", "1;2", "[1]", ","])
def test_scales_that_are_no_numbers_show_how(text: str) -> None:
    assert "0.75,1,1.25" in refusal(("scales", text)).message


def test_too_many_scales() -> None:
    assert parse(("scales", ",".join(["1"] * 8))).scales == (1.0,) * 8
    assert "at most 8" in refusal(("scales", ",".join(["1"] * 9))).message
    assert "has 1000001 scales, at most 8" in refusal(("scales", "," * 1_000_000)).message  # without reading them


def test_range_and_number_come_from_the_settings() -> None:
    settings = Settings(min_scale=0.5, max_scale=1, max_scales=1)
    assert parse_options([("scales", "0.5")], settings).scales == (0.5,)
    for text in ("0.49", "1.5", "1,1"):
        with pytest.raises(InputError):
            parse_options([("scales", text)], settings)


def test_limits_belong_to_what_is_allowed() -> None:
    allowed = [("timeout_ms", "300000"), ("window", "64"), ("stride", "8"), ("threshold", "1"), ("max_side", "1")]
    assert parse(*allowed).stride == 8
    for name, text in (("timeout_ms", "300001"), ("timeout_ms", "0"), ("stride", "7"), ("stride", "65")):
        assert refusal(("window", "64"), (name, text)).code == "invalid_option"


def test_flip_and_format_say_what_they_take() -> None:
    assert "true or false" in refusal(("flip", "maybe")).message
    message = refusal(("format", "bmp")).message
    assert "json" in message
    assert "png" in message


def test_every_fault_is_told_at_once() -> None:
    message = refusal(("flip", "maybe"), ("scales", "9")).message
    assert "flip" in message
    assert "scales" in message


def test_repeating_is_fine_contradicting_is_not() -> None:
    assert parse(("flip", "true"), ("flip", "true")).flip is True
    error = refusal(("scales", "1"), ("scales", "2"))
    assert error.code == "contradicting_options"
    assert "scales" in error.message


@pytest.mark.parametrize(
    ("name", "text", "again"),
    [
        ("scales", "1,0.5", "1.0, .5"),
        ("flip", "true", "True"),
        ("max_side", "100", "0100"),
        ("classes", "car, sky", "car,sky"),
    ],
)
def test_repeating_in_other_words_is_fine_too(name: str, text: str, again: str) -> None:
    assert parse((name, text), (name, again)) == parse((name, text))


@pytest.mark.parametrize("again", ["50", "many"])
def test_a_repeated_option_contradicts_whatever_is_wrong_with_it_beside(again: str) -> None:
    assert refusal(("window", "100"), ("stride", "100"), ("window", again)).code == "contradicting_options"


@pytest.mark.parametrize("text", [",", " , ,"])
def test_classes_without_a_name_are_refused(text: str) -> None:
    error = refusal(("classes", text))
    assert error.code == "invalid_option"
    assert "names or ids of classes separated by commas" in error.message


@pytest.mark.parametrize(("name", "text"), [("scales", "0"), ("classes", ","), ("window", "3")])
def test_a_request_whose_option_was_refused_is_let_go_at_once(name: str, text: str) -> None:
    """Not only when Python looks for garbage: its frame has the picture."""

    class Picture: ...

    def refused() -> weakref.ref[Picture]:
        picture = Picture()
        try:
            parse((name, text))
        except InputError:
            return weakref.ref(picture)
        raise AssertionError("it was not refused")

    gc.disable()
    try:
        assert refused()() is None
    finally:
        gc.enable()


def test_a_long_value_is_not_echoed_whole() -> None:
    assert len(refusal(("scales", "x" * 10_000)).message) < 300
    assert len(refusal(("x" * 10_000, "1")).message) < 300
