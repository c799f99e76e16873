"""Arrays of token ids in files, memory-mapped, and the documents in them."""

import io
import os
from collections.abc import Iterator

import numpy as np

TYPES = ("uint16", "uint32", "int32", "int64")  # of files without a header


def open_ids(
    url: str, token_type: str | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids, memory-mapped, and where documents begin if the file says so.

    Raises:
      ValueError: it is a URL, or no such file.
      OSError: it cannot be read.
    """
    if "://" in url:
        raise ValueError(f"Token files are memory-mapped, so {url} must be local.")
    if os.path.isdir(url):
        # Imported here: it brings the whole of training with it.
        from jaxling.training import packing

        file = packing.open_tokens(url)
        return np.asarray(file.tokens), np.asarray(file.documents)
    if token_type is not None:
        return _headless(url, np.dtype(token_type)), None
    # Not `open_tokens`, which reads a plain array through: it may be large, and every
    # shard of it opens it.
    try:
        tokens = np.load(url, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError(
            f"{url} is no .npy file, whose header tells the type of its numbers. Where"
            " there is nothing but numbers, name their type (`token_type`)."
        ) from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"{url} must hold integers on one axis; it holds {tokens.dtype} of shape"
            f" {tokens.shape}."
        )
    return np.asarray(tokens), None


def _headless(url: str, dtype: np.dtype) -> np.ndarray:
    with open(url, "rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise ValueError(f"{url} has a header, which names the type: give none.")
        size = file.seek(0, io.SEEK_END)
    if not size or size % dtype.itemsize:
        raise ValueError(f"{url} has {size:,} bytes, which hold no ids of {dtype}.")
    return np.asarray(np.memmap(url, dtype, "r"))


def closed_by(
    tokens: np.ndarray, token: int, begin: int, end: int | None
) -> Iterator[np.ndarray]:
    """The documents that begin in `[begin, end)`, without the `token` that closes each.

    A document goes on to its own end, which may lie behind `end`.
    """
    end = len(tokens) if end is None else end
    at = begin
    if at and tokens[at - 1] != token:
        at = _closed(tokens, at, token) + 1
    for close in (at + np.flatnonzero(tokens[at:end] == token)).tolist():
        yield tokens[at:close]
        at = close + 1
    if at < end:
        yield tokens[at : _closed(tokens, end, token)]


def _closed(tokens: np.ndarray, at: int, token: int) -> int:
    """Where the next `token` stands from `at` on; the end where there is none."""
    for begin in range(at, len(tokens), 1 << 16):
        found = np.flatnonzero(tokens[begin : begin + (1 << 16)] == token)
        if len(found):
            return begin + int(found[0])
    return len(tokens)
