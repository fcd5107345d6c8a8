"""Pictures for people: label maps in colour, and the contact sheet of an evaluation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy
from PIL import Image, ImageDraw, ImageFont

from model.losses import IGNORE
from model.metrics import PRESENCE_THRESHOLD

VOID = (224, 224, 192)
INK, FAINT, TRACK, BAR = "#1f2328", "#6e7781", "#eaeef2", "#0969da"
WRONG, PAPER = "#c1121f", "#ffffff"
MARGIN, GAP, CELL, BARS = 28, 14, 320, 330
BAR_ROW, MOST_BARS = 20, 12


class Sample(NamedTuple):
    """One picture of a contact sheet.

    image: uint8 (H, W, 3); truth, mask: uint8 (H, W) labels, 255 = ignore; presence: (C,) float in 0..1;
    present: (C,) bool, the classes in the truth.
    """

    name: str
    image: numpy.ndarray
    truth: numpy.ndarray
    mask: numpy.ndarray
    presence: numpy.ndarray
    present: numpy.ndarray


def colourise(mask: numpy.ndarray, palette: Sequence[Sequence[int]]) -> numpy.ndarray:
    """Labels (H, W) -> uint8 (H, W, 3); those beyond the palette, and 255 where they are uint8, become VOC's beige."""
    colours = numpy.asarray(palette, dtype=numpy.uint8)
    table = numpy.full((max(256, len(colours)), 3), VOID, dtype=numpy.uint8)
    table[: len(colours)] = colours
    if mask.dtype == numpy.uint8:
        table[IGNORE] = VOID
    return table[mask]


def sample_row(
    image: numpy.ndarray, truth: numpy.ndarray, mask: numpy.ndarray, palette: Sequence[Sequence[int]]
) -> numpy.ndarray:
    """Picture | truth | prediction side by side: uint8 (H, 3W, 3)."""
    return numpy.concatenate([image, colourise(truth, palette), colourise(mask, palette)], axis=1)


def contact_sheet(
    samples: Sequence[Sample], classes: Sequence[str], palette: Sequence[Sequence[int]], title: str, subtitle: str
) -> Image.Image:
    """One row per sample: picture, truth, prediction, presence bars; a legend of the classes below.

    A bar is the score of a class from 0 to 1, with a tick at 0.5; a filled dot says that the class is in the truth.
    Up to 12 classes per picture get a bar: those in the truth and those with the highest scores.
    """
    heights = [_row_height(sample) for sample in samples]
    width = 2 * MARGIN + 3 * (CELL + GAP) + BARS
    legend = _legend_places([*classes, "ignored"], width - 2 * MARGIN)
    legend_height = legend[-1][1] + 24
    top = MARGIN + 74
    sheet = Image.new("RGB", (width, top + sum(heights) + legend_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), title, INK, _font(22))
    draw.text((MARGIN, MARGIN + 24), subtitle, FAINT, _font(14))
    columns = [MARGIN + column * (CELL + GAP) for column in range(4)]
    headings = ("picture", "truth", "prediction", "presence (dot: in the truth, red: wrong at 0.5)")
    for left, heading in zip(columns, headings, strict=True):
        draw.text((left, top - 24), heading, FAINT, _font(13))
    for sample, height in zip(samples, heights, strict=True):
        _draw_sample(sheet, draw, sample, classes, palette, top, columns)
        top += height
    for (left, line), name, colour in zip(legend, [*classes, "ignored"], [*palette, VOID], strict=True):
        x, y = MARGIN + left, top + line
        draw.rectangle((x, y + 2, x + 14, y + 16), tuple(colour), FAINT)
        draw.text((x + 21, y), name, INK, _font(14))
    return sheet


def _draw_sample(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    sample: Sample,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    top: int,
    columns: Sequence[int],
) -> None:
    labelled = sample.truth != IGNORE
    right = (sample.mask == sample.truth)[labelled].mean() if labelled.any() else 0.0
    size = _cell_size(sample)
    cells = (
        Image.fromarray(sample.image).resize(size, Image.Resampling.LANCZOS),
        Image.fromarray(colourise(sample.truth, palette)).resize(size, Image.Resampling.NEAREST),
        Image.fromarray(colourise(sample.mask, palette)).resize(size, Image.Resampling.NEAREST),
    )
    for left, cell in zip(columns, cells, strict=False):
        sheet.paste(cell, (left, top))
    caption = top + size[1] + 3
    draw.text((columns[0], caption), _shorten(sample.name, _font(13), CELL), FAINT, _font(13))
    draw.text((columns[2], caption), f"{right:.1%} of labelled pixels right", FAINT, _font(13))

    left = columns[3]
    names_right, bar_left, bar_right = left + 130, left + 138, left + BARS - 40
    for line, index in enumerate(_shown_classes(sample)):
        score, present = float(sample.presence[index]), bool(sample.present[index])
        y = top + line * BAR_ROW
        ink = INK if (score >= PRESENCE_THRESHOLD) == present else WRONG
        dot = (left + 1, y + 5, left + 9, y + 13)
        draw.ellipse(dot, ink if present else PAPER, ink if present else FAINT)
        name = _shorten(classes[index], _font(13), names_right - left - 16)
        draw.text((left + 16, y + 1), name, ink, _font(13))
        draw.rectangle((bar_left, y + 3, bar_right, y + 15), TRACK)
        end = bar_left + round((bar_right - bar_left) * min(max(score, 0.0), 1.0))
        draw.rectangle((bar_left, y + 3, end, y + 15), tuple(palette[index]), FAINT)
        middle = bar_left + round((bar_right - bar_left) * PRESENCE_THRESHOLD)
        draw.line((middle, y + 1, middle, y + 17), INK)
        draw.text((bar_right + 8, y + 1), f"{score:.2f}", ink, _font(13))


def _shown_classes(sample: Sample) -> list[int]:
    """The classes that get a bar, in their own order."""
    importance = sample.presence + sample.present
    return sorted(numpy.argsort(-importance, kind="stable")[:MOST_BARS].tolist())


def _cell_size(sample: Sample) -> tuple[int, int]:
    """(width, height) of the sample's pictures on the sheet, at most CELL x CELL, aspect kept."""
    height, width = sample.truth.shape
    factor = CELL / max(height, width)
    return max(1, round(width * factor)), max(1, round(height * factor))


def _row_height(sample: Sample) -> int:
    return max(_cell_size(sample)[1] + 24, min(len(sample.presence), MOST_BARS) * BAR_ROW) + GAP


def _legend_places(names: Sequence[str], width: int) -> list[tuple[int, int]]:
    """(left, top) of every entry of the legend, wrapped to the width in pixels."""
    places, left, line = [], 0, 0
    for name in names:
        entry = 21 + round(_font(14).getlength(name)) + 22
        if left and left + entry > width:
            left, line = 0, line + 24
        places.append((left, line))
        left += entry
    return places


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, or its beginning and an ellipsis, in at most so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font inside Pillow, so that a sheet looks the same everywhere."""
    return ImageFont.load_default(size)
