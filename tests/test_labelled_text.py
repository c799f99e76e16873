"""Labelled texts, and hidden states that belong to the words they claim."""

import numpy as np
import pytest

from jaxling import demo, labelled_text, models


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def test_a_file_of_labelled_texts(tmp_path):
    path = write(
        tmp_path / "a.tsv",
        "label\ttext\tlanguage\titem\tnote",
        "N V\tthe\u00a0cat sleeps\teng\t1\tx",
        "X\tमें\thin\t1\ty",
        "\t  \teng\t2\tz",
    )
    with pytest.raises(ValueError, match="Line 2 .* 3 words; got 2"):
        labelled_text.read_texts(path, level="token")
    read = labelled_text.read_texts(path, level="sentence")
    assert read.texts == ["the\u00a0cat sleeps", "में"]
    assert read.labels == ["N V", "X"] and read.languages == ["eng", "hin"]
    assert read.items == ["1", "1"]
    bare = write(tmp_path / "b.tsv", "text\tlabel", "a b\tx y", 'the "c\tz z')
    read = labelled_text.read_texts(bare, level="token")
    assert read.labels == [["x", "y"], ["z", "z"]] and read.items == ["2", "3"]


@pytest.mark.parametrize(
    "lines, match",
    [
        (["text\tkind", "a\tb"], "missing \\['label'\\]"),
        (["text\tlabel", "a"], "Line 2 of .* 2 fields"),
        (["text\tlabel"], "no texts"),
        ([""], "missing"),
        (["text\tlabel\tlabel", "a\tb\tc"], "every column once; got \\['text', 'l"),
        (["text\tlabel", "a\tb", "c\t "], "Line 3 of .* a label for its text; got ' '"),
        (["text\tlabel", "", "a\tb"], "Line 2 of .* 2 fields"),
    ],
)
def test_a_wrong_file_is_described(tmp_path, lines, match):
    with pytest.raises(ValueError, match=match):
        labelled_text.read_texts(write(tmp_path / "a.tsv", *lines), level="sentence")


def test_a_byte_order_mark_and_blank_lines_at_the_end_are_no_content(tmp_path):
    path = write(tmp_path / "a.tsv", "\ufefftext\tlabel", "a\tb", "", "")
    read = labelled_text.read_texts(path, level="sentence")
    assert read.texts == ["a"] and read.labels == ["b"]


def test_a_text_may_be_long(tmp_path):
    book = "word " * 40_000
    read = labelled_text.read_texts(
        write(tmp_path / "a.tsv", "text\tlabel", f"{book}\tb"), level="sentence"
    )
    assert [text.strip() for text in read.texts] == [book.strip()]


def test_bytes_that_are_no_text_are_described(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"text\tlabel\n\xff\xfe\tb\n")
    with pytest.raises(ValueError, match="not a TSV in UTF-8"):
        labelled_text.read_texts(tmp_path / "a.tsv", level="sentence")


def test_built_in_texts_are_parallel_and_were_never_seen():
    texts = labelled_text.demo_texts(30)
    assert {item.split(".")[0] for item in texts.items} <= demo.HELD_OUT_BOOKS
    of = {}
    for item, label in zip(texts.items, texts.labels):
        assert of.setdefault(item, label) == label
    count = texts.languages.count("eng")
    assert 27 <= count <= 36 and texts.languages.count("ukr") >= count - 3
    assert set(texts.labels) == {"gospel", "letter", "vision"}


def test_states_are_those_of_the_model_at_the_last_token_of_each_word():
    model = models.load("demo-small", dtype="float32")
    tokenizer = labelled_text.load_tokenizer("demo-small")
    verses = demo.verses("held_out").text
    texts = ["In the beginning", verses["guj"][3], verses["eng"][40], "x"]
    found = labelled_text.states(model, tokenizer, texts, level="token", batch=3)
    layers = model.config["num_hidden_layers"] + 1
    assert found.vectors.shape[:2] == (layers, len(found.words))
    for number, text in enumerate(texts):
        own = np.flatnonzero(found.text == number)
        assert [found.words[i] for i in own] == text.split()
        np.testing.assert_array_equal(found.place[own], np.arange(len(own)))
        ids = tokenizer(text)["input_ids"]
        _, cache = model.run_with_cache(np.array([ids]))
        # The last token that is not a special one ends the last word.
        special = set(tokenizer.all_special_ids)
        last = max(i for i, token in enumerate(ids) if token not in special)
        np.testing.assert_allclose(
            found.vectors[1:, own[-1]],
            np.asarray(cache["resid_post"])[:, 0, last],
            atol=2e-4,  # padding changes the order of float32 sums
        )
    means = labelled_text.states(model, tokenizer, texts, level="sentence", batch=3)
    assert means.vectors.shape == (layers, 4, found.vectors.shape[2])
    row = int(np.flatnonzero(means.text == 0)[0])
    ids = tokenizer(texts[0])["input_ids"]
    _, cache = model.run_with_cache(np.array([ids]))
    np.testing.assert_allclose(
        means.vectors[-1, row],
        np.asarray(cache["resid_post"])[-1, 0].mean(axis=0),
        atol=2e-4,
    )
    short = labelled_text.states(
        model, tokenizer, [texts[2]], level="token", longest=8, batch=1
    )
    assert 0 < len(short.words) < len(texts[2].split())
    assert short.cut == 1 and found.cut == means.cut == 0
    with pytest.raises(ValueError, match="`level`"):
        labelled_text.states(model, tokenizer, texts, level="word")
