"""Which script a token is written in: the paper's rule, and Unicode's.

Both rules label every character and let the characters of a token vote; the label seen
first wins a tie. A vocabulary's characters are labelled once, so 250,000 tokens take
about a second.
"""

import re
import unicodedata

import numpy as np
from fontTools import unicodedata as scripts

BYTES = "Bytes"
COMMON = "Common"
SPECIAL = "Special"
UNKNOWN = "Unknown"

# `<0xE0>` is a byte-fallback token, `<E0 A4>` how vocabulary.py shows stray bytes.
_BYTES = re.compile(r"<0x[0-9A-F]{2}>|<[0-9A-F]{2}(?: [0-9A-F]{2})*>")
_BYTE_PLACEHOLDER = "\ufdd0"  # a noncharacter: no text holds it
_NO_SCRIPT = {"Zyyy", "Zinh", "Zzzz"}  # common, inherited, unassigned


def unicode_categories(tokens: list[str]) -> list[str]:
    """The category of each token by the rule of Hyperpolyglot LLMs.

    A letter's category is the first word of its Unicode name (LATIN, CJK, HANGUL), any
    other character's the first letter of its general category (N, P, S, M, Z, C). A
    token takes the category most of its characters have, the first seen among equals;
    the empty token is "Unknown". So `▁` is one S, a Devanagari vowel sign an M, and
    tokens of scripts with many marks are often M. The numbers of the paper depend on
    all of it; `writing_systems` is the rule for any other purpose. Unicode's version is
    Python's own.

    Wen-Yi and Mimno, 2023, https://arxiv.org/abs/2311.18034, section 3.
    """
    return _vote(tokens, _category, UNKNOWN)


def _category(character: str) -> str:
    category = unicodedata.category(character)
    if category.startswith("L"):
        return unicodedata.name(character, "L").split(" ")[0]
    return category[0]


def writing_systems(
    tokens: list[str], special: np.ndarray | list[bool] | None = None
) -> list[str]:
    """The writing system of each token by the Unicode Script property.

    Every character with a script of its own votes (Latin, Cyrillic, Han, Devanagari,
    vowel signs included); characters common to several scripts and combining accents
    do not. A token without any such character asks the script extensions of what it
    has: the only script named there, or the one whose block the character stands in,
    so `،` alone is Arabic and `ー` Katakana. Left are "Common" (digits, punctuation,
    symbols, the space mark) and "Bytes" (byte-fallback tokens and stray bytes as
    `vocabulary` shows them); "Special" where the mask `special` says so; "Unknown" for
    the empty token.

    UAX #24, https://www.unicode.org/reports/tr24/; the data are fontTools'.
    """
    readable = [_BYTES.sub(_BYTE_PLACEHOLDER, token) for token in tokens]
    own = _vote(readable, _own_script, "")
    rest = [i for i, label in enumerate(own) if not label and tokens[i]]
    extended = _vote([readable[i] for i in rest], _extended_script, "")
    for i, label in zip(rest, extended):
        stray = BYTES if _BYTE_PLACEHOLDER in readable[i] else COMMON
        own[i] = label or stray
    labels = [label or UNKNOWN for label in own]
    if special is not None:
        for i in np.flatnonzero(special).tolist():
            labels[i] = SPECIAL
    return labels


def _own_script(character: str) -> str:
    code = scripts.script(character)
    return "" if code in _NO_SCRIPT else scripts.script_name(code)


def _extended_script(character: str) -> str:
    codes = scripts.script_extension(character) - _NO_SCRIPT
    names = {scripts.script_name(code) for code in codes}
    if len(names) == 1:
        return names.pop()
    block = scripts.block(character)
    return next((name for name in sorted(names) if block.startswith(name)), "")


def _vote(tokens: list[str], label, empty: str) -> list[str]:
    """The most frequent label among each token's characters, ties to the first seen.

    Characters labelled "" abstain; a token without votes is labelled `empty`.
    """
    if not tokens:
        return []
    text = "".join(tokens).encode("utf-32-le", "surrogatepass")
    characters, character = np.unique(
        np.frombuffer(text, dtype="<u4"), return_inverse=True
    )
    names = [label(chr(point)) for point in characters]
    kinds = ["", *sorted(set(names) - {""})]
    number = {kind: i for i, kind in enumerate(kinds)}
    of_character = np.array([number[name] for name in names], dtype=np.int64)
    row = np.repeat(np.arange(len(tokens)), [len(token) for token in tokens])
    ballot = of_character[character] if len(row) else row
    row, ballot = row[ballot > 0], ballot[ballot > 0]
    pairs, first, votes = np.unique(
        row * len(kinds) + ballot, return_index=True, return_counts=True
    )
    row, ballot = np.divmod(pairs, len(kinds))
    order = np.lexsort((first, -votes, row))
    rows, winner = np.unique(row[order], return_index=True)
    labels = [empty] * len(tokens)
    for i, kind in zip(rows.tolist(), ballot[order][winner].tolist()):
        labels[i] = kinds[kind]
    return labels
