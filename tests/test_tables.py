"""Terminal tables in any script, and Parquet files that are equal to the byte."""

import hashlib
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow.parquet
import pytest

from jaxling.report import tables


@pytest.mark.parametrize(
    "text, width",
    [
        ("abc", 3),
        ("日本語", 6),
        ("ｱ", 1),
        ("Ａ", 2),
        ("e\u0301", 1),
        ("ที่", 1),
        ("한글", 4),
        ("\u1112\u1161\u11ab", 2),
        ("שלום", 4),
        ("👍", 2),
        ("", 0),
    ],
)
def test_widths_are_those_of_a_terminal(text, width):
    assert tables.display_width(text) == width


def test_shortening_never_cuts_a_wide_character_in_half():
    assert tables.shorten("日本語", 6) == "日本語"
    assert tables.shorten("日本語", 5) == "日本…"
    assert tables.shorten("日本語", 4) == "日…"


def test_columns_stay_aligned_in_every_script():
    rows = [["日本語", 1.5, 12], ["שלום", float("nan"), 1_234_567], ["ที่", 22.25, 0]]
    lines = tables.format_table(["token", "mean", "count"], rows).split("\n")
    assert lines[0] == "token     mean      count"
    assert lines[1] == "──────  ──────  ─────────"
    assert lines[2] == "日本語   1.500         12"
    assert lines[3] == "\u2068שלום\u2069         –  1,234,567"
    assert {tables.display_width(line) for line in lines} == {25}


def test_a_table_is_cut_to_the_terminals_width():
    rows = [["x" * 200, "y" * 50, 7]]
    text = tables.format_table(["a", "b", "n"], rows, width=60)
    assert max(map(tables.display_width, text.split("\n"))) == 60
    assert text.endswith("  7") and "…" in text
    with pytest.raises(ValueError, match="Row 0 must have 2 cells"):
        tables.format_table(["a", "b"], [[1]])


def test_an_empty_table_is_its_header():
    assert tables.format_table(["a", "b"], []) == "a  b\n─  ─"


def test_neighbors_have_the_shape_embedding_atlas_opens(tmp_path):
    ids = np.array([[1, 2], [0, -1], [-1, -1]])
    distances = np.array([[0.5, 0.25], [0.5, np.nan], [np.nan, np.nan]])
    column = tables.neighbor_column(ids, distances)
    tables.write_parquet(
        tmp_path / "n.parquet",
        {"id": np.arange(3), "token": ["a", "ب", ""], "neighbors": column, "x": ids},
    )
    rows = pyarrow.parquet.read_table(tmp_path / "n.parquet").to_pylist()
    assert [row["neighbors"] for row in rows] == [
        {"ids": [1, 2], "distances": [0.5, 0.25]},
        {"ids": [0], "distances": [0.5]},
        {"ids": [], "distances": []},
    ]
    assert [row["token"] for row in rows] == ["a", "ب", ""]
    assert rows[2]["x"] == [-1, -1]


def test_two_processes_write_the_same_bytes(tmp_path):
    program = textwrap.dedent(
        """
        import sys
        import numpy as np
        from jaxling.report import tables
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 999, (5_000, 8))
        columns = {
            "token": [f"t{i % 700}" for i in range(5_000)],
            "neighbors": tables.neighbor_column(ids, rng.random((5_000, 8))),
        }
        tables.write_parquet(sys.argv[1], columns, rows_per_group=1_024)
        """
    )
    digests = set()
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", program, tmp_path / name], check=True)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    metadata = pyarrow.parquet.ParquetFile(tmp_path / "a").metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert groups == [1_024] * 4 + [904]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.parquet"
    tables.write_parquet(path, {"a": [1, 2]})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="one length"):
        tables.write_parquet(path, {"a": [1, 2], "b": [1]})
    with pytest.raises(OSError):
        tables.write_parquet(tmp_path / "missing" / "t.parquet", {"a": [1]})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_joined_texts_keep_their_order_and_the_width():
    assert tables.joined(["one", "two", "three"], 8) == "one  two"
    # Each right-to-left word is isolated, so that the line runs from left to right.
    assert tables.joined(["a", "ماء", "b"], 20) == "a  \u2068ماء\u2069  b"
    assert tables.joined([], 8) == "" and tables.joined(["水火"], 3) == ""
