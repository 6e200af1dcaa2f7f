"""Still pictures: what their headers say, and their pixels as the factory takes them."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_BYTES = 1 << 30  # of a file: it is read whole
MAX_PIXELS = 120_000_000  # 360 MB as RGB; our own sketches of 10240 x 10240 lie below
MAX_SIDE = 65_500  # JPEG's limit, in which frames are stored
_ORIENTATION = 0x0112  # of EXIF; 5 to 8 turn the picture on its side
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N")


def facts(file: BinaryIO) -> dict[str, Any]:
    """Return the columns of a `sources` row that a picture's header tells, before any pixel is decoded.

    A picture is a film of one frame. ValueError or OSError, in words, for what is refused.
    """
    with _opened(file) as image:
        # Asked for the EXIF of a PNG that has none in front, Pillow decodes the pixels to look behind them.
        asked = image.format != "PNG" or "exif" in image.info
        turned = asked and image.getexif().get(_ORIENTATION, 1) >= 5
        width, height = reversed(image.size) if turned else image.size
        name = str(image.format).lower()
        return {
            "container": name,
            "codec": name,
            "width": width,
            "height": height,
            "start_time": 0.0,
            "duration": 0.0,
            "segment_starts": [0.0],
        }


def decode(data: bytes) -> np.ndarray:
    """Return an encoded picture as RGB uint8 H,W,3: upright, in sRGB, over white where it is transparent.

    16-bit grey becomes 8 bit. ValueError or OSError, in words, for what is refused or damaged.
    """
    try:
        return _decoded(data)
    except (ValueError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise what they please: SyntaxError for a broken part of a PNG
        raise ValueError(f"it is damaged: {error}") from error


def _decoded(data: bytes) -> np.ndarray:
    with _opened(io.BytesIO(data)) as image:
        profile = image.info.get("icc_profile")
        upright = ImageOps.exif_transpose(image)
    if upright.mode in _DEEP:
        upright = Image.fromarray(((np.asarray(upright, np.uint32) + 128) // 257).astype(np.uint8))
    if upright.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits. Save it with 8 or 16 bits a channel")
    if not upright.has_transparency_data:
        return np.asarray(_srgb(upright, profile))
    layered = upright.convert("RGBA")
    colours = upright.getchannel("L") if upright.mode == "LA" else layered.convert("RGB")
    white = Image.new("RGB", upright.size, "white")
    return np.asarray(Image.composite(_srgb(colours, profile), white, layered.getchannel("A")))


@contextlib.contextmanager
def _opened(file: BinaryIO) -> Iterator[Image.Image]:
    """Yield the picture in `file`, its pixels not decoded yet. ValueError where the header is beyond the limits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is MAX_PIXELS
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError("it is no picture of a kind that is read: " + ", ".join(FORMATS)) from None
        except Image.DecompressionBombError:
            raise ValueError(f"it has more than the {MAX_PIXELS // 10**6} million pixels that are read") from None
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise ValueError(
                f"it has {width}x{height} pixels; at most {MAX_PIXELS // 10**6} million are read, {MAX_SIDE} on a side"
            )
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # what cameras add to a JPEG: previews
            raise ValueError(f"it holds {frames} pictures. Save them one by one, or as a video")
        yield image


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return `image` as RGB, its colours taken from `profile` to sRGB; without one they are sRGB already."""
    if not profile:
        return image.convert("RGB")
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        changed = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise ValueError(f"its colour profile cannot be used: {error}. Remove it, or save as sRGB") from None
    assert changed is not None  # None only where the image is changed in place
    return changed
