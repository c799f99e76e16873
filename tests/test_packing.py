"""Token files and the rows that are made of them."""

import itertools
import json

import numpy as np
import pytest

from jaxling import training
from jaxling.training import packing


def documents_of(rng, count=300, longest=40, vocabulary=97):
    return [
        rng.integers(0, vocabulary, rng.integers(1, longest)).tolist()
        for _ in range(count)
    ]


def test_a_token_file_gives_back_its_documents(tmp_path, rng):
    documents = documents_of(rng)
    file = training.write_tokens(tmp_path / "t", documents, vocabulary_size=97)
    assert isinstance(file.tokens, np.memmap) and file.tokens.dtype == np.uint16
    back = [
        file.tokens[a:b].tolist()
        for a, b in itertools.pairwise(file.documents.tolist())
    ]
    assert back == documents
    assert file.targets is None and file.largest == max(map(max, documents))


def test_ids_beyond_16_bits_are_kept(tmp_path):
    file = training.write_tokens(
        tmp_path / "t", [[250_001, 7]], vocabulary_size=250_002
    )
    assert file.tokens.tolist() == [250_001, 7]


def test_the_fingerprint_is_of_tokens_targets_and_boundaries(tmp_path):
    def fingerprint(documents):
        file = training.write_tokens(tmp_path / "t", documents, vocabulary_size=9)
        return file.fingerprint

    document = training.Document
    seen = {
        fingerprint([[1, 2, 3]]),
        fingerprint([[1, 2, 4]]),
        fingerprint([[1, 2], [3]]),
        fingerprint([document([1, 2, 3], [True, False, True])]),
    }
    assert len(seen) == 4


def rows_of(batch):
    """The pieces of each row, as (tokens, targets)."""
    found = []
    for tokens, segments, targets in zip(*batch):
        pieces = []
        for number in range(1, segments.max(initial=0) + 1):
            inside = segments == number
            pieces.append((tuple(tokens[inside].tolist()), targets[inside].tolist()))
        assert np.all(np.diff(segments[segments > 0]) >= 0)
        assert not targets[segments == 0].any()
        found.append(pieces)
    return found


@pytest.mark.parametrize("length", [8, 39, 64, 256])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_an_epoch_holds_every_document_once(tmp_path, rng, length, seed):
    documents = documents_of(rng)
    file = training.write_tokens(tmp_path / "t", documents, vocabulary_size=97)
    rows = (
        len(
            packing.plan_epoch(
                file.documents,
                length,
                None if seed is None else np.random.default_rng([seed, 0]),
            ).first
        )
        - 1
    )
    batches = packing.training_batches(file, rows=1, length=length, seed=seed)
    seen = []
    for batch, position in itertools.islice(batches, rows):  # noqa: B007
        for pieces in rows_of(batch):
            assert sum(len(tokens) for tokens, _ in pieces) <= length
            for tokens, targets in pieces:
                assert targets == [False] + [True] * (len(tokens) - 1)
                seen.append(tokens)
    assert position == (0, rows)
    expected = [
        tuple(document[i : i + length])
        for document in documents
        for i in range(0, len(document), length)
    ]
    assert sorted(seen) == sorted(expected)
    # Best fit wastes little: the rows could not be fewer by a tenth.
    assert rows <= 1.1 * sum(map(len, documents)) / length + 1


def test_targets_choose_what_is_predicted(tmp_path):
    document = training.Document([5, 6, 7, 8], [True, False, True, True])
    file = training.write_tokens(tmp_path / "t", [document], vocabulary_size=9)
    (batch,) = packing.evaluation_batches(file, rows=2, length=6)
    np.testing.assert_array_equal(batch.tokens[0], [5, 6, 7, 8, 0, 0])
    np.testing.assert_array_equal(batch.targets[0], [0, 0, 1, 1, 0, 0])
    assert batch.segments[1].max() == 0


def test_a_position_is_all_that_is_needed_to_go_on(tmp_path, rng):
    file = training.write_tokens(tmp_path / "t", documents_of(rng), vocabulary_size=97)
    options = dict(rows=7, length=64, seed=3)
    whole = list(itertools.islice(packing.training_batches(file, **options), 60))
    assert whole[-1][1].epoch >= 2
    for cut in (1, 13, 41):
        later = packing.training_batches(file, **options, position=whole[cut - 1][1])
        for (batch, position), (expected, where) in zip(later, whole[cut:]):
            assert position == where
            for a, b in zip(batch, expected):
                np.testing.assert_array_equal(a, b)


def test_epochs_differ_in_order(tmp_path, rng):
    file = training.write_tokens(tmp_path / "t", documents_of(rng), vocabulary_size=97)
    plans = [
        packing.plan_epoch(file.documents, 64, np.random.default_rng([0, epoch]))
        for epoch in (0, 1)
    ]
    assert plans[0].starts.tolist() != plans[1].starts.tolist()


def test_a_plain_array_is_one_stream(tmp_path, rng):
    ids = rng.integers(0, 1000, 1003)
    np.save(tmp_path / "stream.npy", ids)
    file = training.open_tokens(tmp_path / "stream.npy")
    batches = list(packing.evaluation_batches(file, rows=2, length=100))
    flat = np.concatenate([b.tokens.reshape(-1) for b in batches])
    np.testing.assert_array_equal(flat[:1003], ids)
    assert sum(int(b.targets.sum()) for b in batches) == 1003 - 11


@pytest.mark.parametrize(
    "documents, message",
    [
        ([[1, 2], [3, 97]], r"Document 1 holds token 97.*\[0, 97\)"),
        ([[-1]], "Document 0 holds token -1"),
        ([], "no token"),
        ([[], []], "no token"),
        ([training.Document([1, 2], [True])], "2 tokens and 1 targets"),
        ([[1], [1.7]], "Document 1 holds float64; tokens must be integers"),
        ([training.Document([1, 2, 3], [0.5, 2, -1])], "targets of float64"),
        ([training.Document([1, 2], [0, 2])], "targets of int64; .*True or False"),
    ],
)
def test_bad_documents_are_named(tmp_path, documents, message):
    with pytest.raises(ValueError, match=message):
        training.write_tokens(tmp_path / "t", documents, vocabulary_size=97)
    with pytest.raises(FileNotFoundError, match="no token file"):
        training.open_tokens(tmp_path / "t")


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_is_no_token_file_is_not_written_over(tmp_path, kind):
    path = tmp_path / "thesis"
    if kind == "directory":
        path.mkdir()
        (path / "chapter").write_text("years of work")
    else:
        path.write_text("years of work")
    with pytest.raises(ValueError, match="thesis is there and no token file"):
        training.write_tokens(path, [[1, 2]], vocabulary_size=97)
    kept = path / "chapter" if kind == "directory" else path
    assert kept.read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]


def test_a_token_file_is_replaced_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "t"
    training.write_tokens(path, [[1, 2]], vocabulary_size=97)
    with pytest.raises(ValueError, match="holds token 97"):
        training.write_tokens(path, [[3], [97]], vocabulary_size=97)
    assert training.open_tokens(path).tokens.tolist() == [1, 2]
    training.write_tokens(path, [[3, 4, 5]], vocabulary_size=97)
    assert training.open_tokens(path).tokens.tolist() == [3, 4, 5]
    assert [p.name for p in tmp_path.iterdir() if "former" in p.name] == []


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("length", [2, 7, 64])
def test_predicted_tokens_are_counted_as_batches_have_them(
    tmp_path, rng, chosen, length
):
    documents = [
        training.Document(ids, rng.integers(0, 2, len(ids)).astype(bool))
        if chosen
        else ids
        for ids in documents_of(rng)
    ]
    file = training.write_tokens(tmp_path / "t", documents, vocabulary_size=97)
    batches = packing.evaluation_batches(file, rows=4, length=length)
    expected = sum(int(batch.targets.sum()) for batch in batches)
    assert packing.predicted(file, length) == expected


def damaged(path, kind):
    if kind == "cut":
        raw = (path / "tokens.npy").read_bytes()
        (path / "tokens.npy").write_bytes(raw[:-100])
    elif kind == "record":
        (path / "tokens.json").write_text("{")
    elif kind == "no record":
        (path / "tokens.json").unlink()
    elif kind == "boundaries":
        boundaries = np.load(path / "documents.npy")
        boundaries[3], boundaries[4] = boundaries[4], boundaries[3]
        np.save(path / "documents.npy", boundaries)
    elif kind == "sizes":
        record = json.loads((path / "tokens.json").read_text())
        record["tokens"] += 1
        (path / "tokens.json").write_text(json.dumps(record))
    elif kind == "missing":
        (path / "documents.npy").unlink()
    elif kind == "pickle":
        np.save(path / "tokens.npy", np.array([{}]), allow_pickle=True)
    elif kind == "longer":
        np.save(path / "tokens.npy", np.append(np.load(path / "tokens.npy"), 1))
    elif kind == "dtype":
        np.save(path / "tokens.npy", np.load(path / "tokens.npy").astype(np.int16))
    elif kind in ("largest", "words"):
        record = json.loads((path / "tokens.json").read_text())
        record["largest"] = {"largest": 97, "words": "many"}[kind]
        (path / "tokens.json").write_text(json.dumps(record))
    elif kind == "list":
        (path / "tokens.json").write_text("[]")


@pytest.mark.parametrize(
    "kind",
    [
        *("cut", "record", "no record", "boundaries", "sizes", "missing", "pickle"),
        *("longer", "dtype", "largest", "words", "list"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, rng, kind):
    training.write_tokens(tmp_path / "t", documents_of(rng), vocabulary_size=97)
    damaged(tmp_path / "t", kind)
    with pytest.raises((ValueError, OSError), match=str(tmp_path / "t")):
        training.open_tokens(tmp_path / "t")


def changed(path, name, place, value):
    array = np.load(path / name)
    array[place] = value
    np.save(path / name, array)


@pytest.mark.parametrize(
    "name, place, value",
    [
        ("tokens.npy", 5, 3),  # another token, as good as any
        ("tokens.npy", 5, 65_000),  # beyond the vocabulary
        ("documents.npy", 2, 7),  # another boundary, ascending all the same
        ("targets.npy", 5, False),
        ("tokens.json", "largest", 96),  # of the vocabulary, but not the file's
        ("tokens.json", "checksum", "0"),
    ],
)
def test_what_an_opened_file_does_not_show_is_found_before_a_run(
    tmp_path, name, place, value
):
    documents = [training.Document([k, 1, 2, 4, 6], [True] * 5) for k in range(9)]
    file = training.write_tokens(tmp_path / "t", documents, vocabulary_size=97)
    training.verify_tokens(file)
    if name == "tokens.json":
        record = json.loads((tmp_path / "t" / name).read_text())
        (tmp_path / "t" / name).write_text(json.dumps({**record, place: value}))
    else:
        changed(tmp_path / "t", name, place, value)
    file = training.open_tokens(tmp_path / "t")
    with pytest.raises(
        ValueError, match=f"{tmp_path / 't'} is damaged.*Write it again"
    ):
        training.verify_tokens(file)


def test_no_batch_holds_a_token_beyond_the_record(tmp_path):
    path = tmp_path / "t"
    training.write_tokens(path, [[1, 2, 3], [4, 5, 6]], vocabulary_size=70_000)
    changed(path, "tokens.npy", 4, 2**32 - 1)
    file = training.open_tokens(path)
    for batches in (
        packing.training_batches(file, rows=2, length=6, seed=0),
        packing.evaluation_batches(file, rows=2, length=6),
    ):
        with pytest.raises(ValueError, match="holds token 4294967295.* 6 is the larg"):
            next(batches)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 3), int), "one axis"),
        (np.zeros(3), "integers"),
        (np.array([], int), "no token"),
        (np.array([1, -2]), "negative"),
    ],
)
def test_a_plain_array_of_another_kind_is_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        training.open_tokens(tmp_path / "a.npy")
