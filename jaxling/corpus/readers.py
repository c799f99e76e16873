"""Corpora as streams of documents: files of many kinds, in shards that fit a worker."""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

FORMATS = ("jsonl", "parquet", "text", "tokens")
SHARD = 64 << 20  # bytes of an uncompressed file that one worker reads at a time


class Shard(NamedTuple):
    """A part of a corpus: what one call of `count_shard` reads.

    `begin` and `end` are bytes of an uncompressed file, row groups of a Parquet
    file, documents of a token file; `end` is None for a file that cannot be cut.
    """

    url: str
    format: str
    field: str
    begin: int = 0
    end: int | None = None


class Damage(NamedTuple):
    """What was not as it should be: counts, and the first few places with the reason.

    `skipped` records could not be read; `mended` documents had bytes that are no UTF-8,
    which became U+FFFD; `empty` documents have nothing to count.
    """

    skipped: int = 0
    mended: int = 0
    empty: int = 0
    examples: tuple[str, ...] = ()


def find_shards(
    sources: Sequence[str],
    *,
    format: str | None = None,
    field: str = "text",
    size: int = SHARD,
) -> list[Shard]:
    """The shards of files, directories, globs or fsspec URLs, in a fixed order.

    Args:
      sources: paths or URLs. A directory stands for all files in it, but one that
        `jaxling.training.write_tokens` wrote is a corpus itself.
      format: one of `FORMATS` where the names do not tell: `jsonl` (an object a line),
        `parquet`, `text` (a document a line), `tokens` (token files of
        `jaxling.training`, or a `.npy` of ids). `.gz` and `.zst` are unpacked.
      field: where a record has its text, or its list of token ids; `a.b` is field b of
        field a.
      size: bytes of an uncompressed file that make a shard; compressed files are not
        cut.

    Raises:
      ValueError: an unknown format; a source without files.
      OSError: a source cannot be listed.
    """
    files = [path for s in sources for path in sorted(pathlib.Path().glob(s))]
    return [Shard(str(path), format or "text", field) for path in files]


def read_shard(
    shard: Shard, damaged: Callable[[Damage], None] | None = None
) -> Iterator[str | np.ndarray]:
    """The documents of a shard, one after another: texts, or arrays of token ids.

    Args:
      shard: from `find_shards`.
      damaged: is called with each piece of damage, which is then passed over; without
        it the first one raises. Empty documents are yielded as they are.

    Raises:
      ValueError: damage, where `damaged` is None.
      OSError: the file cannot be read.
    """
    with open(shard.url, encoding="utf-8", errors="replace") as file:
        for line in file:
            yield line.rstrip("\n")
