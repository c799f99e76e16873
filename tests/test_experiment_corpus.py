"""The experiments that count, end to end on a small corpus."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxling import corpus, demo, dictionaries, vocabulary

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(name: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"jaxling.experiments.{name}", *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """Some verses as JSON lines, one of them damaged, and a table of traced items."""
    folder = tmp_path_factory.mktemp("corpus")
    verses = demo.verses("train").text
    rows = list(zip(verses["eng"], verses["swh"]))[:600]
    lines = [json.dumps({"text": "\n".join(row)}) for row in rows]
    lines.insert(5, '{"text": "dam')
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    pairs = [("Jesus", "Yesu"), ("David", "Daudi"), ("house", "nyumba")] * 4
    rng = np.random.default_rng(0)
    behaviour = ["co-occurrence", "pivot"] * 6
    table = pa.table(
        {
            "source": ["eng"] * 12,
            "target": ["swh"] * 12,
            "word": [a for a, _ in pairs],
            "answer": [b for _, b in pairs],
            "score": rng.random(12),
            "behaviour": behaviour,
        }
    )
    pa.parquet.write_table(table, folder / "items.parquet")
    return folder


def test_token_frequencies_are_what_token_neighbors_reads(place, tmp_path):
    flags = [f"--corpus={place}/a.jsonl", f"--workdir={tmp_path}", "--processes=1"]
    done = run("token_frequencies", *flags)
    assert done.returncode == 0, done.stderr
    assert "1 records were skipped" in done.stderr
    words = vocabulary.load_vocabulary("demo")
    tokenizer = vocabulary.load_tokenizer("demo")
    expected = np.zeros(len(words.strings), np.int64)
    for line in (place / "a.jsonl").read_text().splitlines():
        if line.endswith("}"):
            ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)
            np.add.at(expected, ids.ids, 1)
    table = pa.parquet.read_table(tmp_path / "frequencies.parquet").to_pydict()
    assert table["count"] == expected.tolist()
    read = dictionaries.read_frequencies(tmp_path / "frequencies.tsv", words.strings)
    newline = words.strings.index("\n")  # the file has a token a line
    assert read[newline] == 0 < expected[newline]
    expected[newline] = 0
    np.testing.assert_array_equal(read, expected)
    strict = run(
        "token_frequencies", *flags[:1], f"--workdir={tmp_path / 'b'}", "--strict"
    )
    assert strict.returncode == 1 and "Traceback" not in strict.stderr
    assert "line 6: no JSON" in strict.stderr


def test_a_dask_cluster_counts_the_same(place, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, processes=False, protocol="tcp://", dashboard_address=None
    ) as cluster:
        flags = [f"--corpus={place}/a.jsonl", f"--workdir={tmp_path / 'dask'}"]
        done = run("token_frequencies", *flags, f"--dask={cluster.scheduler_address}")
    assert done.returncode == 0, done.stderr
    assert "1 records were skipped" in done.stderr
    flags[1] = f"--workdir={tmp_path / 'here'}"
    assert run("token_frequencies", *flags, "--processes=1").returncode == 0
    one, other = (
        json.loads((tmp_path / name / "summary.json").read_text())
        for name in ("dask", "here")
    )
    assert one == other and one["tokens"] > 10_000
    assert not (tmp_path / "dask" / "counts").exists()


@pytest.mark.parametrize("flags", [[], ["--window=30"], ["--match_tokens"]])
def test_counts_of_traced_items(place, tmp_path, flags):
    flags = [*flags, f"--corpus={place}/a.jsonl", "--processes=1"]
    done = run(
        "cooccurrence",
        *flags,
        f"--trace={place}/items.parquet",
        f"--workdir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    table = pa.parquet.read_table(tmp_path / "items.parquet").to_pydict()
    texts = [
        json.loads(line)["text"]
        for line in (place / "a.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]

    # The plans of the flags; counts themselves are checked in test_corpus_counts.
    words = sorted({*table["word"], *table["answer"]})
    plan = corpus.Plan(corpus.surface_terms(words))
    if "--window=30" in flags:
        plan = plan._replace(window=30)
    if "--match_tokens" in flags:
        tokenizer = vocabulary.load_tokenizer("demo")
        terms = corpus.token_terms(words, tokenizer)
        plan = corpus.Plan(terms, tokenizer=tokenizer)
    counts = corpus.count_documents(texts, plan)
    near = "--window=30" in flags
    pairs = counts.window_pairs if near else counts.document_pairs
    alone = counts.term_occurrences if near else counts.term_documents
    one, other = ([words.index(w) for w in table[c]] for c in ("word", "answer"))
    assert table["count"] == corpus.pair_counts(pairs, one, other).tolist()
    assert table["source_count"] == alone[one].tolist()
    assert table["target_count"] == alone[other].tolist()
    assert table["count"][0] > 5 and len(set(table["count"])) > 1
    if plan == corpus.Plan(corpus.surface_terms(words)):
        both = [r"(?i)\bjesus\b", r"(?i)\byesu\b"]
        held = [all(re.search(word, text) for word in both) for text in texts]
        assert table["word"][0] == "Jesus" and table["count"][0] == sum(held)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["damage"]["skipped"] == 1 and summary["items"] == 12
    assert 0 <= summary["pairs"]["eng-swh"]["area"]["both words"]["value"] <= 1
    assert "minus that by the target word alone: " in done.stdout
    assert {"scores.png", "areas.png", "correlations.png"} <= {
        path.name for path in tmp_path.iterdir()
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trace={}/a.jsonl"], "is no items.parquet"),
        (["--trace={}/nowhere.parquet"], "nowhere.parquet"),
        (["--trace={}/items.parquet", "--corpus={}/nothing-*"], "no file at"),
        (["--trace={}/items.parquet", "--words=3"], "--words has no meaning here"),
        (
            ["--trace={}/items.parquet", "--corpus={}/a.jsonl", "--text_field=txt"],
            "601 records were skipped and 0 are empty. The first: ",
        ),
        (
            ["--trace={}/items.parquet", "--corpus={}/a.jsonl", "--dask=nowhere"],
            "nowhere",
        ),
    ],
)
def test_bad_input_ends_in_one_paragraph(place, tmp_path, flags, words):
    flags = [flag.format(place) for flag in flags]
    done = run("cooccurrence", *flags, f"--workdir={tmp_path}")
    assert done.returncode == 1, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
