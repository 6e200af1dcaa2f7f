"""Pictures of requests and answers: what is read, refused and written."""

from __future__ import annotations

import contextlib
import io

import pytest
from PIL import Image, ImageOps

from serving.pictures import BadPicture, check_picture, read_picture, read_recipe, write_picture
from tests.asking import (
    picture,
)


def test_transparency_lies_on_white_and_exif_turns_the_picture() -> None:
    file = io.BytesIO()
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(file, "PNG")
    assert read_picture(file.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    file = io.BytesIO()
    Image.new("P", (2, 2)).save(file, "PNG", transparency=0)
    assert read_picture(file.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    file = io.BytesIO()
    Image.new("I;16", (2, 2), 32768).save(file, "PNG")
    assert read_picture(file.getvalue()).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_whatever_its_other_tags_are(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, "abcdefg"
    image = Image.effect_noise((6, 4), 90).convert("RGB")
    odd = exif.tobytes().replace(b"\x01\x0e\0\x02\0\0\0\x08", b"\x01\x0e\0\x05\0\0\0\x01")  # the text as a fraction
    assert odd != exif.tobytes()
    for tags in (exif.tobytes(), odd):
        file = io.BytesIO()
        image.save(file, "PNG", exif=tags)
        assert read_picture(file.getvalue()).tobytes() == upright(image, exif).tobytes()


def upright(image: Image.Image, exif: Image.Exif) -> Image.Image:
    image = image.copy()
    image.getexif().update(exif)
    return ImageOps.exif_transpose(image)


def test_exif_in_thousands_of_parts_is_refused_at_once() -> None:
    part = b"\xff\xe1\x00\x14Exif\0\0" + bytes(12)
    data = picture("JPEG")
    with pytest.raises(BadPicture, match="too many parts"):
        check_picture(data[:2] + 300_000 * part + data[2:], 10_000)
    check_picture(data[:2] + 100 * part + data[2:], 10_000)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_are_refused_or_read_and_never_crash(format: str) -> None:
    data = picture(format, (64, 64))
    read = 0
    for position in range(0, len(data), max(1, len(data) // 60)):
        for broken in (data[:position], data[:position] + b"\xff\x00" + data[position + 2 :]):
            with contextlib.suppress(BadPicture):  # and nothing else
                assert read_picture(broken).mode == "RGB"
                read += 1
    assert read < 120


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_written_picture_holds_its_recipe_and_is_the_same_each_time(format: str) -> None:
    image, recipe = Image.effect_noise((16, 16), 50).convert("RGB"), {"prompt": "鉛筆\n✏️", "seed": 2**62}
    first, second = (write_picture(image, format, 100, recipe) for _ in range(2))
    assert first == second
    back = Image.open(io.BytesIO(first))
    assert read_recipe(back) == recipe
    if format != "jpeg":
        assert back.convert("RGB").tobytes() == image.tobytes()
