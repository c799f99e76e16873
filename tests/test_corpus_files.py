"""Corpora as files: every format, every cut, every kind of damage, and killed runs."""

import gzip
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxling import corpus, training

TEXTS = ["first one", "zweites", "три слова тут", "", "第四", "\tsix  ", "é" * 40]
IDS = [[1, 2, 3], [7], [70_000, 2], [5, 5]]


def read(sources, damaged=None, **options) -> list:
    shards = corpus.find_shards([str(source) for source in sources], **options)
    return [d for shard in shards for d in corpus.read_shard(shard, damaged)]


def jsonl(texts, key="text") -> bytes:
    return b"".join(
        json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0).encode() + b"\n"
        for i, text in enumerate(texts)
    )


def zst(raw: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(raw) // 2  # two frames, as parallel writers leave them
    return b"".join(
        zstandard.ZstdCompressor().compress(p) for p in (raw[:half], raw[half:])
    )


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zst])
def test_lines_of_text_and_json(tmp_path, pack):
    ending = {bytes: "", gzip.compress: ".gz", zst: ".zst"}[pack]
    (tmp_path / "b").mkdir()
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(jsonl(TEXTS)))
    lines = "\r\n".join(TEXTS).encode("utf-8-sig")
    (tmp_path / "b" / f"c.txt{ending}").write_bytes(pack(lines))
    (tmp_path / ".hidden.txt").write_text("never")
    assert read([tmp_path]) == TEXTS * 2
    assert read([tmp_path / "**" / "c.*"]) == TEXTS
    assert read([tmp_path / f"a.jsonl{ending}"], format="text")[0][:8] == '{"id": 0'


def test_fields_within_fields(tmp_path):
    records = [{"meta": {"body": text}} for text in TEXTS]
    lines = "\n\n".join(json.dumps(record) for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    table = pa.table({"other": range(7), "meta": [r["meta"] for r in records]})
    pa.parquet.write_table(table, tmp_path / "b.parquet")
    assert read([tmp_path], field="meta.body") == TEXTS * 2


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.utf8())],
)
def test_parquet_texts(tmp_path, kind):
    texts = TEXTS * 50
    table = pa.table({"text": pa.array(texts).cast(kind)})
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=33)
    assert read([tmp_path]) == texts
    cut = corpus.find_shards([str(tmp_path)], size=1)
    assert len(cut) == 11 and read([tmp_path], size=1) == texts


def test_token_ids_in_every_format(tmp_path):
    training.write_tokens(tmp_path / "made", IDS, vocabulary_size=1 << 17)
    flat = np.concatenate([[*ids, 0] for ids in IDS])[:-1].astype(np.uint32)
    np.save(tmp_path / "flat.npy", flat)
    (tmp_path / "a.jsonl").write_bytes(jsonl(IDS, "ids"))
    for kind in (pa.list_(pa.uint32()), pa.large_list(pa.int64())):
        table = pa.table({"ids": pa.array(IDS, kind)})
        pa.parquet.write_table(table, tmp_path / f"{kind.value_type}.parquet")
    for name, options in (
        ("made", {}),
        ("flat.npy", {"end_token": 0}),
        ("a.jsonl", {"field": "ids"}),
        ("uint32.parquet", {"field": "ids"}),
        ("int64.parquet", {"field": "ids"}),
    ):
        for size in (1, 9, 12, 1 << 20):
            found = read([tmp_path / name], size=size, **options)
            assert [ids.tolist() for ids in found] == IDS, (name, size)
    (whole,) = read([tmp_path / "flat.npy"])
    np.testing.assert_array_equal(whole, flat)
    bare = tmp_path / "bare.bin"
    flat.tofile(bare)
    given = dict(format="tokens", token_type="uint32")
    for size in (1, 9, 1 << 20):
        found = read([bare], end_token=0, size=size, **given)
        assert [ids.tolist() for ids in found] == IDS
    (whole,) = read([bare], **given)
    np.testing.assert_array_equal(whole, flat)
    for place, options, words in (
        (bare, dict(format="tokens"), "name their type"),
        (bare, dict(token_type="uint32"), "`format` be tokens"),
        (bare, given | dict(token_type="float32"), "must be one of"),
        (bare, given | dict(token_type="int64"), "44 bytes, which hold no ids"),
        (tmp_path / "flat.npy", given, "has a header"),
    ):
        with pytest.raises(ValueError, match=words):
            read([place], **options)


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_wherever_a_file_is_cut(tmp_path, end):
    raw = "\n".join(TEXTS).encode() + end
    (tmp_path / "a.txt").write_bytes(raw)
    for size in range(1, len(raw) + 2):
        assert read([tmp_path / "a.txt"], size=size) == TEXTS
    (tmp_path / "empty.txt").touch()
    assert read([tmp_path / "empty.txt"]) == []


def test_urls(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.jsonl.gz", gzip.compress(jsonl(TEXTS)))
    memory.pipe("/corpus/deep/b.txt", "\n".join(TEXTS).encode())
    assert read(["memory://corpus"], size=7) == TEXTS * 2
    assert read(["memory://corpus/*.gz"]) == TEXTS
    (tmp_path / "a.txt").write_text("one")
    assert read([f"file://{tmp_path}/a.txt"]) == ["one"]
    assert read([f"file://{tmp_path}/?.txt"]) == ["one"]


DAMAGED = (
    b'{"text": "good"}\n{"text": broken}\n{"other": 1}\n{"text": null}\n[]\n'
    b'{"text": "caf\xe9 bad"}\n{"text": ""}\n{"text": [1, -2]}\n'
    b'{"text": "half \\ud800"}\n{"text": "last"}\n'
    b'{"text":%s\n{"text": "cut' % (b"[" * 100_000)
)


def test_damaged_records_are_counted_and_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(DAMAGED)
    (shard,) = corpus.find_shards([str(path)])
    plan = corpus.Plan(corpus.surface_terms(["good", "bad", "half", "last"]))
    counts = corpus.count_shard(shard, plan)
    assert counts.term_documents.tolist() == [1, 1, 1, 1] and counts.documents == 4
    damage = counts.damage
    assert (damage.skipped, damage.mended, damage.empty) == (7, 2, 1)
    assert len(damage.examples) == 9
    texts = list(corpus.read_shard(shard, lambda damage: None))
    assert texts[1] == "caf\ufffd bad" and texts[3] == "half \ufffd"
    assert f"{path}, line 2: no JSON" in damage.examples[0]
    assert "'text'" in damage.examples[1]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: no JSON"):
        corpus.count_shard(shard, plan, strict=True)
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="no UTF-8"):
        read([path], format="text")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.parquet"])
def test_a_file_that_ends_too_early(tmp_path, name):
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, 50))) for _ in range(20_000)]
    path = tmp_path / name
    if name.endswith("parquet"):
        table = pa.table({"text": texts})
        pa.parquet.write_table(table, path, row_group_size=1000)
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2 : len(raw) // 2 + 2000] = bytes(2000)
    else:
        pack = zst if name.endswith("zst") else gzip.compress
        raw = pack("\n".join(texts).encode())
        raw = raw[: len(raw) * 3 // 4]
    path.write_bytes(raw)
    met = []
    found = read([path], met.append)
    assert 1000 < len(found) < 20_000 and set(found[:1000]) <= set(texts)
    assert sum(damage.skipped for damage in met) in (1, 2), met
    assert name in met[0].examples[0]
    with pytest.raises(ValueError, match=name):
        read([path])


class Failing(io.FileIO):
    """A file whose middle cannot be reached."""

    def readinto(self, buffer) -> int:
        if self.tell() >= 10_000 and self.tell() < os.path.getsize(self.name) - 30_000:
            raise ConnectionResetError(104, "connection reset by peer")
        return super().readinto(buffer)

    def read(self, size=-1) -> bytes:
        buffer = bytearray(1 << 20 if size < 0 else size)
        return bytes(buffer[: self.readinto(buffer)])


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.parquet"])
def test_a_network_that_fails_is_no_damage(tmp_path, name, monkeypatch):
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, 50))) for _ in range(20_000)]
    path = tmp_path / name
    if name.endswith("parquet"):
        table = pa.table({"text": texts})
        pa.parquet.write_table(table, path, row_group_size=1000)
    else:
        pack = {"txt": bytes, "gz": gzip.compress, "zst": zst}[name.split(".")[-1]]
        path.write_bytes(pack("\n".join(texts).encode()))
    (shard,) = corpus.find_shards([str(path)])
    monkeypatch.setattr("jaxling.corpus.files.opened", lambda url: Failing(url))
    met = []
    with pytest.raises(ConnectionResetError):
        list(corpus.read_shard(shard, met.append))
    assert not met


@pytest.mark.parametrize("name", ["a.parquet", "b.jsonl.gz", "c.jsonl.zst", "d.npy"])
def test_a_file_that_is_something_else(tmp_path, name):
    (tmp_path / name).write_bytes(b"something else, and long enough to be looked into")
    met = []
    if name == "d.npy":
        with pytest.raises(ValueError, match="d.npy"):
            read([tmp_path / name], met.append)
        return
    assert read([tmp_path / name], met.append) == []
    assert [damage.skipped for damage in met] == [1]


def test_fields_and_columns_that_are_not_there_are_damage(tmp_path):
    table = pa.table({"meta": [{"body": "a"}] * 3, "n": [1.5, 2.5, None]})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    records = '{"meta": "a"}\n"a"\n[1]\n{"meta": {"body": {"x": 1}}}\n'
    (tmp_path / "b.jsonl").write_text(records)
    for field in ("gone", "meta.gone", "meta.body.x", "n", ""):
        met = []
        assert read([tmp_path], met.append, field=field) == []
        assert sum(damage.skipped for damage in met) == 5, (field, met)


def test_integers_of_every_kind(tmp_path):
    terms = corpus.Terms(("one",), (((1,),),), "tokens")
    for kind in (pa.list_(pa.uint64()), pa.list_(pa.int8()), pa.list_(pa.int32(), 2)):
        table = pa.table({"text": pa.array([[1, 2], [3, 1]], kind)})
        pa.parquet.write_table(table, tmp_path / "a.parquet")
        (shard,) = corpus.find_shards([str(tmp_path / "a.parquet")])
        plan = corpus.Plan(terms, tokens=True, vocabulary_size=4)
        counts = corpus.count_shard(shard, plan)
        assert counts.term_occurrences.tolist() == [2], kind
        assert counts.token_occurrences.tolist() == [0, 2, 1, 1]
    table = pa.table({"text": [[1, -2], [3], [None], None]})
    pa.parquet.write_table(table, tmp_path / "c.parquet")
    met = []
    assert [ids.tolist() for ids in read([tmp_path / "c.parquet"], met.append)] == [[3]]
    assert [damage.skipped for damage in met] == [1] * 3
    with pytest.raises(ValueError, match=r"a\.parquet: A token must be in \[0, 2\)"):
        corpus.count_shard(shard, plan._replace(vocabulary_size=2))
    for array in (np.zeros(3), np.zeros((2, 2), int)):
        np.save(tmp_path / "b.npy", array)
        with pytest.raises(ValueError, match=r"b\.npy must hold integers on one axis"):
            read([tmp_path / "b.npy"])


def test_a_large_array_is_cut_without_being_read(tmp_path):
    path = tmp_path / "a.npy"
    # A hole of 80 GB: whoever reads it through, or counts it one by one, is seen.
    array = np.lib.format.open_memmap(path, "w+", np.uint32, (20_000_000_000,))
    array[:6] = [5, 6, 0, 7, 0, 8]
    array.flush()
    shards = corpus.find_shards([str(path)], end_token=0)
    assert len(shards) == -(-20_000_000_000 // (corpus.readers.SHARD // 4))
    documents = corpus.read_shard(shards[0])
    assert [next(documents).tolist() for _ in range(4)] == [[5, 6], [7], [8], []]


def test_token_files_within_a_directory_are_one_source_each(tmp_path):
    training.write_tokens(tmp_path / "in" / "made", IDS, vocabulary_size=1 << 17)
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(IDS))
    for source in (tmp_path, tmp_path / "**"):
        assert [ids.tolist() for ids in read([source])] == IDS * 2


def test_documents_with_their_labels(tmp_path):
    lines = [
        '{"text": "one", "meta": {"code": "eng"}}',
        '{"text": "zwei", "meta": {"code": null}}',
        '{"text": "trois", "meta": {}}',
        '{"text": 4, "meta": {"code": "eng"}}',
        "damaged",
        '{"text": [5], "meta": {"code": "x"}}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = [{"code": "eng"}, None, {"code": "deu"}, {"code": "x"}]
    texts = ["one", "two", "drei", None]
    pa.parquet.write_table(
        pa.table({"meta": rows, "text": texts}), tmp_path / "b.parquet"
    )
    expected = {"a.jsonl": [("one", "eng"), ([5], "x")]}
    expected["b.parquet"] = [("one", "eng"), ("drei", "deu")]
    of = {"a.jsonl": len(lines), "b.parquet": len(rows)}
    for name, labelled in expected.items():
        (shard,) = corpus.find_shards([str(tmp_path / name)])
        met = []
        found = list(corpus.read_labelled(shard, "meta.code", met.append))
        assert [(d if isinstance(d, str) else d.tolist(), x) for d, x in found] == (
            labelled
        )
        assert sum(damage.skipped for damage in met) == of[name] - len(labelled)
        with pytest.raises(ValueError, match=f"{name}.*(field 'meta.code'|no value)"):
            list(corpus.read_labelled(shard, "meta.code"))
    (tmp_path / "c.txt").write_text("one")
    (shard,) = corpus.find_shards([str(tmp_path / "c.txt")])
    with pytest.raises(ValueError, match="have no field"):
        corpus.read_labelled(shard, "meta.code")


def test_a_document_of_fifty_megabytes(tmp_path):
    text = "lorem ipsum dolor sit amet " * 1_940_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (shard,) = corpus.find_shards([str(tmp_path)])
    plan = corpus.Plan(corpus.surface_terms(["ipsum dolor", "amet", "amet lorem"]))
    counts = corpus.count_shard(shard, plan)
    assert counts.term_occurrences.tolist() == [1_940_000, 1_940_000, 1_939_999]
    assert counts.characters == len(text) > 50e6


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.bin", {}, "does not say what is in it"),
        ("nowhere.txt", {}, "no file at"),
        ("a.txt", {"format": "csv"}, "must be one of"),
        ("a.txt", {"size": 0}, "at least 1 byte"),
    ],
)
def test_a_source_that_is_no_corpus(tmp_path, name, options, words):
    (tmp_path / "a.bin").touch()
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=words):
        corpus.find_shards([str(tmp_path / name)], **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A corpus of 40 files, some of it damaged."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(60)]
    for number in range(40):
        lines = [" ".join(rng.choice(words, 20)) for _ in range(50)]
        raw = jsonl(lines) + (b"{damaged\n" if number % 3 == 0 else b"")
        (folder / f"{number:02d}.jsonl").write_bytes(raw)
    return folder


PLAN = corpus.Plan(corpus.surface_terms([f"w{i}" for i in range(0, 60, 2)]), window=5)


def same(a: corpus.Counts, b: corpus.Counts) -> None:
    for x, y in zip(a, b):
        np.testing.assert_equal(x, y)


def test_the_counts_of_a_corpus_as_a_file(place, tmp_path):
    shards = corpus.find_shards([str(place)])
    run = corpus.count_corpus(shards, PLAN, processes=1, progress=False)
    counts = run.counts
    assert counts.documents == 2000 and counts.damage.skipped == 14
    assert (
        counts.damage.examples
        == tuple(
            example
            for s in shards
            for example in corpus.count_shard(s, PLAN).damage[-1]
        )[:10]
    )
    path = tmp_path / "counts.npz"
    corpus.save_counts(counts, path)
    same(corpus.load_counts(path), counts)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="no file of counts, or damaged"):
        corpus.load_counts(path)


RUN = """
    import os, pathlib, sys, time
    from jaxling import corpus
    from jaxling.corpus import runs
    from tests_of_counting import PLAN

    def slow(shard, plan, strict=False, count=runs.count_shard):
        time.sleep(0.05)
        return count(shard, plan, strict=strict)

    runs.count_shard = slow  # in this process, and those it starts
    if __name__ == "__main__":
        shards = corpus.find_shards([sys.argv[1]])
        run = corpus.count_corpus(
            shards, PLAN, workdir=sys.argv[2], processes=int(sys.argv[3])
        )
        corpus.save_counts(run.counts, sys.argv[2] + "/whole.npz")
        print("resumed", run.resumed)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_to_the_same_counts(place, tmp_path, processes):
    (tmp_path / "tests_of_counting.py").write_text(
        "from jaxling import corpus\n"
        "PLAN = corpus.Plan(corpus.surface_terms("
        "[f'w{i}' for i in range(0, 60, 2)]), window=5)\n"
    )
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(RUN))
    work = tmp_path / "run"
    command = [sys.executable, str(program), str(place), str(work), str(processes)]
    root = pathlib.Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}:{tmp_path}"}
    killed = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while len(list(work.glob("shards-*.npz"))) < 5:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    files = sorted(work.glob("shards-*.npz"))
    assert 5 <= len(files) < 40
    files[0].write_bytes(files[0].read_bytes()[:-20])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is counted again" in done.stderr
    assert 4 <= int(done.stdout.split()[-1]) < 40
    shards = corpus.find_shards([str(place)])
    whole = corpus.count_corpus(shards, PLAN, processes=1, progress=False).counts
    same(corpus.load_counts(work / "whole.npz"), whole)
    # Sixteen neighbours are one file.
    assert len(list(work.glob("shards-*.npz"))) <= 3
    with pytest.raises(ValueError, match="holds a count of other plan"):
        corpus.count_corpus(shards, PLAN._replace(window=6), workdir=work)
    with pytest.raises(ValueError, match="holds a count of other shards"):
        corpus.count_corpus(shards[1:], PLAN, workdir=work)


def test_damage_stops_a_strict_run(place, tmp_path):
    shards = corpus.find_shards([str(place)])
    options = dict(workdir=tmp_path, processes=1, progress=False)
    assert corpus.count_corpus(shards, PLAN, **options).counts.damage.skipped == 14
    with pytest.raises(ValueError, match="no JSON"):
        corpus.count_corpus(shards, PLAN, strict=True, **options)
    for processes in (1, 2):
        with pytest.raises(ValueError, match="no JSON"):
            corpus.count_corpus(
                shards, PLAN, processes=processes, strict=True, progress=False
            )


def test_a_dask_cluster_that_loses_a_worker(place):
    distributed = pytest.importorskip("distributed")
    shards = corpus.find_shards([str(place)])
    whole = corpus.count_corpus(shards, PLAN, processes=1, progress=False).counts
    # Often enough each that the worker dies in the middle of the run.
    repeats = 30
    killed = []

    def kill(client, workers: list[int]) -> None:
        while not any(client.processing().values()):
            time.sleep(0.005)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
            killed.append(worker)

    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        workers = list(client.run(os.getpid).values())
        assert len(workers) == 2
        one = threading.Thread(target=kill, args=(client, workers[:1]), daemon=True)
        one.start()
        counts = corpus.count_on_dask(shards * repeats, PLAN, client)
        one.join()
        assert len(killed) == 1
        # A cluster that forgives no death says so.
        client.wait_for_workers(2)
        cluster.scheduler.allowed_failures = 0
        workers = list(client.run(os.getpid).values())
        both = threading.Thread(target=kill, args=(client, workers), daemon=True)
        both.start()
        with pytest.raises(ChildProcessError, match="The Dask cluster gave up"):
            corpus.count_on_dask(shards * repeats, PLAN, client)
        both.join()
    assert counts.documents == repeats * whole.documents
    for name in ("term_documents", "term_occurrences", "token_occurrences"):
        ours, theirs = getattr(counts, name), getattr(whole, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, repeats * theirs)
    for name in ("document_pairs", "window_pairs", "term_tokens"):
        ours, theirs = getattr(counts, name), getattr(whole, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours[:-1], theirs[:-1])
            np.testing.assert_array_equal(ours[-1], repeats * theirs[-1])
    assert counts.damage[:-1] == tuple(repeats * n for n in whole.damage[:-1])
