"""Labelled documents of verses: a corpus whose languages and pairs are known.

A document is a verse (" In the beginning ...") or a verse in two languages ("English:
...\\nSwahili: ..."), in the proportion in which the demo models read them, pairs of
languages likewise; word prompts are left out. The label is the language's code, or both
("eng+swh", in the order of `text.LANGUAGES`).
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from . import documents, text

# Of the held-out books the letters whose verses tell how good a model is. They share
# passages with each other (Ephesians and Colossians) and with none of the others, so a
# model that is trained on the rest of the held-out verses has not read them.
EVALUATED_BOOKS = ("1PE", "COL", "EPH", "TIT")


class Labelled(NamedTuple):
    """A document, its languages, and the verse that it holds."""

    text: str
    language: str
    verse: str


def without_books(
    verses: text.Verses, books: Collection[str], *, keep: bool = False
) -> text.Verses:
    """The verses that are in none of `books`; with `keep`, those that are in one."""
    rows = [
        row
        for row, name in enumerate(verses.names)
        if (name.split(".")[0] in books) == keep
    ]
    return text.Verses(
        [verses.names[row] for row in rows],
        {code: [column[row] for row in rows] for code, column in verses.text.items()},
    )


def paired(names: Sequence[str], texts: Sequence[str]) -> str:
    """A verse in two languages, as the demo models read it."""
    return "\n".join(f"{name}: {own}" for name, own in zip(names, texts))


def labelled_verses(
    verses: text.Verses, *, characters: int, seed: int
) -> Iterator[Labelled]:
    """Draws documents until they hold `characters` characters, each at most once.

    Raises:
      ValueError: the verses hold fewer documents than that.
    """
    rng = np.random.default_rng(seed)
    present = {
        code: {row for row, verse in enumerate(column) if verse}
        for code, column in verses.text.items()
    }
    kinds: dict[tuple[str, ...], float] = {}
    pairs = [
        pair
        for pair in itertools.combinations(present, 2)
        if pair not in documents.UNSEEN_PAIRS
    ]
    weights = [documents.ENGLISH_WEIGHT if "eng" in pair else 1.0 for pair in pairs]
    for code in present:
        kinds[(code,)] = documents.SHARES["verse"] / len(present)
    for pair, weight in zip(pairs, weights):
        kinds[pair] = documents.SHARES["verse pair"] * weight / sum(weights)
    # Every kind has its verses in an order of its own and gives the next one.
    waiting = {
        kind: rng.permutation(
            sorted(set.intersection(*(present[code] for code in kind)))
        ).tolist()
        for kind in kinds
    }
    names, shares = list(kinds), np.array(list(kinds.values()))
    drawn = 0
    while drawn < characters:
        left = shares * [bool(waiting[kind]) for kind in names]
        if not left.any():
            raise ValueError(
                f"The verses make documents of {drawn:,} characters in all;"
                f" {characters:,} are asked for."
            )
        kind = names[rng.choice(len(names), p=left / left.sum())]
        row = waiting[kind].pop()
        own = [verses.text[code][row] for code in kind]
        if len(kind) == 1:
            content = " " + own[0]
        else:
            turn = slice(None, None, -1) if rng.integers(2) else slice(None)
            called = [text.LANGUAGES[code] for code in kind]
            content = paired(called[turn], own[turn])
        drawn += len(content)
        yield Labelled(content, "+".join(kind), verses.names[row])
