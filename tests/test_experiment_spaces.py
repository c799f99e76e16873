"""The experiments that compare spaces, end to end on the built-in models."""

import gzip
import json
import shutil

import numpy as np
import pyarrow.compute
import pyarrow.parquet
import pytest
import safetensors.numpy
import scipy.linalg
from absl import flags
from absl.testing import flagsaver

from jaxling import checkpoints, demo, labelled_text, models, parallel_text
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


_SHARED = [f"word{chr(97 + i)}" for i in range(20)]
_FILLERS = [f"other{chr(97 + i)}" for i in range(26)]


def write_space(folder, tokens, rows):
    """A checkpoint of nothing but a vocabulary and its vectors."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", "utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": False})
    )
    safetensors.numpy.save_file(
        {"embeddings.word_embeddings.weight": rows.astype(np.float32)},
        folder / "model.safetensors",
    )


def two_spaces(folder, rng, width=4):
    """The shared tokens stand beyond the end of the smaller model's matrix."""
    small, large = rng.normal(size=(20, 4)), rng.normal(size=(46, width))
    large[26:, :4] += small
    small[3] = large[30] = large[5] = 0  # two shared tokens, and one that is not
    write_space(folder / "small", _SHARED, small)
    write_space(folder / "large", [*_FILLERS, *_SHARED], large)
    flags_of = dict(model=str(folder / "small"), models=[str(folder / "large")])
    return np.delete(small, [3, 4], 0), np.delete(large[26:], [3, 4], 0), flags_of


def own_neighbors(x, k):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return [set(row) for row in np.argsort(-(x @ x.T), axis=1)[:, :k]]


def test_agreement_is_that_of_the_dense_definition(rng, tmp_path):
    """Vocabularies of other sizes; tokens without a vector in one of the models."""
    small, large, given = two_spaces(tmp_path, rng)
    workdir = str(tmp_path / "run")
    with flagsaver.flagsaver(workdir=workdir, k=5, permutations=30, **given):
        model_agreement.main([])
    found = summary(tmp_path / "run")
    assert found["shared_tokens"] == 18 and found["tokens_without_direction"] == 2
    (pair,) = found["pairs"]
    both = list(zip(own_neighbors(small, 5), own_neighbors(large, 5)))
    overlap = [len(a & b) / 5 for a, b in both]
    assert pair["overlap_percent"] == pytest.approx(100 * np.mean(overlap))
    jaccard = np.mean([len(a & b) / len(a | b) for a, b in both])
    assert pair["jaccard"] == pytest.approx(jaccard)
    # Itself, and 4 of 17 others by 4 of 17: four standard errors of 18 x 30 lists.
    assert pair["chance_percent"] == pytest.approx(100 * (1 + 16 / 17) / 5, abs=3)
    assert pair["chance_low"] < pair["chance_percent"] < pair["chance_high"]
    cosines = np.cos(scipy.linalg.subspace_angles(small, large))
    assert pair["first_angle"] == pytest.approx(cosines.max(), abs=1e-5)
    assert pair["mean_angle"] == pytest.approx(cosines.mean(), abs=1e-5)
    assert not pair["angle_is_forced"]


def test_angles_that_could_not_be_other_than_one_are_named(rng, tmp_path, capsys):
    """Of 4 and 15 columns over 18 tokens; of 512 random ones over any so few."""
    *_, given = two_spaces(tmp_path, rng, width=15)
    for center in (False, True):
        workdir = str(tmp_path / str(center))
        with flagsaver.flagsaver(workdir=workdir, k=5, center=center, **given):
            model_agreement.main([])
        (pair,) = summary(tmp_path / str(center))["pairs"]
        assert pair["angle_is_forced"]
        assert pair["first_angle"] == pytest.approx(1, abs=1e-5)
        said = capsys.readouterr().out
        assert "small and a random matrix; " in said and "than the 18 shared" in said


def test_centring_takes_the_dimension_that_forces_an_angle(rng):
    """18 columns together fit into 18 tokens, and not into the 17 that are left."""
    a, b = rng.normal(size=(18, 4)), rng.normal(size=(18, 14))
    for center in (False, True):
        with flagsaver.flagsaver(center=center):
            assert model_agreement._is_forced(18, a, b) == center
            first = float(model_agreement._angles(a, b)[0])
        assert (first > 1 - 1e-5) == center


def test_vectors_that_are_not_finite_are_refused(rng, tmp_path):
    *_, given = two_spaces(tmp_path, rng)
    rows = rng.normal(size=(46, 4))
    rows[[2, 28]] = np.nan  # the first belongs to no shared token
    write_space(tmp_path / "unknown", [*_FILLERS, *_SHARED], rows)
    given["models"].append(str(tmp_path / "unknown"))
    with flagsaver.flagsaver(workdir=str(tmp_path / "run"), k=5, **given):
        with pytest.raises(ValueError, match=r"unknown must be finite; .* 1 .*\[28\]"):
            model_agreement.main([])
    assert not (tmp_path / "run").exists()


def test_induction_asks_every_map_and_method(tmp_path):
    with flagsaver.flagsaver(workdir=str(tmp_path), languages=["eng", "swh"]):
        lexicon_induction.main([])
    found = summary(tmp_path)
    assert found["pairs"] == 2 and len(found["means"]) == 16
    assert all(0 <= row["p1"] <= row["p5"] <= row["p10"] <= 1 for row in found["means"])
    table = pyarrow.parquet.read_table(tmp_path / "induction.parquet")
    assert set(table["source"].to_pylist()) == {"eng", "swh"}


def retrieved_oracle(x, y):
    """Accuracy of both directions and F1 of mutual ratio margins, every pair scored."""
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    cosine, own = x @ y.T, np.arange(len(x))
    accuracy = [np.mean(cosine.argmax(axis) == own) for axis in (0, 1)]
    near = [np.sort(cosine, axis).take(range(-4, 0), axis) for axis in (1, 0)]
    margin = 2 * cosine / (near[0].mean(1)[:, None] + near[1].mean(0))
    forward = np.where(cosine >= near[0][:, :1], margin, -np.inf).argmax(1)
    backward = np.where(cosine >= near[1][:1], margin, -np.inf).argmax(0)
    mined = backward[forward] == own
    right = np.sum(mined & (forward == own))
    return np.mean(accuracy), 2 * right / (mined.sum() + len(own))


def test_sentences_and_layers_of_parallel_text(tmp_path):
    shared = dict(languages=["eng", "ukr"], per_language=24)
    with flagsaver.flagsaver(workdir=str(tmp_path / "a"), **shared):
        sentence_retrieval.main([])
    found = summary(tmp_path / "a")
    curve = found["mean_by_layer"]["accuracy"]
    assert found["items"] == 24
    assert curve[found["best_layer"]] == max(curve) <= 1
    spaces = parallel_text.spaces(
        models.load("demo", dtype="float32"),
        labelled_text.load_tokenizer("demo"),
        parallel_text.demo_parallel(["eng", "ukr"], 24),
    )
    table = pyarrow.parquet.read_table(tmp_path / "a" / "retrieval.parquet").to_pylist()
    assert [row["layer"] for row in table] == list(range(len(curve)))
    for row, x, y in zip(table, spaces["eng"], spaces["ukr"]):
        accuracy, f1 = retrieved_oracle(x.astype(float), y.astype(float))
        assert row["accuracy"] == pytest.approx(accuracy)
        assert row["f1"] == pytest.approx(f1)
    (pair,) = found["best_of_pairs"]
    assert pair == max(table, key=lambda row: row["accuracy"])
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
    # The order of a file's columns, not of the alphabet.
    turned = {name: spaces[name] for name in "cab"}
    other = layer_similarity._mantel(turned, np.roll(cka, 1, (0, 1)), 0)
    assert other.correlation == pytest.approx(found.correlation)
    with flagsaver.flagsaver(clusters=2):
        assert layer_similarity._clusters(turned, 0) == [["a", "b"], ["c"]]


def test_texts_that_are_all_alike_leave_no_picture_and_no_crash(tmp_path, capsys):
    """Their debiased CKA is NaN at every layer: there is no best one."""
    path = tmp_path / "texts.tsv"
    lines = [f"{i}\tthe same\tever the same\tone" for i in range(6)]
    path.write_text("\n".join(["id\ta\tb\tc", *lines]), "utf-8")
    given = dict(parallel=str(path), models=["demo"], k=2)
    with flagsaver.flagsaver(workdir=str(tmp_path / "run"), **given):
        layer_similarity.main([])
    assert "No two languages have a debiased CKA" in capsys.readouterr().out
    found = summary(tmp_path / "run")
    assert set(found["languages_by_layer"]["cka"]) == {None}
    assert len(found["clusters_by_layer"][0]) == 3


def test_a_model_with_vectors_that_are_not_finite_is_refused(tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoints.locate("demo-small"), folder)
    path = folder / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(path))
    name = checkpoints.open_checkpoint(folder).input_embeddings()
    rows = tensors[name].copy()
    tokenizer = labelled_text.load_tokenizer(str(folder))
    word = demo.lexicon("eng", "ukr", "test")[0][0]
    for text in (" " + word, " that"):
        rows[tokenizer(text, add_special_tokens=False)["input_ids"]] = np.inf
    safetensors.numpy.save_file(tensors | {name: rows}, path)
    shared = dict(model=str(folder), languages=["eng", "ukr"])
    text = r"layer 0 that of item LUK\S* in eng is not"
    for experiment, given, message in [
        (sentence_retrieval, dict(per_language=20), text),
        (layer_similarity, dict(per_language=20, models=[]), text),
        (lexicon_induction, {}, r"of those of '\w+', \[[\d, ]+\], one is not"),
    ]:
        workdir = str(tmp_path / experiment.__name__)
        with flagsaver.flagsaver(workdir=workdir, **given, **shared):
            with pytest.raises(ValueError, match=message):
                experiment.main([])


REFUSED = [
    (lexicon_induction, {"languages": ["eng"]}, "one besides eng"),
    (lexicon_induction, {"languages": ["eng", "xx"]}, r"No language \['xx'\]"),
    (lexicon_induction, {"train": "words"}, "--train and --test go together"),
    (lexicon_induction, {"model": "nowhere/x"}, "nowhere/x"),
    (lexicon_induction, {"train": "a", "test": "b", "languages": ["eng"]}, "languages"),
    (lexicon_induction, {"models": ["demo"]}, "--models has no meaning"),
    (lexicon_induction, {"k": 5}, "--k has no meaning"),
    (lexicon_induction, {"center": True}, "--center has no meaning"),
    (lexicon_induction, {"parallel": "x.tsv"}, "--parallel has no meaning"),
    (lexicon_induction, {"per_language": 5}, "--per_language has no meaning"),
    (sentence_retrieval, {"models": ["demo"]}, "--models has no meaning"),
    (sentence_retrieval, {"k": 5}, "--k has no meaning"),
    (sentence_retrieval, {"center": True, "per_language": 4}, "more than 4 texts"),
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
    found = table.filter(pyarrow.compute.field("method") != "margin_ratio")
    assert set(found["p10"].to_pylist()) == {1.0}  # five centred words have no margin
    train.write_text("one two three\n", "utf-8")
    with flagsaver.flagsaver(workdir=str(tmp_path / "bad"), **files):
        with pytest.raises(ValueError, match="line 1"):
            lexicon_induction.main([])


def test_a_dictionary_without_words_that_have_vectors_is_refused_first(rng, tmp_path):
    known, unknown = tmp_path / "known.txt", tmp_path / "unknown.txt"
    known.write_text("worda wordb\n", "utf-8")
    unknown.write_text("worda nothing\nno wordb\n", "utf-8")
    write_space(tmp_path / "model", ["[UNK]", *_SHARED], rng.normal(size=(21, 4)))
    run = tmp_path / "run"
    for train, test, message in [
        (unknown, known, "source to target: of 2 training pairs none"),
        (known, unknown, "source to target: of 2 test pairs none"),
    ]:
        files = {"train": str(train), "test": str(test)}
        with flagsaver.flagsaver(
            model=str(tmp_path / "model"), workdir=str(run), **files
        ):
            with pytest.raises(ValueError, match=message):
                lexicon_induction.main([])
        assert not run.exists()


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
