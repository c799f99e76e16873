"""Does a model translate directly, or through a pivot?

He et al., 2025, "Semantic Pivots", https://arxiv.org/abs/2505.16385, and its released
code: the lens is read at the answer's place in every layer, and the token that any
layer says most firmly decides. A firm token that is neither what the last layer says
nor a part of the source word is a semantic pivot.

The statistic is literal: a layer that firmly says a bare word marker counts as a pivot
too. Read it together with which tokens the pivots are.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

CO_OCCURRENCE, PIVOT, NONE, SKIPPED = "co-occurrence", "pivot", "none", "skipped"
RULES = ("firmest", "threshold")


class Behaviours(NamedTuple):
    """One row per item.

    `kind` is "co-occurrence", "pivot", "none" (nothing firm enough) or "skipped"
    (source and answer share a token). `layer`, `token` and `probability` are those of
    the deciding token; for a "threshold" pivot, its firmest layer.
    """

    kind: list[str]
    layer: np.ndarray
    token: np.ndarray
    probability: np.ndarray


def classify(
    top_tokens: np.ndarray,
    probabilities: np.ndarray,
    source_tokens: Sequence[Collection[int]],
    answer_tokens: Sequence[Collection[int]],
    *,
    rule: str = "firmest",
    minimum: float | None = None,
    ignored: Collection[int] = (),
) -> Behaviours:
    """The behaviour behind every answer.

    `firmest` (the paper's): over all layers take the top token of highest probability,
    the later layer where two are equal. It is a pivot unless it is the last layer's
    top token or one of the source word's; with `minimum`, an item whose highest
    probability does not exceed it is "none" (the filter that the released code holds,
    commented out, at 0.1). `threshold` (an older rule of the same code): a pivot if any
    layer gives at least `minimum` (0.1 by default) to a top token that is neither the
    source's nor the answer's.

    Args:
      top_tokens: `[layer, n]`, each layer's most probable token at the answer's place;
        the last layer is the model's own output.
      probabilities: `[layer, n]`, theirs.
      source_tokens: the tokens of each item's source word.
      answer_tokens: those of its answer.
      rule: one of `RULES`.
      minimum: see above.
      ignored: tokens that may be on both sides without the item being skipped (a bare
        space).

    Raises:
      ValueError: an unknown rule, or shapes that differ.
    """
    top_tokens, probabilities = np.asarray(top_tokens), np.asarray(probabilities)
    n = len(source_tokens)
    if top_tokens.shape != probabilities.shape or top_tokens.shape[1:] != (n,):
        raise ValueError(
            f"`top_tokens` and `probabilities` must be [layer, {n}];"
            f" got {top_tokens.shape} and {probabilities.shape}."
        )
    if len(answer_tokens) != n:
        raise ValueError(f"`answer_tokens` must have {n} entries.")
    if rule not in RULES:
        raise ValueError(f"`rule` must be one of {RULES}; got {rule!r}.")
    candidates = probabilities.astype(np.float64)
    if rule == "threshold":
        least = 0.1 if minimum is None else minimum
        foreign = np.zeros(top_tokens.shape, bool)
        for i in range(n):
            own = {*source_tokens[i], *answer_tokens[i]}
            foreign[:, i] = ~np.isin(top_tokens[:, i], list(own))
        firm = foreign & (candidates >= least)
        found = firm.any(0)
        # Where no foreign token is firm, the firmest token of any kind is reported.
        candidates = np.where(firm | ~found, candidates, -np.inf)
    layers = len(candidates)
    layer = layers - 1 - np.argmax(candidates[::-1], axis=0)
    columns = np.arange(n)
    token, probability = top_tokens[layer, columns], probabilities[layer, columns]
    kind = []
    for i in range(n):
        source, answer = set(source_tokens[i]), set(answer_tokens[i])
        if (source & answer) - set(ignored):
            kind.append(SKIPPED)
        elif rule == "threshold":
            kind.append(PIVOT if found[i] else CO_OCCURRENCE)
        elif minimum is not None and probability[i] <= minimum:
            kind.append(NONE)
        elif token[i] != top_tokens[-1, i] and token[i] not in source:
            kind.append(PIVOT)
        else:
            kind.append(CO_OCCURRENCE)
    return Behaviours(kind, layer, token, probability)


class Shares(NamedTuple):
    """Of a group's items that were not skipped: counts, and the share of pivots."""

    items: int
    co_occurrence: int
    pivot: int
    none: int
    skipped: int
    pivot_share: float


def shares(kinds: Sequence[str]) -> Shares:
    """Counts behaviours; the share is NaN where every item was skipped."""
    count = {k: list(kinds).count(k) for k in (CO_OCCURRENCE, PIVOT, NONE, SKIPPED)}
    judged = len(kinds) - count[SKIPPED]
    share = count[PIVOT] / judged if judged else float("nan")
    return Shares(
        len(kinds), *(count[k] for k in (CO_OCCURRENCE, PIVOT, NONE, SKIPPED)), share
    )
