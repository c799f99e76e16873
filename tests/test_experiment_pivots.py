"""The two pivot experiments on a tiny model, corpus and pool."""

import json
import sys
import types

import jax
import numpy as np
import pyarrow.parquet
import pytest
import tokenizers
from absl import flags as absl_flags
from absl.testing import flagsaver

from jaxling import models
from jaxling.corpus import selection
from jaxling.experiments import pivot_pretraining, semantic_pivots

WORDS = [(f"word{i}", f"mot{i}") for i in range(12)]
PIVOTS = "apple brick cloud drum earth fish glass honey iron jewel knife lamp".split()


@pytest.fixture(autouse=True)
def parsed():
    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS(["test"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint with its tokenizer, a lexicon, a corpus, a pool and sentences."""
    folder = tmp_path_factory.mktemp("place")
    config = {
        "model_type": "llama",
        "vocab_size": 420,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "eos_token_id": 0,
    }
    models.save(models.build(config, jax.random.key(0)), folder / "model")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    found.train_from_iterator(
        [f" {pivot} {a} {b}" for pivot, (a, b) in zip(PIVOTS, WORDS)] * 3,
        tokenizers.trainers.BpeTrainer(
            vocab_size=420, initial_alphabet=alphabet, show_progress=False
        ),
    )
    found.save(str(folder / "model" / "tokenizer.json"))
    (folder / "en-fr.txt").write_text("".join(f"{a}\t{b}\n" for a, b in WORDS))
    rng = np.random.default_rng(0)
    with open(folder / "corpus.jsonl", "w") as file:
        for _ in range(600):
            # A word and its translation never meet; both meet their pivot.
            i, side = rng.integers(12), rng.integers(2)
            noise = " ".join(f"noise{n}" for n in rng.integers(0, 5, 3))
            text = f"{noise} {WORDS[i][side]} {PIVOTS[i]}"
            file.write(json.dumps({"text": text, "lang": "ef"[side]}) + "\n")
        file.write("not json\n")
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    (folder / "pool.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    rows = [f"{i}\tsentence {a}\tphrase {b}" for i, (a, b) in enumerate(WORDS)]
    (folder / "sentences.tsv").write_text("id\teng\tfra\n" + "\n".join(rows) + "\n")
    return folder


def settings(place, workdir, **flags):
    return flagsaver.flagsaver(
        model=str(place / "model"),
        lexicon=[f"eng-fra:{place}/en-fr.txt"],
        names=["eng:English", "fra:French"],
        words=3,
        shots=2,
        workdir=str(workdir),
        **flags,
    )


def test_planted_pivots_are_found_and_read_in_the_layers(place, tmp_path):
    given = dict(
        corpus=[f"{place}/corpus.jsonl"],
        k=2,
        minimum_association=0.05,
        minimum_similarity=-1.0,
        testbed_documents=400,
    )
    with settings(place, tmp_path, **given):
        semantic_pivots.main([])
    items = pyarrow.parquet.read_table(tmp_path / "items.parquet").to_pydict()
    assert len(items["word"]) == 6
    coded = tokenizers.Tokenizer.from_file(str(place / "model" / "tokenizer.json"))
    for word, found in zip(items["word"], items["pivot_token_id"]):
        number = word.removeprefix("word").removeprefix("mot")
        [pivot] = coded.encode(f" {PIVOTS[int(number)]}").ids
        assert found[0] == pivot, (word, found)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["documents"] == 600 and summary["damage"]["skipped"] == 1
    assert summary["items_read"] >= 5  # the control needs another word's pivots
    fits = summary["fits_of_score"]
    alone = max(fits[name]["explained"]["value"] for name in ("pair", "pivots"))
    assert alone <= fits["both"]["explained"]["value"] <= 1
    assert items["ln_count"] == [0] * 6 and min(items["pivot_company"]) > 0
    assert summary["testbed"]["best 2 by score"]["precision"] > 0.3
    assert (tmp_path / "mass.png").stat().st_size > 1000


def small(**flags):
    return dict(
        parallel="",
        steps=2,
        rows=2,
        length=64,
        learning_rate=1e-3,
        seeds=2,
        sentences=2,
        answer_tokens=6,
        graph_tokens=60,
        edge_documents=2,
        edge_association=0.01,
        pivot_tokens=10,
        **flags,
    )


def test_arms_are_trained_measured_and_kept(place, tmp_path, monkeypatch):
    # With a record that is none, and is passed over.
    given = small(corpus=[f"{place}/corpus.jsonl"], language_field="lang")
    given["parallel"] = f"{place}/sentences.tsv"
    with settings(place, tmp_path / "run", **given):
        pivot_pretraining.main([])
    run = tmp_path / "run"
    first = json.loads((run / "summary.json").read_text())
    table = pyarrow.parquet.read_table(run / "arms.parquet").to_pydict()
    assert table["arm"] == [arm for arm in selection.ARMS for _ in range(2)]
    # Of 2 steps of 2 rows of 64 positions, less what rows end and documents begin with.
    assert 0.9 * max(table["predicted_tokens"]) < min(table["predicted_tokens"]) < 256
    assert all(t >= 2 * 2 * 64 for t in table["tokens"])
    shares = first["arms"]
    assert min(shares["pivots"]["pivot_share"]) > max(
        shares["co-occurrence"]["pivot_share"]
    )
    for arm in selection.ARMS:
        own = [s for s, of in zip(table["score"], table["arm"]) if of == arm]
        # Student's t of one degree of freedom is 12.7062 at 0.975.
        half = 12.7062 * abs(own[0] - own[1]) / 2
        np.testing.assert_allclose(shares[arm]["score"]["mean"], np.mean(own))
        np.testing.assert_allclose(
            shares[arm]["score"]["low"], np.mean(own) - half, atol=1e-6
        )
    pivots = np.array([table["score"][0], table["score"][1]])
    others = np.array([table["score"][2], table["score"][3]])
    np.testing.assert_allclose(
        first["pivots_minus"]["original"]["score"]["mean"], np.mean(pivots - others)
    )
    assert (run / "arms.png").stat().st_size > 1000
    assert not list(run.glob("*/snapshots"))

    # As after a kill: what is finished is kept, what is missing comes out the same.
    (run / "pivots-1.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in run.glob("*-[01].json")}
    with settings(place, run, **given):
        pivot_pretraining.main([])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads((run / "summary.json").read_text()) == first

    # Not of a pool that has changed since.
    with open(place / "corpus.jsonl", "a") as file:
        file.write("\n")
    with settings(place, run, **given), pytest.raises(ValueError, match="other inputs"):
        pivot_pretraining.main([])

    module = types.ModuleType("languages_of_the_pool")
    module.identify = lambda text: "f" if "mot" in text else "e"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    given = small(
        corpus=[f"{place}/pool.jsonl"], identifier=f"{module.__name__}:identify"
    )
    given |= {"parallel": f"{place}/sentences.tsv", "seeds": 1}
    with settings(place, tmp_path / "identified", **given):
        pivot_pretraining.main([])
    again = json.loads((tmp_path / "identified" / "summary.json").read_text())
    for arm, found in again["arms"].items():
        assert found["tokens"] == first["arms"][arm]["tokens"][:1]
        assert np.isclose(found["loss"]["mean"], table["loss"][table["arm"].index(arm)])


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(corpus=["x"]), "languages of --corpus are to be known"),
        (dict(language_field="a", identifier="b:c"), "exclude each other"),
        (dict(corpus=["{}/none.jsonl"], language_field="lang"), "none.jsonl"),
        (
            dict(corpus=["{}/corpus.jsonl"], language_field="lang", strict=True),
            "no JSON",
        ),
        (dict(corpus=["{}/pool.jsonl"], language_field="tongue"), "tongue"),
        (dict(corpus=["{}/pool.jsonl"], identifier="json:gone"), "module:function"),
        (dict(corpus=["{}/pool.jsonl"], identifier="builtins:len"), "must return the"),
        (dict(mix=["eng"]), "--mix takes key:value"),
        (dict(mix=["e:much"]), "--mix takes language:share, a number; got e:much"),
        (dict(dask="localhost:8786"), "--dask has no meaning here"),
        (dict(mix=["zzz:1"]), "Documents of 'zzz' hold 0 tokens"),
        (dict(steps=2000), "lower the budget"),
    ],
)
def test_bad_input_is_one_paragraph(place, tmp_path, flags, message):
    flags = {
        name: [v.format(place) for v in value] if isinstance(value, list) else value
        for name, value in flags.items()
    }
    pool = dict(corpus=[f"{place}/pool.jsonl"], language_field="lang")
    flags = flags if "corpus" in flags or "identifier" in flags else pool | flags
    given = small() | {"parallel": f"{place}/sentences.tsv"} | flags
    with settings(place, tmp_path / "run", **given):
        with pytest.raises((ValueError, OSError), match=message):
            pivot_pretraining.main([])


def test_the_built_in_sentences_are_of_no_verse_of_the_pool():
    pool, demo = pivot_pretraining.pool, pivot_pretraining.demo
    held_out = demo.verses("held_out")
    asked = pool.without_books(held_out, pool.EVALUATED_BOOKS, keep=True)
    read = pool.without_books(held_out, pool.EVALUATED_BOOKS)
    assert not set(asked.names) & set(read.names)
    assert len(asked.names) + len(read.names) == len(held_out.names)
    for code in demo.LANGUAGES:
        own = {verse for verse in asked.text[code] if verse}
        assert not own & {verse for verse in read.text[code] if verse}
