"""What the containers share: a stored tensor, a mapped file, JSON that may lie."""

import json
import math
import os
import pathlib
import stat
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# The longest header that the safetensors format allows; a bound for any JSON here.
LONGEST_JSON = 100_000_000
# Beyond any published checkpoint; bounds what a file of tiny entries can cost.
MOST_TENSORS = 1_000_000

DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, None) or name)
    for name in (
        "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"
        " bfloat16 float8_e4m3fn float8_e5m2"
    ).split()
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be opened or believed; names the file and the tensor.

    The message is one paragraph, whatever names it had to quote.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class Stored(NamedTuple):
    """A tensor as it lies in mapped files.

    The pieces, flat and of `dtype`, make up the tensor one after the other; nearly
    always there is one. With `transposed` the file holds the transpose of `shape`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[np.ndarray, ...]
    transposed: bool = False


def checked_shape(
    shape: Any, dtype: np.dtype, where: str
) -> tuple[tuple[int, ...], int]:
    """A shape and its bytes; an error unless it is one that numpy can hold."""
    if (
        not isinstance(shape, list)
        or len(shape) > 32
        or not all(type(size) is int and 0 <= size < 2**63 for size in shape)
        or math.prod(size for size in shape if size) * dtype.itemsize >= 2**63
    ):
        raise CheckpointError(f"{where}: {short(shape)} is not a shape.")
    return tuple(shape), math.prod(shape) * dtype.itemsize


def short(value: Any) -> str:
    """`repr(value)`, cut where a hostile file makes it long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def elements(stored: Stored, start: int, stop: int) -> np.ndarray:
    """Elements `start` to `stop` in file order: a view where one piece holds them."""
    parts, offset = [], 0
    for piece in stored.pieces:
        low, high = max(start - offset, 0), min(stop - offset, len(piece))
        if low < high:
            parts.append(piece[low:high])
        offset += len(piece)
    if not parts:
        return np.empty(0, stored.dtype)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read(stored: Stored, rows: slice | Sequence[int] | np.ndarray | None) -> np.ndarray:
    """The tensor, or some of its rows; touches those rows alone (see `Checkpoint`)."""
    if stored.transposed:
        whole = elements(stored, 0, math.prod(stored.shape)).reshape(stored.shape[::-1])
        return np.ascontiguousarray(whole.T if rows is None else whole.T[rows])
    if rows is None:
        return elements(stored, 0, math.prod(stored.shape)).reshape(stored.shape)
    width = math.prod(stored.shape[1:])
    if isinstance(rows, slice):
        start, stop, step = rows.indices(stored.shape[0])
        if step > 0:
            stop = max(start, stop)
            block = elements(stored, start * width, stop * width)
            return block.reshape(stop - start, *stored.shape[1:])[::step]
        rows = np.arange(start, stop, step)
    if len(stored.pieces) == 1:
        return stored.pieces[0].reshape(stored.shape)[rows]
    found = np.empty((len(rows), *stored.shape[1:]), stored.dtype)
    for at, row in enumerate(rows):
        found[at] = elements(stored, row * width, (row + 1) * width).reshape(
            stored.shape[1:]
        )
    return found


def inside(directory: pathlib.Path, name: str) -> pathlib.Path:
    """The path of file `name` of a checkpoint, which may not leave its directory.

    The hub's cache keeps contents in `blobs/` beside `snapshots/<commit>/`, linked
    from there: that is the one place outside a directory where a link may lead.
    """
    directory = directory.resolve()
    allowed = [directory]
    if directory.parent.name == "snapshots":
        allowed.append(directory.parents[1] / "blobs")
    try:
        path = (directory / name).resolve()
        good = len(name) < 1000
        good &= any(path.is_relative_to(root) and path != root for root in allowed)
    except (OSError, ValueError, RuntimeError):  # a loop of links, a null character
        good = False
    if not good:
        raise CheckpointError(
            f"{directory}: {short(name)} leads out of the checkpoint's directory."
        )
    return directory / name


def mapped(path: pathlib.Path) -> np.ndarray:
    """The bytes of a regular file, memory-mapped, read-only."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is not a regular file.")
        if found.st_size == 0:
            raise CheckpointError(f"{path} is empty.")
        return np.memmap(path, np.uint8, "r").view(np.ndarray)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object without duplicate names, or a CheckpointError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise CheckpointError(f"{where}: {short(name)} stands there twice.")
            found[name] = value
        return found

    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where} is not UTF-8 text at byte {error.start}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {short(str(error))}.") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} is not a JSON object.")
    return parsed


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file."""
    content = mapped(path)
    if len(content) > LONGEST_JSON:
        raise CheckpointError(f"{path} has {len(content)} bytes: too long to be JSON.")
    return parse_object(content.tobytes(), str(path))
