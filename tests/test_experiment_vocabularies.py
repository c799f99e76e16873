"""The vocabularies experiment from the command line, on tiny checkpoints."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow.parquet
from safetensors.numpy import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = ["<pad>", "▁the", "▁dog", "слово", "бог", "日本", "道", "كلمة", "7", "।"]


def checkpoint(folder: pathlib.Path, tokens: list[str], rng) -> pathlib.Path:
    """A tokenizer and a BERT-like embedding with two rows too many."""
    folder.mkdir()
    description = {
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}},
        "added_tokens": [{"id": 0, "content": tokens[0], "special": True}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(description), "utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    rows = rng.normal(size=(len(tokens) + 2, 16)).astype(np.float32)
    save_file(
        {"bert.embeddings.word_embeddings.weight": rows}, folder / "model.safetensors"
    )
    return folder


def run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.vocabularies", *flags]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_overlap_and_map_from_the_command_line(tmp_path, rng):
    a = checkpoint(tmp_path / "a", WORDS, rng)
    b = checkpoint(tmp_path / "b", [*WORDS[:4][::-1], "▁cat", "▁sat"], rng)
    workdir = tmp_path / "run"
    flags = [f"--model={a}", f"--models={b}", "--umap=off", f"--workdir={workdir}"]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["tokens"] == {str(a): 10, str(b): 6}
    np.testing.assert_allclose(summary["mean_overlap"], (1 + 1 + 4 / 6 * 2) / 4)
    assert summary["map"]["tokens"] == 10
    assert summary["map"]["writing_systems"]["Cyrillic"] == 2
    assert summary["map"]["categories"] == {
        "LATIN": 3,
        "CYRILLIC": 2,
        "CJK": 2,
        "ARABIC": 1,
        "N": 1,
        "P": 1,
    }
    table = pyarrow.parquet.read_table(workdir / "map.parquet").to_pydict()
    assert table["token"] == WORDS
    assert table["writing_system"][0] == "Special"
    assert {path.name for path in workdir.iterdir()} == {
        "config.json",
        "run.json",
        "summary.json",
        "map.parquet",
        "overlap.parquet",
        "overlap.png",
        "not_latin.png",
        "pca.png",
    }
    assert "0.667" in done.stdout and str(workdir) in done.stdout
    shared = run(*flags[:3], f"--shared_with={b}", f"--workdir={tmp_path / 'shared'}")
    assert shared.returncode == 0, shared.stderr
    table = pyarrow.parquet.read_table(tmp_path / "shared" / "map.parquet").to_pydict()
    assert table["token"] == WORDS[:4] and table["id"] == [0, 1, 2, 3]


def test_too_little_for_a_map_still_gives_the_overlap(tmp_path, rng):
    """One shared token is no map; rows that are no numbers are named and left out."""
    a = checkpoint(tmp_path / "a", WORDS, rng)
    b = checkpoint(tmp_path / "b", ["▁dog", "▁cat"], rng)
    name = "bert.embeddings.word_embeddings.weight"
    rows = load_file(a / "model.safetensors")[name]
    rows[3, 1] = np.nan
    save_file({name: rows}, a / "model.safetensors")
    flags = [f"--model={a}", "--umap=off", f"--workdir={tmp_path / 'run'}"]
    done = run(*flags, f"--shared_with={b}")
    assert done.returncode == 0, done.stderr
    assert f"No map: 1 rows of {name} in {a}" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # A model that is named is not compared with a built-in one.
    assert summary["tokens"] == {str(a): 10, str(b): 2} and summary["map"] is None
    assert (tmp_path / "run" / "overlap.parquet").exists()
    done = run(*flags[:2], f"--workdir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr
    assert f"1 rows of {name} in {a} are not finite, such as that of слово" in (
        done.stderr
    )
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["not_finite"] == ["слово"] and summary["map"]["tokens"] == 9


def test_bad_input_ends_in_one_paragraph(tmp_path, rng):
    a = checkpoint(tmp_path / "a", WORDS, rng)
    (a / "tokenizer.json").write_text("{")
    done = run(f"--model={a}", "--models=", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "tokenizer.json must be JSON" in done.stderr
    assert "Traceback" not in done.stderr
