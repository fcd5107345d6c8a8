"""Figures: the right colours in the right places, for any size and number of classes."""

import numpy
import pytest

from model.curves import write_curves
from model.figures import CELL, GAP, MARGIN, VOID, Sample, colourise, contact_sheet, sample_row
from model.reliability import reliability_diagram

PALETTE = [[10, 20, 30], [200, 100, 50]]
MASK = numpy.array([[0, 1], [255, 0]], dtype=numpy.uint8)


def sample(height: int, width: int, classes: int, name: str = "picture") -> Sample:
    truth = numpy.zeros((height, width), dtype=numpy.uint8)
    image = numpy.full((height, width, 3), 90, dtype=numpy.uint8)
    presence = numpy.linspace(0, 1, classes)
    return Sample(name, image, truth, numpy.full_like(truth, 1), presence, presence > 0.3)


def test_colourise():
    picture = colourise(MASK, PALETTE)
    assert picture.dtype == numpy.uint8
    assert picture.tolist() == [[PALETTE[0], PALETTE[1]], [list(VOID), PALETTE[0]]]
    assert colourise(numpy.array([[7]], dtype=numpy.uint8), PALETTE).tolist() == [[list(VOID)]]
    many = [[index // 256, index % 256, 9] for index in range(300)]
    assert colourise(numpy.array([[255, 299]]), many).tolist() == [[[0, 255, 9], [1, 43, 9]]]
    assert colourise(numpy.array([[255]], dtype=numpy.uint8), many).tolist() == [[list(VOID)]]


def test_a_sample_row_is_picture_truth_prediction():
    image = numpy.arange(12, dtype=numpy.uint8).reshape(2, 2, 3)
    row = sample_row(image, MASK, numpy.zeros_like(MASK), PALETTE)
    assert row.shape == (2, 6, 3)
    assert (row[:, :2] == image).all()
    assert (row[:, 2:4] == colourise(MASK, PALETTE)).all()
    assert (row[:, 4:] == PALETTE[0]).all()


def test_a_contact_sheet_shows_picture_truth_and_prediction():
    sheet = contact_sheet([sample(48, 64, 2)], ["road", "sky"], PALETTE, "title", "subtitle")
    middle = MARGIN + 74 + CELL * 48 // 64 // 2
    cells = [sheet.getpixel((MARGIN + column * (CELL + GAP) + CELL // 2, middle)) for column in range(3)]
    assert cells == [(90, 90, 90), tuple(PALETTE[0]), tuple(PALETTE[1])]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 400), (400, 3), (500, 300)])
@pytest.mark.parametrize("classes", [2, 150])
def test_any_size_and_number_of_classes(height, width, classes):
    names = ["a very long class name that fits no column at all", *(f"class {n}" for n in range(1, classes))]
    samples = [sample(height, width, classes, "a/rather/long/identifier" * 5), sample(40, 40, classes)]
    palette = [[n % 256, 0, 0] for n in range(classes)]
    assert contact_sheet(samples, names, palette, "t", "s").height > 2 * CELL // 3


def test_a_picture_without_labelled_pixels():
    unlabelled = sample(4, 4, 2)._replace(truth=numpy.full((4, 4), 255, dtype=numpy.uint8))
    assert contact_sheet([unlabelled], ["road", "sky"], PALETTE, "t", "s").mode == "RGB"


def test_names_with_dollar_signs_are_no_formulas(tmp_path):
    name = "$\\frac$"
    write_curves(tmp_path, name, {"training": [], "validation": []})
    diagram = reliability_diagram(numpy.full((2, 1), 0.5), numpy.array([[True], [False]]), [name], name)
    diagram.draw_without_rendering()
