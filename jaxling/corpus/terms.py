"""Words and phrases to look for, and the units in which documents are compared.

A text's units are its words: the longest runs of letters, marks, numbers and joiners,
folded to one case. Scripts that are written without spaces have no such words: each of
their characters is a unit, so that a term in them is found wherever it stands. A
document of token ids has its tokens for units.
"""

import functools
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from fontTools import unicodedata as scripts

# ISO 15924; Tibetan is not among them, as it marks the ends of its syllables.
WITHOUT_SPACES = frozenset(
    "Hani Hira Kana Bopo Thai Laoo Khmr Mymr Tale Talu Lana Tavt Java Bali".split()
)
SEPARATOR, LETTER, ALONE = 0, 1, 2
_JOINERS = "\u200c\u200d"  # inside words of Persian and of Indian scripts
_CODES = 0x110000
_ASSIGNED = 0x32400  # above are private use, tags and variation selectors


class Terms(NamedTuple):
    """What to count: term i is found where one of `variants[i]` stands.

    Of surface terms a variant is a text, of token terms a sequence of token ids.
    """

    names: tuple[str, ...]
    variants: tuple[tuple, ...]
    kind: str
    """`surface` or `tokens`."""
    fold_case: bool = True


def surface_terms(words: Sequence[str], *, fold_case: bool = True) -> Terms:
    """Terms that are matched in text, whole words where the script has them.

    Where a term has anything between two words, a document may have any characters
    there that belong to no word, but not none; characters of scripts without spaces
    that touch in the term touch in the document. Equal terms are counted each. Texts
    are compared code point by code point: bring both to one normal form before.

    Args:
      words: words or phrases.
      fold_case: whether "House" is "house": simple folding, one character for one.

    Raises:
      ValueError: a term without a letter, mark or number; no term at all.
    """
    words = tuple(words)
    if not words:
        raise ValueError("`words` must hold at least one word; got none.")
    for word in words:
        if not cut(word, fold_case):
            raise ValueError(
                f"A term must hold a letter, a mark or a number; got {word!r}."
            )
    return Terms(words, tuple((word,) for word in words), "surface", fold_case)


def token_terms(words: Sequence[str], tokenizer: Any) -> Terms:
    """Terms that are matched as sequences of tokens.

    A word's variants are its tokens after a space and at the beginning of a text.
    `tokenizer` is a `tokenizers.Tokenizer`.

    Raises:
      ValueError: a word without tokens; no word at all.
    """
    words = tuple(words)
    if not words:
        raise ValueError("`words` must hold at least one word; got none.")
    spaced, bare = (
        tokenizer.encode_batch([before + w for w in words], add_special_tokens=False)
        for before in (" ", "")
    )
    variants = []
    for word, *coded in zip(words, spaced, bare):
        own = tuple(dict.fromkeys(tuple(found.ids) for found in coded))
        if not all(own):
            raise ValueError(f"The tokenizer makes no token of the word {word!r}.")
        variants.append(own)
    return Terms(words, tuple(variants), "tokens")


class Alphabet(NamedTuple):
    """By code point: `SEPARATOR`, `LETTER` or `ALONE`, and the folded code point."""

    kind: np.ndarray  # [code point] uint8
    folded: np.ndarray  # [code point] uint32


@functools.cache
def alphabet(fold_case: bool) -> Alphabet:
    """Which characters make words, by the Unicode version of this Python.

    Letters, marks and numbers (general categories L, M, N) and the zero-width joiners;
    `ALONE` are those of scripts in `WITHOUT_SPACES`, by Script or, for what several
    scripts share, by Script_Extensions (UAX #24, as fontTools has them).
    """
    kind = np.zeros(_CODES, np.uint8)
    folded = np.arange(_CODES, dtype=np.uint32)
    for code in range(_ASSIGNED):
        character = chr(code)
        if unicodedata.category(character)[0] in "LMN" or character in _JOINERS:
            kind[code] = LETTER
        if fold_case:
            lower = character.casefold()
            if len(lower) == 1:
                folded[code] = ord(lower)
    own = _by_code(scripts.Scripts, lambda script: script in WITHOUT_SPACES)
    shared = _by_code(
        scripts.ScriptExtensions,
        lambda listed: bool(listed) and set(listed) <= WITHOUT_SPACES,
    )
    kind[(kind == LETTER) & (own | shared)] = ALONE
    return Alphabet(kind, folded)


def _by_code(table: Any, holds: Any) -> np.ndarray:
    """A property of Unicode as an array, from fontTools' ranges."""
    sizes = np.diff([*table.RANGES, _CODES])
    return np.repeat([holds(value) for value in table.VALUES], sizes)


def cut(text: str, fold_case: bool) -> list[tuple[str, bool]]:
    """The units of a short text, and whether each touches the unit before it."""
    kind, folded = alphabet(fold_case)
    units: list[tuple[str, bool]] = []
    before = SEPARATOR
    for character in text:
        now = int(kind[ord(character)])
        written = chr(folded[ord(character)])
        if now == LETTER and before == LETTER:
            units[-1] = (units[-1][0] + written, units[-1][1])
        elif now != SEPARATOR:
            units.append((written, before != SEPARATOR and bool(units)))
        before = now
    return units
