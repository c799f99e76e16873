"""The experiments that compare spaces, end to end on the built-in models."""

import json

import numpy as np
import pyarrow.parquet
import pytest
from absl import flags
from absl.testing import flagsaver

from jaxling import parallel_text
from jaxling.experiments import (
    layer_similarity,
    lexicon_induction,
    model_agreement,
    sentence_retrieval,
)

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text("utf-8"))


def test_agreement_is_beyond_chance_and_whole_with_oneself(tmp_path):
    with flagsaver.flagsaver(workdir=str(tmp_path), k=10, permutations=2):
        model_agreement.main([])
    found = summary(tmp_path)
    (pair,) = found["pairs"]
    assert pair["overlap_percent"] > 5 * pair["chance_high"]
    assert 0.9 < pair["first_angle"] <= 1
    assert 0 < found["first_angle_with_random"]["demo"] < 0.5
    with flagsaver.flagsaver(workdir=str(tmp_path / "same"), models=["demo"]):
        with pytest.raises(ValueError, match="two different models"):
            model_agreement.main([])


def test_induction_asks_every_map_and_method(tmp_path):
    with flagsaver.flagsaver(workdir=str(tmp_path), languages=["eng", "swh"]):
        lexicon_induction.main([])
    found = summary(tmp_path)
    assert found["pairs"] == 2 and len(found["means"]) == 16
    assert all(0 <= row["p1"] <= row["p5"] <= row["p10"] <= 1 for row in found["means"])
    table = pyarrow.parquet.read_table(tmp_path / "induction.parquet")
    assert set(table["source"].to_pylist()) == {"eng", "swh"}


def test_sentences_and_layers_of_parallel_text(tmp_path):
    shared = dict(languages=["eng", "ukr"], per_language=24)
    with flagsaver.flagsaver(workdir=str(tmp_path / "a"), **shared):
        sentence_retrieval.main([])
    found = summary(tmp_path / "a")
    curve = found["mean_by_layer"]["accuracy"]
    assert found["items"] == 24
    assert curve[found["best_layer"]] == max(curve) <= 1
    with flagsaver.flagsaver(workdir=str(tmp_path / "b"), **shared):
        layer_similarity.main([])
    table = pyarrow.parquet.read_table(tmp_path / "b" / "similarity.parquet")
    rows = table.to_pylist()
    own = [r for r in rows if r["a"] == r["b"] and r["layer_a"] == r["layer_b"]]
    np.testing.assert_allclose([r["debiased_cka"] for r in own], 1, atol=1e-3)
    assert {r["between"] for r in rows} == {"layers", "languages"}


def test_parallel_files_are_read_and_refused(tmp_path):
    path = tmp_path / "texts.tsv"
    path.write_text("id\ten\tde\na\tone\teins\nb\t\tzwei\nc\tthree\tdrei\n", "utf-8")
    found = parallel_text.read_parallel(path)
    assert found.items == ["a", "c"] and found.texts["de"] == ["eins", "drei"]
    for content, message in [
        ("id\ten\n", "two languages"),
        ("id\ten\tde\na\tone\n", "Line 2"),
        ("id\ten\tde\na\tone\teins\n", "1 items"),
        ("", "two languages"),
    ]:
        path.write_text(content, "utf-8")
        with pytest.raises(ValueError, match=message):
            parallel_text.read_parallel(path)
    with pytest.raises(ValueError, match=r"\['fr'\]"):
        parallel_text.read_parallel(path, ["fr"])
    (tmp_path / "bad.tsv.xz").write_bytes(b"no")
    with pytest.raises(ValueError, match="bad.tsv.xz is not a TSV"):
        parallel_text.read_parallel(tmp_path / "bad.tsv.xz")
