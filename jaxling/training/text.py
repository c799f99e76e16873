"""Documents of token ids from text."""

import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any


def lines_of(path: str | os.PathLike) -> Iterator[str]:
    """The lines of a UTF-8 text file that are not empty: one document each.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no UTF-8; the message names the line.
    """
    path = pathlib.Path(path)
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is no UTF-8 text: line {number}: {error.reason}."
                ) from None
            if line:
                yield line


def tokenize(
    texts: Iterable[str], tokenizer: Any, *, end_token: int | None = None
) -> Iterator[list[int]]:
    """Ids of each text, with its end marked where there is a token for it.

    Args:
      tokenizer: a tokenizer of `transformers`.
      end_token: appended to every document, unless the tokenizer has done so.
    """
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, 1000)):
        for ids in tokenizer(chunk, verbose=False)["input_ids"]:
            if end_token is not None and ids[-1:] != [end_token]:
                ids = [*ids, end_token]
            yield ids
