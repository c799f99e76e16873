"""Texts with labels, and the vectors that a model has for them at every layer."""

import csv
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxling import checkpoints, demo, models, tokenizer_files


class Texts(NamedTuple):
    """Texts, a label for each (for each word, at token level), and what they are.

    `labels[i]` is a label, or a list with one for each word of `texts[i].split()`.
    `languages` may be empty strings; `items` are equal for translations of one text.
    """

    texts: list[str]
    labels: list
    languages: list[str]
    items: list[str]


class States(NamedTuple):
    """Vectors `[layer, n, d]` float32: the input embedding, then each block's output.

    `text[i]` is the text of row i, `words[i]` its word ("" at sentence level) and
    `place[i]` the word's number in the text (0 at sentence level). `cut` counts the
    texts that were too long.
    """

    vectors: np.ndarray
    text: np.ndarray
    words: list[str]
    place: np.ndarray
    cut: int


def read_texts(path: str | pathlib.Path, *, level: str) -> Texts:
    """Reads a TSV whose first line names its columns: `text`, `label` and perhaps more.

    `language` and `item` (the same for translations of one text; the line's number
    when absent) are read too, other columns ignored. At level "token" the label column
    holds a label for every word of the text, separated by spaces as the words are.
    Lines without a text are left out, and so are blank lines at the end.

    Raises:
      ValueError: a column is missing or there twice, or a line has too few fields or
        labels.
      OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        usual = csv.field_size_limit(2**31 - 1)  # a text may be a book
        try:
            rows = list(lines)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a TSV in UTF-8: {error}.") from error
        finally:
            csv.field_size_limit(usual)
    while rows and not rows[-1]:
        rows.pop()
    header = rows[0] if rows else []
    if len(set(header)) < len(header):
        raise ValueError(
            f"The first line of {path} must name every column once; got {header}."
        )
    missing = {"text", "label"} - set(header)
    if missing:
        raise ValueError(
            f"The first line of {path} must name the columns text and label; missing"
            f" {sorted(missing)}, found {header}."
        )
    read = Texts([], [], [], [])
    for number, fields in enumerate(rows[1:], 2):
        if len(fields) != len(header):
            raise ValueError(
                f"Line {number} of {path} must have {len(header)} fields, as the first"
                f" has; got {len(fields)}."
            )
        row = dict(zip(header, fields))
        label = row["label"].split() if level == "token" else row["label"]
        if level == "token" and len(label) != len(row["text"].split()):
            raise ValueError(
                f"Line {number} of {path} must have a label for each of its"
                f" {len(row['text'].split())} words; got {len(label)}."
            )
        if row["text"].strip():
            if not row["label"].strip():
                raise ValueError(
                    f"Line {number} of {path} must have a label for its text; got"
                    f" {row['label']!r}."
                )
            read.texts.append(row["text"])
            read.labels.append(label)
            read.languages.append(row.get("language", ""))
            read.items.append(row.get("item", str(number)))
    if not read.texts:
        raise ValueError(f"{path} holds no texts.")
    return read


def demo_texts(per_language: int) -> Texts:
    """Verses of the built-in text that no demo model saw, labelled with their kind.

    As many verses of each kind of book (gospel, letter, vision) as there are, the same
    ones in every language, `per_language` in all; Armenian has the gospel alone.
    """
    verses = demo.verses("held_out")
    kinds = {"LUK": "gospel", "REV": "vision"}
    of_kind: dict[str, list[int]] = {"gospel": [], "letter": [], "vision": []}
    for row, name in enumerate(verses.names):
        of_kind[kinds.get(name.split(".")[0], "letter")].append(row)
    read = Texts([], [], [], [])
    for kind, rows in of_kind.items():
        step = max(1, len(rows) * len(of_kind) // per_language)
        for row in rows[::step]:
            for language, column in verses.text.items():
                if column[row]:
                    read.texts.append(column[row])
                    read.labels.append(kind)
                    read.languages.append(language)
                    read.items.append(verses.names[row])
    return read


def load_tokenizer(path_or_id: str, revision: str | None = None):
    """The tokenizer of a checkpoint, one that knows the characters of each token.

    Raises:
      ValueError: there is none, or it cannot say which characters a token covers.
    """
    import transformers

    folder = checkpoints.locate(path_or_id, revision, tokenizer_files.FILES)
    tokenizer_files.check(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path_or_id} has no tokenizer that transformers can open: {error}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer of {path_or_id} must be a fast one (tokenizer.json); got"
            f" {type(tokenizer).__name__}."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def states(
    model: models.Model,
    tokenizer,
    texts: Sequence[str],
    *,
    level: str,
    longest: int = 128,
    batch: int = 32,
) -> States:
    """Runs the model and keeps a vector per word ("token") or per text ("sentence").

    A word is what spaces separate; its vector is that of its last token, the first that
    has seen all of it in a causal model. A text's vector is the mean over its tokens.
    Texts are cut after `longest` tokens; words that are cut off have no row.

    Raises:
      ValueError: `level` is neither.
    """
    if level not in ("token", "sentence"):
        raise ValueError(f'`level` must be "token" or "sentence"; got {level!r}.')
    tokenizer.padding_side = "right"
    order = np.argsort([len(text) for text in texts], kind="stable")
    vectors, of_text, words, places, cut = [], [], [], [], 0
    for start in range(0, len(texts), batch):
        own = order[start : start + batch]
        # One shape per rounded length; the last batch is filled up with its last text.
        filled = np.resize(own, batch) if len(own) < batch else own
        encoded = tokenizer(
            [texts[i] for i in filled],
            padding=True,
            pad_to_multiple_of=math.gcd(32, longest),
            truncation=True,
            max_length=longest,
            return_offsets_mapping=True,
            return_tensors="np",
        )
        _, cache = model.run_with_cache(encoded["input_ids"], encoded["attention_mask"])
        side = "encoder." if "encoder.resid_post" in cache else ""
        layers = np.concatenate(
            [
                np.asarray(cache[side + "hook_embed"], np.float32)[None],
                np.asarray(cache[side + "resid_post"], np.float32),
            ]
        )
        for line, i in enumerate(own.tolist()):
            spans = encoded["offset_mapping"][line]
            full = encoded["attention_mask"][line].sum() == longest
            cut += int(full and spans.max() < len(texts[i].rstrip()))
            if level == "sentence":
                real = encoded["attention_mask"][line] > 0
                vectors.append(layers[:, line, real].mean(axis=1, keepdims=True))
                of_text.append(i)
                words.append("")
                places.append(0)
                continue
            last = _last_tokens(texts[i], spans)
            vectors.append(layers[:, line, list(last.values())])
            pieces = texts[i].split()
            of_text += [i] * len(last)
            words += [pieces[place] for place in last]
            places += list(last)
    joined = np.concatenate(vectors, axis=1)
    return States(joined, np.array(of_text), words, np.array(places), cut)


def _last_tokens(text: str, spans) -> dict[int, int]:
    """The last token of each word that is there to its end: word number to position."""
    word_of, ends, word, inside = {}, {}, -1, False
    for at, character in enumerate(text):
        if character.isspace():
            inside = False
            continue
        word, inside = (word if inside else word + 1), True
        word_of[at], ends[word] = word, at
    last = {}
    for position, (start, stop) in enumerate(spans):
        if stop > start and stop - 1 in word_of and ends[word_of[stop - 1]] == stop - 1:
            last[word_of[stop - 1]] = position
    return last
