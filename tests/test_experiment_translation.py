"""The word-translation and layer-trace experiments on a tiny model and lexicon."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pyarrow.parquet
import pytest
import tokenizers

from jaxling import models

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = [(f"word{i}", f"mot{i}") for i in range(12)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint with its tokenizer, and a lexicon."""
    folder = tmp_path_factory.mktemp("place")
    config = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    models.save(models.build(config, jax.random.key(0)), folder / "model")
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.train_from_iterator(
        ["English: word1\nFrench: mot1\n"],
        tokenizers.trainers.BpeTrainer(
            vocab_size=280,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    pair = {
        "model_type": "t5",
        "vocab_size": 300,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    models.save(models.build(pair, jax.random.key(1)), folder / "pair")
    broken = models.build(config, jax.random.key(0))
    broken.unembedding[...] = broken.unembedding[...].at[5, 5].set(np.nan)
    models.save(broken, folder / "broken")
    for name in ("model", "pair", "broken"):
        found.save(str(folder / name / "tokenizer.json"))
    lines = "".join(f"{a}\t{b}\n" for a, b in WORDS)
    (folder / "en-fr.txt").write_text(lines)
    return folder


def run(name: str, place: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"experiments.{name}", f"--model={place}/model"]
    return subprocess.run(
        [*command, *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )


def test_words_are_scored_and_traced_by_the_command_line(place, tmp_path):
    lexicon = [f"--lexicon=eng-fra:{place}/en-fr.txt", "--names=fra:French"]
    small = ["--words=3", "--shots=2", "--draws=1"]
    first = tmp_path / "words"
    done = run("word_translation", place, *lexicon, *small, f"--workdir={first}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((first / "summary.json").read_text())
    assert set(summary["pairs"]) == {"eng-fra", "fra-eng"} and summary["items"] == 6
    items = pyarrow.parquet.read_table(first / "items.parquet").to_pydict()
    pair = summary["pairs"]["eng-fra"]
    own = [s for s, code in zip(items["score"], items["source"]) if code == "eng"]
    np.testing.assert_allclose(pair["score"]["mean"], np.mean(own))
    assert pair["score"]["low"] <= pair["score"]["mean"] <= pair["score"]["high"]
    assert {"score.png", "first.png", "task.json"} <= {
        path.name for path in first.iterdir()
    }

    second = tmp_path / "trace"
    task = f"--task={first}/task.json"
    done = run("layer_trace", place, task, *small, f"--workdir={second}")
    assert done.returncode == 0, done.stderr
    traced = pyarrow.parquet.read_table(second / "items.parquet").to_pydict()
    assert traced["word"] == items["word"] and traced["answer"] == items["answer"]
    np.testing.assert_allclose(traced["score"], items["score"], atol=1e-6)
    assert all(len(row) == 2 for row in traced["top_token"] + traced["source_mass"])
    summary = json.loads((second / "summary.json").read_text())
    assert sum(s["items"] for s in summary["pairs"].values()) == 6
    assert summary["all"]["pivot"] == traced["behaviour"].count("pivot")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lexicon=eng-fra"], "source-target:path"),
        (["--lexicon=eng-fra:nowhere.txt", "--names=fra:French"], "nowhere.txt"),
        (["--lexicon=eng-xx:{}/en-fr.txt"], "No prompt name"),
        (["--task={}/en-fr.txt"], "is not a word-translation task"),
        (["--task={}/en-fr.txt", "--hard"], "--task excludes --lexicon, --word_lists"),
        (["--word_lists=xx:{}/en-fr.txt"], "which no lexicon has"),
        (["--word_lists=eng:nowhere.txt"], "nowhere.txt"),
        (["--names=French"], "--names takes key:value"),
    ],
)
def test_bad_input_ends_in_one_paragraph(place, tmp_path, flags, words):
    flags = [flag.format(place) for flag in flags]
    done = run("word_translation", place, *flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr


def test_an_encoder_decoder_is_asked_by_tokens_and_read_by_a_tuned_lens(
    place, tmp_path
):
    lexicon = [f"--lexicon=eng-fra:{place}/en-fr.txt", "--names=fra:French"]
    pair = [f"--model={place}/pair", *lexicon]
    tokens = ["--language_tokens=eng:E,fra:F", "--hard", "--words=2"]
    done = run("layer_trace", place, *pair, *tokens, f"--workdir={tmp_path / 'trace'}")
    assert done.returncode == 0, done.stderr
    traced = pyarrow.parquet.read_table(tmp_path / "trace" / "items.parquet")
    assert traced.num_rows == 4 and set(traced["position"].to_pylist()) == {1}

    lines = tmp_path / "lines.txt"
    lines.write_text("English: word3\tF mot3\n")
    said = ["--text=word1", "--decoder_text=F mot1", "--train_steps=2"]
    tuned = [f"--tuned_lens={tmp_path / 'tuned'}", f"--train_text={lines}"]
    flags = [*pair, *said, *tuned]
    done = run("lens", place, *flags, f"--workdir={tmp_path / 'lens'}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "lens" / "summary.json").read_text())
    assert summary["reading"] == "tuned lens"
    done = run("lens", place, *flags, "--stack=encoder", f"--workdir={tmp_path / 'b'}")
    assert done.returncode == 1 and "reads the decoder, not the" in done.stderr


def test_a_text_is_read_in_every_layer(place, tmp_path):
    text = "English: word1 French: mot1"
    lexicon = [f"--lexicon=eng-fra:{place}/en-fr.txt"]
    flags = [f"--text={text}", "--target= mot2", f"--workdir={tmp_path / 'run'}"]
    lines = tmp_path / "lines.txt"
    lines.write_text("English: word3\nFrench: mot5\n")
    tuned = [f"--tuned_lens={tmp_path / 'tuned'}", f"--train_text={lines}"]
    done = run("lens", place, *lexicon, *flags, *tuned, "--train_steps=3")
    assert done.returncode == 0, done.stderr
    coded = tokenizers.Tokenizer.from_file(str(place / "model" / "tokenizer.json"))
    ids = coded.encode(text).ids
    table = pyarrow.parquet.read_table(tmp_path / "run" / "trajectory.parquet")
    table = table.to_pydict()
    assert table["token_id"] == ids * 2
    assert table["target_id"] == [*ids[1:], coded.encode(" mot2").ids[0]] * 2
    log_probs = jax.nn.log_softmax(models.load(place / "model")(np.array([ids]))[0])
    own = [log_probs[i, t] for i, t in enumerate(ids[1:])]
    last = table["target_log_probability"][len(ids) :]
    np.testing.assert_allclose(last[:-1], own, atol=1e-4)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reading"] == "tuned lens"
    for bounds in summary["mass"]["languages"].values():
        assert np.all(np.array(bounds["lower"]) <= np.array(bounds["upper"]) + 1e-6)
    scripts = [bounds["lower"] for bounds in summary["mass"]["scripts"].values()]
    assert np.sum(scripts, 0)[-1] <= 1 + 1e-5
    assert (tmp_path / "tuned").is_dir() and "lens.html" in done.stdout
    assert {"languages.png", "scripts.png", "tokens.png", "lens.html"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model={}/broken"], "Layer 0 of"),
        (["--train_steps=3"], "--train_steps has no meaning here"),
    ],
)
def test_a_lens_that_cannot_be_read_ends_in_one_paragraph(
    place, tmp_path, flags, words
):
    given = [flag.format(place) for flag in flags]
    lexicon = f"--lexicon=eng-fra:{place}/en-fr.txt"
    done = run(
        "lens", place, "--text=word1", lexicon, *given, f"--workdir={tmp_path / 'run'}"
    )
    assert done.returncode == 1, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
