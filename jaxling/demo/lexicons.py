"""The demo lexicon: word pairs that verses of two languages share unusually often.

A pair is kept when each word is the other's strongest associate (Dunning's
log-likelihood ratio over verses), the ratio is past `MINIMUM_RATIO` and the Dice
coefficient past `MINIMUM_DICE`. Splits are by concept, never by pair: the concept of a
word is the stem of its strongest English associate, a concept lies wholly in one split,
and so no form of a held-out word is in a training pair of any two languages.

T. Dunning, "Accurate Methods for the Statistics of Surprise and Coincidence",
Computational Linguistics 19 (1993). Files are in the form of MUSE's dictionaries.
"""

import functools
import hashlib
import itertools
import pathlib
from collections import Counter
from typing import NamedTuple

import numpy as np

from jaxling import dictionaries

from . import text

MINIMUM_RATIO = 25.0
MINIMUM_DICE = 0.3
LOOSE_RATIO = 12.0  # of pairs for training alone, the best of one word of the two
LOOSE_DICE = 0.15
VERSE_COUNTS = (5, 700)  # rarer words are chance, commoner ones grammar
SPLITS = {"train": 0.5, "development": 0.15, "test": 0.35}  # shares of concepts
_FOLDER = pathlib.Path(__file__).parent / "lexicon"


class Words(NamedTuple):
    """One language's words and the verses they are in."""

    forms: list[str]  # the commonest spelling of each word
    counts: np.ndarray  # [word] verses that hold it
    verse: np.ndarray  # [occurrence] sorted; a word counts once a verse
    word: np.ndarray  # [occurrence]
    names: np.ndarray  # [word] bool: mostly capitalised within verses
    present: np.ndarray  # [verse] bool: not empty in this language


class Associations(NamedTuple):
    """Pairs of words that share a verse more often than chance, one row a pair."""

    left: np.ndarray
    right: np.ndarray
    ratio: np.ndarray  # log-likelihood ratio, in nats
    dice: np.ndarray


def occurrences(column: list[str]) -> Words:
    """Words of one language, case folded, within `VERSE_COUNTS`."""
    spellings: dict[str, Counter] = {}
    inside: dict[str, list[int]] = {}
    verse, seen = [], []
    for row, content in enumerate(column):
        found = text.words(content)
        for position, form in enumerate(found):
            key = form.lower()
            spellings.setdefault(key, Counter())[form] += 1
            if position:
                tally = inside.setdefault(key, [0, 0])
                tally[0] += form[0].isupper()
                tally[1] += 1
        keys = sorted({form.lower() for form in found})
        verse.extend([row] * len(keys))
        seen.extend(keys)
    counts = Counter(seen)
    low, high = VERSE_COUNTS
    kept = sorted(key for key, count in counts.items() if low <= count <= high)
    number = {key: index for index, key in enumerate(kept)}
    rows = [(row, number[key]) for row, key in zip(verse, seen) if key in number]
    pairs = np.array(rows, np.int64).reshape(-1, 2)
    commonest = [spellings[key].most_common(1)[0][0] for key in kept]
    share = [inside[key][0] / inside[key][1] if key in inside else 0.0 for key in kept]
    capital = np.mean([form[0].isupper() for form in commonest] or [0.0])
    return Words(
        commonest,
        np.array([counts[key] for key in kept], np.int64),
        pairs[:, 0],
        pairs[:, 1],
        # Coptic and Cherokee are written in capitals throughout: no names to be seen.
        (np.array(share) > 0.5) & (capital < 0.5),
        np.array([bool(content) for content in column]),
    )


def associations(left: Words, right: Words) -> Associations:
    """Every pair that shares a verse more often than independent words would.

    With k verses holding both, a and b holding each, n holding both languages,
    ratio = 2 sum_ij o_ij log(o_ij / e_ij) over the 2 x 2 table, dice = 2k / (a + b).
    """
    both = left.present & right.present
    n = int(both.sum())

    def bounds(words: Words) -> tuple[np.ndarray, np.ndarray]:
        starts = np.searchsorted(words.verse, np.arange(len(both) + 1))
        kept = both[words.verse]
        return starts, np.bincount(words.word[kept], minlength=len(words.forms))

    (left_at, a), (right_at, b) = bounds(left), bounds(right)
    width = max(len(right.forms), 1)
    keys = [
        np.add.outer(
            left.word[left_at[row] : left_at[row + 1]] * width,
            right.word[right_at[row] : right_at[row + 1]],
        ).ravel()
        for row in np.flatnonzero(both)
    ]
    pair, k = np.unique(np.concatenate(keys or [[]]).astype(int), return_counts=True)
    i, j = pair // width, pair % width
    likely = k * n > a[i] * b[j]
    i, j, k = i[likely], j[likely], k[likely]
    a, b = a[i], b[j]
    ratio = np.zeros(len(k))
    for observed, row, column in (
        (k, a, b),
        (a - k, a, n - b),
        (b - k, n - a, b),
        (n - a - b + k, n - a, n - b),
    ):
        expected = row * column / max(n, 1)
        safe = np.where(observed > 0, observed, 1)
        ratio += 2 * observed * np.log(safe / np.where(expected > 0, expected, 1))
    return Associations(i, j, ratio, 2 * k / (a + b))


def _best(of: np.ndarray, other: np.ndarray, found: Associations, size: int):
    """The strongest associate of each word (-1: none); equal ones, the lower index."""
    order = np.lexsort((other, -found.ratio, of))
    words, first = np.unique(of[order], return_index=True)
    best = np.full(size, -1)
    best[words] = other[order][first]
    return best


def stem(word: str) -> str:
    """A crude English stem, so that "baptized" and "baptizing" are one concept."""
    word = word.lower()
    for ending in ("ings", "ing", "edst", "eth", "est", "ies", "ed", "es", "ly", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word.rstrip("ey")


def split_of(concept: str) -> str:
    """Where a concept lies: by its hash, so that it never depends on the others."""
    digest = hashlib.sha256(concept.encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    for split, size in SPLITS.items():
        if share < size:
            return split
        share -= size
    return split


class Mined(NamedTuple):
    """What association finds: pairs by language pair, before and after thresholds."""

    lexicon: dict[tuple[str, str, str], list[tuple[str, str]]]  # source, target, split
    loose: dict[tuple[str, str], list[tuple[str, str]]]  # training concepts alone


def mine(verses: text.Verses) -> Mined:
    """The lexicon of all language pairs, and looser pairs of training concepts.

    `verses` are the training verses. Pairs of two languages follow the order of
    `text.LANGUAGES` and are listed strongest association first.
    """
    languages = [code for code in text.LANGUAGES if code in verses.text]
    words = {code: occurrences(verses.text[code]) for code in languages}
    english = words["eng"]
    concept = {"eng": [stem(form) for form in english.forms]}
    named = {"eng": english.names}
    found = {}
    for left, right in itertools.combinations(languages, 2):
        found[left, right] = associations(words[left], words[right])
    for code in languages[1:]:
        to_english = found["eng", code]
        anchor = _best(
            to_english.right, to_english.left, to_english, len(words[code].forms)
        )
        concept[code] = [concept["eng"][a] if a >= 0 else "" for a in anchor]
        named[code] = words[code].names | ((anchor >= 0) & english.names[anchor])
    lexicon: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    loose: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (left, right), pairs in found.items():
        forward = _best(pairs.left, pairs.right, pairs, len(words[left].forms))
        backward = _best(pairs.right, pairs.left, pairs, len(words[right].forms))
        mutual = (forward[pairs.left] == pairs.right) & (
            backward[pairs.right] == pairs.left
        )
        strict = mutual & (pairs.ratio > MINIMUM_RATIO) & (pairs.dice > MINIMUM_DICE)
        chosen = (forward[pairs.left] == pairs.right) | (
            backward[pairs.right] == pairs.left
        )
        lax = chosen & (pairs.ratio > LOOSE_RATIO) & (pairs.dice > LOOSE_DICE)
        for split in SPLITS:
            lexicon[left, right, split] = []
        loose[left, right] = []
        for row in np.flatnonzero(strict | lax)[
            np.argsort(-pairs.ratio[strict | lax], kind="stable")
        ]:
            i, j = pairs.left[row], pairs.right[row]
            if named[left][i] or named[right][j]:
                continue
            concepts = {concept[left][i], concept[right][j]}
            pair = words[left].forms[i], words[right].forms[j]
            if strict[row] and len(concepts) == 1 and "" not in concepts:
                lexicon[left, right, split_of(*concepts)].append(pair)
            if lax[row] and all(c and split_of(c) == "train" for c in concepts):
                loose[left, right].append(pair)
    return Mined(lexicon, loose)


def training_pairs(mined: Mined) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """What word prompts are drawn from: the lexicon's pairs thrice, the loose once.

    The lexicon's are among the loose ones too.
    """
    return {
        pair: 2 * mined.lexicon[(*pair, "train")] + loose
        for pair, loose in mined.loose.items()
    }


def write(mined: Mined, folder: str | pathlib.Path = _FOLDER) -> None:
    """Writes one MUSE-style file for each pair of languages and split."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for (source, target, split), pairs in mined.lexicon.items():
        lines = "".join(f"{left}\t{right}\n" for left, right in pairs)
        path = folder / f"{source}-{target}.{split}.tsv"
        path.write_text(lines, "utf-8")


def lexicon(source: str, target: str, split: str) -> list[tuple[str, str]]:
    """The packaged word pairs of two languages, strongest association first.

    Args:
      source, target: codes of `text.LANGUAGES`, in either order.
      split: "train" (in the models' word prompts), "development" (what choices were
        made on), or "test". No concept is in two of them.

    Raises:
      ValueError: an unknown language or split, or a language paired with itself.
    """
    for name, code in (("source", source), ("target", target)):
        if code not in text.LANGUAGES:
            raise ValueError(
                f"`{name}` must be one of {', '.join(text.LANGUAGES)}; got {code!r}."
            )
    if source == target:
        raise ValueError(f"`source` and `target` must differ; both are {source!r}.")
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}; got {split!r}.")
    order = list(text.LANGUAGES)
    turned = order.index(source) > order.index(target)
    first, second = (target, source) if turned else (source, target)
    pairs = _read(_FOLDER / f"{first}-{second}.{split}.tsv")
    return [pair[::-1] for pair in pairs] if turned else list(pairs)


@functools.cache
def _read(path: pathlib.Path) -> list[tuple[str, str]]:
    return dictionaries.read_dictionary(path)
