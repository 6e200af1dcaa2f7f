"""Extent: how long a film's file says that it is. One whose copy or download broke off is shorter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

# Outermost boxes of MP4 and MOV; what follows another one is none of them, such as a tag of a player's.
_ISO_BOXES = (
    "ftyp styp pdin moov moof mdat mfra meta free skip wide uuid sidx ssix prft emsg junk pnot PICT udta imda bloc"
)
_MATROSKA_SEGMENT = 0x18538067


def bytes_missing(file: BinaryIO, container: str) -> int:
    """Return how many bytes of the `file` are missing at its end by its own account, 0 where it gives none.

    `container` is FFmpeg's name of its format. MP4 and MOV (ISO 14496-12, 4.2), Matroska and WebM (RFC 8794) and AVI
    state the sizes of their outermost parts; MPEG-TS, MPEG-PS and FLV don't.
    """
    if container not in _ENDS:
        return 0
    size = file.seek(0, os.SEEK_END)
    return max([0, *(end - size for end in _ENDS[container](file, size))])


def _iso_ends(file: BinaryIO, size: int) -> Iterator[int]:
    """Yield where each outermost box ends; one of size 0 goes on to the end of the file."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        length = int.from_bytes(file.read(4))
        kind = file.read(4).decode("latin-1")
        if length == 1:
            length = int.from_bytes(file.read(8))
        if length < 8 or kind not in _ISO_BOXES.split():
            return
        at += length
        yield at


def _matroska_ends(file: BinaryIO, size: int) -> Iterator[int]:
    """Yield where each outermost element ends up to the first Segment; one of unknown size is a broadcast's."""
    at = 0
    while at < size:
        file.seek(at)
        identity = int.from_bytes(_vint(file))
        raw = _vint(file)
        bits = 7 * len(raw)
        length = int.from_bytes(raw) & ((1 << bits) - 1)
        if not raw or length == (1 << bits) - 1:
            return
        at = file.tell() + length
        yield at
        if identity == _MATROSKA_SEGMENT:
            return


def _vint(file: BinaryIO) -> bytes:
    """Read EBML's integer of variable length: the zeros that it begins with count the bytes that follow the first."""
    first = file.read(1)
    return first + file.read(8 - first[0].bit_length()) if first and first[0] else b""


def _riff_ends(file: BinaryIO, size: int) -> Iterator[int]:
    """Yield where each RIFF chunk ends: one, and more beyond 1 GB (OpenDML)."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        if file.read(4) != b"RIFF":
            return
        length = int.from_bytes(file.read(4), "little")
        if length == 0xFFFFFFFF:  # it was written to a pipe, and never filled in
            return
        at += 8 + length
        yield at


_ENDS: dict[str, Callable[[BinaryIO, int], Iterator[int]]] = {
    "mov,mp4,m4a,3gp,3g2,mj2": _iso_ends,
    "matroska,webm": _matroska_ends,
    "avi": _riff_ends,
}
