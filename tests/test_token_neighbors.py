"""The main job, on a small checkpoint whose neighbours are planted."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import chromium
import numpy as np
import processes
import pyarrow.parquet
import pytest
import safetensors.numpy
from absl import flags
from absl.testing import flagsaver

from jaxling import sweeps
from jaxling.experiments import token_neighbors

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = {  # two letters of each; category by the paper's rule, Unicode script
    "ab": ("LATIN", "Latin"),
    "бв": ("CYRILLIC", "Cyrillic"),
    "γδ": ("GREEK", "Greek"),
    "اب": ("ARABIC", "Arabic"),
    "ກຂ": ("LAO", "Lao"),
}
LATIN, CYRILLIC, GREEK, ARABIC, _ = SCRIPTS
CONCEPTS = 40

# A machine without fonts for these scripts says so; that is plots' business.
pytestmark = pytest.mark.filterwarnings("ignore:No font of this machine")


def word(letters: str, concept: int) -> str:
    return "".join(letters[int(digit)] for digit in f"{concept:06b}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """200 words, 40 concepts in five scripts; words of a concept point one way.

    One token more has the zero vector, and the matrix two rows more than the tokens.
    """
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    tokens = [word(letters, i) for i in range(CONCEPTS) for letters in SCRIPTS]
    directions = rng.standard_normal((CONCEPTS, 64))
    x = np.repeat(directions, len(SCRIPTS), axis=0)
    x += 0.05 * rng.standard_normal(x.shape)
    x = np.concatenate([x, np.zeros((1, 64)), directions[:2]]).astype(np.float32)
    (folder / "vocab.txt").write_text("\n".join([*tokens, "[PAD]"]) + "\n", "utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": False})
    )
    safetensors.numpy.save_file(
        {"embeddings.word_embeddings.weight": x}, folder / "model.safetensors"
    )
    return folder


@pytest.fixture
def job(model, tmp_path, capsys):
    def run(**values):
        values = {"model": str(model), "workdir": str(tmp_path / "run"), **values}
        if not flags.FLAGS.is_parsed():
            flags.FLAGS(["test"])
        with flagsaver.flagsaver(**values):
            token_neighbors.main([])
        workdir = pathlib.Path(values["workdir"])
        summary = json.loads((workdir / "summary.json").read_text("utf-8"))
        table = pyarrow.parquet.read_table(workdir / "neighbors.parquet")
        return summary, table.to_pylist(), capsys.readouterr().out

    return run


def test_planted_neighbours_by_the_papers_conventions(job, tmp_path):
    summary, table, shown = job(k=4)
    assert len(table) == 201
    for line in table[:200]:
        concept = line["id"] // 5
        others = set(range(5 * concept, 5 * concept + 5)) - {line["id"]}
        assert set(line["neighbors"]["ids"]) == others
        assert max(line["neighbors"]["distances"]) < 0.02  # noise of 0.05 a side
        assert line["k_occurrence"] == 4
        expected = list(SCRIPTS.values())[line["id"] % 5]
        assert (line["category"], line["writing_system"]) == expected
    assert table[200]["token"] == "[PAD]"
    assert table[200]["neighbors"] == {"ids": [], "distances": []}
    assert summary["without_direction"] == ["[PAD]"]
    # Five scripts in each list, the token's own among them; the zero row has its own.
    assert summary["categories"]["histogram"] == [0, 1, 0, 0, 0, 200]
    latin = summary["matrix"]["names"].index("LATIN")
    cyrillic = summary["matrix"]["names"].index("CYRILLIC")
    assert summary["matrix"]["mean_where_present"][cyrillic][latin] == 1.0
    assert "browser.html" in shown
    left = {file.name for file in (tmp_path / "run").iterdir()}
    assert left == {
        *("config.json", "run.json", "summary.json", "neighbors.parquet"),
        *("browser.html", "sweep.state", "diversity.png", "matrix.png", "hubs.png"),
    }


def test_clean_conventions_count_neighbours_alone(job):
    summary, _, _ = job(k=4, conventions="clean")
    assert summary["writing_systems"]["histogram"] == [1, 0, 0, 0, 200]
    names = summary["matrix"]["names"]
    mean = np.array(summary["matrix"]["mean"], dtype=float)
    assert mean[names.index("Latin"), names.index("Latin")] == 0
    assert mean[names.index("Latin"), names.index("Greek")] == 1


def test_dictionary_frequencies_sample_and_shared_tokens(job, model, tmp_path):
    english_greek = [f"{word(LATIN, i)}\t{word(GREEK, i)}\n" for i in range(10)]
    (tmp_path / "a-g.txt").write_text("".join(english_greek), "utf-8")
    counts = [f"{word(LATIN, i)}\t{i + 1}\n" for i in range(CONCEPTS)]
    (tmp_path / "counts.tsv").write_text("".join(counts), "utf-8")
    summary, _, shown = job(
        k=4,
        dictionary=[str(tmp_path / "a-g.txt")],
        frequencies=str(tmp_path / "counts.tsv"),
    )
    found = summary["translations"]
    assert found["tokens"] == 20 and found["rate"] == 1.0
    # A list of 4 random tokens of 201 holds a given one in 2 of 100 cases.
    assert 0.01 < found["rate_of_random_lists"] < 0.03
    # 161 of 201 tokens are never seen and share the middle of their ranks.
    assert summary["deciles"]["size"] == [0, 0, 0, 161, 0, 0, 0, 0, 20, 20]
    assert (tmp_path / "run" / "deciles.png").exists()
    assert "of 20 tokens have a translation" in shown

    other = tmp_path / "other"
    other.mkdir()
    (other / "vocab.txt").write_text(
        "\n".join([word(LATIN, 3), word(CYRILLIC, 5), "x"])
    )
    (other / "tokenizer_config.json").write_text("{}")
    summary, table, _ = job(
        k=4, shared_with=[str(other)], workdir=str(tmp_path / "shared")
    )
    assert summary["queries"] == 2
    asked = [line["id"] for line in table if line["neighbors"]["ids"]]
    assert [table[i]["token"] for i in asked] == [word(LATIN, 3), word(CYRILLIC, 5)]
    # Neighbours come from the whole vocabulary.
    assert sorted(table[15]["neighbors"]["ids"]) == [16, 17, 18, 19]

    sampled = [
        job(k=4, sample=0.1, seed=seed, workdir=str(tmp_path / f"sample{i}"))[1]
        for i, seed in enumerate([0, 0, 1])
    ]
    ids = [[line["id"] for line in t if line["neighbors"]["ids"]] for t in sampled]
    assert ids[0] == ids[1] != ids[2] and 19 <= len(ids[0]) <= 20


def test_a_workdir_of_another_run_is_refused(job, model, tmp_path):
    job(k=4)
    before = (tmp_path / "run" / "summary.json").read_bytes()
    with pytest.raises(ValueError, match="other flags: k was 4 and is now 3"):
        job(k=3)
    assert (tmp_path / "run" / "summary.json").read_bytes() == before
    again, _, _ = job(k=4)
    assert (tmp_path / "run" / "summary.json").read_bytes() == before
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["resumed"] == run["bands"] == 1
    assert 0 < run["seconds"] < run["process_seconds"]
    assert 0 < run["processor_seconds"]
    assert run["scores_per_second"] is None  # nothing was left to compute


def test_a_refused_run_leaves_the_record_of_a_finished_one(job, tmp_path, monkeypatch):
    """Another version of what computes, which the state of a sweep is bound to."""
    job(k=4)
    files = {
        name: (tmp_path / "run" / name).read_bytes()
        for name in ("config.json", "summary.json", "run.json", "sweep.state")
    }
    assert json.loads(files["run.json"])["scores_per_second"] > 0
    monkeypatch.setattr(sweeps.jax, "__version__", "0.0.1")
    with pytest.raises(ValueError, match="computed_with was .* and is now .*0.0.1"):
        job(k=4)
    for name, content in files.items():
        assert (tmp_path / "run" / name).read_bytes() == content


@pytest.mark.parametrize("others", [["[PAD]"], ["[PAD]", "unknown"]])
def test_tokens_that_have_no_neighbour_are_refused_before_the_sweep(
    job, tmp_path, others
):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "vocab.txt").write_text("\n".join(others) + "\n", "utf-8")
    with pytest.raises(ValueError, match="None of the 1 tokens .* 200 of all tokens"):
        job(k=4, shared_with=[str(tmp_path / "other")])
    assert not (tmp_path / "run" / "sweep.state").exists()


def test_two_models_need_no_workdir(job, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"workdir": None, "k": 4}
    for name in ("one", "two"):
        shutil.copytree(model, tmp_path / name)
        with flagsaver.flagsaver(model=str(tmp_path / name), **values):
            token_neighbors.main([])
    made = {path.name for path in (tmp_path / "runs").iterdir()}
    assert made == {"token_neighbors-one", "token_neighbors-two"}


def test_a_damaged_record_is_written_anew(job, tmp_path):
    job(k=4)
    (tmp_path / "run" / "config.json").write_text("[]")
    job(k=4)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["flags"]["k"] == 4


def test_a_matrix_without_directions_is_named(job, model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    name = "embeddings.word_embeddings.weight"
    path = tmp_path / "copy" / "model.safetensors"
    safetensors.numpy.save_file({name: np.zeros((203, 64), np.float32)}, path)
    with pytest.raises(ValueError, match=f"No row of {name} in .*copy has a direction"):
        job(k=4, model=str(tmp_path / "copy"))


def test_a_workdir_of_another_matrix_is_refused(job, model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    job(k=4, model=str(tmp_path / "copy"))
    name = "embeddings.word_embeddings.weight"
    path = tmp_path / "copy" / "model.safetensors"
    changed = -safetensors.numpy.load_file(path)[name]
    safetensors.numpy.save_file({name: changed}, path)
    with pytest.raises(ValueError, match="other inputs: tensor was"):
        job(k=4, model=str(tmp_path / "copy"))


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.token_neighbors", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


IMPATIENT = """
    from jaxling.experiments import common, token_neighbors
    common.SILENT = 10
    common.launch(token_neighbors.main)
"""


def test_a_host_that_dies_leaves_a_workdir_that_resumes(job, model, tmp_path):
    """Process 1 is killed after its first band. The other one finishes its share, says
    who is missing and ends; the same job then finishes."""
    summary, *_ = job(k=4, panel=32, workdir=str(tmp_path / "alone"))
    run = tmp_path / "run"

    flags = [f"--model={model}", f"--workdir={run}", "--k=4", "--panel=32"]
    program = ["-m", "experiments.token_neighbors", *flags]
    by_hand = [f"--coordinator={processes.address()}", "--process_count=2"]
    first, second = (
        processes.start(
            [
                *("-c", textwrap.dedent(IMPATIENT)),
                *(*flags, *by_hand, f"--process_id={i}"),
            ]
        )
        for i in (0, 1)
    )
    state = run / "sweep.state.1-of-2"
    while not state.exists() and second.poll() is None:
        time.sleep(0.001)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    _, error = first.communicate(timeout=300)
    assert first.returncode == 1, error[-4000:]
    told = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "Another process of this job is gone" in told[0]
    assert "Traceback" not in error and "***" not in error
    assert not (run / "summary.json").exists()
    again = [
        processes.start(
            [*program, "--distributed"], env=processes.slurm(i, 2, job=os.getpid())
        )
        for i in (0, 1)
    ]
    for process in again:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-4000:]
    record = json.loads((run / "run.json").read_text("utf-8"))
    assert record["bands"] == 2 * 7 and record["resumed"] >= 7 + 1
    found = json.loads((run / "summary.json").read_text("utf-8"))
    assert found == summary
    tables = (folder / "neighbors.parquet" for folder in (run, tmp_path / "alone"))
    shared, alone = (pyarrow.parquet.read_table(table).to_pylist() for table in tables)
    for a, b in zip(shared, alone):
        assert a["neighbors"]["ids"] == b["neighbors"]["ids"]


def test_killed_at_any_instant_it_resumes_to_the_same_bytes(job, model, tmp_path):
    """`kill -9` once while it sweeps and once while it writes its results."""
    job(k=4, panel=32, workdir=str(tmp_path / "whole"))
    state = tmp_path / "run" / "sweep.state"
    arguments = (
        f"--model={model}",
        f"--workdir={tmp_path / 'run'}",
        "--k=4",
        "--panel=32",
    )
    for landmark in (state, tmp_path / "run" / "matrix.png"):
        process = start(*arguments)
        while not landmark.exists() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "run.json").exists()
    process = start(*arguments)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 1 <= run["resumed"] <= run["bands"] == 7
    for name in ("neighbors.parquet", "summary.json", "browser.html", "sweep.state"):
        resumed, whole = (tmp_path / part / name for part in ("run", "whole"))
        assert resumed.read_bytes() == whole.read_bytes(), name


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model=/nowhere"], "nowhere"),
        (["--dictionary=/nowhere.txt"], "/nowhere.txt: No such file"),
        (["--k=20000"], "--k must be less than the"),
        (["--workdir=/dev/null/run"], "/dev/null/run"),
    ],
)
def test_bad_input_is_one_paragraph(model, tmp_path, arguments, message):
    process = start(f"--model={model}", f"--workdir={tmp_path}", *arguments)
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 1 and "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium on this machine")
def test_the_page_of_a_run_walks(job, tmp_path):
    job(k=4)
    with chromium.Page() as page:
        page.open(tmp_path / "run" / "browser.html")
        page.until("document.documentElement.dataset.ready")
        page.run("$('query').focus()")
        page.type(word(ARABIC, 7))
        page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter")
        page.until(f"$('name').textContent === '{word(ARABIC, 7)}'")
        shown = page.run(
            "[...document.querySelectorAll('#list .token')].map(n => n.textContent)"
        )
        assert set(shown) == {word(script, 7) for script in SCRIPTS} - {word(ARABIC, 7)}
        assert page.complaints() == []
