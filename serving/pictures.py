"""Picture files in and out: untrusted bytes to an RGB picture, and a picture to a file that holds its recipe."""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

FORMATS = ("PNG", "JPEG", "WEBP")
METADATA = "animesketch"  # key of the recipe in a PNG; in JPEG and WebP it is Exif's ImageDescription
MOST_EXIF_PARTS = 200  # of 64 kB each
_DESCRIPTION = ExifTags.Base.ImageDescription
MOST_EXIF = 60_000  # bytes of a recipe in a JPEG, whose Exif ends at 64 kB
_T = Image.Transpose
# what makes a picture upright, by its Exif tag Orientation
_UPRIGHT = {
    2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE, 6: _T.ROTATE_270,
    7: _T.TRANSVERSE, 8: _T.ROTATE_90,
}  # fmt: skip
# what Pillow's decoders raise for damaged files, and its refusals of bombs
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class BadPicture(ValueError):
    """Bytes that are no picture this server reads; the message continues "image …"."""


def check_picture(data: bytes, max_pixels: int) -> None:
    """Raise BadPicture unless `data` begins as a PNG, JPEG or WebP file of at most `max_pixels`. Nothing is decoded."""
    image = _open(data)
    if image.width * image.height > max_pixels:
        side = math.isqrt(max_pixels)
        raise BadPicture(
            f"is {image.width}x{image.height}, more than this server's limit of {max_pixels} pixels ({side}x{side})."
        )


def read_picture(data: bytes) -> Image.Image:
    """Return the first frame of a PNG, JPEG or WebP file as RGB: upright by its Exif tag, transparency on white.

    BadPicture for what is damaged. What comes from outside is to pass `check_picture` first.
    """
    image = _open(data)
    try:
        image.load()
        # not by ImageOps.exif_transpose: it writes the other tags anew, which fails for odd ones
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        image = image if turn is None else image.transpose(turn)
        if image.mode.startswith("I"):  # 16 bits per pixel: convert("RGB") would clip, not scale
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except _DAMAGED as error:
        raise BadPicture(f"is damaged: {error}.") from None


def _open(data: bytes) -> Image.Image:
    """Return the picture in a file, by its header. BadPicture when it is of no kind that is read."""
    if not data:
        raise BadPicture("is empty.")
    if data.count(b"Exif\0\0") > MOST_EXIF_PARTS:  # Pillow joins them one by one: 8 MB of small ones take half a minute
        raise BadPicture("has its Exif in too many parts.")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except _BOMB:
        raise BadPicture("has more pixels than any picture that is read.") from None
    except UnidentifiedImageError:
        raise BadPicture(f"is none of {', '.join(FORMATS)}.") from None
    except _DAMAGED as error:
        raise BadPicture(f"can't be read: {error}.") from None


def write_picture(image: Image.Image, output_format: str, output_compression: int, recipe: dict[str, Any]) -> bytes:
    """Return the bytes of a "png", "jpeg" or "webp" file with `recipe` as JSON in it; the same input, the same bytes.

    `output_compression` 0..100 is the quality of jpeg and webp (100 is lossless for webp); png is always lossless.
    """
    text = json.dumps(recipe, sort_keys=True)
    file = io.BytesIO()
    if output_format == "png":
        info = PngInfo()
        info.add_itxt(METADATA, text)
        image.save(file, "PNG", pnginfo=info)
        return file.getvalue()
    exif = Image.Exif()
    exif[_DESCRIPTION] = text
    if output_format == "jpeg":
        image.save(file, "JPEG", quality=output_compression, subsampling=0, exif=exif)
    elif output_compression < 100:
        image.save(file, "WEBP", quality=output_compression, exif=exif)
    else:  # the quickest way: at its default, 1024x1024 take two seconds, and their file is an eighth smaller
        image.save(file, "WEBP", lossless=True, quality=0, method=0, exif=exif)
    return file.getvalue()


def read_recipe(image: Image.Image) -> dict[str, Any]:
    """Return the recipe in a picture file of this server. KeyError when there is none."""
    text = image.info[METADATA] if image.format == "PNG" else image.getexif()[_DESCRIPTION]
    return json.loads(text)
