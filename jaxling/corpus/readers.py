"""Corpora as streams of documents: files of many kinds, in shards that fit a worker.

A record that cannot be read is reported and passed over. A file is never in memory as
a whole, and no more of it than one record (of Parquet: some rows) at a time.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import arrays, files

FORMATS = ("jsonl", "parquet", "text", "tokens")
EXAMPLES = 10  # of damage, that a count remembers
SHARD = 64 << 20  # bytes of an uncompressed file that one worker reads at a time
_ENDINGS = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
    "parquet": "parquet",
    "txt": "text",
    "npy": "tokens",
}
_ROWS = 64  # of Parquet at a time: a row may be a book


class Shard(NamedTuple):
    """A part of a corpus: what one call of `count_shard` reads.

    `begin` and `end` are bytes of an uncompressed file of lines, row groups of a
    Parquet file, documents of a token file (with `end_token`: tokens of it); `end` is
    None where all the rest is meant.
    """

    url: str
    format: str
    field: str
    begin: int = 0
    end: int | None = None
    end_token: int | None = None
    token_type: str | None = None


class Damage(NamedTuple):
    """What was not as it should be: counts, and the first few places with the reason.

    `skipped` records could not be read; `mended` documents had bytes that are no UTF-8,
    or halves of characters, which became U+FFFD; `empty` documents have
    nothing to count.
    """

    skipped: int = 0
    mended: int = 0
    empty: int = 0
    examples: tuple[str, ...] = ()


Damaged = Callable[[Damage], None]


def find_shards(
    sources: Sequence[str],
    *,
    format: str | None = None,
    field: str = "text",
    size: int = SHARD,
    end_token: int | None = None,
    token_type: str | None = None,
) -> list[Shard]:
    """The shards of files, directories, globs or fsspec URLs, in a fixed order.

    Args:
      sources: paths or URLs (those need the extra `corpus`). A directory stands for
        all files in it, but one that `jaxling.training.write_tokens` wrote is a corpus
        itself. `*`, `?` and `**` are patterns.
      format: one of `FORMATS` where names do not tell: `jsonl` (an object a line),
        `parquet`, `text` (a document a line), `tokens` (token files of
        `jaxling.training`, a `.npy` of ids, or with `token_type` a file of nothing but
        ids). `.gz` and `.zst` are unpacked.
      field: where a record has its text, or its list of token ids; `a.b` is field b of
        field a.
      size: bytes of an uncompressed file that make a shard; compressed files are not
        cut.
      end_token: closes each document of an array, which is one document without it.
      token_type: one of `arrays.TYPES`, of the ids in files that have no header, as
        trainers leave them (OLMo, nanoGPT).

    Raises:
      ValueError: an unknown format; a source without files.
      OSError: a source cannot be listed.
      ImportError: a URL without the extra `corpus`, or without what its scheme needs.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"`format` must be one of {FORMATS}; got {format!r}.")
    if token_type is not None and (
        token_type not in arrays.TYPES or format != "tokens"
    ):
        raise ValueError(
            f"`token_type` must be one of {arrays.TYPES}, and `format` be tokens; got"
            f" {token_type!r} and {format!r}."
        )
    if size < 1:
        raise ValueError(f"`size` must be at least 1 byte; got {size}.")
    shards = []
    for source in sources:
        urls = files.listed(source)
        if not urls:
            raise ValueError(f"There is no file at {source!r}.")
        for url in urls:
            kind = format or _format_of(url)
            whole = Shard(url, kind, field, end_token=end_token, token_type=token_type)
            shards += [
                whole._replace(begin=begin, end=end)
                for begin, end in _parts(whole, size)
            ]
    return shards


def _format_of(url: str) -> str:
    if "://" not in url and os.path.isdir(url):
        return "tokens"
    parts = url.rsplit("/", 1)[-1].lower().split(".")
    while parts and parts[-1] in ("gz", "zst"):
        parts.pop()
    if len(parts) > 1 and parts[-1] in _ENDINGS:
        return _ENDINGS[parts[-1]]
    raise ValueError(
        f"The name of {url} does not say what is in it: name the format, one of"
        f" {FORMATS}."
    )


def _parts(shard: Shard, size: int) -> list[tuple[int, int | None]]:
    """Where to cut a file. One that cannot be opened is left to who reads it."""
    url, kind = shard.url, shard.format
    whole: list[tuple[int, int | None]] = [(0, None)]
    try:
        if kind == "tokens":
            tokens, ends = arrays.open_ids(shard.url, shard.token_type)
            if ends is None and shard.end_token is not None:
                step = -(-size // 4)
                return [
                    (at, min(at + step, len(tokens)))
                    for at in range(0, len(tokens), step)
                ]
            return whole if ends is None else _grouped(ends * 4, size)
        if kind == "parquet":
            import pyarrow.parquet

            with files.opened(url) as file:
                found = pyarrow.parquet.ParquetFile(file).metadata
                groups = [found.row_group(i) for i in range(found.num_row_groups)]
                ends = np.cumsum([0, *(group.total_byte_size for group in groups)])
            return _grouped(ends, size) or whole
        if url.endswith((".gz", ".zst")):
            return whole
        with files.opened(url) as file:
            total = file.seek(0, io.SEEK_END)
    except (ValueError, OSError):
        if kind == "parquet":
            return whole
        raise
    return [(at, min(at + size, total)) for at in range(0, max(total, 1), size)]


def _grouped(ends: np.ndarray, size: int) -> list[tuple[int, int | None]]:
    """Runs of pieces of about `size` bytes; piece i goes from `ends[i]` on."""
    cuts: list[int] = [0]
    while cuts[-1] < len(ends) - 1:
        after = np.searchsorted(ends, ends[cuts[-1]] + size, side="right") - 1
        cuts.append(max(int(after), cuts[-1] + 1))
    return list(zip(cuts[:-1], cuts[1:]))


def read_shard(
    shard: Shard, damaged: Damaged | None = None
) -> Iterator[str | np.ndarray]:
    """The documents of a shard, one after another: texts, or arrays of token ids.

    Args:
      shard: from `find_shards`.
      damaged: is called with each piece of damage, which is then passed over; without
        it the first one raises. Empty documents are yielded as they are.

    Raises:
      ValueError: damage, where `damaged` is None.
      OSError: the file cannot be opened, or a disk or network fails.
      ImportError: a URL, or `.zst`, without the extra `corpus`.
    """
    damaged = damaged or _raise
    if shard.format == "tokens":
        return _read_tokens(shard, damaged)
    if shard.format == "text":
        return (
            _decoded(line, place, damaged) for line, place in _lines(shard, damaged)
        )
    return (document for document, _ in _records(shard, None, damaged))


def read_labelled(
    shard: Shard, label: str, damaged: Damaged | None = None
) -> Iterator[tuple[str | np.ndarray, str]]:
    """The documents of a shard, each with the text that its field `label` holds.

    A record without one is damaged. Arguments and errors as in `read_shard`.

    Raises:
      ValueError: also a format whose documents have no fields.
    """
    if shard.format not in ("jsonl", "parquet"):
        raise ValueError(
            f"{shard.url} is read as {shard.format}, whose documents have no field"
            f" {label!r}; JSON lines and Parquet have fields."
        )
    return _records(shard, label, damaged or _raise)


def _records(shard: Shard, label: str | None, damaged: Damaged) -> Iterator[tuple]:
    if shard.format == "parquet":
        return _read_parquet(shard, label, damaged)
    return _read_jsonl(shard, label, damaged)


def _raise(damage: Damage) -> None:
    raise ValueError(damage.examples[0])


def _skip(damaged: Damaged, place: str, why: object) -> None:
    reason = " ".join(str(why).split())[:200]
    damaged(Damage(skipped=1, examples=(f"{place}: {reason}",)))


def _decoded(raw: bytes, place: str, damaged: Damaged) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"{place}: no UTF-8, {error.reason} at byte {error.start}"
        damaged(Damage(mended=1, examples=(reason,)))
        return raw.decode("utf-8", "replace")


def _read_jsonl(
    shard: Shard, label: str | None, damaged: Damaged
) -> Iterator[tuple[str | np.ndarray, str | None]]:
    for line, place in _lines(shard, damaged):
        if not line.strip():
            continue
        text = _decoded(line, place, damaged)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            _skip(damaged, place, f"no JSON, {error}")
            continue
        name = shard.field
        try:
            document = _document(_within(record, name))
            own = None
            if label is not None:
                name = label
                own = _within(record, name)
                if not isinstance(own, str):
                    raise TypeError(f"no text: {type(own)}")
        except (KeyError, TypeError, IndexError):
            what = "text" if name is label else "text or token ids"
            _skip(damaged, place, f"no {what} in the field {name!r}")
            continue
        if isinstance(document, str) and not document.isascii():
            document = _whole(document, place, damaged)
        yield document, own


def _within(record: Any, path: str) -> Any:
    for name in path.split("."):
        record = record[name]
    return record


def _whole(text: str, place: str, damaged: Damaged) -> str:
    """`text` as Unicode: JSON may hold half of a character that needs two escapes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        reason = f"{place}: half a character at {error.start}"
        damaged(Damage(mended=1, examples=(reason,)))
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _document(value: Any) -> str | np.ndarray:
    """A text, or token ids.

    Raises:
      TypeError: it is neither.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or any(type(token) is not int for token in value):
        raise TypeError(f"neither text nor a list of token ids: {type(value)}")
    if any(not 0 <= token < 1 << 32 for token in value):
        raise TypeError("a token id must be in [0, 2**32)")
    return np.array(value, np.int64)


def _lines(shard: Shard, damaged: Damaged) -> Iterator[tuple[bytes, str]]:
    """The lines that begin within the shard, and how to name the place of each."""
    with files.opened(shard.url) as raw, files.unpacked(shard.url, raw) as file:
        at = shard.begin
        if at:
            # The line of the byte before belongs to the shard in which it begins.
            file.seek(at - 1)
            at += len(file.readline()) - 1
        number = 0
        while shard.end is None or at < shard.end:
            try:
                line = file.readline()
            except files.damages() as error:
                if files.out_of_reach(error):
                    raise
                _skip(damaged, shard.url, f"the rest is lost, {error}")
                return
            if not line:
                return
            at += len(line)
            number += 1
            if number == 1 and not shard.begin:
                line = line.removeprefix(b"\xef\xbb\xbf")
            place = f"line {number}"
            if shard.begin:
                place += f" from byte {shard.begin:,} on"
            yield line.rstrip(b"\r\n"), f"{shard.url}, {place}"


def _read_parquet(
    shard: Shard, label: str | None, damaged: Damaged
) -> Iterator[tuple[str | np.ndarray, str | None]]:
    import pyarrow as pa
    import pyarrow.parquet

    fields = [shard.field] if label is None else [shard.field, label]
    with files.opened(shard.url) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            for field in fields:
                if field.split(".")[0] not in table.schema_arrow.names:
                    raise ValueError(f"there is no column {field.split('.')[0]!r}")
            end = table.num_row_groups if shard.end is None else shard.end
        except (pa.ArrowException, ValueError, OSError) as error:
            if files.out_of_reach(error):
                raise
            _skip(damaged, shard.url, error)
            return
        for group in range(shard.begin, end):
            row = 0
            try:
                for batch in table.iter_batches(_ROWS, [group], fields):
                    for values in zip(*(_values(batch, field) for field in fields)):
                        place = f"{shard.url}, row group {group}, row {row}"
                        row += 1
                        if any(value is None for value in values):
                            _skip(damaged, place, "no value, or a negative token id")
                            continue
                        document, *rest = (
                            _decoded(value, place, damaged)
                            if isinstance(value, bytes)
                            else value
                            for value in values
                        )
                        if rest and not isinstance(rest[0], str):
                            _skip(damaged, place, f"no text in the field {label!r}")
                            continue
                        yield document, rest[0] if rest else None
            except (pa.ArrowException, OSError, KeyError, TypeError) as error:
                if files.out_of_reach(error):
                    raise
                place = f"{shard.url}, row group {group} from row {row} on"
                _skip(damaged, place, error)


def _values(batch: Any, field: str) -> Iterator[bytes | np.ndarray | None]:
    """Texts as bytes, lists of token ids as arrays; None where there is neither.

    Raises:
      TypeError: the field holds neither.
      KeyError, ArrowException: there is no such field.
    """
    import pyarrow as pa
    import pyarrow.compute

    name, *inner = field.split(".")
    column = batch.column(name)
    if inner:
        column = pyarrow.compute.struct_field(column, inner)
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    types = pa.types
    if (
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
    ):
        if not types.is_integer(kind.value_type):
            raise TypeError(f"a column of {kind} holds neither text nor token ids")
        for row in column:
            ids = None
            if row.is_valid and not row.values.null_count:
                ids = row.values.to_numpy()
            yield None if ids is None or (ids < 0).any() else ids
    elif (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
    ):
        yield from column.cast(pa.large_binary()).to_pylist()
    else:
        raise TypeError(f"a column of {kind} holds neither text nor token ids")


def _read_tokens(shard: Shard, damaged: Damaged) -> Iterator[np.ndarray]:
    try:
        tokens, begins = arrays.open_ids(shard.url, shard.token_type)
    except ValueError as error:
        _skip(damaged, shard.url, error)
        return
    if begins is None and shard.end_token is not None:
        yield from arrays.closed_by(tokens, shard.end_token, shard.begin, shard.end)
        return
    if begins is None:
        begins = np.array([0, len(tokens)])
    end = len(begins) - 1 if shard.end is None else shard.end
    for document in range(shard.begin, end):
        yield tokens[begins[document] : begins[document + 1]]
