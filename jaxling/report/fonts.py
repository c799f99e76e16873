"""Which fonts of the machine together hold the characters of a text."""

import functools
import unicodedata

from matplotlib import font_manager, ft2font

_BASE = "DejaVu Sans"  # comes with matplotlib
_PREFERRED = ("Noto Sans CJK", "Noto Sans", "Noto", "DejaVu", "Arial", "Hiragino")


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """Font families for matplotlib, in order, and the characters that none holds.

    Few families: DejaVu Sans, and after it only those that add a character.
    """
    families = [_BASE]
    missing = {c for c in set(text) - {"\n"} if ord(c) not in _held(_BASE)}
    for family in _families():
        if not missing:
            break
        found = {c for c in missing if ord(c) in _held(family)}
        if found:
            families.append(family)
            missing -= found
    return families, missing


@functools.cache
def _families() -> tuple[str, ...]:
    """The machine's upright fonts of ordinary weight, those for many scripts first."""
    names = {
        font.name
        for font in font_manager.fontManager.ttflist
        if font.style == "normal" and font.weight in (300, 400, 500, "normal")
    }

    def rank(name: str) -> tuple[int, str]:
        places = [i for i, start in enumerate(_PREFERRED) if name.startswith(start)]
        return min(places, default=len(_PREFERRED)), name

    return tuple(sorted(names - {_BASE}, key=rank))


@functools.cache
def _held(family: str) -> frozenset[int]:
    """The code points a family has glyphs for; none when its file cannot be read.

    Glyphs for private use mean something else in every font, and do not count.
    """
    try:
        found = font_manager.findfont(family, fallback_to_default=False)
        points = ft2font.FT2Font(found).get_charmap()
        return frozenset(p for p in points if unicodedata.category(chr(p)) != "Co")
    except (OSError, RuntimeError, ValueError):
        return frozenset()
