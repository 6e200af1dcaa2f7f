"""Signatures: what is kept of a picture to compare it by: a hash, a small picture, the layout of its colours."""

from __future__ import annotations

import cv2
import numpy as np

SIDE = 32  # cells of a signature along each side
BYTES = SIDE * SIDE * 3
# A cell has changed when its luma or chroma (0..255) differs by more than this; the values were tuned on drawn pairs.
_LUMA, _CHROMA = 16, 16
_WHITE = 230  # luma from which on cells are alike: brightening clips there
_OUTLIER = 8  # luma error at which a cell counts half in the fit
# Weights of gain 1, no offset, no shift and no zoom: they decide where flat cells leave it open.
_PRIOR = np.array([4096, 1e-3, 4096, 4096, 4096])
_GAIN = (0.7, 1.4)  # light that one picture may have more than the other,
_MOVES = (0.5, 0.5, 0.5)  # and cells that it may be shifted by in x and y, and its edges by a zoom


def phash(grey: np.ndarray) -> int:
    """Return the 64-bit perceptual hash of the uint8 image H,W as a signed integer.

    Signs of the 8x8 lowest frequencies of a 32x32 DCT against their median, the constant left out of the median
    (Zauner 2010, section 3.2.1).
    """
    spectrum = cv2.dct(cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32))[:8, :8].ravel()
    bits = spectrum > np.median(spectrum[1:])
    return int(np.packbits(bits).view(">i8")[0])


def layout(image: np.ndarray) -> list[float]:
    """Return the colour layout of the RGB uint8 image: 8x8 mean colours as a unit vector of 192 numbers."""
    cells = cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA).astype(np.float64).ravel() + 1.0
    return (cells / np.linalg.norm(cells)).tolist()


def signature(image: np.ndarray) -> bytes:
    """Return the signature of the RGB uint8 image: 32x32 cells, each its mean luma, Cr and Cb as a byte."""
    cells = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return cells.tobytes()


def changed_share(one: bytes, others: list[bytes]) -> np.ndarray:
    """Return the share of cells (0 to 1) in which signature `one` differs from each of the n `others`: float (n,).

    Before they are compared, light and place are fitted: one = gain * other + offset + the other's gradient times a
    shift and a zoom, by least squares over luma (a step of Lucas and Kanade 1981, with weights that leave out what has
    changed). What more light, shift or zoom than a little would be needed for is another picture: 1.
    """
    target = _cells([one])[0]
    found = _cells(others)
    luma, white = found[..., 0], np.float32(_WHITE)
    terms = np.stack([luma, np.ones_like(luma), *_moves(luma)], axis=-1).reshape(len(found), SIDE * SIDE, 5)
    wanted = target[..., 0].ravel()
    usable = (wanted < white) & (luma.reshape(len(found), -1) < white)
    weights = usable.astype(np.float32)
    for _ in range(3):
        weighted = terms * weights[..., None]
        normal = np.matmul(weighted.transpose(0, 2, 1), terms) + np.diag(_PRIOR)
        moment = (weighted * wanted[:, None]).sum(1) + _PRIOR * np.array([1, 0, 0, 0, 0])
        fit = np.linalg.solve(normal, moment[..., None])
        error = np.minimum(wanted, white) - np.minimum(np.matmul(terms, fit)[..., 0], white)
        weights = usable / (1 + (error / _OUTLIER) ** 2)
    changed = np.abs(error) > _LUMA
    gain, _, *moves = fit[..., 0].T
    for channel in (1, 2):
        chroma = found[..., channel]
        expected = sum(
            share[:, None, None] * term for share, term in zip((gain, *moves), (chroma, *_moves(chroma)), strict=True)
        )
        changed |= (np.abs(target[..., channel] - expected) > _CHROMA).reshape(changed.shape)
    near = (gain > _GAIN[0]) & (gain < _GAIN[1]) & (np.abs(moves) < np.array(_MOVES)[:, None]).all(0)
    return np.where(near, changed.mean(1), 1.0)


def _moves(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what (n, 32, 32) gains per cell of shift in x and in y, and per cell that a zoom moves its edges."""
    slope_y, slope_x = np.gradient(cells, axis=(1, 2))
    place = np.linspace(-1, 1, SIDE, dtype=np.float32)
    return slope_x, slope_y, place * slope_x + place[:, None] * slope_y


def _cells(signatures: list[bytes]) -> np.ndarray:
    """Return float32 (n, 32, 32, 3): luma 0..255, and chroma about 0."""
    cells = np.frombuffer(b"".join(signatures), np.uint8).reshape(-1, SIDE, SIDE, 3)
    return cells.astype(np.float32) - np.array([0, 128, 128], np.float32)
