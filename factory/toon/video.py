"""Writes drawn films: light, letterbox and grain laid over the drawings, H.264 in MP4, the edit list beside it."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from .film import EditList, drawings, plan_clip


def finished(image: np.ndarray, light: float, film: EditList, frame: int) -> np.ndarray:
    """A drawn picture in its light -> the film's frame number `frame`: RGB uint8 of the film's size.

    Light 0 to 1 darkens to black, 1 to 2 brightens to white; then come the letterbox's bars and the grain.
    """
    if light != 1:
        image = cv2.convertScaleAbs(image, alpha=min(light, 2 - light), beta=255 * max(0.0, light - 1))
    bar = (film.size[1] - film.picture[1]) // 2
    if bar:
        rest = film.size[1] - film.picture[1] - bar
        image = cv2.copyMakeBorder(image, bar, rest, 0, 0, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    if film.grain:
        noise = np.random.default_rng((film.seed, frame)).normal(0, film.grain, image.shape[:2]).astype(np.float32)
        image = (image + noise[..., None]).round().clip(0, 255).astype(np.uint8)
    return image


def write_clip(path: str | Path, clip: EditList, size: tuple[int, int] | None = None) -> Path:
    """Draw a film and write it as H.264 in MP4, with `<name>.truth.json` beside it -> path of the video.

    `size` is (width, height), both even; the plan's own unless given. The same plan gives the same bytes with the same
    library versions. Both files are written aside and renamed, the truth last: where it is, the video is whole.
    """
    path = Path(path)
    clip = clip if size is None else replace(clip, size=size)
    width, height = clip.size
    if width % 2 or height % 2:
        raise ValueError(f"H.264 in 4:2:0 needs an even width and height, not {width} x {height}")
    path.parent.mkdir(parents=True, exist_ok=True)
    truth = truth_path(path)
    truth.unlink(missing_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _encode(aside, clip)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
    part = truth.with_name(f".{truth.name}.{os.getpid()}.part")
    part.write_text(clip.to_json())
    part.rename(truth)
    return path


def truth_path(video: str | Path) -> Path:
    """Path of a film -> path of the truth beside it."""
    return Path(video).with_suffix(".truth.json")


def _encode(path: Path, clip: EditList) -> None:
    width, height = clip.size
    with av.open(path, "w", format="mp4", options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
        options = {"crf": "16", "preset": "veryfast", "threads": "1", "flags": "+bitexact"}
        stream = container.add_stream("libx264", rate=clip.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size = 2 * clip.fps
        stream.thread_count = 1
        stream.codec_context.time_base = Fraction(1, clip.fps)
        for drawing, first, lights in drawings(clip):
            planes = None
            for held, light in enumerate(lights):
                if planes is None or clip.grain or light != lights[held - 1]:
                    image = finished(drawing.image, light, clip, first + held)
                    planes = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2YUV_I420), np.uint8)
                frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
                frame.pts, frame.time_base = first + held, Fraction(1, clip.fps)
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_one(path: Path, clip: EditList) -> Path:
    cv2.setNumThreads(1)  # the films share the cores already
    return write_clip(path, clip)


def write_clips(
    directory: str | Path,
    count: int,
    seed: int = 0,
    size: tuple[int, int] = (640, 360),
    *,
    shots: int = 12,
    fps: int = 24,
    workers: int | None = None,
    flashes: int = 0,
    letterbox: float | None = None,
    grain: float = 0.0,
) -> list[Path]:
    """Write `count` films `toon-00.mp4`, ... with seeds `seed`, `seed` + 1, ... -> their paths, in order.

    Films are drawn in parallel processes (as many as cores unless `workers` is given); each prints a line. A film that
    is there with the same plan and code is left as it is.
    """
    directory = Path(directory)
    plans = {
        directory / f"toon-{i:02d}.mp4": plan_clip(
            seed + i, shots=shots, fps=fps, size=size, flashes=flashes, letterbox=letterbox, grain=grain
        )
        for i in range(count)
    }
    for left in directory.glob(".toon-*.part"):  # of a run that was killed
        left.unlink()
    missing = {path: plan for path, plan in plans.items() if not _complete(path, plan)}
    for path in plans.keys() - missing.keys():
        print(f"{path}: already there", flush=True)
    if missing:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers or os.cpu_count() or 1, len(missing)), mp_context=context) as pool:
            for done in as_completed([pool.submit(_write_one, path, plan) for path, plan in missing.items()]):
                path = done.result()
                plan = plans[path]
                print(f"{path}: {len(plan.shots)} shots, {plan.frames} frames, seed {plan.seed}", flush=True)
    return list(plans)


def _complete(path: Path, plan: EditList) -> bool:
    truth = truth_path(path)
    return path.is_file() and truth.is_file() and truth.read_text() == plan.to_json()
