"""Token files, and how their documents become rows of a batch.

A token file is a directory of memory-mapped arrays:

    tokens.npy     [token] uint16 or uint32, all documents one after another
    documents.npy  [document + 1] int64, where each document begins; the last is the end
    targets.npy    [token] bool, which tokens count in the loss (absent: all of them)
    tokens.json    sizes, vocabulary, largest token and checksums

Sizes and headers are looked at whenever the file is opened, and no batch holds a token
above the largest; `verify_tokens` reads everything once, before a run begins. A plain
`.npy` file of token ids is read too, as one stream without documents. It has no record,
and so is read through when it is opened.
"""

import itertools
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Documents that are packed together: small enough to plan at once, large enough that
# nearly every gap finds a document that fills it.
_WINDOW = 4096
_CHUNK = 1 << 24


class TokenFile(NamedTuple):
    """An opened token file; the arrays are memory-mapped."""

    path: pathlib.Path
    tokens: np.ndarray  # [token]
    documents: np.ndarray  # [document + 1]
    targets: np.ndarray | None  # [token]
    largest: int  # the largest token id
    fingerprint: str  # sizes and checksums


class Document(NamedTuple):
    """Token ids, and which of them count in the loss (None: all)."""

    tokens: Sequence[int] | np.ndarray
    targets: Sequence[bool] | np.ndarray | None = None


class Batch(NamedTuple):
    """Rows of packed documents.

    `segments` numbers the documents of a row from 1; 0 is padding. `targets` is True
    where a token is predicted from the one before it in its document.
    """

    tokens: np.ndarray  # [row, position] int32
    segments: np.ndarray  # [row, position] int32
    targets: np.ndarray  # [row, position] bool


class Position(NamedTuple):
    """Place in the data: the next row of an epoch."""

    epoch: int
    row: int


BEGINNING = Position(0, 0)


def write_tokens(
    path: str | os.PathLike,
    documents: Iterable[Document | Sequence[int]],
    *,
    vocabulary_size: int,
) -> TokenFile:
    """Writes a token file; documents are streamed, never all in memory.

    The directory appears when it is complete; a former token file of that name is
    replaced, and anything else of that name is left as it is.

    Raises:
      ValueError: a token that is no integer in `[0, vocabulary_size)`, targets that are
        not True or False or of another length than their tokens, no token at all, or
        `path` is there and no token file.
    """
    path = pathlib.Path(path)
    if os.path.lexists(path) and not (path / "tokens.json").exists():
        raise ValueError(
            f"{path} is there and no token file (it holds no tokens.json), so nothing"
            " is written over it. Choose another name, or remove it."
        )
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.uint32)
    begins, largest, chosen = [0], -1, False
    of_tokens, of_targets = 0, 0
    # Raw first, as the headers of .npy files need the sizes.
    with open(partial / "t", "wb") as tokens_file, open(partial / "m", "wb") as masks:
        for number, document in enumerate(documents):
            if not isinstance(document, Document):
                document = Document(document)
            ids = np.asarray(document.tokens).reshape(-1)
            if len(ids) and ids.dtype.kind not in "iu":
                raise ValueError(
                    f"Document {number} holds {ids.dtype}; tokens must be integers."
                )
            ids = ids.astype(np.int64)
            mask = np.ones(len(ids), bool)
            if document.targets is not None:
                mask, chosen = np.asarray(document.targets), True
                if len(mask) and mask.dtype != bool:
                    raise ValueError(
                        f"Document {number} has targets of {mask.dtype}; they must be"
                        " True or False."
                    )
                mask = mask.astype(bool)
                if mask.shape != ids.shape:
                    raise ValueError(
                        f"Document {number} has {len(ids)} tokens and"
                        f" {len(mask)} targets; they must be as many."
                    )
            if len(ids) == 0:
                continue
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= vocabulary_size:
                raise ValueError(
                    f"Document {number} holds token {low if low < 0 else high}; tokens"
                    f" must be in [0, {vocabulary_size}), the vocabulary."
                )
            largest = max(largest, high)
            raw = ids.astype(dtype).tobytes()
            of_tokens = zlib.crc32(raw, of_tokens)
            of_targets = zlib.crc32(mask.tobytes(), of_targets)
            tokens_file.write(raw)
            masks.write(mask.tobytes())
            begins.append(begins[-1] + len(ids))
    if len(begins) == 1:
        shutil.rmtree(partial)
        raise ValueError(f"There is no token to write to {path}: no document has any.")
    boundaries = np.array(begins, np.int64)
    _raw_to_npy(partial / "t", partial / "tokens.npy", dtype, begins[-1])
    if chosen:
        _raw_to_npy(partial / "m", partial / "targets.npy", np.dtype(bool), begins[-1])
    (partial / "m").unlink(missing_ok=True)
    np.save(partial / "documents.npy", boundaries)
    record = {
        "tokens": begins[-1],
        "documents": len(begins) - 1,
        "targets": chosen,
        "largest": largest,
        "vocabulary_size": vocabulary_size,
        "checksum": _joined(
            of_tokens, zlib.crc32(boundaries.tobytes()), of_targets if chosen else 0
        ),
    }
    (partial / "tokens.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    former = path.with_name(path.name + ".former")
    shutil.rmtree(former, ignore_errors=True)
    if path.exists():
        os.replace(path, former)
    os.replace(partial, path)
    shutil.rmtree(former, ignore_errors=True)
    return open_tokens(path)


def _raw_to_npy(raw: pathlib.Path, path: pathlib.Path, dtype: np.dtype, size: int):
    array = np.lib.format.open_memmap(path, "w+", dtype, (size,))
    source = np.memmap(raw, dtype, "r", shape=(size,))
    for start in range(0, size, _CHUNK):
        array[start : start + _CHUNK] = source[start : start + _CHUNK]
    array.flush()
    raw.unlink()


def _joined(*checksums: int) -> str:
    return " ".join(f"{checksum:08x}" for checksum in checksums)


def open_tokens(path: str | os.PathLike, token_type: str | None = None) -> TokenFile:
    """Opens a token file (a directory of `write_tokens`, or one `.npy` of ids).

    Of a directory only sizes, headers and boundaries are read, and `verify_tokens`
    reads the rest. `token_type` (uint16, uint32, int32 or int64) is of the ids of a
    file that holds nothing else, without a header.

    Raises:
      OSError: there is no such file.
      ValueError: it is damaged, empty, or not one-dimensional integers.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no token file at {path}.")
    if path.is_file():
        tokens = _map(path) if token_type is None else _headless(path, token_type)
        record = None
        documents, targets = np.array([0, len(tokens)], np.int64), None
    else:
        if not (path / "tokens.json").exists():
            raise ValueError(
                f"{path} is no token file: it holds no tokens.json. Make one with"
                " jaxling.training.write_tokens, or give a .npy file of token ids."
            )
        try:
            record = json.loads((path / "tokens.json").read_text("utf-8"))
            sizes = [record[n] for n in ("tokens", "documents", "largest")]
            chosen, checksum = record["targets"], record["checksum"]
            if not all(type(size) is int for size in sizes):
                raise ValueError(f"sizes must be whole numbers, not {sizes}")
            if not 0 <= sizes[2] < record["vocabulary_size"]:
                raise ValueError(
                    f"the largest token {sizes[2]} is outside of its own"
                    f" vocabulary of {record['vocabulary_size']}"
                )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path / 'tokens.json'} is damaged: {error!r}.") from None
        tokens, documents = _map(path / "tokens.npy"), _map(path / "documents.npy")
        targets = _map(path / "targets.npy") if chosen else None
        if (len(tokens), len(documents) - 1) != tuple(sizes[:2]):
            raise ValueError(
                f"{path} is damaged: it should hold {sizes[0]} tokens of {sizes[1]}"
                f" documents and holds {len(tokens)} of {len(documents) - 1}."
            )
        dtypes = (tokens.dtype, documents.dtype, getattr(targets, "dtype", bool))
        if dtypes[0] not in (np.uint16, np.uint32) or dtypes[1:] != (np.int64, bool):
            raise ValueError(
                f"{path} is damaged: tokens.npy must hold uint16 or uint32,"
                " documents.npy int64 and targets.npy bool; they hold"
                f" {', '.join(map(str, dtypes))}."
            )
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold integers; it holds {tokens.dtype}.")
    if len(tokens) == 0:
        raise ValueError(f"{path} holds no token.")
    if (
        len(documents) < 2
        or documents[0] != 0
        or documents[-1] != len(tokens)
        or np.any(np.diff(documents) <= 0)
        or (targets is not None and len(targets) != len(tokens))
    ):
        raise ValueError(
            f"{path} is damaged: documents.npy must ascend from 0 to {len(tokens)},"
            " the number of tokens, and targets.npy must have as many entries."
        )
    if record is None:
        largest, checksum = _scan(path, tokens)
    else:
        largest = sizes[2]
    fingerprint = f"{len(tokens)} tokens, {len(documents) - 1} documents, {checksum}"
    return TokenFile(path, tokens, documents, targets, largest, fingerprint)


def verify_tokens(file: TokenFile) -> None:
    """Reads a token file through and compares it with its record.

    Raises:
      ValueError: it is not what was written.
    """
    largest, of_tokens = _scan(file.path, file.tokens)
    checksum = of_tokens
    if file.path.is_dir():
        boundaries = _scan(file.path, file.documents)[1]
        masks = (
            "00000000" if file.targets is None else _scan(file.path, file.targets)[1]
        )
        checksum = f"{of_tokens} {boundaries} {masks}"
    if largest != file.largest or not file.fingerprint.endswith(f", {checksum}"):
        raise ValueError(
            f"{file.path} is damaged, or not all of it is of one file: its record has"
            f" {file.fingerprint}, largest token {file.largest}; it holds checksums"
            f" {checksum}, largest token {largest}. Write it again."
        )


def joined(files: Sequence[TokenFile], length: int) -> Iterator[Document]:
    """The documents of several files, for `write_tokens`.

    A document too long to be held at once comes in parts that are multiples of
    `length`, which is where rows of that many tokens cut it anyway.
    """
    most = length * max(1, _CHUNK // length)
    for file in files:
        for begin, end in itertools.pairwise(file.documents.tolist()):
            for start in range(begin, end, most):
                part = slice(start, min(start + most, end))
                targets = None if file.targets is None else file.targets[part]
                yield Document(file.tokens[part], targets)


def _headless(path: pathlib.Path, token_type: str) -> np.ndarray:
    # Imported here: that room imports this one.
    from jaxling.corpus import arrays

    return arrays.open_ids(str(path), token_type)[0]


def _map(path: pathlib.Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        # NumPy's own words advise to trust what it takes for a pickle.
        raise ValueError(
            f"{path} is no readable .npy file of numbers. Where there is nothing but"
            " numbers, without a header, name their type (`token_type`)."
        ) from None
    if array.ndim != 1:
        raise ValueError(f"{path} must have one axis; it has shape {array.shape}.")
    return array


def _scan(path: pathlib.Path, tokens: np.ndarray) -> tuple[int, str]:
    largest, checksum = -1, 0
    for start in range(0, len(tokens), _CHUNK):
        chunk = np.ascontiguousarray(tokens[start : start + _CHUNK])
        if chunk.min() < 0:
            raise ValueError(f"{path} holds the negative token {chunk.min()}.")
        largest = max(largest, int(chunk.max()))
        checksum = zlib.crc32(chunk.tobytes(), checksum)
    return largest, f"{checksum:08x}"


class _Plan(NamedTuple):
    """Which slices of the tokens make which row; row r owns `pieces[first[r]:]`."""

    first: np.ndarray  # [row + 1]
    starts: np.ndarray  # [piece]
    lengths: np.ndarray  # [piece]


def plan_epoch(
    documents: np.ndarray, length: int, rng: np.random.Generator | None
) -> _Plan:
    """Packs whole documents into rows of `length` tokens, each document once.

    A document longer than a row is cut into rows and a remainder. Documents are
    shuffled, then packed best-fit, longest first, within windows of the shuffled order
    (Ding et al., 2024, https://arxiv.org/abs/2404.10830), and the rows are shuffled.
    Without `rng`, order is kept as far as packing allows.
    """
    starts, lengths = _pieces(documents, length)
    order = np.arange(len(starts)) if rng is None else rng.permutation(len(starts))
    rows: list[list[int]] = []
    for begin in range(0, len(order), _WINDOW):
        window = order[begin : begin + _WINDOW]
        longest_first = window[np.argsort(-lengths[window], kind="stable")]
        rows += _best_fit(longest_first.tolist(), lengths, length)
    if rng is None:
        rows = sorted(sorted(row) for row in rows)
    else:
        rows = [rows[i] for i in rng.permutation(len(rows))]
    first = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    piece = np.array([i for row in rows for i in row], np.int64)
    return _Plan(first, starts[piece], lengths[piece])


def _pieces(documents: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the documents, cut where they are longer than a row."""
    sizes = np.diff(documents)
    counts = -(-sizes // length)
    inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(documents[:-1], counts) + inside * length
    ends = np.minimum(starts + length, np.repeat(documents[1:], counts))
    return starts, ends - starts


def predicted(file: TokenFile, length: int) -> int:
    """How many tokens of a file are predicted in rows of `length`; reads its targets.

    All that count but the first of a piece, which has nothing before it.
    """
    starts, lengths = _pieces(file.documents, length)
    if file.targets is None:
        return int((lengths - 1).sum())
    return int(file.targets.sum()) - int(file.targets[starts].sum())


def _best_fit(pieces: list[int], lengths: np.ndarray, length: int) -> list[list[int]]:
    """Puts each piece into the fullest row that still has room for it."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit r is set where some row has room for exactly r tokens
    for piece in pieces:
        size = int(lengths[piece])
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            rows[row].append(piece)
        else:
            row, room = len(rows), length
            rows.append([piece])
        if room > size:
            with_room[room - size].append(row)
            rooms |= 1 << (room - size)
    return rows


def _fill(file: TokenFile, plan: _Plan, row: int, batch: Batch, at: int) -> None:
    """Copies row `row` of the plan into row `at` of the batch."""
    begin = 0
    pieces = slice(plan.first[row], plan.first[row + 1])
    for number, (start, size) in enumerate(
        zip(plan.starts[pieces].tolist(), plan.lengths[pieces].tolist()), 1
    ):
        end = begin + size
        batch.tokens[at, begin:end] = file.tokens[start : start + size]
        batch.segments[at, begin:end] = number
        # The first token of a piece has nothing before it to be predicted from.
        if file.targets is None:
            batch.targets[at, begin + 1 : end] = True
        else:
            batch.targets[at, begin + 1 : end] = file.targets[start + 1 : start + size]
        begin = end


def _checked(batch: Batch, file: TokenFile) -> Batch:
    # Seen as unsigned, what 32 bits do not hold as a positive number is large too.
    largest = int(batch.tokens.view(np.uint32).max())
    if largest > file.largest:
        raise ValueError(
            f"{file.path} is damaged: it holds token {largest}, and its record says"
            f" that {file.largest} is the largest. Write it again."
        )
    return batch


def _empty(rows: int, length: int) -> Batch:
    shape = (rows, length)
    return Batch(
        np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    )


def training_batches(
    file: TokenFile,
    *,
    rows: int,
    length: int,
    seed: int | None,
    position: Position = BEGINNING,
) -> Iterator[tuple[Batch, Position]]:
    """Batches without end, each with the position after it.

    Every epoch holds every document once, in an order of its own that follows from
    (seed, epoch) alone, so a position says all that is needed to go on from it.
    `seed=None` keeps the file's order.
    """
    epoch, row = position

    def plan_of(epoch: int) -> _Plan:
        rng = None if seed is None else np.random.default_rng([seed, epoch])
        return plan_epoch(file.documents, length, rng)

    plan = plan_of(epoch)
    while True:
        batch = _empty(rows, length)
        for at in range(rows):
            if row == len(plan.first) - 1:
                epoch, row = epoch + 1, 0
                plan = plan if seed is None else plan_of(epoch)
            _fill(file, plan, row, batch, at)
            row += 1
        yield _checked(batch, file), Position(epoch, row)


def evaluation_batches(file: TokenFile, *, rows: int, length: int) -> Iterator[Batch]:
    """Every document once, in the file's order; the last batch is padded."""
    plan = plan_epoch(file.documents, length, None)
    total = len(plan.first) - 1
    for begin in range(0, total, rows):
        batch = _empty(rows, length)
        for at in range(min(rows, total - begin)):
            _fill(file, plan, begin + at, batch, at)
        yield _checked(batch, file)
