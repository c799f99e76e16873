"""The questions of the word-translation task: word pairs with nine distractors."""

import itertools
import json
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxling import dictionaries, kernels

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
            raise ValueError(
                f"No prompt name for the languages {sorted(unnamed)}: `names` says what"
                " a prompt calls each, such as eng:English."
            )
        pairs = list(dict.fromkeys((word, answer) for word, answer in pairs))
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
            distractors = tuple(wrong[:DISTRACTORS])
            items.append(Item(source, target, word, answer, distractors))
            kept += 1
    if not items:
        raise ValueError(
            f"No item could be built: every pair needs two different words and"
            f" {DISTRACTORS} other source words that do not translate alike."
        )
    shots = lexicons if examples is None else examples
    known = {pair: [(a, b) for a, b in shots.get(pair, ())] for pair in lexicons}
    return Task(dict(names), known, items)


def _nearest_words(language, words, vectors) -> dict[str, list[str]] | None:
    """For each word the others by falling cosine; None without vectors or enough."""
    if vectors is None or len(words) <= DISTRACTORS:
        return None
    table = np.stack([vectors[language, word] for word in words])
    k = min(len(words) - 1, 8 * DISTRACTORS)
    found = kernels.all_pairs_neighbors(table, k=k)
    lists = np.asarray(found.indices)
    return {w: [words[j] for j in row if j >= 0] for w, row in zip(words, lists)}


def word_vectors(
    embedding: np.ndarray, tokenizer: Any, words: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], np.ndarray]:
    """For each `(language, word)` the mean input embedding of the tokens of " " + word.

    What `build_task` takes for hard distractors. `embedding` is `[vocab, d]`.
    """
    words = list(words)
    coded = tokenizer.encode_batch(
        [" " + w for _, w in words], add_special_tokens=False
    )
    return {
        key: np.asarray(embedding[found.ids], np.float32).mean(0)
        for key, found in zip(words, coded)
    }


def tokens_of(
    words: Mapping[str, Iterable[str]], tokenizer: Any
) -> dict[str, set[int]]:
    """The tokens of each language's words, each with a space before it.

    A token that several languages' words hold is in each of their sets.
    """
    found = {}
    for language, own in words.items():
        texts = [" " + word for word in sorted(set(own))]
        coded = tokenizer.encode_batch(texts, add_special_tokens=False)
        found[language] = {token for c in coded for token in c.ids}
    return found


def words_of(
    lexicons: Mapping[tuple[str, str], Iterable[tuple[str, str]]],
) -> dict[str, set[str]]:
    """The words of each language, from word pairs of `(source, target)`."""
    words: dict[str, set[str]] = {}
    for languages, pairs in lexicons.items():
        for pair in pairs:
            for language, word in zip(languages, pair):
                words.setdefault(language, set()).add(word)
    return words


def read_lexicons(
    files: Iterable[str],
) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Word pairs of all ordered pairs of languages that the files join.

    An entry is `source-target:path`, a dictionary as MUSE has them, or the path of a
    multilingual `.tsv`: its first line holds the languages' codes, every other line the
    words of one concept, or nothing where a language lacks one. A code has no hyphen.

    Raises:
      ValueError: an entry or a file that cannot be read as such.
      OSError: a file cannot be read.
    """
    lexicons: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for entry in files:
        if ":" not in entry and entry.endswith(".tsv"):
            columns = dictionaries.read_concepts(entry)
            for source, target in itertools.permutations(columns, 2):
                pairs = [p for p in zip(columns[source], columns[target]) if all(p)]
                lexicons.setdefault((source, target), []).extend(pairs)
            continue
        languages, _, path = entry.partition(":")
        source, _, target = languages.partition("-")
        if not (source and target and path) or "-" in target or source == target:
            raise ValueError(
                "A lexicon is given as source-target:path, two different languages"
                f" without hyphens, or as the path of a .tsv; got {entry!r}."
            )
        pairs = dictionaries.read_dictionary(path)
        lexicons.setdefault((source, target), []).extend(pairs)
        lexicons.setdefault((target, source), []).extend(p[::-1] for p in pairs)
    return lexicons


def keep_words(
    lexicons: Mapping[tuple[str, str], Sequence[tuple[str, str]]],
    lists: Mapping[str, Collection[str]],
) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """The pairs of which each word is in the list of its language, where there is one.

    The paper keeps English words of the letters a to z that a dictionary has as noun,
    verb or adjective: such a list for "eng", whichever side English is on.
    """
    kept = {}
    for languages, pairs in lexicons.items():
        limits = [lists.get(language) for language in languages]
        kept[languages] = [
            pair
            for pair in pairs
            if all(own is None or word in own for word, own in zip(pair, limits))
        ]
    return kept


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
        if not items or not all(field and isinstance(field, str) for field in fields):
            raise TypeError("an item's fields must be strings that are not empty")
        if any(len(set(item.distractors)) != DISTRACTORS for item in items):
            raise TypeError(f"every item needs {DISTRACTORS} different distractors")
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
