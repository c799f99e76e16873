"""Does a model translate directly, or through a pivot?

He et al., 2025, "Semantic Pivots", https://arxiv.org/abs/2505.16385, and its released
code: the lens is read at the answer's place in every layer, and the token that any
layer says most firmly decides. A firm token that is neither what the last layer says
nor a part of the source word is a semantic pivot.

The statistic is literal: a layer that firmly says a bare word marker counts as a pivot
too, unless the source word's own tokens begin with one. Read it together with which
tokens the pivots are.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxling import lens, models, vocabulary, word_translation
from jaxling.models import encoder_decoder

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
      ValueError: an unknown rule, a minimum that is no probability, or shapes that
        differ.
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
    if minimum is not None and not 0 <= minimum <= 1:
        raise ValueError(f"`minimum` must be in [0, 1]; got {minimum}.")
    candidates = probabilities.astype(np.float64)
    if rule == "threshold":
        least = 0.1 if minimum is None else minimum
        foreign = np.zeros(top_tokens.shape, bool)
        for i in range(n):
            own = {*source_tokens[i], *answer_tokens[i]}
            foreign[:, i] = ~np.isin(top_tokens[:, i], list(own))
        firm = foreign & (candidates >= least)
        found = np.any(firm, axis=0)
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
        len(kinds),
        count[CO_OCCURRENCE],
        count[PIVOT],
        count[NONE],
        count[SKIPPED],
        share,
    )


class Trace(NamedTuple):
    """What every layer would say where an item's answer begins, and what follows.

    Masses are summed softmax probabilities, `[layer, n]`: of the source word's tokens,
    of the pivot (NaN unless the item has one that is in neither word), of the answer's
    tokens. A bare word marker counts for neither word; a token of both words counts for
    both.
    """

    position: np.ndarray
    """`[n]`: where in the prompt the lens is read."""
    top_tokens: np.ndarray
    """`[layer, n]`."""
    probabilities: np.ndarray
    """`[layer, n]`: those of the top tokens."""
    source_mass: np.ndarray
    pivot_mass: np.ndarray
    answer_mass: np.ndarray
    behaviours: Behaviours
    source_tokens: list[list[int]]
    """Those of each source word, bare markers left out."""
    answer_tokens: list[list[int]]


def trace(
    model: models.Model,
    tokenizer: Any,
    task: word_translation.Task,
    *,
    shots: int = 5,
    seed: int = 0,
    batch: int = 32,
    rule: str = "firmest",
    minimum: float | None = None,
    pivots: Sequence[Collection[int]] | None = None,
    reading: Callable[[models.Model, str], Any] = lens.LogitLens,
    language_tokens: Mapping[str, str] | None = None,
    progress: Callable[[Iterable], Any] = iter,
) -> Trace:
    """Reads all layers at the answer of every item, and classifies the items.

    The answer is teacher-forced. The lens is read at the position that predicts its
    first token that is more than a word marker (tokenizers that part the space from
    the word have such tokens). One prompt per item, its examples drawn with `seed`.

    Args:
      model: a decoder, or an encoder-decoder (its decoder stack is read).
      tokenizer: its `tokenizers.Tokenizer`.
      task: the items.
      shots: examples in a prompt.
      batch: prompts at a time.
      rule, minimum: as in `classify`.
      pivots: tokens of each item's pivots, known from elsewhere (a corpus); by default
        the token that decided, for items with the pivot behaviour.
      reading: `LogitLens`, or makes another lens of a model and a stack.
      language_tokens: as in `jaxling.word_translation.score_task`.
      progress: wraps the iteration over batches (`tqdm.tqdm`).

    Raises:
      ValueError: as `score_task` and `classify`; an answer of nothing but markers; a
        layer that is not a number.
    """
    rng = np.random.default_rng(seed)
    markers = word_markers(tokenizer)
    questions, position, sources, answers = [], [], [], []
    for item in task.items:
        shown = word_translation.draw_examples(
            task, item, rng, 0 if language_tokens else shots
        )
        question = word_translation.encode(
            model, tokenizer, task, item, shown, [item.word], language_tokens
        )
        [sequence], [start] = question.sequences, question.starts
        said = [t for t in sequence[start:] if t not in markers]
        if not said:
            raise ValueError(f"The answer {item.answer!r} has no token of its own.")
        first = next(i for i in range(start, len(sequence)) if sequence[i] == said[0])
        questions.append(question)
        position.append(first - 1)
        sources.append(tokenizer.encode(" " + item.word, add_special_tokens=False).ids)
        answers.append(sequence[start:])
    stack = "decoder." if isinstance(model, encoder_decoder.EncoderDecoder) else ""
    view = reading(model, stack)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].sequences[0]))
    parts = []
    for start in progress(range(0, len(order), batch)):
        chosen = order[start : start + batch]
        hidden = _hidden(
            model, stack, [questions[i] for i in chosen], [position[i] for i in chosen]
        )
        own = [[column[i] for i in chosen] for column in (sources, answers)]
        given = None if pivots is None else [pivots[i] for i in chosen]
        parts.append(_read(view, hidden, own, given, rule, minimum, markers))
    back = np.argsort(order)
    arrays, kinds = zip(*parts)
    joined = [np.concatenate(columns, -1)[..., back] for columns in zip(*arrays)]
    top, probabilities, source, pivot, answer, layer, token, firmest = joined
    kind = [k for part in kinds for k in part]
    decided = Behaviours([kind[i] for i in back], layer, token, firmest)
    where = np.array(position)
    return Trace(
        *(where, top, probabilities, source, pivot, answer),
        behaviours=decided,
        source_tokens=_without(sources, markers),
        answer_tokens=_without(answers, markers),
    )


def _without(
    column: Iterable[Sequence[int]], markers: Collection[int]
) -> list[list[int]]:
    return [[t for t in tokens if t not in markers] for tokens in column]


def word_markers(tokenizer: Any) -> frozenset[int]:
    """Ids of tokens that mark the beginning of a word and hold nothing of it."""
    ids = {tokenizer.token_to_id(text) for text in (vocabulary.SPACE, "\u0120", " ")}
    return frozenset(ids - {None})


def _hidden(model, stack, questions, position) -> np.ndarray:
    """Every block's output at one position of each question, `[layer, n, d]`."""
    tokens, mask = _padded([q.sequences[0] for q in questions])
    name = stack + "resid_post"
    if questions[0].inputs is None:
        _, cache = model.run_with_cache(tokens, mask, names_filter=(name,))
    else:
        inputs, read = _padded([q.inputs[0] for q in questions])
        _, cache = model.run_with_cache(
            inputs, read, decoder_tokens=tokens, names_filter=(name,)
        )
    return cache[name][:, np.arange(len(questions)), np.array(position)]


def _padded(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Padding to the right, to a multiple of 32: few lengths, so few programs."""
    longest = -(-max(map(len, sequences)) // 32) * 32
    tokens = np.zeros((len(sequences), longest), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = True
    return tokens, mask


def _read(view, hidden, own, pivots, rule, minimum, markers):
    """One batch: the arrays of a `Trace`, `[..., n]`, and the kinds."""
    seen = lens.project(view, hidden, k=1)
    top = np.asarray(seen.top_tokens)[..., 0]
    if np.any(top < 0):
        raise ValueError(
            f"Block {np.argmax((top < 0).any(1))} of the model says nothing where an"
            " answer begins: its hidden states or the unembedding are not numbers."
        )
    probabilities = np.exp(np.asarray(seen.top_log_probs)[..., 0])
    found = classify(
        *(top, probabilities, *own),
        **dict(rule=rule, minimum=minimum, ignored=markers),
    )
    if pivots is None:
        pivots = [[t] if k == PIVOT else [] for t, k in zip(found.token, found.kind)]
    both = [{*a, *b} for a, b in zip(*own)]
    pivots = [set(tokens) - other for tokens, other in zip(pivots, both)]
    source, answer = (_without(column, markers) for column in own)
    columns = [source, pivots, answer]
    # One list of targets per item: the three sets behind each other, padded to a power
    # of two so that batches share a compiled program.
    longest = max(len(set(c)) for column in columns for c in column)
    size = max(8, 1 << (longest - 1).bit_length())
    targets = np.full((hidden.shape[1], 3, size), -1)
    for place, column in enumerate(columns):
        for row, tokens in enumerate(column):
            targets[row, place, : len(set(tokens))] = sorted(set(tokens))
    said = lens.project(view, hidden, targets=targets.reshape(len(targets), -1))
    mass = np.exp(np.asarray(said.target_log_probs)).reshape(*top.shape, 3, size)
    mass = np.where(np.isnan(mass).all(-1), np.nan, np.nansum(mass, -1))
    arrays = (top, probabilities, *np.moveaxis(mass, -1, 0))
    return (*arrays, found.layer, found.token, found.probability), found.kind


def token_languages(task: word_translation.Task, tokenizer: Any) -> dict[int, set[str]]:
    """Languages of the task that have a word with this token, by token.

    From all words of items and examples. A token that is absent is in no word of the
    task; one of several languages cannot be told apart by this.
    """
    words = word_translation.words_of(task.examples)
    for item in task.items:
        words.setdefault(item.source, set()).update((item.word, *item.distractors))
        words.setdefault(item.target, set()).add(item.answer)
    found: dict[int, set[str]] = {}
    for language, tokens in word_translation.tokens_of(words, tokenizer).items():
        for token in tokens:
            found.setdefault(token, set()).add(language)
    return found
