"""The word-translation task: does the source word make its translation likelier?

He et al., 2025, "Semantic Pivots", https://arxiv.org/abs/2505.16385, and its released
code: items are word pairs with nine distractors, prompts hold five examples, and

    P(y | w) = exp(mean log-probability of the tokens of y after the prompt for w)
    Score(w) = P(y | w) - mean over the distractors w' of P(y | w')

Beyond the paper: the rank of w among its distractors, and how often it is first.
"""

import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxling import kernels, models
from jaxling.models import decoder

DISTRACTORS = 9


class Item(NamedTuple):
    """One question: `word` of language `source` should yield `answer` in `target`.

    `distractors` are source-language words that no lexicon entry joins to `answer`.
    """

    source: str
    target: str
    word: str
    answer: str
    distractors: tuple[str, ...]


class Task(NamedTuple):
    """Items, the pairs that examples are drawn from, and the languages' names.

    `examples[source, target]` are word pairs; an item's own is never drawn for it.
    """

    names: dict[str, str]
    examples: dict[tuple[str, str], list[tuple[str, str]]]
    items: list[Item]


def build_task(
    lexicons: Mapping[tuple[str, str], Sequence[tuple[str, str]]],
    names: Mapping[str, str],
    *,
    examples: Mapping[tuple[str, str], Sequence[tuple[str, str]]] | None = None,
    count: int | None = None,
    vectors: Mapping[tuple[str, str], np.ndarray] | None = None,
    seed: int = 0,
) -> Task:
    """Items for every ordered pair of languages that has a lexicon.

    Pairs whose two words are equal are left out, as in the paper, and so are pairs
    with fewer than nine possible distractors. Distractors are drawn without
    replacement from the pair's other source words; with `vectors` they are the hard
    ones, the nearest source words by cosine.

    Args:
      lexicons: word pairs of each `(source, target)`.
      names: what a prompt calls each language.
      examples: where the shots come from; the lexicons themselves by default.
      count: items of each ordered pair; all where None.
      vectors: for each `(language, word)` a vector `[d]`.
      seed: of the order and the draws.

    Raises:
      ValueError: a language without a name; no item at all.
    """
    rng = np.random.default_rng(seed)
    items = []
    for (source, target), pairs in lexicons.items():
        unnamed = {source, target} - set(names)
        if unnamed:
            raise ValueError(f"No prompt name for the languages {sorted(unnamed)}.")
        pairs = list(dict.fromkeys(map(tuple, pairs)))
        answers: dict[str, set[str]] = {}
        for word, answer in pairs:
            answers.setdefault(word, set()).add(answer)
        words = sorted(answers)
        near = _nearest_words(source, words, vectors)
        kept = 0
        for i in rng.permutation(len(pairs)):
            word, answer = pairs[i]
            if count is not None and kept == count:
                break
            if near is None:
                order = [words[j] for j in rng.permutation(len(words))]
            else:
                order = near[word]
            wrong = [w for w in order if w != word and answer not in answers[w]]
            if word == answer or len(wrong) < DISTRACTORS:
                continue
            wrong = tuple(wrong[:DISTRACTORS])
            items.append(Item(source, target, word, answer, wrong))
            kept += 1
    if not items:
        raise ValueError(
            f"No item could be built: every pair needs two different words and"
            f" {DISTRACTORS} other source words that do not translate alike."
        )
    shots = lexicons if examples is None else examples
    known = {pair: [tuple(p) for p in shots.get(pair, ())] for pair in lexicons}
    return Task(dict(names), known, items)


def _nearest_words(language, words, vectors) -> dict[str, list[str]] | None:
    """For each word the others by falling cosine, or None without vectors."""
    if vectors is None:
        return None
    table = np.stack([vectors[language, word] for word in words])
    k = min(len(words) - 1, 8 * DISTRACTORS)
    found = kernels.all_pairs_neighbors(table, k=k)
    lists = np.asarray(found.indices)
    return {w: [words[j] for j in row if j >= 0] for w, row in zip(words, lists)}


def save_task(task: Task, path: str | os.PathLike) -> None:
    """Writes a task as JSON that `load_task` reads back."""
    content = {
        "names": task.names,
        "examples": {"-".join(pair): pairs for pair, pairs in task.examples.items()},
        "items": [item._asdict() for item in task.items],
    }
    text = json.dumps(content, ensure_ascii=False, indent=1)
    pathlib.Path(path).write_text(text + "\n", encoding="utf-8")


def load_task(path: str | os.PathLike) -> Task:
    """Reads a task that `save_task` wrote.

    Raises:
      ValueError: the file is not such a task.
      OSError: it cannot be read.
    """
    try:
        content = json.loads(pathlib.Path(path).read_bytes())
        examples = {
            tuple(pair.split("-")): [(str(a), str(b)) for a, b in pairs]
            for pair, pairs in content["examples"].items()
        }
        items = [
            Item(**{**item, "distractors": tuple(item["distractors"])})
            for item in content["items"]
        ]
        names = {str(k): str(v) for k, v in content["names"].items()}
        fields = [field for item in items for field in (*item[:4], *item.distractors)]
        if not items or not all(isinstance(field, str) for field in fields):
            raise TypeError("an item's fields must be strings")
        lacking = {code for item in items for code in item[:2]} - set(names)
        if lacking:
            raise KeyError(f"no name for {sorted(lacking)}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a word-translation task: {error}.") from None
    return Task(names, examples, items)


def prompt(
    task: Task, item: Item, examples: Iterable[tuple[str, str]], word: str
) -> str:
    """The question about `word`, up to the place of its answer (" " + the answer)."""
    source, target = task.names[item.source], task.names[item.target]
    shots = "".join(f"{source}: {a}\n{target}: {b}\n\n" for a, b in examples)
    return (
        f"Please translate words from {source} to {target}.\n\n"
        f"{shots}{source}: {word}\n{target}:"
    )


def draw_examples(
    task: Task, item: Item, rng: np.random.Generator, shots: int
) -> list[tuple[str, str]]:
    """`shots` word pairs of the item's languages, none with its word or its answer.

    Raises:
      ValueError: the task holds too few.
    """
    pairs = task.examples.get((item.source, item.target), [])
    usable = [p for p in pairs if p[0] != item.word and p[1] != item.answer]
    if len(usable) < shots:
        raise ValueError(
            f"{shots} examples from {item.source} to {item.target} are needed for"
            f" {item.word!r}; the task holds {len(usable)}."
        )
    return [usable[i] for i in rng.choice(len(usable), shots, replace=False)]


class Scores(NamedTuple):
    """One row per item, in the task's order.

    `probability [n]` is P(y | w), `score [n]` the Score, both means over the prompt
    draws; `rank [n]` is 0 where w beats all its distractors (ties count against it).
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
    progress: Any = iter,
) -> Scores:
    """Scores every item.

    What the ten questions of a draw have in common, instruction and examples, runs
    through a decoder once. Questions are batched by length, in a few padded shapes. An
    encoder-decoder reads the question in its encoder and is scored on the answer.

    Args:
      model: a decoder or an encoder-decoder.
      tokenizer: its `tokenizers.Tokenizer`.
      task: what to ask.
      shots: examples in a prompt.
      draws: prompts with other examples; the losses are averaged over them.
      seed: of the examples.
      batch: prompts at a time.
      progress: wraps the iteration over batches (`tqdm.tqdm`).

    Raises:
      ValueError: a prompt is longer than the model's positions; too few examples.
    """
    rng = np.random.default_rng(seed)
    questions = []
    for item in task.items:
        for _ in range(draws):
            examples = draw_examples(task, item, rng, shots)
            asked = [
                prompt(task, item, examples, word)
                for word in (item.word, *item.distractors)
            ]
            questions.append(_encode(tokenizer, asked, " " + item.answer))
    causal = isinstance(model, decoder.Decoder)
    measure = _after_a_shared_prefix if causal else _after_an_encoder
    means = measure(model, questions, batch, progress)
    losses = means.reshape(len(task.items), draws, -1).mean(1)
    p = np.exp(losses)
    return Scores(p[:, 0], p[:, 0] - p[:, 1:].mean(1), (p[:, 1:] >= p[:, :1]).sum(1))


class _Question(NamedTuple):
    """Ten prompts with the same answer: tokens, and where each answer starts."""

    sequences: list[list[int]]
    starts: list[int]


def _encode(tokenizer, prompts: list[str], answer: str) -> _Question:
    """Tokens of prompt and answer together: a boundary may merge across them."""
    sequences = [e.ids for e in tokenizer.encode_batch([p + answer for p in prompts])]
    heads = [e.ids for e in tokenizer.encode_batch(prompts)]
    starts = [_common([s, h]) for s, h in zip(sequences, heads)]
    return _Question(sequences, starts)


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
            _rounded(length, 32),
            _rounded(max(map(len, q.sequences)) - length, 8),
            _rounded(max(len(s) - b for s, b in zip(q.sequences, q.starts)), 4),
        )
        for q, length in zip(questions, shared)
    ]
    branches = len(questions[0].sequences)
    results = np.zeros((len(questions), branches))
    for shape in progress(_batches(shapes, batch)):
        (longest, rest, answer), chosen = shape
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
        models.model.check_length(longest + rest, model.spec.length, "prompt")
        graph, parameters = nnx.split(model)
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
    start = model.config["decoder_start_token_id"]
    flat = [(s[:b], s[b:]) for q in questions for s, b in zip(q.sequences, q.starts)]
    shapes = [(_rounded(len(a), 32), _rounded(len(b), 4)) for a, b in flat]
    results = np.zeros(len(flat))
    for (longest, size), chosen in progress(_batches(shapes, batch)):
        tokens = np.zeros((batch, longest), np.int32)
        mask = np.zeros((batch, longest), bool)
        mask[:, 0] = True
        outputs = np.full((batch, size), -1, np.int32)
        for row, i in enumerate(chosen):
            tokens[row, : len(flat[i][0])] = flat[i][0]
            mask[row, : len(flat[i][0])] = True
            outputs[row, : len(flat[i][1])] = flat[i][1]
        inputs = np.pad(np.maximum(outputs, 0), ((0, 0), (1, 0)))[:, :-1]
        inputs[:, 0] = start
        logits = model(tokens, mask, decoder_tokens=inputs)
        log_probs = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(log_probs, np.maximum(outputs, 0)[..., None], -1)
        own = jnp.where(outputs >= 0, own[..., 0], jnp.nan)
        results[chosen] = np.asarray(jnp.nanmean(own, axis=-1))[: len(chosen)]
    return results.reshape(len(questions), -1)
