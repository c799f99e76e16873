"""The text of the demo models: the New Testament, aligned by verse, ten languages."""

import functools
import pathlib
import unicodedata
from typing import NamedTuple

LANGUAGES = {
    "eng": "English",
    "swh": "Swahili",
    "eus": "Basque",
    "lav": "Latvian",
    "ukr": "Ukrainian",
    "hye": "Armenian",
    "guj": "Gujarati",
    "syc": "Syriac",
    "cop": "Coptic",
    "chr": "Cherokee",
}
# 30.02% of the verses. Whole books, because neighbouring verses and parallel gospels
# repeat each other word for word; Luke is here since Armenian has the gospels alone.
HELD_OUT_BOOKS = frozenset({"LUK", "ROM", "REV", "EPH", "1PE", "COL", "TIT"})
_TEXT = pathlib.Path(__file__).parent / "data" / "new_testament.parquet"


class Verses(NamedTuple):
    """Aligned verses: row i of every language is the verse named by `names[i]`."""

    names: list[str]  # book.chapter.verse, such as "MAT.1.1"
    text: dict[str, list[str]]  # by language code; "" where the verse is missing


@functools.cache
def _all_verses() -> Verses:
    # Imported here: a reader of the packaged models needs no Parquet.
    import pyarrow.parquet

    columns = pyarrow.parquet.read_table(_TEXT).to_pydict()
    return Verses(columns.pop("verse"), columns)


def verses(split: str | None = None) -> Verses:
    """The packaged text in canonical order; `data/README.md` names its sources.

    Args:
      split: "train" (what the demo models saw), "held_out" (`HELD_OUT_BOOKS`, 30% of
        the verses, the pool for continued pre-training), or None for both.

    Raises:
      ValueError: another `split`.
    """
    everything = _all_verses()
    if split is None:
        keep = list(range(len(everything.names)))
    elif split in ("train", "held_out"):
        keep = [
            row
            for row, name in enumerate(everything.names)
            if (name.split(".")[0] in HELD_OUT_BOOKS) == (split == "held_out")
        ]
    else:
        raise ValueError(f'`split` must be "train", "held_out" or None; got {split!r}.')
    return Verses(
        [everything.names[row] for row in keep],
        {
            language: [column[row] for row in keep]
            for language, column in everything.text.items()
        },
    )


class _LettersAndMarks(dict):
    """For `str.translate`: letters and their marks stay, all else becomes a space."""

    def __missing__(self, code: int) -> int:
        kept = unicodedata.category(chr(code))[0] in "LM"
        self[code] = code if kept else ord(" ")
        return self[code]


_letters_and_marks = _LettersAndMarks()


def words(text: str) -> list[str]:
    """Runs of letters with their marks (`\\w` would cut Gujarati words at vowels)."""
    return text.translate(_letters_and_marks).split()
