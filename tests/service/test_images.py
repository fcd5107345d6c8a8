"""Promise: every kind of picture file is read as the mode table says, or refused with a code that says why."""

import io
import random
import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from tiny_model import encoded

from service import images
from service.errors import InputError
from service.images import Picture, decode, read_size

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")


def read(data: bytes, max_bytes: int = 1 << 20, max_pixels: int = 1 << 20) -> Picture:
    return decode(data, max_bytes=max_bytes, max_pixels=max_pixels)


def code_of(data: bytes, **limits: int) -> str:
    with pytest.raises(InputError) as caught:
        read(data, **limits)
    assert caught.value.message
    return caught.value.code


@pytest.fixture
def photo() -> np.ndarray:
    """uint8 (24, 32, 3): smooth colours that differ in every corner."""
    y, x = np.mgrid[:24, :32]
    return np.stack([x * 8, y * 10, 255 - x * 4 - y * 5], -1).astype(np.uint8)


# ---- pixel modes


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb_is_read_as_it_is(photo: np.ndarray, format: str) -> None:
    picture = read(encoded(photo, format))
    np.testing.assert_array_equal(picture.pixels, photo)
    assert (picture.mode, picture.format, picture.exif_applied) == ("RGB", format, False)
    assert (picture.width, picture.height) == (32, 24)


def test_lossless_webp_is_read_as_it_is(photo: np.ndarray) -> None:
    np.testing.assert_array_equal(read(encoded(photo, "WEBP", lossless=True)).pixels, photo)


@pytest.mark.parametrize(("format", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95}), ("AVIF", {})])
def test_lossy_formats_are_close(photo: np.ndarray, format: str, options: dict) -> None:
    picture = read(encoded(photo, format, **options))
    assert np.abs(picture.pixels.astype(int) - photo).mean() < 6


def test_grey_is_repeated_in_the_three_channels(photo: np.ndarray) -> None:
    grey = photo[..., 0]
    picture = read(encoded(grey))
    assert picture.mode == "L"
    np.testing.assert_array_equal(picture.pixels, np.repeat(grey[..., None], 3, -1))


def test_black_and_white() -> None:
    bits = np.array([[True, False], [False, True]])
    picture = read(encoded(Image.fromarray(bits)))
    assert picture.mode == "1"
    np.testing.assert_array_equal(picture.pixels[..., 0], [[255, 0], [0, 255]])


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP"])
def test_palette_is_looked_up(format: str) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 250])
    picture = read(encoded(image, format))
    assert picture.mode == "P"
    np.testing.assert_array_equal(picture.pixels, [[[10, 20, 30], [200, 0, 0]], [[0, 0, 250], [200, 0, 0]]])


def test_alpha_is_composited_on_white() -> None:
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    picture = read(encoded(pixels))
    assert picture.mode == "RGBA"
    np.testing.assert_array_equal(picture.pixels, [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]])


def test_grey_with_alpha_is_composited_on_white() -> None:
    picture = read(encoded(Image.merge("LA", [Image.new("L", (2, 1), 0), Image.fromarray(np.uint8([[255, 0]]))])))
    assert picture.mode == "LA"
    np.testing.assert_array_equal(picture.pixels[..., 0], [[0, 255]])


@pytest.mark.parametrize(("mode", "format"), [("P", "PNG"), ("P", "GIF"), ("L", "PNG"), ("RGB", "PNG")])
def test_a_transparent_colour_becomes_white(mode: str, format: str) -> None:
    image = Image.fromarray(np.uint8([[0, 1]]))
    if mode == "P":
        image.putpalette([9, 9, 9, 90, 90, 90])
    key = (0, 0, 0) if mode == "RGB" else 0
    picture = read(encoded(image if mode == "P" else image.convert(mode), format, transparency=key))
    assert picture.pixels[0, 0].tolist() == [255, 255, 255]
    assert picture.pixels[0, 1].max() < 255


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(format: str) -> None:
    wide = np.array([[0, 128, 257, 32896, 65535]], np.uint16)
    picture = read(encoded(wide, format))
    np.testing.assert_array_equal(picture.pixels[0, :, 0], [0, 0, 1, 128, 255])


def test_sixteen_bits_with_the_high_byte_first() -> None:
    wide = Image.frombytes("I;16B", (3, 1), np.array([257, 32896, 65535], ">u2").tobytes())
    picture = read(encoded(wide, "TIFF"))
    assert picture.mode == "I;16B"
    np.testing.assert_array_equal(picture.pixels[0, :, 0], [1, 128, 255])


def test_sixteen_bit_grey_with_a_transparent_key() -> None:
    rows = b"".join(b"\0" + np.array(row, ">u2").tobytes() for row in ([0, 1000], [1001, 65535]))
    picture = read(_png(2, 2, rows, bit_depth=16, key=struct.pack(">H", 1000)))
    assert picture.pixels[..., 0].tolist() == [[0, 255], [4, 255]]


def test_sixteen_bit_colour_png_is_scaled() -> None:
    rows = b"\0" + struct.pack(">6H", 65535, 0x8000, 0, 0, 0x1200, 0xFF00)
    picture = read(_png(2, 1, bit_depth=16, colour_type=2, rows=rows))
    np.testing.assert_array_equal(picture.pixels, [[[255, 128, 0], [0, 18, 255]]])


@pytest.mark.parametrize(
    ("bit_depth", "colour_type", "row", "key", "seen"),
    [
        (2, 0, b"\x60", (1,), [[255] * 3, [170] * 3]),
        (4, 0, b"\x59", (5,), [[255] * 3, [153] * 3]),
        (4, 0, b"\x59", (0xFFF5,), [[255] * 3, [153] * 3]),
        (16, 2, struct.pack(">6H", *[0x1234] * 3, *[0x3434] * 3), [0x1234] * 3, [[255] * 3, [0x34] * 3]),
    ],
)
def test_a_transparent_key_has_the_files_own_bits(
    bit_depth: int, colour_type: int, row: bytes, key: list[int], seen: list[list[int]]
) -> None:
    packed = struct.pack(f">{len(key)}H", *key)
    picture = read(_png(2, 1, b"\0" + row, bit_depth=bit_depth, colour_type=colour_type, key=packed))
    assert picture.pixels[0].tolist() == seen


@pytest.mark.parametrize(
    ("bits", "white_is_zero", "row", "seen"),
    [
        (16, True, struct.pack("<3H", 0, 0x8000, 0xFFFF), [255, 127, 0]),
        (12, False, b"\xff\xf8\x00\x00\x00", [255, 128, 0]),
        (8, True, b"\0\x80\xff", [255, 127, 0]),
    ],
)
def test_white_of_a_grey_tiff_is_what_the_file_says(
    bits: int, white_is_zero: bool, row: bytes, seen: list[int]
) -> None:
    assert read(_tiff(3, 1, row, bits, photometric=0 if white_is_zero else 1)).pixels[0, :, 0].tolist() == seen


def test_a_tiff_of_millions_of_strips_is_refused_before_they_are_listed() -> None:
    assert code_of(_tiff(1, 2, b"\x08" * 300_000, 8, strips=300_000)) == "unsupported"
    assert read(_tiff(1, 2, b"\x08" * 2_000, 8, strips=2_000)).width == 1


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format: str) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    picture = read(encoded(image, format))
    assert picture.mode == "CMYK"
    assert np.abs(picture.pixels[8, 8].astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_known_white_are_refused(mode: str) -> None:
    assert code_of(encoded(Image.new(mode, (4, 4)), "TIFF")) == "unsupported"


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animated_first_frame(format: str) -> None:
    first, second = Image.new("RGB", (6, 5), (255, 0, 0)), Image.new("RGB", (6, 5), (0, 255, 0))
    data = encoded(first, format, save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    picture = read(data)
    assert np.abs(picture.pixels.astype(int) - [255, 0, 0]).max() <= 2


# ---- orientation

UPRIGHT = np.array([[0, 10, 20], [30, 40, 50]], np.uint8)
STORED = {  # how the upright picture lies in a file of each EXIF orientation: each row of the standard's table
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: UPRIGHT.T[::-1],
    7: UPRIGHT.T[::-1, ::-1],
    8: UPRIGHT.T[:, ::-1],
}


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_exif_orientation(orientation: int, format: str) -> None:
    block = 16 if format in ("JPEG", "WEBP") else 1  # lossy formats get flat blocks, so that values survive
    stored = np.kron(STORED[orientation], np.ones((block, block), np.uint8))
    picture = read(encoded(np.repeat(stored[..., None], 3, -1), format, exif=_exif(orientation)))
    assert picture.exif_applied == (orientation > 1)
    assert (picture.height, picture.width) == (2 * block, 3 * block)
    centres = picture.pixels[block // 2 :: block, block // 2 :: block, 0].astype(int)
    assert np.abs(centres - UPRIGHT).max() <= 2


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0garbage"])
def test_a_damaged_exif_block_does_not_deny_the_picture(photo: np.ndarray, exif: bytes) -> None:
    picture = read(encoded(photo, "JPEG", exif=exif))
    assert not picture.exif_applied
    assert picture.pixels.shape == photo.shape


@pytest.mark.parametrize("orientation", [0, 9, 60000])
def test_an_orientation_out_of_the_table_is_ignored(photo: np.ndarray, orientation: int) -> None:
    assert not read(encoded(photo, exif=_exif(orientation))).exif_applied


# ---- files at fault


def test_zero_bytes() -> None:
    assert code_of(b"") == "empty"


@pytest.mark.parametrize("data", [b"hello", b"\0" * 100, b"%PDF-1.7 ...", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_not_an_image(data: bytes) -> None:
    assert code_of(data) == "not_an_image"


def test_formats_outside_the_list_are_not_opened() -> None:
    assert code_of(encoded(Image.new("RGB", (8, 8)), "EPS")) == "not_an_image"


TRUNCATED = {
    "JPEG": {},
    "progressive JPEG": {"progressive": True},
    "PNG": {},
    "WEBP": {"quality": 80},
    "lossless WEBP": {"lossless": True},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "deflated TIFF": {"compression": "tiff_adobe_deflate"},
    "PPM": {},
    "AVIF": {},
}


@pytest.mark.parametrize("kind", TRUNCATED)
def test_cut_at_half_is_called_truncated(photo: np.ndarray, kind: str) -> None:
    data = encoded(photo, kind.split()[-1], **TRUNCATED[kind])
    assert code_of(data[: len(data) // 2]) == "truncated"


@pytest.mark.parametrize("kind", TRUNCATED)
def test_cut_anywhere_gives_an_error_or_the_whole_picture(photo: np.ndarray, kind: str) -> None:
    data = encoded(photo, kind.split()[-1], **TRUNCATED[kind])
    whole = read(data).pixels
    for length in range(len(data)):
        try:
            picture = read(data[:length])
        except InputError as error:
            assert error.code in ("empty", "not_an_image", "truncated")
        else:
            np.testing.assert_array_equal(picture.pixels, whole, err_msg=f"{length} of {len(data)} bytes")


@pytest.mark.parametrize("kind", TRUNCATED)
def test_damage_anywhere_never_raises_anything_else(photo: np.ndarray, kind: str) -> None:
    data = encoded(photo, kind.split()[-1], **TRUNCATED[kind])
    dice = random.Random(kind)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(data))] = dice.randrange(256)
        try:
            read(bytes(damaged))
        except InputError as error:
            assert error.message


def test_a_png_with_a_damaged_pixel_is_an_error_and_no_black_picture(photo: np.ndarray) -> None:
    """Pillow decodes a PNG's pixels where it looks for an EXIF block, which may stand behind them."""
    data = bytearray(encoded(photo, "PNG"))
    data[data.index(b"IDAT") + 34] ^= 16
    assert code_of(bytes(data)) == "truncated"


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"])
def test_heic_is_refused_by_name(brand: bytes) -> None:
    data = struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1heic" + bytes(100)
    with pytest.raises(InputError, match="HEIC"):
        read(data)
    assert code_of(data) == "unsupported"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_colour_profile_changes_nothing(photo: np.ndarray, format: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    plain, profiled = encoded(photo, format), encoded(photo, format, icc_profile=profile)
    assert len(profiled) > len(plain)
    np.testing.assert_array_equal(read(profiled).pixels, read(plain).pixels)


# ---- text in a PNG

LONG = zlib.compress(bytes(2_000_000))  # more, once inflated, than Pillow takes of one text


@pytest.mark.parametrize(
    "extra",
    [
        [(b"zTXt", b"Comment\0\0" + LONG)],
        [(b"iTXt", b"Comment\0\1\0\0\0" + LONG)],
        [(b"iCCP", b"profile\0\0" + LONG)],
        [(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_000_000)))] * 80,
        [(b"tEXt", b"Comment\0" + bytes(1_000_000))] * 80,
    ],
    ids=["compressed", "international", "profile", "many compressed", "many"],
)
@pytest.mark.parametrize("behind", [False, True])
def test_a_png_with_more_text_than_pillow_takes_is_read(extra: list[tuple[bytes, bytes]], behind: bool) -> None:
    orientation = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    data = _png(2, 1, b"\0\x10\x90", extra=[(b"iTXt", orientation), *(() if behind else extra)])
    if behind:
        data = data[:-12] + b"".join(_chunk(*one) for one in extra) + data[-12:]
    picture = read(data, max_bytes=1 << 27)
    assert picture.pixels[..., 0].tolist() == [[0x10], [0x90]], "turned by the short text before the long one"


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt"])
def test_text_inflates_only_so_much_however_many_there_are(name: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    inflated = []
    inflate = PngImagePlugin._safe_zlib_decompress
    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", lambda data: inflated.append(1) or inflate(data))
    head = b"Comment\0\0" if name == b"zTXt" else b"Comment\0\1\0\0\0"
    assert read(_png(1, 1, b"\0\0", extra=[(name, head + LONG)] * 300)).width == 1
    assert len(inflated) <= 70


def test_damage_in_a_text_is_damage(photo: np.ndarray) -> None:
    data = _png(1, 1, b"\0\0", extra=[(b"zTXt", b"Comment\0\0" + LONG)])
    assert code_of(data.replace(LONG, LONG[:-1] + b"?")) == "truncated"


# ---- headers of far too many parts

MANY = 60_000


def _repeated_in_header(kind: str, times: int) -> bytes:
    """A sound picture of 1 x 1 pixel whose header repeats, so many times, the least part that its format allows."""
    pixel = Image.new("P", (1, 1))
    if kind == "PNG chunk":
        return _png(1, 1, b"\0\0", extra=[(b"prVt", b"")] * times)
    if kind == "TIFF tag":
        return _tiff(1, 1, b"\0", 8, more=[(300, 0)] * times)
    if kind == "PPM space":
        return b"P6" + b" " * times + b"1 1 255\n" + bytes(3)
    if kind.startswith("GIF"):
        data = encoded(pixel, "GIF")
        start = data.index(b",")  # of the frame
        part = b"!\xfe\0" * times if kind == "GIF comment" else b"!\xfe" + b"\1a" * times + b"\0"
        return data[:start] + part + data[start:]
    data = encoded(pixel.convert("RGB"), "JPEG")
    return data[:2] + {"JPEG comment": b"\xff\xfe\0\2", "JPEG fill byte": b"\xff"}[kind] * times + data[2:]


@pytest.mark.parametrize(
    "kind",
    ["PNG chunk", "TIFF tag", "PPM space", "GIF comment", "GIF block", "JPEG comment", "JPEG fill byte"],
)
def test_a_header_of_far_too_many_parts_is_refused_however_sound(kind: str) -> None:
    limits = {"max_bytes": 1 << 20, "max_pixels": 1}
    assert read_size(_repeated_in_header(kind, MANY // 10), **limits) == (1, 1)
    assert read(_repeated_in_header(kind, MANY // 10)).pixels.shape == (1, 1, 3)
    with pytest.raises(InputError, match="header has far too many") as refused:
        read_size(_repeated_in_header(kind, MANY), **limits)
    assert refused.value.code == "unsupported"


def test_a_header_has_far_less_time_than_the_pixels(photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    assert images.HEADER_SECONDS <= images.DECODE_SECONDS / 10
    monkeypatch.setattr(images, "HEADER_SECONDS", -1.0)
    with pytest.raises(InputError, match="header takes longer"):
        read_size(encoded(photo), max_bytes=1 << 20, max_pixels=1 << 20)


@pytest.mark.parametrize("name", [b"IDAT", b"prVt"])
def test_a_png_of_far_too_many_chunks_behind_its_header_is_refused(name: bytes) -> None:
    sound = _png(1, 1, b"\0\0")
    for times, fault in ((1_000, None), (110_000, "unsupported")):
        data = sound[:-12] + _chunk(name, b"") * times + sound[-12:]
        if fault is None:
            assert read(data).width == 1
        else:
            assert code_of(data, max_bytes=1 << 21) == fault


# ---- limits


def test_a_reduced_picture_has_at_least_a_pixel_each_way() -> None:
    for wide, size in ((True, (10, 1)), (False, (1, 10))):
        pixels = np.full((1, 300, 3) if wide else (300, 1, 3), 90, np.uint8)
        picture = decode(encoded(pixels), max_bytes=1 << 20, max_pixels=300, max_side=10)
        assert (picture.width, picture.height) == size


def test_reducing_averages() -> None:
    stripes = np.zeros((8, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    picture = decode(encoded(stripes), max_bytes=1 << 20, max_pixels=1 << 20, max_side=16)
    assert np.abs(picture.pixels.astype(int) - 100).max() <= 10


def test_too_many_bytes(photo: np.ndarray) -> None:
    data = encoded(photo)
    assert read(data, max_bytes=len(data)).width == 32
    assert code_of(data, max_bytes=len(data) - 1) == "too_many_bytes"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_too_many_pixels(photo: np.ndarray, format: str) -> None:
    data = encoded(photo, format)
    assert read(data, max_pixels=24 * 32).width == 32
    assert code_of(data, max_pixels=24 * 32 - 1) == "too_many_pixels"


@pytest.mark.parametrize("side", [10_000, 20_000, 2**31 - 1])
def test_a_bomb_is_refused_by_its_header_alone(side: int) -> None:
    """Warned about by Pillow, refused by Pillow, and absurd: all the same to us, and no pixel is decoded."""
    assert code_of(_png(side, side, rows=b"")) == "too_many_pixels"


def _tiff(
    width: int,
    height: int,
    data: bytes,
    bits: int,
    photometric: int = 1,
    strips: int = 1,
    more: Sequence[tuple[int, int]] = (),
) -> bytes:
    """An uncompressed grey TIFF of these rows; with more than one strip, of offsets that are the data's bytes."""
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 0),
        (277, 1),
        (279, len(data)),
        *more,
    ]
    tags.insert(7, (278, height if strips == 1 else 1))
    start = 8 + 2 + 12 * len(tags) + 4
    parts = [struct.pack("<2sHIH", b"II", 42, 8, len(tags))]
    for tag, value in tags:
        if tag == 273:
            parts.append(struct.pack("<HHII", tag, 4 if strips == 1 else 1, strips, start))
        else:
            parts.append(struct.pack("<HHII", tag, 4, 1, value))
    return b"".join([*parts, struct.pack("<I", 0), data])


def _png(
    width: int,
    height: int,
    rows: bytes,
    bit_depth: int = 8,
    colour_type: int = 0,
    key: bytes = b"",
    extra: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    def chunks() -> Iterator[bytes]:
        yield _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0))
        if key:
            yield _chunk(b"tRNS", key)
        for name, data in extra:
            yield _chunk(name, data)
        yield _chunk(b"IDAT", zlib.compress(rows))
        yield _chunk(b"IEND", b"")

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks())


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
