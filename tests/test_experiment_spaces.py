"""The experiments that compare spaces, end to end on the built-in models."""

import gzip
import json

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy
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
    # A token is among its own 10 in both models, relabelled or not.
    beyond = pair["overlap_percent"] - 10, pair["chance_high"] - 10
    assert beyond[0] > 5 * beyond[1] >= 0
    assert 0.9 < pair["first_angle"] <= 1
    assert 0 < found["first_angle_with_random"]["demo"] < 0.5
    with flagsaver.flagsaver(workdir=str(tmp_path / "same"), models=["demo"]):
        with pytest.raises(ValueError, match="two different models"):
            model_agreement.main([])


def test_vocabularies_of_other_sizes_lose_no_shared_token(tmp_path):
    """The shared tokens stand beyond the end of the smaller model's matrix."""
    rng = np.random.default_rng(0)
    shared = [f"word{chr(97 + i)}" for i in range(20)]
    fillers = [f"other{chr(97 + i)}" for i in range(26)]
    for name, tokens in (("small", shared), ("large", [*fillers, *shared])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", "utf-8")
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": False})
        )
        rows = rng.standard_normal((len(tokens), 4)).astype(np.float32)
        safetensors.numpy.save_file(
            {"embeddings.word_embeddings.weight": rows}, folder / "model.safetensors"
        )
    with flagsaver.flagsaver(
        workdir=str(tmp_path / "run"),
        model=str(tmp_path / "small"),
        models=[str(tmp_path / "large")],
        k=5,
        permutations=2,
    ):
        model_agreement.main([])
    assert summary(tmp_path / "run")["shared_tokens"] == len(shared)


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
    by_layer = summary(tmp_path / "b")["languages_by_layer"]
    assert by_layer["mantel"] == [None] * len(by_layer["cka"])  # two languages


def test_closeness_of_languages_is_tested_against_their_likeness(rng):
    """Three languages at known places, two of which arrange the texts alike."""
    texts = rng.normal(size=(1, 30, 8))
    spaces = {"a": texts + 5, "b": texts + 5.1, "c": rng.normal(size=(1, 30, 8)) - 5}
    cka = np.array([[1, 0.9, 0.1], [0.9, 1, 0.1], [0.1, 0.1, 1]])
    found = layer_similarity._mantel(spaces, cka, 0)
    assert found.correlation > 0.99 and 0.2 < found.p_value < 0.5  # 2 of 6 relabellings


REFUSED = [
    (lexicon_induction, {"languages": ["eng"]}, "one besides eng"),
    (lexicon_induction, {"languages": ["eng", "xx"]}, r"No language \['xx'\]"),
    (lexicon_induction, {"train": "words"}, "--train and --test go together"),
    (lexicon_induction, {"model": "nowhere/x"}, "nowhere/x"),
    (model_agreement, {"models": ["/nowhere"]}, "/nowhere"),
    (model_agreement, {"tensor": "nothing"}, "nothing"),
    (model_agreement, {"shared_with": ["/nowhere"]}, "/nowhere"),
    (layer_similarity, {"models": ["/nowhere"]}, "/nowhere"),
    (layer_similarity, {"per_language": 3}, "At least 4 texts"),
    (layer_similarity, {"languages": ["eng", "xx"]}, r"No language \['xx'\]"),
    (layer_similarity, {"parallel": "/nowhere.tsv"}, "/nowhere.tsv"),
    (sentence_retrieval, {"languages": ["eng"]}, "at least two languages"),
    (sentence_retrieval, {"parallel": "/nowhere.tsv.xz"}, "/nowhere.tsv.xz"),
    (sentence_retrieval, {"model": "/nowhere"}, "/nowhere"),
    (sentence_retrieval, {"revision": "main", "model": "/nowhere"}, "/nowhere"),
]


@pytest.mark.parametrize("experiment, given, message", REFUSED)
def test_a_bad_flag_is_refused_before_anything_is_written(
    tmp_path, experiment, given, message
):
    with flagsaver.flagsaver(workdir=str(tmp_path / "run"), **given):
        with pytest.raises((ValueError, OSError), match=message):
            experiment.main([])
    assert not (tmp_path / "run").exists()


def test_dictionaries_of_muse_are_asked_and_their_gaps_named(tmp_path):
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("god mungu\nman mtu\nhouse nyumba\n", "utf-8")
    test.write_text("water maji\nday siku\n", "utf-8")
    files = {"train": str(train), "test": str(test)}
    with flagsaver.flagsaver(workdir=str(tmp_path / "run"), **files):
        lexicon_induction.main([])
    table = pyarrow.parquet.read_table(tmp_path / "run" / "induction.parquet")
    assert set(table["candidates"].to_pylist()) == {5}  # fewer than the 10 of P@10
    assert set(table["p10"].to_pylist()) == {1.0}
    train.write_text("one two three\n", "utf-8")
    with flagsaver.flagsaver(workdir=str(tmp_path / "bad"), **files):
        with pytest.raises(ValueError, match="line 1"):
            lexicon_induction.main([])


def test_parallel_files_are_read_and_refused(tmp_path):
    path = tmp_path / "texts.tsv"
    path.write_text("id\ten\tde\na\tone\teins\nb\t\tzwei\nc\tthree\tdrei\n", "utf-8")
    found = parallel_text.read_parallel(path)
    assert found.items == ["a", "c"] and found.texts["de"] == ["eins", "drei"]
    for content, message in [
        ("id\ten\n", "two languages"),
        ("id\ten\tde\na\tone\n", "Line 2"),
        ("id\ten\tde\na\tone\teins\n", "1 items"),
        ("id\ten\tde\ten\na\tone\teins\tuno\n", "twice"),
        ("", "two languages"),
    ]:
        path.write_text(content, "utf-8")
        with pytest.raises(ValueError, match=message):
            parallel_text.read_parallel(path)
    with pytest.raises(ValueError, match=r"\['fr'\]"):
        parallel_text.read_parallel(path, ["fr"])
    # A byte-order mark, ends of line of Windows, a separator inside of a text.
    marked = "\ufeffid\ten\tde\r\na\tone\u2028more\teins\r\nb\ttwo\tzwei\r\n"
    path.write_bytes(marked.encode())
    found = parallel_text.read_parallel(path, ["en", "de"])
    assert found.texts["en"] == ["one\u2028more", "two"]
    (tmp_path / "bad.tsv.xz").write_bytes(b"no")
    with pytest.raises(ValueError, match="bad.tsv.xz is not a TSV"):
        parallel_text.read_parallel(tmp_path / "bad.tsv.xz")
    packed = bytearray(gzip.compress(bytes(range(256)) * 40, mtime=0))
    packed[10] = 0xFF  # no kind of block that deflate has
    (tmp_path / "bad.tsv.gz").write_bytes(packed)
    with pytest.raises(ValueError, match="bad.tsv.gz is not a TSV"):
        parallel_text.read_parallel(tmp_path / "bad.tsv.gz")
