"""Pictures as people send them, and as attackers do."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from embedwire.engines.transformers.images import decode_image
from embedwire.errors import InvalidRequestError


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        decode_image(data, **options)
    assert (caught.value.code, caught.value.param, caught.value.status) == ("invalid_image", "messages", 400)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_format_gives_rgb(kind: str) -> None:
    image = decode_image(encoded(Image.new("RGB", (9, 5), (255, 0, 0)), kind))
    assert (image.mode, image.size) == ("RGB", (9, 5))
    assert np.allclose(pixel(image), (255, 0, 0), atol=3)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("LA", (4, 4), (40, 0)), (255, 255, 255)),
        (Image.new("RGB", (4, 4), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE), (10, 20, 30)),
        (Image.fromarray(np.full((4, 4), 0x8001, np.uint16)), (128, 128, 128)),
    ],
    ids=["grey", "bits", "opaque", "transparent", "half", "grey-transparent", "palette", "16-bit"],
)
def test_every_mode_becomes_the_right_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert pixel(decode_image(encoded(image))) == expected


def test_a_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30] * 256)
    assert pixel(decode_image(encoded(image, "GIF", transparency=0))) == (255, 255, 255)


def test_a_colour_that_stands_for_transparent_becomes_white() -> None:
    image = Image.new("RGB", (4, 6), (7, 8, 9))
    image.putpixel((1, 1), (7, 8, 10))
    read = decode_image(encoded(image, transparency=(7, 8, 9)))
    assert (pixel(read), pixel(read, 1, 1)) == ((255, 255, 255), (7, 8, 10))


def test_cmyk_becomes_the_right_rgb() -> None:
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert np.allclose(pixel(decode_image(data)), (255, 0, 0), atol=3)


def test_an_image_on_its_side_is_turned_up() -> None:
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))  # the left half, which is the top once it is turned clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode_image(encoded(image, "JPEG", exif=exif, quality=100))
    assert upright.size == ImageOps.exif_transpose(upright).size == (8, 16)
    assert pixel(upright, 4, 2) > (200, 200, 200) > (50, 50, 50) > pixel(upright, 4, 13)


def test_notes_of_a_camera_that_nobody_reads_may_be_odd() -> None:
    """Its orientation counts; how the rest is typed does not matter here."""
    exif = struct.pack("<2sHI", b"II", 42, 8)
    exif += struct.pack("<H", 2)
    exif += struct.pack("<HHIHxx", 0x0112, 3, 1, 6)
    exif += struct.pack("<HHII", 0x0213, 12, 1, 38)  # YCbCrPositioning, a short, as a double
    exif += struct.pack("<Id", 0, 1.0)
    photograph = encoded(Image.new("RGB", (8, 6), "red"), "JPEG", exif=b"Exif\0\0" + exif)
    assert decode_image(photograph).size == (6, 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(100_000, 100_000), (8_001, 8_000), (64_000_001, 1), (12_000, 12_000)])
def test_a_bomb_is_refused_from_its_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000,000,000 pixels in 70 bytes; and sizes that Pillow itself lets pass, or only warns about."""
    decoded: list[object] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded.append)
    assert "over the limit of 64,000,000 pixels" in refusal(png_header(*size))
    assert decoded == []


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (60_000, 299)])
def test_a_strip_is_refused(size: tuple[int, int]) -> None:
    """Some processors scale the shorter edge to a fixed length before they cut: 90 bytes of strip would become gigabytes."""
    assert "times as long as it is wide" in refusal(encoded(Image.new("1", size)))
    decode_image(encoded(Image.new("1", (200, 1))))


def test_the_limit_is_a_parameter_and_is_itself_allowed() -> None:
    data = encoded(Image.new("RGB", (10, 10)))
    assert decode_image(data, max_pixels=100).size == (10, 10)
    assert "10 x 10 pixels is over the limit of 99 pixels" in refusal(data, max_pixels=99)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_what_moves_is_refused(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert "animated" in refusal(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))


def test_a_photograph_with_a_preview_behind_it_does_not_move() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image = decode_image(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    assert np.allclose(pixel(image), (255, 0, 0), atol=3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_cut_anywhere_is_refused_or_whole(kind: str, picture: Callable[..., bytes]) -> None:
    """A cut that only loses what no decoder reads gives the same picture; every other one is refused."""
    data = encoded(Image.open(io.BytesIO(picture(24, 16))), kind)
    whole = decode_image(data).tobytes()
    refused = 0
    for end in range(0, len(data), max(1, len(data) // 40)):
        try:
            assert decode_image(data[:end]).tobytes() == whole
        except InvalidRequestError as error:
            refused += error.code == "invalid_image"
    assert refused >= 35


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"\x00" * 1000,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encoded(Image.new("RGB", (4, 4)), "TIFF"),
        png_header(4, 4),
        png_header(0, 4),
    ],
    ids=["empty", "text", "zeros", "postscript", "svg", "tiff", "no pixels", "no width"],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    assert "not a readable PNG, JPEG, WEBP, GIF, BMP image" in refusal(data)


def test_any_damaged_byte_is_survived(picture: Callable[..., bytes]) -> None:
    """Whatever a decoder makes of it, the caller sees pixels or our error, and nothing else."""
    data = encoded(Image.open(io.BytesIO(picture(16, 16))).quantize(8), "GIF")
    codes: set[str] = set()
    for place in range(len(data)):
        damaged = data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]
        try:
            decode_image(damaged, max_pixels=10_000)
        except InvalidRequestError as error:
            codes.add(error.code)
    assert codes == {"invalid_image"}
