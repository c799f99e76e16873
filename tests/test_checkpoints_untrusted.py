"""Checkpoints that lie: each refused in one paragraph; a fuzz loop looks for more."""

import json
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys

import flax.serialization
import numpy as np
import pytest
import safetensors.numpy

from jaxling.checkpoints import CheckpointError, locate, open_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE = np.arange(6, dtype=np.float32).reshape(2, 3)
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def raw(header, data: bytes = TABLE.tobytes(), length: int | None = None) -> bytes:
    """A safetensors file with this header, which need not be true."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = raw({"e.weight": ENTRY})
BAD_SAFETENSORS = {
    "empty": (b"", "is empty"),
    "shorter than its length": (GOOD[:5], "truncated"),
    "cut in the header": (GOOD[:40], "claims a header"),
    "cut in the data": (GOOD[:-1], r"e\.weight' ends at byte 24.*truncated"),
    "longer than its tensors": (GOOD + b"x", "1 bytes after its last tensor"),
    "absurd header length": (raw({}, length=2**63), "claims a header"),
    "header above the format's limit": (raw({}, length=100_000_001), "claims a header"),
    "not JSON": (raw(b"{'e': 1}"), "is not JSON"),
    "not an object": (raw([1]), "not a JSON object"),
    "deep": (raw(b'{"a":' + b"[" * 100_000), "is not JSON"),
    "a long number": (raw(b'{"a":' + b"9" * 5000 + b"}"), "is not JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not UTF-8"),
    "twice the same name": (
        raw(b'{"e": %b, "e": %b}' % ((json.dumps(ENTRY).encode(),) * 2)),
        "'e' stands there twice",
    ),
    "an entry that is no object": (raw({"e.weight": 7}), r"e\.weight' is described by"),
    "no dtype": (raw({"e.weight": {**ENTRY, "dtype": None}}), "unknown dtype"),
    "a dtype of Python": (raw({"e.weight": {**ENTRY, "dtype": "O"}}), "unknown dtype"),
    "a shape of words": (raw({"e.weight": {**ENTRY, "shape": ["2"]}}), "not a shape"),
    "a shape of truths": (raw({"e.weight": {**ENTRY, "shape": [True]}}), "not a shape"),
    "a negative shape": (
        raw({"e.weight": {**ENTRY, "shape": [-2, -3]}}),
        "not a shape",
    ),
    "a shape beyond integers": (
        raw(
            {"e.weight": {**ENTRY, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}
        ),
        "not a shape",
    ),
    "too many axes": (raw({"e.weight": {**ENTRY, "shape": [1] * 40}}), "not a shape"),
    "bytes that do not fit": (
        raw({"e.weight": {**ENTRY, "shape": [2, 4]}}),
        r"e\.weight' of shape \[2, 4\] and dtype F32 needs 32 bytes",
    ),
    "offsets turned round": (
        raw({"e.weight": {**ENTRY, "data_offsets": [24, 0]}}),
        "are not offsets",
    ),
    "negative offsets": (
        raw({"e.weight": {**ENTRY, "data_offsets": [-24, 0]}}),
        "are not offsets",
    ),
    "overlap": (
        raw(
            {"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 36]}}, TABLE.tobytes() * 2
        ),
        "'b' begins at byte 12.*overlap",
    ),
    "two tensors in one place": (raw({"a": ENTRY, "b": ENTRY}), "overlap"),
    "a gap": (
        raw({"a": {**ENTRY, "data_offsets": [4, 28]}}, bytes(4) + TABLE.tobytes()),
        "leave a gap",
    ),
}


def refusal(path: pathlib.Path) -> str:
    """The message with which a checkpoint is refused: one paragraph, not too long."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensor_names:
            checkpoint.read(name)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_safetensors_that_lie(tmp_path, case):
    content, problem = BAD_SAFETENSORS[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=problem) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert refusal(tmp_path) == str(caught.value)


def indexed(path: pathlib.Path, files: dict, **shards: dict) -> None:
    for shard, whole in shards.items():
        safetensors.numpy.save_file(whole, path / f"{shard}.safetensors")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "link"]
    + ["linked/outside.safetensors", "..", ".", "", "a\0b", "loop", "x" * 5000],
)
def test_an_index_that_leaves_the_directory(tmp_path, file):
    outside, inside = tmp_path / "outside.safetensors", tmp_path / "model"
    inside.mkdir()
    safetensors.numpy.save_file({"secret": TABLE}, outside)
    (inside / "link").symlink_to(outside)
    (inside / "linked").symlink_to(tmp_path)
    (inside / "loop").symlink_to("loop")
    indexed(inside, {"secret": file})
    message = refusal(inside)
    assert "leads out of" in message or "cannot be read" in message, message


def test_a_single_file_or_config_that_is_a_link_out(tmp_path):
    inside = tmp_path / "model"
    inside.mkdir()
    safetensors.numpy.save_file({"secret": TABLE}, tmp_path / "outside.safetensors")
    (tmp_path / "outside.json").write_text('{"secret": 1}')
    (inside / "config.json").symlink_to("../outside.json")
    (inside / "model.safetensors").symlink_to("../outside.safetensors")
    assert "leads out of" in refusal(inside)
    (inside / "model.safetensors").unlink()
    safetensors.numpy.save_file({"open": TABLE}, inside / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json' leads out of"):
        _ = open_checkpoint(inside).config


def test_links_that_stay_at_home_are_followed(tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "1234", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    safetensors.numpy.save_file({"e": TABLE}, blobs / "5678")
    (snapshot / "model.safetensors").symlink_to("../../blobs/5678")
    (tmp_path / "alias").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "alias"):
        np.testing.assert_array_equal(open_checkpoint(path).read("e"), TABLE)


@pytest.mark.parametrize(
    "files, problem",
    [
        (
            {"a": "one.safetensors", "b": "two.safetensors"},
            r"two\.safetensors is missing",
        ),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "'b' is missing"),
        ({"a": "other.safetensors", "c": "one.safetensors"}, "'a' stands here and"),
        ({"a": 7}, "'a' is in 7"),
        ({"a": None}, "'a' is in None"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"a": "folder"}, "not a regular file"),
        ({"a": "pipe"}, "not a regular file"),
        ({"a/kernel": "one.safetensors"}, "'a/kernel' is missing"),
    ],
)
def test_an_index_that_lies(tmp_path, files, problem):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    indexed(tmp_path, files, one={"a": TABLE, "c": TABLE}, other={"a": TABLE})
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(tmp_path)


def test_two_paths_of_one_name_in_torch(tmp_path):
    index = {"a/kernel": "flax_model-1.msgpack", "a/weight": "flax_model-1.msgpack"}
    path = tmp_path / "flax_model.msgpack.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=r"'a\.weight' stands there twice"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text, problem",
    [
        (b"[]", "not a JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"model_type": "llama", "model_type": "bert"}', "twice"),
        (b"", "is empty"),
        (b"\x89PNG", "not UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_not_what_it_claims(tmp_path, name, text, problem):
    if name == "config.json":
        (tmp_path / "model.safetensors").write_bytes(GOOD)
    (tmp_path / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=problem) as caught:
        _ = open_checkpoint(tmp_path).config
    assert name in str(caught.value)


def test_a_config_of_another_type(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    for kind in (7, ["llama"], {"a": 1}, None, "x" * 10_000):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(
            CheckpointError, match=r"--tensor=NAME: e\.weight"
        ) as caught:
            open_checkpoint(tmp_path).input_embeddings()
        assert len(str(caught.value)) < 1000


FLAX = flax.serialization.msgpack_serialize({"e": {"embedding": TABLE}})
BAD_FLAX = {
    "empty": (b"", "is empty"),
    "cut": (FLAX[:-1], "truncated"),
    "longer": (FLAX + b"x", "1 bytes after"),
    "not a map": (b"\x93\x01\x02\x03", "not a map"),
    "no value": (b"\x81\xa1e\xc1", "0xc1 begins no value"),
    "a huge map": (b"\xdf\xff\xff\xff\xff", "truncated"),
    "a huge array": (b"\x81\xa1e\xdd\xff\xff\xff\xff", "truncated"),
    "huge bytes": (b"\x81\xa1e\xc6\xff\xff\xff\xff", "truncated"),
    "deep": (b"\x81\xa1e" * 100_000, "too many values or levels"),
    "a number for a name": (b"\x81\x07\x07", "7 is not a name"),
    "a name not UTF-8": (b"\x81\xa1\xff\x07", "not UTF-8"),
    "twice": (b"\x82\xa1e\x07\xa1e\x07", "'e' stands there twice"),
    "an array of nothing": (b"\x81\xa1e\xc7\x01\x01\x07", "not .shape, dtype, bytes."),
    "a shape too large": (FLAX.replace(b"\x92\x02\x03", b"\x92\x02\x04"), "needs 32"),
    "a dtype of Python": (FLAX.replace(b"float32", b"object_"), "unknown dtype"),
    "two names in torch": (
        flax.serialization.msgpack_serialize(
            {"e": {"embedding": TABLE, "kernel": TABLE}}
        ),
        r"'e\.weight' stands there twice",
    ),
    "chunks without a shape": (
        flax.serialization.msgpack_serialize({"__msgpack_chunked_array__": True}),
        "not numbered",
    ),
    "chunks that do not fit": (
        flax.serialization.msgpack_serialize(
            {"e": {"__msgpack_chunked_array__": True, "shape": {"0": 7},
                   "chunks": {"0": TABLE.ravel()}}}
        ),
        "do not make up",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAX)
def test_flax_that_lies(tmp_path, case):
    content, problem = BAD_FLAX[case]
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    with pytest.raises(CheckpointError, match=problem) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "flax_model.msgpack") in str(caught.value)


class Trap:
    """Unpickled, this would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


def test_a_pickle_is_not_executed(tmp_path):
    torch = pytest.importorskip("torch")
    sprung = tmp_path / "sprung"
    path = tmp_path / "pytorch_model.bin"
    torch.save({"e.weight": torch.ones(2), "x": Trap(sprung)}, path)
    assert "something else than tensors" in refusal(tmp_path)
    path.write_bytes(pickle.dumps({"x": Trap(sprung)}))
    assert "older than torch 1.6" in refusal(tmp_path)
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "older than torch 1.6" in refusal(tmp_path)
    assert not sprung.exists()


def test_torch_files_that_hold_no_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    for content, problem in [
        ([torch.ones(2)], "not hold a dict"),
        ({"a": 7}, "'a' is not a named tensor"),
        ({7: torch.ones(2)}, "7 is not a named tensor"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a' is stored in a way not known"),
        ({"a": torch.ones(1).expand(10**9)}, "'a' of shape .* its storage has 4"),
    ]:
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=problem):
            open_checkpoint(tmp_path)


def test_torch_files_that_would_inflate(tmp_path):
    torch = pytest.importorskip("torch")
    import zipfile

    torch.save({"a": torch.zeros(10**6)}, tmp_path / "stored")
    with (
        zipfile.ZipFile(tmp_path / "stored") as stored,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as packed,
    ):
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry), zipfile.ZIP_DEFLATED, 9)
    assert "is compressed" in refusal(tmp_path)


def test_without_torch_the_error_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"jaxling\[torch\].*refs/pr/N"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content, problem",
    [
        (GOOD[:-1], r"e.weight' ends at byte 24"),
        (GOOD, "--tensor=NAME: e.weight [2, 3]"),
    ],
)
def test_the_command_line_ends_in_one_paragraph(tmp_path, content, problem):
    for part in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate("demo-small") / part, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    run = subprocess.run(
        [sys.executable, "-m", "jaxling.experiments.token_neighbors"]
        + [f"--model={tmp_path}", f"--workdir={tmp_path / 'run'}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and problem in said[0] and str(tmp_path) in said[0]


# Mutates real files and asks for everything. A file is either refused or read as an
# independent reader of the format reads it, within half a GiB: the same names, shapes,
# dtypes and bytes. What that reader refuses and we read is listed, with the reason.
FUZZ = """
import collections, io, json, pathlib, random, resource, sys
import flax.serialization, ml_dtypes
import numpy as np
import safetensors, safetensors.numpy
from jaxling.checkpoints import CheckpointError, open_checkpoint
from jaxling.checkpoints.safetensors_files import NAMES
from jaxling.checkpoints.tensors import DTYPES

path, kind, seed, rounds = pathlib.Path(sys.argv[1]), *sys.argv[2:]
chance = random.Random(int(seed))
numbers = np.random.default_rng(int(seed))
whole = {
    f"block/{n}/kernel": numbers.normal(size=shape).astype(dtype)
    for n, (shape, dtype) in enumerate(
        [((3, 4), np.float32), ((5,), np.float16), ((2, 2, 2), ml_dtypes.bfloat16),
         ((), np.int64), ((0, 3), np.float32), ((7, 1), np.uint8)])
}
if kind == "safetensors":  # whose own reader of bytes knows no bfloat16
    whole["block/2/kernel"] = whole["block/2/kernel"].astype(np.float16)
dotted = {name.replace("/", "."): array for name, array in whole.items()}
if kind == "torch":
    import torch
    torch.save({name: torch.from_numpy(array.astype(np.float32).copy())
                for name, array in dotted.items()}, path / "pytorch_model.bin")
    file, head = "pytorch_model.bin", 10_000
elif kind == "flax":
    if int(seed) % 2:
        flax.serialization.MAX_CHUNK_SIZE = 16
    tree = {"block": {str(n): {"kernel": array}
                      for n, array in enumerate(whole.values())}}
    packed = flax.serialization.msgpack_serialize(tree)
    (path / "flax_model.msgpack").write_bytes(packed)
    file, head = "flax_model.msgpack", 10_000
elif kind == "safetensors":
    safetensors.numpy.save_file(dotted, path / "model.safetensors")
    file = "model.safetensors"
    head = 8 + int(np.fromfile(path / file, "<u8", 1)[0])
else:
    files = {}
    for n, name in enumerate(dotted):
        files[name] = f"model-{n % 2}.safetensors"
    for shard in set(files.values()):
        safetensors.numpy.save_file(
            {n: a for n, a in dotted.items() if files[n] == shard}, path / shard)
    file, head = "model.safetensors.index.json", 10_000
    (path / file).write_text(json.dumps({"weight_map": files}))

original = (path / file).read_bytes()
(path / "config.json").write_text('{"model_type": "llama"}')
EXTREMES = [b"-1", b"0", b"1e9", b"9" * 25, b"null", b"[]", b"{}", b'""', b"true"]

def mutated():
    data, reach = bytearray(original), min(head, len(original))
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        area = reach if chance.random() < 0.8 else len(data)
        at = chance.randrange(max(1, min(area, len(data))))
        act = chance.randrange(8)
        if act < 3 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif act == 3:
            del data[at:]
        elif act == 4:
            start = chance.randrange(max(1, len(original)))
            data[at:at] = original[start : start + chance.randrange(1, 60)]
        elif act == 5:
            del data[at : at + chance.randrange(1, 30)]
        elif act == 6:
            digits = [i for i, byte in enumerate(data[:reach]) if 48 <= byte <= 57]
            if digits:
                at = chance.choice(digits)
                data[at : at + 1] = chance.choice(EXTREMES)
        else:
            data[at : at + 4] = chance.choice([b"\\xff", b"\\0", b"\\x7f"]) * 4
    return bytes(data)

# By the beginning of what the reference says.
LENIENT = {
    # The header before a storage, or its checksum. Storages are mapped where the
    # directory at the end says that they lie, and not read whole to be summed, which
    # reading one tensor of many would have to pay for; torch maps them alike.
    "torch": "RuntimeError: PytorchStreamReader failed reading file data/",
}

def mapped_by_torch():
    return {name: tensor.numpy() for name, tensor in
            torch.load(path / file, "cpu", weights_only=True, mmap=True).items()}

def expected(data):
    if kind == "safetensors":
        return {name: np.frombuffer(entry["data"], DTYPES[NAMES[entry["dtype"]]])
                      .reshape(entry["shape"])
                for name, entry in safetensors.deserialize(data)}
    if kind == "index":
        return {name: safetensors.numpy.load_file(path / file)[name]
                for name, file in json.loads(data)["weight_map"].items()}
    if kind == "torch":
        return {name: tensor.numpy() for name, tensor in
                torch.load(io.BytesIO(data), "cpu", weights_only=True).items()}
    if kind == "flax":
        flat = {}
        def walk(tree, parts):
            for name, value in tree.items():
                if isinstance(value, dict):
                    walk(value, (*parts, name))
                elif isinstance(value, (np.ndarray, np.generic)):
                    value = np.asarray(value)
                    if name == "kernel":
                        name = "weight"
                        value = value.T if value.ndim == 2 else value
                    flat[".".join((*parts, name))] = value
        walk(flax.serialization.msgpack_restore(data), ())
        return flat

def limit():
    for line in open("/proc/self/status"):
        if line.startswith("VmData"):
            size = int(line.split()[1]) * 1024 + 2**29
            resource.setrlimit(resource.RLIMIT_DATA, (size, resource.RLIM_INFINITY))

def outcome():
    try:
        checkpoint = open_checkpoint(path)
        read = {name: checkpoint.read(name) for name in checkpoint.tensor_names}
        for name, array in read.items():
            assert array.shape == checkpoint.shape(name)
            assert array.dtype == checkpoint.dtype(name)
            if array.ndim:
                part = checkpoint.read(name, slice(1, 3))
                assert part.tobytes() == np.ascontiguousarray(array[1:3]).tobytes()
    except CheckpointError as error:
        assert "\\n" not in str(error) and len(str(error)) < 2000, str(error)
        return None, type(error).__name__
    return read, "read"

assert outcome()[1] == "read"
limit()
counts = collections.Counter()
for turn in range(int(rounds)):
    data = mutated()
    (path / file).write_bytes(data)
    read, what = outcome()
    counts[what] += 1
    if read is not None:
        try:
            other = expected(data)
        except Exception as error:
            refused = f"{type(error).__name__}: {error}"
            assert kind in LENIENT and refused.startswith(LENIENT[kind]), refused
            counts["lenient"] += 1
            other = mapped_by_torch()
        assert read.keys() == other.keys(), (read.keys(), other.keys())
        for name, array in read.items():
            assert array.shape == other[name].shape, (name, array, other[name])
            assert array.dtype == other[name].dtype, (name, array, other[name])
            assert array.tobytes() == np.ascontiguousarray(other[name]).tobytes(), name
print(dict(counts))
assert counts["CheckpointError"] > 10 and (counts["read"] or kind == "index"), counts
"""


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["safetensors", "index", "flax", "torch"])
def test_mutated_files_are_read_right_or_refused(tmp_path, kind, seed):
    if kind == "torch":
        pytest.importorskip("torch")
    rounds = int(os.environ.get("FUZZ_ROUNDS", 150))
    run = subprocess.run(
        [sys.executable, "-c", FUZZ, tmp_path, kind, str(seed), str(rounds)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-2000:]
    print(run.stdout)
