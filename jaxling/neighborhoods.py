"""What the neighbours of tokens are: scripts, hubs, frequencies, translations.

Neighbour lists are ids `[n, k]`, best first, -1 where there is no neighbour; row i
belongs to the token `queries[i]`. Labels are any list of one string per token:
categories, writing systems, languages. All is NumPy over whole arrays; 250,000 lists
of 50 take seconds.
"""

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxling import writing_systems
from jaxling.vocabulary import SPACE

_BLOCK = 16_384  # rows counted at a time


class Labels(NamedTuple):
    """One label per token: `names[codes[i]]`; the names are in alphabetical order."""

    names: list[str]
    codes: np.ndarray


def encode(labels: Sequence[str]) -> Labels:
    """Numbers the distinct labels."""
    names = sorted(set(labels))
    number = {name: i for i, name in enumerate(names)}
    codes = np.fromiter((number[name] for name in labels), np.int32, len(labels))
    return Labels(names, codes)


def counts(labels: Sequence[str]) -> dict[str, int]:
    """How often each label occurs, most frequent first."""
    return dict(collections.Counter(sorted(labels)).most_common())


def with_self(indices: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Puts each token in front of its own neighbours, `[n, k + 1]`.

    Hyperpolyglot LLMs counts these 51 rows, so that no token has fewer than one
    category among its 50 neighbours.
    """
    return np.concatenate([np.asarray(queries)[:, None], indices], axis=1)


def distinct_labels(indices: np.ndarray, labels: Labels) -> np.ndarray:
    """How many different labels are among each row's ids, int64 `[n]`."""
    codes = np.sort(_codes_of(indices, labels), axis=1)
    if codes.shape[1] == 0:
        return np.zeros(len(codes), dtype=np.int64)
    first = codes[:, 0] >= 0
    return first + ((codes[:, 1:] != codes[:, :-1]) & (codes[:, 1:] >= 0)).sum(axis=1)


def _codes_of(indices: np.ndarray, labels: Labels) -> np.ndarray:
    """The label's number in every slot, -1 in empty ones, in the smallest dtype."""
    small = np.int16 if len(labels.names) < 2**15 else np.int32
    indices = np.asarray(indices)
    codes = labels.codes.astype(small)[np.maximum(indices, 0)]
    codes[indices < 0] = -1
    return codes


class Spread(NamedTuple):
    """Mean and standard deviation (n - 1) of whole numbers, and how often each occurs.

    `histogram[v]` counts the value v.
    """

    mean: float
    std: float
    histogram: np.ndarray


def spread(values: np.ndarray) -> Spread:
    """Summarises non-negative whole numbers, such as `distinct_labels`."""
    values = np.asarray(values)
    if values.size == 0:
        return Spread(float("nan"), float("nan"), np.zeros(0, dtype=np.int64))
    std = float(values.std(ddof=1)) if values.size > 1 else 0.0
    return Spread(float(values.mean()), std, np.bincount(values))


def striking(
    indices: np.ndarray,
    distances: np.ndarray,
    queries: np.ndarray,
    tokens: Sequence[str],
    systems: Sequence[str],
    *,
    top: int = 8,
) -> list[int]:
    """Ids of readable tokens whose neighbours span most writing systems, widest first.

    Of tokens that span as many, those with the nearest neighbours come first.
    Digits, symbols and bytes among the neighbours do not count. Readable is a token
    that begins a word, where the vocabulary tells, and has three letters at least (two
    where a letter is a syllable or a word). No writing system takes more than a quarter
    of the places while others could.
    """
    written = np.array([system not in _NO_SYSTEM for system in systems])
    letters = np.where(written[np.maximum(indices, 0)], indices, -1)
    spans = distinct_labels(letters, encode(systems))
    marked = any(token.startswith(SPACE) for token in tokens)
    first: list[int] = []
    rest: list[int] = []
    share: dict[str, int] = {}
    far = np.mean(distances, axis=1)  # NaN, where a neighbour is missing, comes last
    for i in np.asarray(queries)[np.lexsort((far, -spans))].tolist():
        token, system = tokens[i], systems[i]
        dense = system in _DENSE
        begins = dense or (token.startswith(SPACE) if marked else token[:1].isalpha())
        enough = sum(map(str.isalpha, token)) >= (2 if dense else 3)
        if begins and enough and written[i]:
            share[system] = share.get(system, 0) + 1
            (first if share[system] <= max(1, top // 4) else rest).append(i)
    return (first + rest)[:top]


_DENSE = {"Han", "Hangul", "Hiragana", "Katakana"}
_NO_SYSTEM = {
    writing_systems.BYTES,
    writing_systems.COMMON,
    writing_systems.SPECIAL,
    writing_systems.UNKNOWN,
}


class LabelMatrix(NamedTuple):
    """Neighbours of each label (column) that tokens of each label (row) have.

    `tokens` counts the rows' tokens `[c]`. `mean` is the mean count over all of them,
    so a full row adds up to the list's length. `mean_where_present` drops the zeros,
    as Figure 6 of Hyperpolyglot LLMs does: the mean over those tokens that have such a
    neighbour at all, which flatters rare labels. NaN where nothing is averaged.
    """

    names: list[str]
    tokens: np.ndarray
    mean: np.ndarray
    mean_where_present: np.ndarray


def label_matrix(
    indices: np.ndarray, queries: np.ndarray, labels: Labels
) -> LabelMatrix:
    """Counts the labels of neighbours by the label of the token.

    Wen-Yi and Mimno, 2023, https://arxiv.org/abs/2311.18034, figure 6.
    """
    c = len(labels.names)
    own = labels.codes[np.asarray(queries)]
    totals, present = np.zeros((2, c, c))
    for start in range(0, len(own), _BLOCK):
        codes = _codes_of(indices[start : start + _BLOCK], labels)
        slots = np.arange(len(codes))[:, None] * (c + 1) + codes + 1
        counts = np.bincount(slots.ravel(), minlength=len(codes) * (c + 1))
        counts = counts.reshape(-1, c + 1)[:, 1:]  # column 0 took the empty slots
        order = np.argsort(own[start : start + _BLOCK], kind="stable")
        rows, first = np.unique(own[start : start + _BLOCK][order], return_index=True)
        totals[rows] += np.add.reduceat(counts[order], first)
        present[rows] += np.add.reduceat(counts[order] > 0, first, dtype=np.int64)
    tokens = np.bincount(own, minlength=c)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = totals / tokens[:, None]
        where_present = totals / present
    return LabelMatrix(labels.names, tokens, mean, where_present)


class Hubness(NamedTuple):
    """How unequally neighbour slots are shared out among the keys.

    `k_skewness` is the skewness of the k-occurrence. `hub_occurrence` is the share of
    slots held by hubs (over twice the mean k-occurrence), `antihub_occurrence` the
    share of keys that nobody lists, `robin_hood_index` the share of slots to be handed
    on until all keys have equally many. `largest` is the greatest k-occurrence, and
    `hubs` are the ids of the most frequent neighbours, most frequent first.
    """

    k_skewness: float
    hub_occurrence: float
    antihub_occurrence: float
    robin_hood_index: float
    largest: int
    hubs: np.ndarray


def hubness(k_occurrence: np.ndarray, *, top: int = 20) -> Hubness:
    """Summarises how many neighbour lists contain each key.

    Radovanović et al., 2010, https://jmlr.org/papers/v11/radovanovic10a.html;
    Feldbauer et al., 2018, https://doi.org/10.1109/ICBK.2018.00055 (Robin Hood index).
    """
    occurrence = np.asarray(k_occurrence, dtype=np.float64)
    if occurrence.size == 0 or occurrence.sum() == 0:
        raise ValueError("`k_occurrence` must count at least one neighbour.")
    mean = occurrence.mean()
    deviation = occurrence - mean
    variance = (deviation**2).mean()
    order = np.argsort(-occurrence, kind="stable")[:top]
    return Hubness(
        float((deviation**3).mean() / variance**1.5) if variance else 0.0,
        float(occurrence[occurrence > 2 * mean].sum() / occurrence.sum()),
        float((occurrence == 0).mean()),
        float(np.abs(deviation).sum() / 2 / occurrence.sum()),
        int(occurrence.max()),
        order,
    )


def frequency_deciles(frequencies: np.ndarray) -> np.ndarray:
    """The decile of each token's frequency rank, 1 (rarest) to 10, int64 `[vocab]`.

    Tokens of equal frequency share the middle of their ranks and so the decile: ids
    follow scripts, and must not decide.
    """
    _, tied, counts = np.unique(frequencies, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return (10 * middle[tied] // max(len(tied), 1)).astype(np.int64) + 1


class GroupMeans(NamedTuple):
    """Mean, standard deviation (n - 1) and size of each group, `[groups]`."""

    mean: np.ndarray
    std: np.ndarray
    size: np.ndarray


def group_means(groups: np.ndarray, values: np.ndarray, size: int) -> GroupMeans:
    """Averages `values` by `groups` in [0, size); NaN where a group is too small."""
    values = np.asarray(values, dtype=np.float64)
    count = np.bincount(groups, minlength=size)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(groups, values, minlength=size) / count
        squares = np.bincount(groups, (values - mean[groups]) ** 2, minlength=size)
        std = np.sqrt(squares / np.where(count > 1, count - 1, np.nan))
    return GroupMeans(mean, std, count)


class Translations(NamedTuple):
    """Which tokens have a translation among their neighbours.

    `rows` are the neighbour lists of tokens that can have one: their word is in the
    dictionary, with a translation that is a token too. `ranks` is the place of the
    first translation in those lists, 1 is nearest, 0 none. `rate` is the share of
    `rows` with one, `chance` what lists of random tokens would reach.
    """

    rows: np.ndarray
    ranks: np.ndarray
    rate: float
    chance: float

    def rate_at(self, k: int) -> float:
        """The share of `rows` with a translation among the first `k`."""
        if len(self.ranks) == 0:
            return float("nan")
        return float(((self.ranks > 0) & (self.ranks <= k)).mean())


def translations(
    indices: np.ndarray,
    queries: np.ndarray,
    tokens: Sequence[str],
    dictionary: Iterable[tuple[str, str]],
) -> Translations:
    """Looks every token and its neighbours up in a dictionary of word pairs.

    A token's word is the token in lower case without the space mark. The pairs count in
    both directions; a pair of equal words is no translation.
    """
    words: dict[str, int] = {}
    word_of = np.array([words.setdefault(_word(t), len(words)) for t in tokens])
    pairs = set()
    for source, target in dictionary:
        a, b = words.get(source.lower()), words.get(target.lower())
        if a is not None and b is not None and a != b:
            pairs |= {(a, b), (b, a)}
    table = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    keys = table[:, 0] * len(words) + table[:, 1]
    spellings = np.bincount(word_of, minlength=len(words))
    reachable = np.zeros(len(words))
    np.add.at(reachable, table[:, 0], spellings[table[:, 1]])
    own = word_of[np.asarray(queries)]
    rows = np.flatnonzero(reachable[own] > 0)
    found = _found(indices, rows, own, word_of, keys, len(words))
    ranks = np.where(found.any(axis=1), found.argmax(axis=1) + 1, 0)
    k = (np.asarray(indices)[rows] >= 0).sum(axis=1)
    chance = 1 - (1 - reachable[own[rows]] / max(len(tokens), 1)) ** k
    nothing = len(rows) == 0
    return Translations(
        rows,
        ranks,
        float("nan") if nothing else float((ranks > 0).mean()),
        float("nan") if nothing else float(chance.mean()),
    )


def _found(indices, rows, own, word_of, keys, words) -> np.ndarray:
    """Which slots of `rows` hold a translation, bool `[rows, k]`."""
    neighbors = np.asarray(indices)[rows]
    if neighbors.size == 0:
        return np.zeros((len(rows), max(neighbors.shape[1], 1)), dtype=bool)
    wanted = own[rows, None] * words + word_of[np.maximum(neighbors, 0)]
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return (keys[place] == wanted) & (neighbors >= 0)


def _word(token: str) -> str:
    return token.removeprefix(SPACE).lower()


def shared_neighbors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many ids the two lists of each row have in common, int64 `[n]`.

    Wen-Yi and Mimno, 2023, https://arxiv.org/abs/2311.18034, figure 7. With lists of k
    the Jaccard index is `shared / (2 k - shared)`.

    Args:
      a, b: `[n, k]` and `[n, j]` ids over the same rows; no id twice in a list.
    """
    both = np.sort(np.concatenate([a, b], axis=1), axis=1)
    return ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(axis=1)


def shared_by_chance(
    a: np.ndarray, b: np.ndarray, *, permutations: int = 20, seed: int = 0
) -> np.ndarray:
    """Mean of `shared_neighbors` when the second space's rows are relabelled at random.

    A relabelling keeps everything about a space but which token sits where: hubs stay
    hubs. So this is what two unrelated spaces of these shapes would share.

    Returns:
      `[permutations]` means.
    """
    a, b = np.asarray(a), np.asarray(b)
    generator = np.random.default_rng(seed)
    means = np.empty(permutations)
    for i in range(permutations):
        relabelled = _relabelled(b, generator.permutation(len(b)))
        means[i] = shared_neighbors(a, relabelled).mean()
    return means


def _relabelled(lists: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The lists `[n, k]` of rows that are called `new[row]` from now on."""
    relabelled = np.empty_like(lists)
    relabelled[new] = np.where(lists >= 0, new[np.maximum(lists, 0)], -1)
    return relabelled
