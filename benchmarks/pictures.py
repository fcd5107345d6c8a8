"""Picture files of every format the service reads, ways to damage them, and files that are made to hurt."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageCms

from service.images import FORMATS

PHOTO = Path(__file__).parents[1] / "examples" / "street.jpg"

Damage = Callable[[random.Random, bytes, bytes], bytes]

_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE)
_HEADER = 256  # bytes at the beginning, where most lengths and sizes stand
_ORIENTATION = 0x0112


def real_pictures(width: int = 120, height: int = 90) -> dict[str, bytes]:
    """The example picture, small, in every format and pixel mode, by name; the same bytes each time."""
    picture = _photo(width, height)
    alpha = picture.copy()
    alpha.putalpha(Image.linear_gradient("L").resize((width, height)))
    grey, palette = picture.convert("L"), picture.quantize(32)
    wide = Image.frombytes("I;16", (width, height), bytes(i % 251 for i in range(2 * width * height)))
    turned = picture.transpose(Image.Transpose.ROTATE_180)
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    frames = {"save_all": True, "append_images": [turned, picture]}
    made = {
        "jpeg": _file(picture, "JPEG", quality=85),
        "jpeg progressive": _file(picture, "JPEG", progressive=True),
        "jpeg grey turned": _file(grey, "JPEG", exif=exif),
        "jpeg cmyk profile": _file(picture.convert("CMYK"), "JPEG", icc_profile=profile),
        "png": _file(picture, "PNG"),
        "png alpha": _file(alpha, "PNG", icc_profile=profile),
        "png palette": _file(palette, "PNG"),
        "png 16 bit": _file(wide, "PNG"),
        "png bits": _file(grey.convert("1"), "PNG"),
        "png animated": _file(picture, "PNG", **frames),
        "webp": _file(picture, "WEBP"),
        "webp lossless": _file(alpha, "WEBP", lossless=True, exif=exif),
        "webp animated": _file(picture, "WEBP", **frames),
        "gif": _file(palette, "GIF"),
        "gif animated": _file(picture, "GIF", **frames),
        "bmp": _file(picture, "BMP"),
        "bmp palette": _file(palette, "BMP"),
        "tiff": _file(picture, "TIFF"),
        "tiff lzw": _file(picture, "TIFF", compression="tiff_lzw"),
        "tiff deflate": _file(alpha, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": _file(picture, "TIFF", compression="jpeg"),
        "tiff packbits": _file(grey, "TIFF", compression="packbits"),
        "tiff pages 16 bit": _file(wide, "TIFF", save_all=True, append_images=[wide]),
        "ppm": _file(picture, "PPM"),
        "pgm": _file(grey, "PPM"),
        "pbm": _file(grey.convert("1"), "PPM"),
        "ppm plain": f"P3 {width} {height} 255\n".encode() + b" ".join(b"%d" % value for value in picture.tobytes()),
    }
    if "AVIF" in FORMATS:
        made["avif"] = _file(picture, "AVIF")
        made["avif alpha"] = _file(alpha, "AVIF", exif=exif)
    return made


def photo(width: int, height: int) -> bytes:
    """The example picture in a size, as a JPEG."""
    return _file(_photo(width, height), "JPEG", quality=85)


def _photo(width: int, height: int) -> Image.Image:
    with Image.open(PHOTO) as image:
        return image.convert("RGB").resize((width, height))


def _file(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# ---- damage; each takes the file, and another one to borrow from


def _place(rng: random.Random, data: bytes) -> int:
    """An offset into the file; every other one near its beginning."""
    return rng.randrange(min(len(data), _HEADER) if rng.random() < 0.5 else len(data))


def flipped(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Some bits the other way."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Some bytes at random."""
    start = _place(rng, data)
    return data[:start] + rng.randbytes(rng.choice((1, 4, 64))) + data[start + 1 :]


def cut(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The beginning only."""
    return data[: rng.choice((_place(rng, data), len(data) - 1, len(data) - rng.randrange(1, 40)))]


def headless(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Without its beginning."""
    return data[rng.choice((1, 2, 8, _place(rng, data))) :]


def spliced(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The beginning of one file and the end of another."""
    return data[: _place(rng, data)] + other[_place(rng, other) :]


def doubled(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A piece twice, or many times."""
    start = _place(rng, data)
    piece = data[start : start + rng.choice((1, 12, 100, 1000))]
    return data[:start] + piece * rng.choice((2, 2, 50)) + data[start + len(piece) :]


def gapped(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A piece left out."""
    start = _place(rng, data)
    return data[:start] + data[start + rng.choice((1, 4, 12, 100)) :]


def extreme(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Numbers of one, two or four bytes at their limits, as if they were lengths or sizes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        number = rng.choice(_EXTREMES)
        size = rng.choice((1, 2, 4))
        start = _place(rng, data)
        changed[start : start + size] = (number & (256**size - 1)).to_bytes(size, rng.choice(("big", "little")))
    return bytes(changed)


def blanked(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A piece of zeros or ones."""
    start = _place(rng, data)
    size = min(rng.choice((4, 64, 2000)), len(data) - start)
    return data[:start] + rng.choice((b"\0", b"\xff")) * size + data[start + size :]


def followed(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """With something behind it."""
    return data + rng.choice((b"\0", other, rng.randbytes(1000)))


DAMAGES: tuple[Damage, ...] = (
    flipped, overwritten, cut, headless, spliced, doubled, gapped, extreme, blanked, followed,
)  # fmt: skip


# ---- files made to hurt


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, *, before: bytes = b"", depth: int = 8, colour: int = 0) -> bytes:
    """A PNG that declares a size, whatever its compressed pixels are."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def grey_png(width: int, height: int) -> bytes:
    """A whole black PNG, a thousand times smaller than its pixels."""
    return png(width, height, zlib.compress(bytes((width + 1) * height), 9))


def gif(width: int, height: int, frame: tuple[int, int, int, int], pixels: bytes = b"\x02\x02\x4c\x01\x00") -> bytes:
    """A GIF that declares a screen, and a frame (left, top, width, height) on it."""
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", *frame, 0) + pixels + b";"


def tiff(tags: dict[int, tuple[int, int, int]], data: bytes = b"", following: int = 0) -> bytes:
    """A little-endian TIFF of one directory. A tag has (type, count, value); data follows at offset 8."""
    start = 8 + len(data)
    entries = b"".join(struct.pack("<HHII", tag, *value) for tag, value in sorted(tags.items()))
    head = struct.pack("<2sHI", b"II", 42, start)
    return head + data + struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)


def tiff_of(width: int, height: int, data: bytes, compression: int, following: int = 0) -> bytes:
    """A grey TIFF of one strip that declares a size."""
    tags = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, compression), 262: (3, 1, 1)}
    tags |= {273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, len(data))}
    return tiff(tags, data, following)


def webp_canvas(width: int, height: int, real: bytes) -> bytes:
    """A WebP that declares a canvas far from the picture in it."""
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (width - 1).to_bytes(3, "little")
    body = b"WEBP" + extended + (height - 1).to_bytes(3, "little") + real[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of_size(real: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header declares another size."""
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        start = real.find(marker)
        if start >= 0:
            return real[: start + 5] + struct.pack(">HH", height, width) + real[start + 9 :]
    return real


def jpeg_of_scans(scans: int, width: int, height: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again; each goes over every pixel."""
    real = _file(Image.new("L", (width, height), 128), "JPEG", progressive=True)
    last = real.rindex(b"\xff\xda")
    return real[:last] + real[last:-2] * scans + real[-2:]


def hurtful_files(real: dict[str, bytes], max_side: int = 4000) -> dict[str, bytes]:
    """Bombs, floods and lies by name; `max_side`: of those that the service is allowed to decode."""
    zeros = zlib.compress(bytes(20_000_000), 9)
    text = b"Comment\0\0" + zeros
    return {
        "png bomb": png(30_000, 30_000, zeros),
        "png bomb of 2^31": png(2**31 - 1, 2**31 - 1, zeros),
        "png of no pixels": png(0, 0, zlib.compress(b"")),
        "png inflates beyond its size": png(16, 16, zeros),
        "png text bomb": png(16, 16, zlib.compress(bytes(17 * 16)), before=png_chunk(b"zTXt", text)),
        "png profile bomb": png(16, 16, zlib.compress(bytes(17 * 16)), before=png_chunk(b"iCCP", text)),
        "png chunk flood": png(16, 16, zlib.compress(bytes(17 * 16)), before=png_chunk(b"teSt", b"") * 50_000),
        "png large and allowed": grey_png(max_side, max_side - 100),
        "png of one row": grey_png(5000, 1),
        "png of one column": grey_png(1, 5000),
        "png of one pixel": grey_png(1, 1),
        "gif bomb": gif(65_535, 65_535, (0, 0, 65_535, 65_535)),
        "gif frame beyond its screen": gif(8, 8, (0, 0, 60_000, 60_000)),
        "gif frame far outside": gif(8, 8, (60_000, 60_000, 1, 1)),
        "gif of no pixels": gif(0, 0, (0, 0, 0, 0)),
        "gif large and empty": gif(max_side, max_side - 100, (0, 0, max_side, max_side - 100)),
        "webp canvas of 2^24": webp_canvas(2**24, 2**24, real["webp"]),
        "webp canvas": webp_canvas(16_383, 16_383, real["webp lossless"]),
        "tiff bomb": tiff_of(60_000, 60_000, zeros, 8),
        "tiff bomb of 2^32": tiff_of(2**32 - 1, 2**32 - 1, zeros, 8),
        "tiff inflates beyond its size": tiff_of(16, 16, zeros, 8),
        "tiff large with little in it": tiff_of(max_side, max_side - 100, zlib.compress(bytes(100)), 8),
        "tiff of lzw": tiff_of(3000, 3000, b"\x80\x00" * 50, 5),
        "tiff directory leads to itself": tiff_of(16, 16, bytes(256), 1, following=8 + 256),
        "tiff of endless tags": tiff({256: (4, 2**32 - 1, 8), 257: (4, 2**31, 8), 273: (4, 2**30, 8)}),
        "tiff without tags": tiff({}),
        "bmp of huge sides": real["bmp"][:18] + struct.pack("<ii", 2**31 - 1, -(2**31)) + real["bmp"][26:],
        "bmp run lengths": real["bmp palette"][:30] + struct.pack("<I", 1) + real["bmp palette"][34:],
        "ppm bomb": b"P6 99999 99999 255\n" + bytes(1000),
        "ppm of no pixels": b"P5 0 0 255\n",
        "ppm of negative sides": b"P6 -4 -4 255\n" + bytes(48),
        "ppm comment flood": b"P6\n#" + b"x" * 1_000_000,
        "ppm space flood": b"P6" + b" " * 1_000_000,
        "ppm plain cut": b"P3 3000 3000 255\n" + b"1 " * 100_000,
        "ppm of floats": b"PF 4 4 -1.0\n" + b"\xff" * 192,
        "jpeg of 65535": jpeg_of_size(real["jpeg"], 65_535, 65_535),
        "jpeg of no rows": jpeg_of_size(real["jpeg"], 100, 0),
        "jpeg larger than it is": jpeg_of_size(real["jpeg progressive"], max_side, max_side - 100),
        "jpeg of many scans": jpeg_of_scans(100, max_side // 2, max_side // 2),
        "jpeg padding flood": b"\xff\xd8" + b"\xff" * 1_000_000,
        "jpeg comment flood": b"\xff\xd8" + b"\xff\xfe\x00\x02" * 250_000,
        "nothing": b"",
        "one byte": b"\xff",
        "text": b"this is no picture",
        "heic": struct.pack(">I", 24) + b"ftypheic" + bytes(1000),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "zip": b"PK\x03\x04" + bytes(500),
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "numpy": b"\x93NUMPY\x01\x00" + bytes(120),
    }
