"""Files about words: pairs in the format of the MUSE dictionaries, and counts."""

import pathlib
from collections.abc import Sequence

import numpy as np


def read_dictionary(path: str | pathlib.Path) -> list[tuple[str, str]]:
    """Reads a MUSE dictionary: one pair a line, two words parted by a tab or a space.

    https://github.com/facebookresearch/MUSE, ground-truth bilingual dictionaries.

    Raises:
      ValueError: a line is not a pair; the message names it.
      OSError: the file cannot be read.
    """
    pairs = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        line = line.strip()
        words = line.split("\t") if "\t" in line else line.split()
        if not line:
            continue
        if len(words) != 2 or not all(word.strip() for word in words):
            raise ValueError(
                f"{path}, line {number}: a dictionary's line holds two words parted by"
                f" a tab or a space; got {line[:80]!r}."
            )
        pairs.append((words[0].strip(), words[1].strip()))
    if not pairs:
        raise ValueError(f"{path} holds no word pair.")
    return pairs


def read_concepts(path: str | pathlib.Path) -> dict[str, list[str]]:
    """The words of each language from a TSV with one concept a line.

    The first line names the languages; a field may be empty.

    Raises:
      ValueError: it names fewer than two languages, one twice or one with a hyphen, or
        a line has more or fewer fields.
      OSError: the file cannot be read.
    """
    lines = [line.rstrip("\r") for line in _text(path).split("\n")]
    codes = [code.strip() for code in lines[0].split("\t")]
    if len(codes) < 2 or len(set(codes)) < len(codes) or "-" in "".join(codes):
        raise ValueError(
            f"The first line of {path} must name two or more different languages,"
            f" without hyphens, parted by tabs; got {lines[0][:80]!r}."
        )
    columns: dict[str, list[str]] = {code: [] for code in codes}
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != len(codes):
            raise ValueError(
                f"{path}, line {number}: {len(codes)} fields are needed, as many as"
                f" languages; got {len(fields)}."
            )
        for code, word in zip(codes, fields):
            columns[code].append(word.strip())
    return columns


def read_words(path: str | pathlib.Path) -> set[str]:
    """The words of a file, one a line.

    Raises:
      ValueError: it is not UTF-8, or holds no word.
      OSError: the file cannot be read.
    """
    words = {line.strip() for line in _text(path).split("\n")} - {""}
    if not words:
        raise ValueError(f"{path} holds no word.")
    return words


def read_frequencies(path: str | pathlib.Path, tokens: Sequence[str]) -> np.ndarray:
    """How often each of `tokens` occurs, float64 `[tokens]`.

    The file has lines of token, tab, count. A token that it does not name counts zero,
    and a name that is no token is passed over.

    Raises:
      ValueError: a line is not a token and a count, or no line names a token.
      OSError: the file cannot be read.
    """
    counts = {}
    for number, line in enumerate(_text(path).split("\n"), 1):
        line = line.rstrip("\r")
        if not line:
            continue
        token, _, count = line.rpartition("\t")
        try:
            counts[token] = float(count)
        except ValueError:
            counts[token] = -1.0
        if not token or not 0 <= counts[token] < float("inf"):
            raise ValueError(
                f"{path}, line {number}: a line holds a token, a tab and how often it"
                f" occurs; got {line[:80]!r}."
            )
    if not counts.keys() & set(tokens):
        raise ValueError(f"{path} names none of the model's {len(tokens):,} tokens.")
    return np.array([counts.get(token, 0.0) for token in tokens])


def _text(path: str | pathlib.Path) -> str:
    try:
        return pathlib.Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8: {error}.") from None
