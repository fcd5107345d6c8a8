"""The layouts of data sets on disk, and which of them a folder has."""

from pathlib import Path

from model.layouts.ade20k import ADE20K
from model.layouts.camvid import CAMVID_FULL, CAMVID_SEGNET
from model.layouts.cityscapes import CITYSCAPES
from model.layouts.coco_stuff import COCO_STUFF
from model.layouts.context import CONTEXT
from model.layouts.folder import FOLDER, MSRC21_CLEAN
from model.layouts.split import DataError, Layout
from model.layouts.voc import VOC, VOC_AUG

LAYOUTS = {
    layout.name: layout
    for layout in (
        FOLDER,
        CAMVID_SEGNET,
        CAMVID_FULL,
        ADE20K,
        VOC,
        VOC_AUG,
        CONTEXT,
        CITYSCAPES,
        COCO_STUFF,
        MSRC21_CLEAN,
    )
}


def layout_of(root: Path, name: str = "") -> Layout:
    """The layout of that name; without one, the only one that the folder looks like.

    Raises DataError for a name that is none, and for a folder that looks like no layout or like several.
    """
    if name:
        if name not in LAYOUTS:
            raise DataError(f"unknown layout {name!r}; layouts are {', '.join(LAYOUTS)}")
        return LAYOUTS[name]
    found = [layout for layout in LAYOUTS.values() if layout.found(root)]
    if len(found) > 1:
        listed = ", ".join(f"{layout.name} ({layout.title})" for layout in found)
        raise DataError(f"{root}: several data sets, {listed}; name one of them as the layout")
    if not found:
        raise DataError(
            f"{root}: not a data set; expected classes.json with images/, labels/ and splits/, "
            "the CamVid tutorial's train.txt, train/ and trainannot/, or one of the public data sets as they come: "
            f"{', '.join(layout.title for layout in LAYOUTS.values() if layout not in (FOLDER, MSRC21_CLEAN))}"
        )
    return found[0]
