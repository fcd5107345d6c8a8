"""Draw README's picture of a result: `python -m examples.result PICTURE OUTPUT.png [MODEL.onnx]`.

Left the picture, in the middle the classes' colours over it, right the score of every class.
"""

import io
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from service.engine import Engine, ModelError
from service.errors import InputError
from service.images import decode
from service.presence import presence_rows
from service.render import overlay_picture
from service.settings import Settings

HEIGHT, BAR, ROW, MARGIN = 375, 120, 30, 16
INK, PAPER, RAIL = (30, 30, 30), (255, 255, 255), (232, 232, 232)


def main(picture_path: Path, output: Path, model: Path) -> None:
    settings = Settings()
    engine = Engine(model)
    picture = decode(picture_path.read_bytes(), max_bytes=settings.max_bytes, max_pixels=settings.max_pixels)
    result = engine.segment(picture.pixels)
    rows = presence_rows(result.mask, result.presence, engine.metadata.classes, settings.threshold)
    overlay = Image.open(io.BytesIO(overlay_picture(picture.pixels, result.mask, engine.metadata.palette, 0.6)))
    width = round(HEIGHT * picture.width / picture.height)
    sheet = Image.new("RGB", (2 * width + 3 * MARGIN + 130 + BAR + 60, HEIGHT), PAPER)
    sheet.paste(Image.fromarray(picture.pixels).resize((width, HEIGHT), Image.Resampling.LANCZOS), (0, 0))
    sheet.paste(overlay.resize((width, HEIGHT), Image.Resampling.LANCZOS), (width + MARGIN, 0))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    left = 2 * (width + MARGIN)
    for line, row in enumerate(rows[: HEIGHT // ROW]):
        colour, top = tuple(engine.metadata.palette[row["id"]]), line * ROW + 8
        draw.rectangle((left, top, left + 14, top + 14), fill=colour)
        draw.text((left + 22, top - 1), row["class"], fill=INK, font=font)
        draw.rectangle((left + 130, top, left + 130 + BAR, top + 14), fill=RAIL)
        draw.rectangle((left + 130, top, left + 130 + round(BAR * row["score"]), top + 14), fill=colour)
        draw.text((left + 140 + BAR, top - 1), f"{row['score']:.2f}", fill=INK, font=font)
    sheet.save(output, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) == 4 else Settings().model)
    except (InputError, ModelError, OSError) as error:
        sys.exit(f"error: {error}")
