"""Letters for pictures: any Unicode text, without needing a font of the system.

DejaVu Sans comes with matplotlib and holds Latin, Greek, Cyrillic, Hebrew, Arabic and many signs. Letters that it lacks
(Chinese, say) are taken from the system's fonts where one has them, and are shown as ▯ where none does.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import ImageDraw, ImageFont

_MISSING = "▯"
#: fonts that hold many scripts are asked first, and not more than so many in all: reading what a font holds takes time
_LIKELY = re.compile(r"cjk|han|wenquan|wqy|yahei|pingfang|unifont|fallback|arial ?unicode|noto|gothic|ming|song", re.I)
_MOST_ASKED = 60


def plain_font() -> Path:
    """DejaVu Sans as matplotlib ships it."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.lru_cache(maxsize=_MOST_ASKED + 8)
def _letters_of(path: Path) -> frozenset[int]:
    """Code points that a font has glyphs for, of any size: coloured emoji are pictures of one size."""
    from matplotlib.ft2font import FT2Font

    font = FT2Font(str(path))
    return frozenset(font.get_charmap()) if font.scalable else frozenset()


def fonts_for(text: str) -> list[Path]:
    """DejaVu Sans, and fonts of the system for those letters of `text` that it lacks."""
    fonts = [plain_font()]
    missing = {ord(letter) for letter in text} - _letters_of(fonts[0])
    if not missing:
        return fonts
    from matplotlib.font_manager import findSystemFonts

    installed = sorted(map(Path, findSystemFonts()), key=lambda path: (not _LIKELY.search(path.name), path.name))
    for path in installed[:_MOST_ASKED]:
        try:
            found = missing & _letters_of(path)
        except (RuntimeError, OSError):  # a font that FreeType cannot read
            continue
        if found:
            fonts.append(path)
            missing -= found
        if not missing:
            break
    return fonts


class Lettering:
    """Draws and measures text of one size in the first of several fonts that has each letter. Pixels."""

    def __init__(self, paths: Sequence[Path], size: int):
        self._fonts = [(ImageFont.truetype(str(path), size), _letters_of(path)) for path in paths]
        self.size = size
        ascent, descent = self._fonts[0][0].getmetrics()
        self.height = ascent + descent

    def width(self, text: str) -> float:
        return sum(font.getlength(run) for font, run in self._runs(text))

    def draw(self, draw: ImageDraw.ImageDraw, left: float, top: float, text: str, colour: str) -> float:
        """Draw one line with its upper left corner at (left, top); returns where it ends."""
        baseline = top + self._fonts[0][0].getmetrics()[0]
        for font, run in self._runs(text):
            draw.text((left, baseline), run, colour, font, anchor="ls")
            left += font.getlength(run)
        return left

    def wrapped(self, text: str, width: float) -> list[str]:
        """Lines no wider than `width`; a word that is wider is cut."""
        lines, line = [], ""
        for word in text.split(" "):
            longer = f"{line} {word}" if line else word
            if self.width(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            while len(word) > 1 and self.width(word) > width:
                count = self._fitting(word, width)
                lines.append(word[:count])
                word = word[count:]
            line = word
        return [*lines, line] if line else lines

    def _fitting(self, word: str, width: float) -> int:
        low, high = 1, len(word)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.width(word[:middle]) <= width else (low, middle - 1)
        return low

    def _runs(self, text: str) -> Iterable[tuple[ImageFont.FreeTypeFont, str]]:
        """The text as pieces of one font each."""
        runs: list[tuple[ImageFont.FreeTypeFont, str]] = []
        for letter in text:
            font = next((font for font, letters in self._fonts if ord(letter) in letters), None)
            if font is None:
                font, letter = self._fonts[0][0], _MISSING
            if runs and runs[-1][0] is font:
                runs[-1] = (font, runs[-1][1] + letter)
            else:
                runs.append((font, letter))
        return runs
