"""The two probing experiments from the command line, on small inputs."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(name: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_separability_of_planted_scripts_beside_the_papers_bars(tmp_path, rng):
    folder = tmp_path / "xlm-roberta-base"
    folder.mkdir()
    starts = {"LATIN": 0x100, "CYRILLIC": 0x430, "CJK": 0x4E00, "GREEK": 0x3B1}
    tokens, centres = [], []
    for c, (name, start) in enumerate(starts.items()):
        for i in range(12 if name == "GREEK" else 40):
            # Greek lies where Cyrillic lies; it has too few tokens for a bar.
            tokens.append(chr(start + i % 20) + chr(start + i // 20) * 2)
            centres.append(min(c, 2))
    rows = rng.normal(size=(len(tokens), 8)).astype(np.float32)
    rows[np.arange(len(tokens)), centres] += 6
    description = {
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}}
    }
    (folder / "tokenizer.json").write_text(json.dumps(description), "utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    save_file(
        {"bert.embeddings.word_embeddings.weight": rows}, folder / "model.safetensors"
    )
    flags = [f"--model={folder}", f"--workdir={tmp_path / 'run'}"]
    done = run("script_separability", *flags, "--min_tokens=20")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = {record["name"]: record for record in summary["categories"]}
    assert set(found) == {"LATIN", "CYRILLIC", "CJK"}
    assert found["LATIN"]["mean"] > 0.95 and found["LATIN"]["rows"] == 80
    assert summary["unsolved"] == 0 and "paper" in done.stdout
    table = pyarrow.parquet.read_table(tmp_path / "run" / "separability.parquet")
    assert table["paper"].to_pylist() == [0.991, 0.999, 0.998]
    assert (tmp_path / "run" / "pairs.png").stat().st_size > 0

    done = run("script_separability", *flags[:1], "--min_tokens=50")
    assert done.returncode == 1 and "--min_tokens" in done.stderr
    assert "Traceback" not in done.stderr


def test_layers_of_the_small_model_from_the_command_line(tmp_path):
    lines = ["text\tlabel\tlanguage\titem"]
    words = {"eng": ("light", "dark"), "swh": ("nuru", "giza")}
    for i in range(60):
        for language, pair in words.items():
            lines.append(f"{pair[i % 2]} {i}\tl{i % 2}\t{language}\t{i}")
    path = tmp_path / "texts.tsv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    flags = ["--model=demo-small", "--level=sentence", f"--texts={path}"]
    done = run("layer_probes", *flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["label"]["accuracy_by_layer"][0] > 0.9
    assert summary["transfer"]["languages"] == ["eng", "swh"]
    assert summary["transfer"]["within_by_layer"][0] > 0.9
    for name in ("label_accuracy", "label_selectivity", "label_layers", "transfer"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 0
    # A rare label is left out of both; with one label a language there is no transfer.
    rare = [f"rare {i}\tl2\teng\t{100 + i}" for i in range(9)]
    single = [
        line.replace("\tl1\teng", "\tl0\teng").replace("\tl0\tswh", "\tl1\tswh")
        for line in lines
    ]
    for name, given, languages in (
        ("rare", [*lines, *rare], ["eng", "swh"]),
        ("single", single, None),
    ):
        other = tmp_path / f"{name}.tsv"
        other.write_text("\n".join([*given, "long " * 200 + "\tl0\teng\t99"]), "utf-8")
        workdir = tmp_path / name
        done = run(
            "layer_probes", *flags[:2], f"--texts={other}", f"--workdir={workdir}"
        )
        assert done.returncode == 0, done.stderr
        assert f"1 of {len(given)} texts are cut" in done.stdout
        summary = json.loads((workdir / "summary.json").read_text())
        assert summary["label"]["labels"] == ["l0", "l1"]
        assert summary["transfer"].get("languages") == languages
        assert ("No transfer matrix." in done.stdout) == (languages is None)

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    path.write_text(path.read_text("utf-8").replace("light 0\tl0", "light 0\tl1"))
    done = run("layer_probes", *flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1 and "a run with other inputs" in done.stderr
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())

    path.write_text("words\tlabel\na\tb\n", "utf-8")
    done = run("layer_probes", *flags, f"--workdir={tmp_path / 'other'}")
    assert done.returncode == 1 and "missing ['text']" in done.stderr
    assert "Traceback" not in done.stderr


def test_labels_that_cannot_be_probed_are_named(tmp_path):
    lines = ["text\tlabel\tlanguage"]
    for i in range(60):
        noun, verb = f"{'abcdefghijkl'[i % 12]}at", f"{'mnopqrstuvwx'[i % 12]}ump"
        rare = ("!", " X") if i < 12 else ("", "")
        text = f"the {noun} {verb} {rare[0]}".strip()
        lines.append(f"{text}\tDET NOUN VERB{rare[1]}\t{('eng', 'deu')[i % 2]}")
    path = tmp_path / "texts.tsv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    flags = ["--model=demo-small", f"--texts={path}", f"--workdir={tmp_path / 'run'}"]
    done = run("layer_probes", *flags)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    left = summary["label"]["left_out"]
    assert left == {"DET": "60 rows, a class of its task in one fold", "X": "12 rows"}
    assert summary["label"]["labels"] == ["NOUN", "VERB"]
    assert f"DET ({left['DET']}), X (12 rows)" in done.stdout
    assert "transfer" not in summary  # labels of words have none

    lines = [line for line in lines if line.endswith(("language", "eng"))]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    done = run("layer_probes", *flags[:2], f"--workdir={tmp_path / 'few'}")
    assert done.returncode == 1 and "DET (30), NOUN (30), VERB (30)" in done.stderr
    assert "50 rows" in done.stderr and not (tmp_path / "few").exists()


@pytest.mark.parametrize(
    "flags, refused",
    [
        (["--model=demo-small", "--revision=main"], "--revision"),
        (["--languages=eng"], "--languages"),
        (["--texts=texts.tsv", "--per_language=9"], "--per_language"),
    ],
)
def test_flags_without_effect_on_the_layers_are_refused(tmp_path, flags, refused):
    done = run("layer_probes", *flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1 and f"{refused} has no meaning here" in done.stderr
    assert not (tmp_path / "run").exists()
