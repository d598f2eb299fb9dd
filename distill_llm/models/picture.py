"""What a vision model sees of an example: its text drawn, or an image of the data's own, as pixels.

B pictures, C channels, H and W rows and columns of pixels.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.core.extras import load_extra, need

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from distill_llm.models.spec import PictureSpec

_KEPT_BYTES = 64 * 2**20  # of drawn pictures, which the next epoch asks for again
_NOWHERE = "\uffff"  # a character that no font has


@dataclass(frozen=True, slots=True)
class Picture:
    """A text to be drawn; or ``image``, the path of an image file or its content, which then is the picture.

    ``num_tokens``: what the model's encoder makes of it.
    """

    text: str = ""
    image: str | bytes = ""
    num_tokens: int = 0

    @property
    def content(self) -> bytes:
        """All that tells it from another picture drawn alike."""
        return self.text.encode() + b"\0" + (self.image.encode() if isinstance(self.image, str) else self.image)


class Painter:
    """Draws pictures black on white, each always the same, and turns them into what a model takes.

    ``processor`` is the model's image processor. ``num_tokens``: of one picture, behind the model's encoder.
    ``place_id``: the token of a text that holds the place of one of them; None for a model that reads pictures alone.
    """

    def __init__(self, spec: PictureSpec, processor: Any, *, channels: int, where: str):
        check_pillow(where)
        self.spec, self._processor, self._mode, self._where = spec, processor, "L" if channels == 1 else "RGB", where
        self._font = _load_font(spec, f"{where}.font")
        self._line_height = int(self._font.getbbox("Mg|")[3]) if spec.font == "fixed" else sum(self._font.getmetrics())
        if self._width("M") > spec.width or self._line_height > spec.height:
            raise ConfigError(
                f"{where}: a line of text is {self._line_height} pixels high, and the picture {spec.width} x "
                f"{spec.height}. Choose a larger picture, or a smaller `font_size`."
            )
        self._painted = functools.lru_cache(maxsize=max(1, _KEPT_BYTES // (spec.width * spec.height)))(self._paint)
        self._has = functools.cache(self._has_sign)
        self.num_tokens = 0
        self.place_id: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of pixels that the model gets of one picture."""
        channels, height, width = self.pixels([Picture()]).shape[1:]
        return channels, height, width

    def picture(self, text: str, image: str | bytes = "") -> Picture:
        """What is shown of an example: its own ``image`` where the recipe wants that, ``text`` otherwise."""
        if self.spec.source == "data":
            return Picture(image=image, num_tokens=self.num_tokens)
        return Picture(text, num_tokens=self.num_tokens)

    def is_whole(self, picture: Picture) -> bool:
        """Whether all of its text is seen: it has room, and the font has each of its characters."""
        if picture.image:
            return True
        room = self.spec.height // self._line_height
        return len(self.lines(picture.text)) <= room and not self.unknown(picture.text)

    def unknown(self, text: str) -> list[str]:
        """Characters that the font does not have: a box or a question mark stands for each."""
        return sorted({sign for sign in text if not sign.isspace() and not self._has(sign)})

    def lines(self, text: str) -> list[str]:
        """The text cut into lines as it is drawn: between words where that can be."""
        return [line for paragraph in text.split("\n") for line in self._wrapped(paragraph.split())]

    def paint(self, picture: Picture) -> Any:
        """A PIL image, in the model's colours. Raises DataError where an image of the data cannot be read."""
        return self._painted(picture)

    def pixels(self, pictures: Sequence[Picture]) -> Float[Tensor, "B C H W"]:
        """What the model's image processor makes of them."""
        found = self._processor([self._painted(picture) for picture in pictures], return_tensors="pt")
        return found["pixel_values"]

    def save(self, folder: str) -> None:
        """Lays the image processor beside a model, where transformers looks for it."""
        self._processor.save_pretrained(folder)

    def as_seen(self, spec: PictureSpec, where: str) -> Painter:
        """Other pictures for the same model."""
        painter = Painter(spec, self._processor, channels=1 if self._mode == "L" else 3, where=where)
        painter.num_tokens, painter.place_id = self.num_tokens, self.place_id
        return painter

    @property
    def places(self) -> list[int]:
        """What a text has where the picture stands; nothing for a model that reads pictures alone."""
        return [] if self.place_id is None else [self.place_id] * self.num_tokens

    def _paint(self, picture: Picture) -> Any:
        from PIL import Image, ImageDraw

        if picture.image:
            return _opened(picture.image, self._mode, self._where)
        image = Image.new("L", (self.spec.width, self.spec.height), 255)
        draw = ImageDraw.Draw(image)
        for number, line in enumerate(self.lines(picture.text)):
            draw.text((0, number * self._line_height), self._drawable(line), fill=0, font=self._font)
        return image.convert(self._mode)

    def _wrapped(self, words: Sequence[str]) -> Iterator[str]:
        line = ""
        for word in words:
            longer = f"{line} {word}" if line else word
            if self._width(longer) <= self.spec.width:
                line = longer
                continue
            if line:
                yield line
            line = word
            while self._width(line) > self.spec.width:
                size = next(size for size in range(len(line) - 1, 0, -1) if self._width(line[:size]) <= self.spec.width)
                yield line[:size]
                line = line[size:]
        yield line

    def _width(self, text: str) -> float:
        return float(self._font.getlength(self._drawable(text)))

    def _drawable(self, text: str) -> str:
        return text.encode("latin-1", "replace").decode("latin-1") if self.spec.font == "fixed" else text

    def _has_sign(self, sign: str) -> bool:
        if self.spec.font == "fixed":
            return sign.isprintable() and ord(sign) < 256
        return bytes(self._font.getmask(sign)) != bytes(self._font.getmask(_NOWHERE))


def check_pillow(where: str) -> None:
    """Raises ConfigError where pictures cannot be made here."""
    need("PIL", "pictures", where=where)


def check_image(image: str | bytes, where: str) -> None:
    """Raises DataError where an image of the data cannot be opened; reads no more than its head."""
    _opened(image, "", where)


def _opened(image: str | bytes, mode: str, where: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    name = f"'{image}'" if isinstance(image, str) else f"of {len(image):,} bytes in the data"
    try:
        with Image.open(Path(image) if isinstance(image, str) else io.BytesIO(image)) as found:
            return found.convert(mode) if mode else found.size
    except (UnidentifiedImageError, OSError) as error:
        reason = "it is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{where}: the image {name} cannot be read: {reason}. Correct it, or remove the row.") from None


def _load_font(spec: PictureSpec, where: str) -> Any:
    fonts = load_extra("PIL.ImageFont", "pictures", where=where)
    if spec.font == "fixed":
        return fonts.load_default_imagefont()
    try:
        if spec.font == "outline":
            return fonts.load_default(spec.font_size)
        # The plain layout, as Pillow's own font has: another one draws otherwise where its library is there.
        return fonts.truetype(str(Path(spec.font).expanduser()), spec.font_size, layout_engine=fonts.Layout.BASIC)
    except (OSError, ImportError) as error:
        raise ConfigError(
            f"{where}: '{spec.font}' cannot be had: {error}. Expected outline, fixed, or a font file that FreeType "
            "reads, such as a .ttf."
        ) from None
