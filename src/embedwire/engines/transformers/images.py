"""Turns the bytes of a picture that somebody sent into RGB pixels, or refuses them.

Owns: which formats are read, and how much a picture may ask for. The bytes are hostile until decoded. Must
not know: models, prompts. Called from several threads at once.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from embedwire.errors import InvalidRequestError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_IMAGE_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 200
"""Qwen's own processors refuse more. Those that scale the shorter edge to a fixed length (CLIP's, for LLaVA) would make a picture of it
whose pixels no limit on the file's bounds."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By the Exif tag Orientation."""
_ORIENTATION = 0x0112


def decode_image(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The picture in ``data`` as an upright RGB image; what is transparent becomes white.

    The size is read from the header and checked before a pixel is decoded. Raises InvalidRequestError
    (``invalid_image``) for bytes that are no picture in one of ``FORMATS``, are damaged or cut short, move,
    hold more than ``max_pixels`` pixels, or are over ``MAX_ASPECT_RATIO`` times as long as wide.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image, max_pixels)
            return _to_rgb(_upright(image))
    except InvalidRequestError:
        raise
    except Image.DecompressionBombError as error:
        raise invalid_image(f"over the limit of {max_pixels:,} pixels: {error}") from error
    except Exception as error:  # what a decoder raises on hostile bytes has no common class
        raise invalid_image(f"not a readable {', '.join(FORMATS)} image: {error}") from error


def invalid_image(message: str) -> InvalidRequestError:
    """The error for a picture that can not be served."""
    return InvalidRequestError(message, code="invalid_image", param="messages")


def _check_header(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise invalid_image(
            f"an image of {image.width} x {image.height} pixels is over the limit of {max_pixels:,} pixels"
        )
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise invalid_image(
            f"an image of {image.width} x {image.height} pixels is over {MAX_ASPECT_RATIO} times as long as it is wide"
        )
    # A photograph in MPO format is a JPEG with a preview behind it, not a film.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise invalid_image("an animated image; send a single frame")


def _upright(image: Image.Image) -> Image.Image:
    """Only the orientation is read. What else the camera noted may be as odd as it likes, where ``ImageOps`` would write it anew."""
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    if turn is None:
        return image
    turned = image.transpose(turn)
    for notes in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        turned.info.pop(notes, None)  # or whoever reads them would turn it again
    return turned


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        image.load()
        return image
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
