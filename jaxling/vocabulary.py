"""What the tokens of a vocabulary are, and which of them two vocabularies share."""

import pathlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxling import checkpoints, tokenizer_files, writing_systems

SPACE = "\u2581"


class Vocabulary(NamedTuple):
    """The tokens of a tokenizer, in id order; both lists hold "" at ids without one.

    `tokens` are for people: UTF-8 text with `▁` for a space, stray bytes as `<E0 A4>`,
    invisible characters escaped. `strings` are for comparison, as Hyperpolyglot LLMs
    has them: the tokenizer's own, byte-level ones decoded, `bad: ` before those that
    are no UTF-8. `special` marks control tokens (`<pad>`, `[CLS]`).
    """

    tokens: list[str]
    strings: list[str]
    special: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """Which ids have a token, bool `[vocab]`."""
        return np.fromiter((s != "" for s in self.strings), bool, len(self.strings))


def load_vocabulary(
    path_or_id: str | pathlib.Path, revision: str | None = None
) -> Vocabulary:
    """Reads the vocabulary of a directory, a built-in model or a hub id.

    Its length is the largest id plus one; an embedding may have more rows, which then
    belong to no token.

    Raises:
      ValueError: nothing is found there, a file is not what it claims to be, or there
        is no tokenizer.
      OSError: a file cannot be read.
    """
    folder = checkpoints.locate(path_or_id, revision, tokenizer_files.FILES)
    pieces = tokenizer_files.read_pieces(folder)
    length = max(pieces.ids.values()) + 1
    tokens, strings = [""] * length, [""] * length
    special = np.zeros(length, dtype=bool)
    for piece, i in pieces.ids.items():
        pair = _from_bytes(piece) if pieces.byte_level else (readable(piece), piece)
        tokens[i], strings[i] = pair
        special[i] = piece in pieces.special
    return Vocabulary(tokens, strings, special)


def load_tokenizer(path_or_id: str | pathlib.Path, revision: str | None = None) -> Any:
    """The `tokenizers.Tokenizer` of a directory, a built-in model or a hub id.

    Raises:
      ValueError: nothing is found there, or no tokenizer that can be read.
    """
    folder = checkpoints.locate(path_or_id, revision, tokenizer_files.FILES)
    return tokenizer_files.read_tokenizer(folder)


class Overlap(NamedTuple):
    """How much the vocabularies `names` have in common, each field `[m, m]`.

    `shared` counts the strings in both, `overlap` is that count over the smaller
    vocabulary's, `latin` the share of LATIN (`unicode_categories`) among them.
    """

    names: list[str]
    shared: np.ndarray
    overlap: np.ndarray
    latin: np.ndarray


def vocabulary_overlap(vocabularies: Mapping[str, Vocabulary]) -> Overlap:
    """Compares all pairs of vocabularies by exact equality of their strings.

    overlap(A, B) = |A ∩ B| / min(|A|, |B|)

    Wen-Yi and Mimno, 2023, https://arxiv.org/abs/2311.18034, figure 2.
    """
    names = list(vocabularies)
    sets = [set(v.strings) - {""} for v in vocabularies.values()]
    union = sorted(set().union(*sets))
    categories = writing_systems.unicode_categories(union)
    latin = {s for s, category in zip(union, categories) if category == "LATIN"}
    shared = np.zeros((len(sets), len(sets)), dtype=np.int64)
    in_latin = np.zeros_like(shared)
    smaller = np.zeros_like(shared)
    for i, a in enumerate(sets):
        for j, b in enumerate(sets[: i + 1]):
            both = a & b
            shared[i, j] = shared[j, i] = len(both)
            in_latin[i, j] = in_latin[j, i] = len(both & latin)
            smaller[i, j] = smaller[j, i] = min(len(a), len(b))
    return Overlap(
        names,
        shared,
        shared / np.maximum(smaller, 1),
        in_latin / np.maximum(shared, 1),
    )


def shared_tokens(*vocabularies: Vocabulary) -> np.ndarray:
    """The ids of the strings that all vocabularies have, int64 `[models, shared]`.

    Column j is one string's id in each vocabulary, in the order of the first one's
    ids; of two ids with one string the lower counts.
    """
    ids = [_ids(vocabulary.strings) for vocabulary in vocabularies]
    both = [s for s in ids[0] if all(s in other for other in ids[1:])]
    return np.array([[of[s] for s in both] for of in ids], dtype=np.int64)


def _ids(strings: Sequence[str]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for i, string in enumerate(strings):
        if string:
            ids.setdefault(string, i)
    return ids


def readable(text: str) -> str:
    """`text` so that nothing in it is invisible or moves a terminal's cursor.

    Spaces become `▁`, control characters their pictures (`␊`) or code points, and so
    does a text of nothing but invisible characters.
    """
    text = text.replace(" ", SPACE)
    if text.isascii() and text.isprintable():
        return text
    invisible = all(unicodedata.category(c) in _INVISIBLE for c in text)
    return "".join(_escape(c) if invisible or _steers(c) else c for c in text)


_INVISIBLE = {"Cc", "Cf", "Co", "Zl", "Zp", "Zs"}


def _steers(character: str) -> bool:
    """Whether it is a control character, a line end or a mark of direction."""
    if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
        return True
    return character in "\u200e\u200f\u061c" or (
        "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    )


def _escape(character: str) -> str:
    if character < " ":
        return chr(0x2400 + ord(character))
    return "␡" if character == "\x7f" else f"<U+{ord(character):04X}>"


def _byte_table() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes.

    Printable bytes stand for themselves, the others for the code points from 256 on.
    Radford et al., 2019, "Language Models are Unsupervised Multitask Learners".
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_table()


def _from_bytes(token: str) -> tuple[str, str]:
    """Of a byte-level token: for people, and for comparison."""
    try:
        raw = bytes([_BYTE_OF[character] for character in token])
    except KeyError:  # an added token, written as it is
        return readable(token), f"bad: {token}"
    try:
        text = raw.decode("utf-8")
        return readable(text), text.replace(" ", SPACE)
    except UnicodeDecodeError:
        pieces = re.split("([\udc80-\udcff]+)", raw.decode("utf-8", "surrogateescape"))
        stray = [
            "<" + piece.encode("utf-8", "surrogateescape").hex(" ").upper() + ">"
            for piece in pieces[1::2]
        ]
        pieces[1::2] = stray
        pieces[::2] = [readable(piece) for piece in pieces[::2]]
        return "".join(pieces), f"bad: {token}"
