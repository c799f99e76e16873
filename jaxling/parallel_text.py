"""The same texts in several languages, and the vectors that a model has for them."""

import gzip
import lzma
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import IO, NamedTuple

import numpy as np

from jaxling import demo, labelled_text, models

_OPENERS: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}


class Parallel(NamedTuple):
    """`texts[language][i]` is item i; every item has a text in every language."""

    items: list[str]
    texts: dict[str, list[str]]


def read_parallel(
    path: str | pathlib.Path, languages: Sequence[str] = (), most: int | None = None
) -> Parallel:
    """Reads a TSV: the first column names the item, each other one is a language.

    The first line names the columns; `.gz` and `.xz` are opened as such. Items that
    lack a language are left out; with `most`, that many evenly spaced ones are kept.

    Raises:
      ValueError: not such a file, an unknown language, or fewer than two languages.
      OSError: the file cannot be read.
    """
    path = pathlib.Path(path)
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as file:
            # Not splitlines: a text may hold U+2028 and its like.
            lines = file.read().removesuffix("\n").split("\n")
    except (UnicodeDecodeError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a TSV in UTF-8: {error}.") from None
    header = lines[0].split("\t")
    if len(set(header)) < len(header):
        raise ValueError(f"{path} names a column twice: {header}.")
    chosen = list(languages) or header[1:]
    unknown = sorted(set(chosen) - set(header[1:]))
    if unknown:
        raise ValueError(f"{path} has no language {unknown}; it has {header[1:]}.")
    columns: dict[str, list[str]] = {language: [] for language in header[1:]}
    items = []
    for number, line in enumerate(lines[1:], 2):
        fields = line.split("\t")
        if len(fields) != len(header):
            raise ValueError(
                f"Line {number} of {path} must have {len(header)} fields, as the first"
                f" has; got {len(fields)}."
            )
        items.append(fields[0])
        for language, text in zip(header[1:], fields[1:]):
            columns[language].append(text)
    return _complete(items, {name: columns[name] for name in chosen}, most, str(path))


def demo_parallel(languages: Sequence[str] = (), most: int | None = None) -> Parallel:
    """The verses that no built-in model saw; all ten languages share those of Luke.

    Raises:
      ValueError: an unknown language, or fewer than two.
    """
    verses = demo.verses("held_out")
    chosen = list(languages) or list(verses.text)
    unknown = sorted(set(chosen) - set(verses.text))
    if unknown:
        raise ValueError(f"No language {unknown}; there are {list(verses.text)}.")
    texts = {name: verses.text[name] for name in chosen}
    return _complete(verses.names, texts, most, "the built-in text")


def _complete(items, columns, most, where) -> Parallel:
    if len(columns) < 2:
        raise ValueError(f"{where} must offer at least two languages: {list(columns)}.")
    rows = [i for i in range(len(items)) if all(c[i].strip() for c in columns.values())]
    if len(rows) < 2:
        raise ValueError(f"{where} has {len(rows)} items in all of {list(columns)}.")
    if most is not None and most < len(rows):
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, most).astype(int)]
    return Parallel(
        [items[i] for i in rows],
        {name: [column[i] for i in rows] for name, column in columns.items()},
    )


def spaces(
    model: models.Model, tokenizer, parallel: Parallel, *, center: bool = False
) -> dict[str, np.ndarray]:
    """For each language the mean vector of every text, `[layer, n, d]` float32.

    Layer 0 is the input embedding, layer l the output of block l. With `center` each
    language's mean vector is taken away at every layer, and with it what only tells
    the language.

    Raises:
      ValueError: the model's vector of a text is not finite.
    """
    found = {}
    for language, texts in parallel.texts.items():
        own = labelled_text.states(model, tokenizer, texts, level="sentence")
        vectors = np.empty_like(own.vectors)
        vectors[:, own.text] = own.vectors
        wrong = np.argwhere(~np.isfinite(vectors).all(2))
        if len(wrong):
            layer, item = wrong[0]
            raise ValueError(
                f"The model's vectors must be finite; at layer {layer} that of item"
                f" {parallel.items[item]} in {language} is not, the first of"
                f" {len(wrong)}."
            )
        found[language] = vectors - vectors.mean(1, keepdims=True) * center
    return found
