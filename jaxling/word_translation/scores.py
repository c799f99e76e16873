"""What a model makes of the task: probabilities, Scores, ranks, and their intervals."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxling import kernels, models
from jaxling.models import decoder, encoder_decoder

from .task import Item, Task, draw_examples, prompt

# Padded lengths: few of them, as each combination compiles a program.
_PREFIX, _REST, _ANSWER = 32, 16, 8


class Scores(NamedTuple):
    """One row per item, in the task's order.

    `probability [n]` is P(y | w), `score [n]` the Score, both of the losses' mean over
    the prompt draws; `rank [n]` is 0 where w beats all its distractors (ties count
    against it).
    """

    probability: np.ndarray
    score: np.ndarray
    rank: np.ndarray


def score_task(
    model: models.Model,
    tokenizer: Any,
    task: Task,
    *,
    shots: int = 5,
    draws: int = 5,
    seed: int = 0,
    batch: int = 16,
    language_tokens: Mapping[str, str] | None = None,
    progress: Callable[[Sequence], Any] = iter,
) -> Scores:
    """Scores every item.

    What the ten questions of a draw have in common, instruction and examples, runs
    through a decoder once. Questions are batched by length, in a few padded shapes. An
    encoder-decoder reads the question in its encoder and is scored on the answer; a
    translation model that knows languages by tokens has a prompt of its own,

        encoder: <source language> word </s>      decoder: <start> <target language>

    which `language_tokens` asks for: no instruction, no examples, one draw.

    Args:
      model: a decoder or an encoder-decoder.
      tokenizer: its `tokenizers.Tokenizer`.
      task: what to ask.
      shots: examples in a prompt.
      draws: prompts with other examples; the losses are averaged over them.
      seed: of the examples.
      batch: prompts at a time.
      language_tokens: of each language of the task, for NLLB, M2M-100, mBART-50.
      progress: wraps the iteration over batches (`tqdm.tqdm`).

    Raises:
      ValueError: a prompt is longer than the model's positions; too few examples; a
        masked language model; an unknown token of a language, or one for a decoder; an
        answer without a token, or of a probability that is not a number.
    """
    rng = np.random.default_rng(seed)
    if language_tokens is not None:
        draws, shots = 1, 0
    questions = []
    for item in task.items:
        for _ in range(draws):
            examples = draw_examples(task, item, rng, shots)
            words = (item.word, *item.distractors)
            questions.append(
                encode(model, tokenizer, task, item, examples, words, language_tokens)
            )
    causal = isinstance(model, decoder.Decoder)
    measure = _after_a_shared_prefix if causal else _after_an_encoder
    means = measure(model, questions, batch, progress)
    unknown = np.flatnonzero(np.isnan(means).any(1))
    if len(unknown):
        item = task.items[unknown[0] // draws]
        raise ValueError(
            f"{len(unknown)} of {len(questions)} questions have no probability, the"
            f" first {item.word!r} -> {item.answer!r}: the answer has no token, or the"
            " model's activations are not numbers."
        )
    p = np.exp(means.reshape(len(task.items), draws, -1).mean(1))
    return Scores(p[:, 0], p[:, 0] - p[:, 1:].mean(1), (p[:, 1:] >= p[:, :1]).sum(1))


class Question(NamedTuple):
    """One item's prompts, each about another source word, with the item's answer.

    `sequences` are tokens in which the answer begins at `starts`; of an
    encoder-decoder they are the decoder's, and `inputs` the encoder's.
    """

    sequences: list[list[int]]
    starts: list[int]
    inputs: list[list[int]] | None = None


def encode(
    model: models.Model,
    tokenizer: Any,
    task: Task,
    item: Item,
    examples: Sequence[tuple[str, str]],
    words: Sequence[str],
    language_tokens: Mapping[str, str] | None = None,
) -> Question:
    """The tokens of an item's prompts about `words`; see `score_task`."""
    question = _encoded(model, tokenizer, task, item, examples, words, language_tokens)
    # Before any is run: the longest prompts come last.
    for tokens in (*question.sequences, *(question.inputs or ())):
        models.model.check_length(len(tokens), model.spec.length, "prompt")
    return question


def _encoded(model, tokenizer, task, item, examples, words, language_tokens):
    if isinstance(model, decoder.Decoder):
        if language_tokens:
            raise ValueError(
                "Tokens of languages are for encoder-decoders; this model,"
                f" {model.config.get('model_type')}, is asked in words."
            )
        # Prompt and answer together: tokens may merge across their boundary.
        texts = [prompt(task, item, examples, word) for word in words]
        heads = [_inner(e) for e in tokenizer.encode_batch(texts)]
        whole = [f"{text} {item.answer}" for text in texts]
        sequences = [_inner(e) for e in tokenizer.encode_batch(whole)]
        return Question(sequences, [_common(p) for p in zip(sequences, heads)])
    if not isinstance(model, encoder_decoder.EncoderDecoder):
        raise ValueError(
            "Words are translated by a decoder or an encoder-decoder; this model,"
            f" {model.config.get('model_type')}, generates nothing."
        )
    start = [] if model.spec.start_token is None else [model.spec.start_token]
    answer = tokenizer.encode(" " + item.answer, add_special_tokens=False).ids
    if language_tokens is None:
        if not start:
            raise ValueError(
                "The config has no decoder_start_token_id: name the tokens of the"
                " languages, with which such models begin."
            )
        texts = [prompt(task, item, examples, word) for word in words]
        inputs = [e.ids for e in tokenizer.encode_batch(texts)]
    else:
        ids = {}
        for code in (item.source, item.target):
            ids[code] = tokenizer.token_to_id(language_tokens.get(code, ""))
            if ids[code] is None:
                raise ValueError(
                    f"The tokenizer has no token {language_tokens.get(code)!r} for the"
                    f" language {code}."
                )
        end = model.config.get("eos_token_id", 2)
        end = end[0] if isinstance(end, list) else end
        bare = tokenizer.encode_batch(list(words), add_special_tokens=False)
        inputs = [[ids[item.source], *e.ids, end] for e in bare]
        start = [*start, ids[item.target]]
    count = len(words)
    return Question([[*start, *answer]] * count, [len(start)] * count, inputs)


def _inner(encoding) -> list[int]:
    """Tokens without the special ones that a tokenizer puts at the end."""
    ids, special = encoding.ids, encoding.special_tokens_mask
    while ids and special[len(ids) - 1]:
        ids = ids[:-1]
    return ids


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all share."""
    for i, tokens in enumerate(zip(*sequences)):
        if len(set(tokens)) > 1:
            return i
    return min(map(len, sequences))


def _rounded(length: int, step: int) -> int:
    return max(step, -(-length // step) * step)


def _after_a_shared_prefix(model, questions, batch, progress) -> np.ndarray:
    """Mean log-probability of each answer's tokens `[question, branch]`."""
    # The token before an answer predicts it, so it must be in the branch.
    shared = [min(_common(q.sequences), min(q.starts) - 1) for q in questions]
    shapes = [
        (
            _rounded(length, _PREFIX),
            _rounded(max(map(len, q.sequences)) - length, _REST),
            _rounded(max(len(s) - b for s, b in zip(q.sequences, q.starts)), _ANSWER),
        )
        for q, length in zip(questions, shared)
    ]
    branches = len(questions[0].sequences)
    results = np.zeros((len(questions), branches))
    graph, parameters = nnx.split(model)
    for (longest, rest, answer), chosen in progress(_batches(shapes, batch)):
        prefix = np.zeros((batch, longest), np.int32)
        mask = np.zeros((batch, longest), bool)
        mask[:, -1] = True  # rows that fill the batch need one position to look at
        suffix = np.zeros((batch, branches, rest), np.int32)
        where = np.zeros((batch, branches, answer), np.int32)
        targets = np.full((batch, branches, answer), -1, np.int32)
        for row, i in enumerate(chosen):
            length, question = shared[i], questions[i]
            prefix[row, longest - length :] = question.sequences[0][:length]
            mask[row, longest - length :] = True
            for j, (tokens, start) in enumerate(
                zip(question.sequences, question.starts)
            ):
                suffix[row, j, : len(tokens) - length] = tokens[length:]
                size = len(tokens) - start
                where[row, j, :size] = np.arange(size) + start - length - 1
                targets[row, j, :size] = tokens[start:]
        found = _branches(graph, parameters, prefix, mask, suffix, where, targets)
        results[chosen] = np.asarray(found)[: len(chosen)]
    return results


def _batches(shapes, batch):
    """Questions of one shape, at most `batch` at a time."""
    order = sorted(range(len(shapes)), key=shapes.__getitem__)
    groups: list[tuple[tuple, list[int]]] = []
    for i in order:
        if not groups or groups[-1][0] != shapes[i] or len(groups[-1][1]) == batch:
            groups.append((shapes[i], []))
        groups[-1][1].append(i)
    return groups


@functools.partial(jax.jit, static_argnums=0)
def _branches(graph, parameters, prefix, mask, suffix, where, targets):
    model = nnx.merge(graph, parameters)
    batch, branches, rest = suffix.shape
    _, state = model.prefill(prefix, mask, prefix, rest)

    def spread(x, axis):
        return jnp.repeat(x, branches, axis=axis)

    state = state._replace(
        past=tuple(spread(x, 1) for x in state.past),
        mask=spread(state.mask, 0),
        where=spread(state.where, 0),
    )
    hidden, _ = model.extend(suffix.reshape(-1, rest), state)
    hidden = jnp.take_along_axis(hidden, where.reshape(-1, where.shape[2], 1), axis=1)
    return _mean_log_probs(model, hidden, targets)


def _mean_log_probs(model, hidden, targets):
    """Over the targets that are not negative: `[..., token] -> [...]`."""
    found = kernels.project_layers(
        hidden.reshape(1, -1, hidden.shape[-1]),
        model.unembed_matrix,
        bias=model.unembed_bias,
        softcap=model.logit_softcap,
        targets=targets.reshape(-1),
    )
    log_probs = found.target_log_probs.reshape(targets.shape)
    return jnp.nanmean(log_probs, axis=-1)


def _after_an_encoder(model, questions, batch, progress) -> np.ndarray:
    """As `_after_a_shared_prefix`, with the question in the encoder."""
    flat = [
        (inputs, tokens, start)
        for question in questions
        for inputs, tokens, start in zip(
            question.inputs, question.sequences, question.starts
        )
    ]
    shapes = [
        (_rounded(len(a), _PREFIX), _rounded(len(b), _ANSWER)) for a, b, _ in flat
    ]
    results = np.zeros(len(flat))
    for (longest, size), chosen in progress(_batches(shapes, batch)):
        inputs = np.zeros((batch, longest), np.int32)
        mask = np.zeros((batch, longest), bool)
        mask[:, 0] = True
        tokens = np.zeros((batch, size), np.int32)
        targets = np.full((batch, size), -1, np.int32)
        for row, i in enumerate(chosen):
            question, sequence, start = flat[i]
            inputs[row, : len(question)] = question
            mask[row, : len(question)] = True
            tokens[row, : len(sequence)] = sequence
            targets[row, start - 1 : len(sequence) - 1] = sequence[start:]
        name = "decoder.ln_final.hook_normalized"
        _, cache = model.run_with_cache(
            inputs, mask, decoder_tokens=tokens, names_filter=(name,)
        )
        found = _mean_log_probs(model, cache[name], targets)
        results[chosen] = np.asarray(found)[: len(chosen)]
    return results.reshape(len(questions), -1)


class Interval(NamedTuple):
    """A mean and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


class PairSummary(NamedTuple):
    """How an ordered pair of languages does: means over its `items`."""

    source: str
    target: str
    items: int
    score: Interval
    first: Interval
    """Share of items whose word beats all its distractors; chance is 0.1."""
    rank: Interval


def summarize(
    task: Task, scores: Scores, *, resamples: int = 2000, seed: int = 0
) -> list[PairSummary]:
    """Means and intervals of every ordered pair, in the task's order.

    Intervals are percentiles of means over resampled items. Items of one pair count
    as independent; an interval over pairs would have to resample concepts, which
    pairs share.
    """
    rng = np.random.default_rng(seed)
    pairs = dict.fromkeys((item.source, item.target) for item in task.items)
    summaries = []
    for source, target in pairs:
        own = [i for i, item in enumerate(task.items) if item[:2] == (source, target)]
        drawn = rng.integers(len(own), size=(resamples, len(own)))

        def interval(values, drawn=drawn):
            low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
            return Interval(float(values.mean()), float(low), float(high))

        columns = scores.score, scores.rank == 0, scores.rank
        means = [interval(np.asarray(c, float)[own]) for c in columns]
        summaries.append(PairSummary(source, target, len(own), *means))
    return summaries


def matrix(
    pairs: Sequence[tuple[str, str]], values: Sequence[float]
) -> tuple[list[str], np.ndarray]:
    """Languages in order of appearance, and `[source, target]`, NaN without a pair."""
    languages = list(dict.fromkeys(code for pair in pairs for code in pair))
    table = np.full((len(languages), len(languages)), np.nan)
    for (source, target), value in zip(pairs, values):
        table[languages.index(source), languages.index(target)] = value
    return languages, table
