"""Pictures of texts: the same always, whole or counted, and the numbers that the model gets of them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.models.picture import Painter, Picture, check_image
from distill_llm.models.spec import PictureSpec

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("PIL", reason="needs the extra pictures")
from PIL import Image, ImageDraw, ImageFont

LONG = "ann buys redhat and oldcup . who pays more ?"


def _painter(channels: int = 1, **keys: Any) -> Painter:
    from transformers import ViTImageProcessorPil

    spec = PictureSpec.model_validate({"width": 96, "height": 33, "font": "fixed"} | keys)
    middle = [0.5] * channels
    size = {"height": spec.height, "width": spec.width}
    processor = ViTImageProcessorPil(size=size, image_mean=middle, image_std=middle)
    return Painter(spec, processor, channels=channels, where="student.picture")


def test_it_is_what_pillow_draws_line_by_line() -> None:
    """Sixteen characters of six pixels a line, broken between words; a line is eleven pixels high."""
    painter = _painter()
    assert painter.lines(LONG) == ["ann buys redhat", "and oldcup . who", "pays more ?"]
    by_hand = Image.new("L", (96, 33), 255)
    for number, line in enumerate(painter.lines(LONG)):
        ImageDraw.Draw(by_hand).text((0, 11 * number), line, fill=0, font=ImageFont.load_default_imagefont())
    assert painter.paint(Picture(LONG)).tobytes() == by_hand.tobytes()
    assert 100 < (np.asarray(by_hand) == 0).sum() < 1500, "letters, and not all of it"


@pytest.mark.parametrize("font", ["fixed", "outline"])
def test_it_is_the_same_in_another_painter_and_another_batch(font: str) -> None:
    one, two = _painter(font=font, font_size=9), _painter(font=font, font_size=9)
    pictures = [Picture(text) for text in (LONG, "who ?", "bob")]
    together = one.pixels(pictures)
    assert torch.equal(together, two.pixels(pictures))
    assert torch.equal(together, torch.cat([two.pixels([picture]) for picture in pictures]))
    assert len({together[row].numpy().tobytes() for row in range(3)}) == 3
    assert one.paint(pictures[0]) is one.paint(Picture(LONG)), "drawn once"


def test_numbers_are_those_of_the_pixels() -> None:
    """White is 1 and black -1, as (x / 255 - 0.5) / 0.5; three channels are the same picture."""
    painter, colours = _painter(), _painter(channels=3)
    drawn = torch.from_numpy(np.asarray(painter.paint(Picture(LONG))).copy()).double()
    got = painter.pixels([Picture(LONG)])
    assert got.shape == (1, 1, 33, 96)
    assert painter.shape == (1, 33, 96)
    torch.testing.assert_close(got[0, 0].double(), (drawn / 255 - 0.5) / 0.5)
    torch.testing.assert_close(colours.pixels([Picture(LONG)]), got.expand(1, 3, 33, 96))


def test_a_long_word_is_cut_where_the_line_ends_and_a_new_line_begins_one() -> None:
    assert _painter().lines("a\nabcdefghijklmnopqrstuvwxyz b") == ["a", "abcdefghijklmnop", "qrstuvwxyz b"]


def test_what_has_no_room_or_no_sign_is_not_whole() -> None:
    painter = _painter()
    assert painter.is_whole(Picture(LONG))
    assert not painter.is_whole(Picture(f"{LONG} {LONG}"))
    assert painter.unknown("5 € for é, 好") == ["€", "好"]
    assert not painter.is_whole(Picture("5 €"))
    assert painter.paint(Picture("5 €")).tobytes() == painter.paint(Picture("5 ?")).tobytes()
    outline = _painter(font="outline", font_size=9)
    assert outline.unknown("ann, é 好 ~?") == ["é", "好"], "Pillow's outline font has ASCII alone"


def test_an_image_of_the_data_is_the_picture(tmp_path: Path) -> None:
    colours = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    Image.fromarray(colours).save(tmp_path / "a.png")
    content = io.BytesIO()
    Image.fromarray(colours).save(content, "png")
    painter = _painter(channels=3, source="data")
    of_file, of_bytes = (painter.picture("unread", image) for image in (str(tmp_path / "a.png"), content.getvalue()))
    assert (np.asarray(painter.paint(of_file)) == colours).all()
    assert (np.asarray(painter.paint(of_bytes)) == colours).all()
    assert painter.pixels([of_file]).shape == (1, 3, 33, 96), "made as large as the model wants it"
    assert painter.is_whole(of_file)
    assert of_file.content != of_bytes.content != painter.picture("unread").content


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DataError, match=r"here: the image '.*a\.png' cannot be read: it is no image that Pillow knows"):
        check_image(str(tmp_path / "a.png"), "here")
    with pytest.raises(DataError, match=r"the image '.*b\.png' cannot be read: .*No such file"):
        check_image(str(tmp_path / "b.png"), "here")
    with pytest.raises(DataError, match="of 3 bytes in the data"):
        check_image(b"abc", "here")


def test_a_font_or_a_size_that_will_not_do_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"student\.picture\.font: 'no\.ttf' cannot be had"):
        _painter(font="no.ttf")
    with pytest.raises(ConfigError, match="a line of text is 11 pixels high, and the picture 96 x 10"):
        _painter(height=10)


def test_without_pillow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'distill-llm\[pictures\]'"):
        _painter()
