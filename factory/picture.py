"""Encoded pictures in and out."""

from __future__ import annotations

import cv2
import numpy as np


def encode_jpeg(image: np.ndarray, quality_level: int) -> bytes:
    """Return the RGB uint8 image H,W,3 as a JPEG with 4:4:4 chroma."""
    flags = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality_level,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), flags)
    if not done:
        raise RuntimeError(f"a frame of {image.shape[1]}x{image.shape[0]} could not be encoded as JPEG")
    return data.tobytes()


def encode_png(picture: np.ndarray) -> bytes:
    """Return the uint8 lines H,W as a PNG."""
    done, data = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    if not done:
        raise RuntimeError("a sketch could not be encoded as PNG")
    return data.tobytes()


def decode_image(data: bytes) -> np.ndarray:
    """Return an encoded picture as RGB uint8 H,W,3. Raises ValueError when it is none."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("the bytes are no picture that OpenCV can decode")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
