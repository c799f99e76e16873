"""Tables: aligned in a terminal whatever the script, and Parquet files."""

import os
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

_ISOLATE, _POP = "\u2068", "\u2069"


def display_width(text: str) -> int:
    """How many columns of a terminal the text takes.

    Wide and full-width characters (UAX #11) take two, non-spacing marks, format
    characters and Hangul's medial and final jamo none.
    """
    if text.isascii():
        return len(text)
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    if "\u1160" <= character <= "\u11ff":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shorten(text: str, width: int) -> str:
    """The beginning of `text` in at most `width` columns; `…` says that it was cut."""
    if display_width(text) <= width:
        return text
    used, kept = 1, []
    for character in text:
        used += _columns(character)
        if used > width:
            break
        kept.append(character)
    return "".join(kept) + "…"


def format_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    width: int = 100,
    digits: int = 3,
) -> str:
    """Lays rows out in columns, numbers to the right, text to the left.

    Cells with right-to-left letters are isolated, so that they neither reorder nor
    shift their neighbours. The widest text columns are cut until a line has `width`
    columns. Floating-point numbers are rounded to `digits` places, NaN is a dash.
    """
    cells = [[_cell(value, digits) for value in row] for row in rows]
    for number, row in enumerate(cells):
        if len(row) != len(headers):
            raise ValueError(
                f"Row {number} must have {len(headers)} cells, as `headers` has; got"
                f" {len(row)}."
            )
    columns = list(zip(headers, *cells))
    right = [
        bool(rows) and all(isinstance(row[i], _NUMBERS) for row in rows)
        for i in range(len(headers))
    ]
    widths = [max(display_width(cell) for cell in column) for column in columns]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        widest = max(range(len(widths)), key=lambda i: (not right[i], widths[i]))
        if right[widest] or widths[widest] <= 8:
            break
        widths[widest] -= 1
    lines = [headers, *cells]
    texts = [
        "  ".join(_pad(cell, w, r) for cell, w, r in zip(line, widths, right)).rstrip()
        for line in lines
    ]
    texts.insert(1, "  ".join("─" * w for w in widths))
    return "\n".join(texts)


_NUMBERS = (int, float, np.integer, np.floating)


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, float | np.floating):
        return "–" if np.isnan(value) else f"{value:,.{digits}f}"
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _pad(cell: str, width: int, right: bool) -> str:
    cell = shorten(cell, width)
    space = " " * (width - display_width(cell))
    return space + _isolated(cell) if right else _isolated(cell) + space


def _isolated(text: str) -> str:
    """Right-to-left letters kept from reordering what stands around them."""
    if any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in text):
        return f"{_ISOLATE}{text}{_POP}"
    return text


def joined(texts: Sequence[str], width: int) -> str:
    """As many of `texts` as `width` columns hold, in order from left to right."""
    line, used = [], -2
    for text in texts:
        used += 2 + display_width(text)
        if used > width:
            break
        line.append(_isolated(text))
    return "  ".join(line)


def neighbor_column(ids: np.ndarray, distances: np.ndarray) -> pa.StructArray:
    """Neighbour lists as Embedding Atlas opens them: structs of `ids` and `distances`.

    Both are `[n, k]`; slots with id -1 are left out.
    """
    kept = ids >= 0
    offsets = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int32)
    flat = (
        pa.array(ids[kept].astype(np.int32)),
        pa.array(distances[kept].astype(np.float32)),
    )
    lists = [pa.ListArray.from_arrays(offsets, values) for values in flat]
    return pa.StructArray.from_arrays(lists, names=["ids", "distances"])


def write_parquet(
    path: str | os.PathLike[str],
    columns: Mapping[str, Any],
    *,
    rows_per_group: int = 16_384,
) -> None:
    """Writes columns (arrays, lists, pyarrow arrays) to a Parquet file.

    The same columns give the same bytes with the same pyarrow: row groups have a fixed
    size and nothing of time or place is recorded. The file is the old one or complete.

    Raises:
      ValueError: the columns differ in length.
      OSError: the file cannot be written.
    """
    table = {name: _array(values) for name, values in columns.items()}
    lengths = {name: len(values) for name, values in table.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The columns must have one length; got {lengths}.")
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            pa.parquet.write_table(
                pa.table(table),
                file,
                row_group_size=rows_per_group,
                compression="zstd",
                version="2.6",
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _array(values: Any) -> pa.Array:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if isinstance(values, np.ndarray) and values.ndim == 2:
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.array(values)
