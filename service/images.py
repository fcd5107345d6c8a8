"""Picture file -> RGB pixels: what is accepted, how each pixel mode is read, and why a file is refused.

| mode in the file             | what the network sees                                                              |
|------------------------------|------------------------------------------------------------------------------------|
| RGB, 8 bits                  | as it is                                                                           |
| grey, black-and-white        | the same value in the three channels                                               |
| palette                      | the palette's colours                                                              |
| alpha, or a transparent key  | composited on white, also for grey and palette                                     |
| 12 or 16 bits                | scaled to 8: the largest value becomes 255, nothing is clipped                     |
| CMYK, YCbCr, LAB, HSV        | converted to RGB, without colour profile                                           |
| animated, or several pages   | the first frame                                                                    |
| 32-bit integers, floats      | refused: nothing in the file says which value is white                             |
| with an ICC profile          | read as if it were sRGB                                                            |

HEIC and HEIF are refused by name, as Pillow does not read them; AVIF is read where Pillow was built with it.
"""

import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from service.errors import InputError

Image.init()  # Pillow loads its readers late otherwise, and the first bad upload would pay for it

DECODE_SECONDS = 10.0  # for one file; a JPEG of thousands of scans would take hours, and no thread can be killed
HEADER_SECONDS = 0.25  # of a processor's time for one header; sound ones take milliseconds

FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if name in Image.OPEN)

_MOST_HEADER_READS = 50_000  # by Pillow, some three for each chunk, segment, block or tag; sound files have hundreds
_MOST_PNG_CHUNKS = 100_000  # with those of pixels, which are of 8 KB as libpng writes them
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MOST_STRIP_BYTES = 1 << 18  # of a TIFF's list of strips or tiles: 65536 offsets of 4 bytes

_ALPHA_MODES = {"LA", "PA", "RGBA", "RGBa"}
_PLAIN_MODES = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
_WHITE_16_BIT = 65535
_WHITE_IS_ZERO = 0  # of TIFF's PhotometricInterpretation
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """A decoded picture: `pixels` uint8 (H, W, 3) RGB, upright; `mode` and `format` are those of the file.

    `size` is the upright picture's (width, height) before `max_side` reduced it.
    """

    pixels: np.ndarray
    mode: str
    format: str
    exif_applied: bool
    size: tuple[int, int]

    @property
    def height(self) -> int:
        """Height of `pixels`."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """Width of `pixels`."""
        return self.pixels.shape[1]


def too_many_bytes(max_bytes: int) -> InputError:
    """The error for a file above the limit, the same sentence wherever the limit is met."""
    return InputError("too_many_bytes", f"the picture file is larger than the {max_bytes} bytes allowed")


def decode(data: bytes, *, max_bytes: int, max_pixels: int, max_side: int | None = None) -> Picture:
    """Decode a whole picture file, its orientation applied; with `max_side`, reduced until no side is longer.

    The pixel count is read from the header and checked before any pixel is decoded; then every pixel is decoded, so
    that a file cut short is an error and never half a picture.

    Raises InputError with one of the codes empty, too_many_bytes, not_an_image, too_many_pixels, truncated (cut short
    or damaged) and unsupported.
    """
    with _opened(data, max_bytes, max_pixels) as image:
        name, mode = str(image.format), image.mode
        if name == "PNG":  # its EXIF may stand behind its pixels: looking for it decodes these, and loses their errors
            image.load()
        orientation = _orientation(image)
        image.load()
        if name == "PNG":
            _key_in_8_bits(image, bits=data[24])
        upright = _turn_upright(_to_rgb(image), _orientation(image))  # TIFF: load() has turned the pixels already
        reduced = reduced_size(*upright.size, max_side)
        pixels = upright if reduced == upright.size else upright.resize(reduced, Image.Resampling.BILINEAR)
        return Picture(np.asarray(pixels), mode, name, orientation in range(2, 9), upright.size)


def read_size(data: bytes, *, max_bytes: int, max_pixels: int) -> tuple[int, int]:
    """Width and height that a picture file's header states, before orientation. Raises InputError as `decode` does."""
    with _opened(data, max_bytes, max_pixels) as image:
        return image.size


def reduced_size(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    """Width and height after `max_side`, at least 1 each; a picture is never enlarged."""
    if max_side is None or max(width, height) <= max_side:
        return width, height
    ratio = max_side / max(width, height)
    return max(1, round(width * ratio)), max(1, round(height * ratio))


class _Tiff(TiffImagePlugin.TiffImageFile):
    """Pillow's reader, without its list of millions of strips for a file whose header names so many."""

    def _setup(self) -> None:
        for tag in (ExifTags.Base.StripOffsets, ExifTags.Base.TileOffsets):
            if len(self.tag_v2._tagdata.get(tag, b"")) > _MOST_STRIP_BYTES:
                raise InputError("unsupported", "the TIFF is cut into too many strips or tiles; save it as PNG")
        super()._setup()


Image.register_open("TIFF", _Tiff, TiffImagePlugin._accept)


class _PngStream(PngImagePlugin.PngStream):
    """Pillow's, with a limit on chunks, and for which text or a colour profile beyond its own limits is no damage."""

    _chunks = 0

    def read(self) -> tuple[bytes, int, int]:
        """As Pillow's. Raises InputError for a file of far too many chunks."""
        self._chunks += 1
        if self._chunks > _MOST_PNG_CHUNKS:
            raise InputError("unsupported", f"the PNG has more than {_MOST_PNG_CHUNKS} chunks; save it anew")
        return super().read()

    def call(self, cid: bytes, pos: int, length: int) -> bytes:
        """As Pillow's, but passes over profiles, and over text once there is too much of it."""
        assert self.fp is not None
        if cid == b"iCCP" or (cid in _PNG_TEXTS and self.text_memory > PngImagePlugin.MAX_TEXT_MEMORY):
            return ImageFile._safe_read(self.fp, length)
        try:
            return super().call(cid, pos, length)
        except ValueError:
            if cid not in _PNG_TEXTS:
                raise
            self.text_memory += PngImagePlugin.MAX_TEXT_CHUNK  # so much was inflated in vain
            self.fp.seek(pos)
            return ImageFile._safe_read(self.fp, length)


PngImagePlugin.PngStream = _PngStream  # type: ignore[misc]  # the reader of PNGs asks for no other


class _LimitedFile(io.BytesIO):
    """A picture file that can be read for so long, and in its header so often: Pillow goes from read to read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._opened = time.monotonic()
        self._worked = time.thread_time()
        self._header_reads = 0
        self._in_header = True

    def leave_header(self) -> None:
        """From now on, it is pixels that are read."""
        self._in_header = False

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file. Raises InputError when a limit is reached."""
        if self._in_header:
            self._check_header()
        elif time.monotonic() - self._opened > DECODE_SECONDS:
            raise InputError("unsupported", f"the picture takes longer than {DECODE_SECONDS:g} s to decode")
        return super().read(size)

    def _check_header(self) -> None:
        self._header_reads += 1
        if self._header_reads > _MOST_HEADER_READS:
            raise InputError(
                "unsupported", "the picture's header has far too many chunks, segments, blocks or tags; save it anew"
            )
        if time.thread_time() - self._worked > HEADER_SECONDS:
            raise InputError("unsupported", f"the picture's header takes longer than {HEADER_SECONDS:g} s to read")


@contextmanager
def _opened(data: bytes, max_bytes: int, max_pixels: int) -> Iterator[Image.Image]:
    """The picture with its header read and its limits checked; what fails in the body becomes InputError too."""
    if not data:
        raise InputError("empty", "the picture file is empty (zero bytes)")
    if len(data) > max_bytes:
        raise too_many_bytes(max_bytes)
    try:
        file = _LimitedFile(data)
        with Image.open(file, formats=FORMATS) as image:
            check_pixels(image.size, max_pixels)
            file.leave_header()
            yield image
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise InputError("too_many_pixels", f"the picture has more than the {max_pixels} pixels allowed") from None
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
            raise InputError("unsupported", "HEIC pictures are not read here; save it as JPEG or PNG") from None
        begins_as = _name_by_signature(data)
        if begins_as:
            raise _damaged(begins_as) from None
        known = ", ".join(FORMATS)
        raise InputError("not_an_image", f"the data is not a picture in a format read here ({known})") from None
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        _log.debug("undecodable picture", exc_info=True)
        raise _damaged(_name_by_signature(data) or "picture") from error


def _damaged(name: str) -> InputError:
    return InputError("truncated", f"the {name} file is cut short or damaged and cannot be decoded completely")


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Raise InputError for (width, height) with no pixels, or with more than the limit."""
    width, height = size
    if width < 1 or height < 1:
        raise InputError("unsupported", f"the picture is {width} x {height}: it has no pixels")
    if width * height > max_pixels:
        raise InputError(
            "too_many_pixels",
            f"the picture is {width} x {height} = {width * height} pixels, more than the {max_pixels} allowed",
        )


def _name_by_signature(data: bytes) -> str | None:
    """The format whose signature the data begins with, by the test of Pillow's own reader."""
    for name in FORMATS:
        accept = Image.OPEN[name][1]
        if accept is not None and accept(data[:16]):
            return name
    return None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none or the EXIF block cannot be read, as the pixels may well be fine."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        _log.debug("unreadable EXIF", exc_info=True)
        return 1
    return value if value in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any accepted mode -> RGB, by the table at the top of this file."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return _wide_grey_to_rgb(image)
    if image.mode in _ALPHA_MODES or (image.mode in _PLAIN_MODES and image.has_transparency_data):
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if image.mode in _PLAIN_MODES:
        return image.convert("RGB")
    raise InputError("unsupported", f"pictures with pixel mode {image.mode} are not supported; save it with 8 bits")


def _wide_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Grey of up to 16 bits -> RGB. A TIFF's may have 12, and 0 for white, neither of which Pillow turns."""
    wide, white = np.asarray(image).astype(np.uint32), _WHITE_16_BIT
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        white = 2 ** image.tag_v2.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
        if image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO:
            wide = white - wide
    grey = (wide * 255 + white // 2) // white
    grey[wide == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _key_in_8_bits(image: Image.Image, bits: int) -> None:
    """Scale the transparent key of a PNG as its pixels have been: Pillow leaves it in the file's own bits."""
    key = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int) and bits in (2, 4):
        most = 2**bits - 1
        image.info["transparency"] = (key & most) * 255 // most
    elif image.mode == "RGB" and isinstance(key, tuple) and bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """The picture turned as its orientation says, by a fresh EXIF block: the file's own may not survive rewriting."""
    image.info.clear()
    exif = image.getexif()
    exif.clear()
    exif[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(image)
