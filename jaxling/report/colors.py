"""One colour per writing system, the same in every picture and page."""

from collections.abc import Sequence

# Common scripts have fixed colours, far apart in hue or lightness; the others take the
# spare ones in alphabetical order.
_FIXED = {
    "latin": "#3b6fb6",
    "cyrillic": "#c0392b",
    "han": "#e0a100",
    "arabic": "#2e8b57",
    "greek": "#17a2b8",
    "hiragana": "#ff7f6b",
    "katakana": "#d6308c",
    "thai": "#7a4fbf",
    "hebrew": "#8bc34a",
    "hangul": "#f57c00",
    "tamil": "#00695c",
    "georgian": "#8d5524",
    "devanagari": "#b39ddb",
    "armenian": "#ad1457",
    "bengali": "#4dd0e1",
    "telugu": "#5d4037",
    "ethiopic": "#9e9d24",
    "khmer": "#1a237e",
    "coptic": "#00897b",
    "syriac": "#6a1b9a",
    "cherokee": "#ef6c00",
    "gujarati": "#26c6da",
    "common": "#9aa0a6",
    "bytes": "#5f6368",
    "special": "#202124",
    "unknown": "#d0d3d6",
    # The paper's categories that are no scripts.
    "s": "#9aa0a6",
    "n": "#6b7785",
    "p": "#c3c7cb",
    "m": "#b8a37e",
    "c": "#5f6368",
    "z": "#d0d3d6",
}
_SAME = {"cjk": "han"}
_SPARE = (
    "#6ab187",
    "#e57373",
    "#7986cb",
    "#ffb74d",
    "#4f9da6",
    "#ba68c8",
    "#a1887f",
    "#90a955",
    "#f06292",
    "#546e7a",
)


def script_colors(names: Sequence[str]) -> list[str]:
    """A `#rrggbb` for each writing system or category name."""
    keys = [_SAME.get(name.lower(), name.lower()) for name in names]
    others = sorted(set(keys) - set(_FIXED))
    spare = {key: _SPARE[i % len(_SPARE)] for i, key in enumerate(others)}
    return [_FIXED.get(key) or spare[key] for key in keys]
