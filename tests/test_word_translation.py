"""The task's items and its score, against one prompt at a time."""

import json
import string

import jax
import numpy as np
import pytest
import tokenizers

from jaxling import models, word_translation

CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
NAMES = {"eng": "English", "fra": "French"}
PAIRS = [(f"word{i}", f"mot{i}") for i in range(14)]


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes; the answer's space is a part of its first token."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.train_from_iterator(
        ["English: word1\nFrench: mot1\n"] * 3,
        tokenizers.trainers.BpeTrainer(
            vocab_size=290,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return found


@pytest.fixture(scope="module")
def model():
    return models.build(CONFIG, jax.random.key(0))


def task(count=3, **options):
    lexicons = {("eng", "fra"): PAIRS, ("fra", "eng"): [p[::-1] for p in PAIRS]}
    return word_translation.build_task(lexicons, NAMES, count=count, **options)


def test_the_prompt_is_the_papers():
    item = word_translation.Item("eng", "fra", "dog", "chien", ())
    found = word_translation.prompt(task(), item, [("cat", "chat")], "dog")
    assert found == (
        "Please translate words from English to French.\n\n"
        "English: cat\nFrench: chat\n\nEnglish: dog\nFrench:"
    )


def test_distractors_never_translate_alike_and_never_repeat():
    pairs = [*PAIRS, ("twin", "mot1"), ("same", "same")]
    found = word_translation.build_task({("eng", "fra"): pairs}, NAMES)
    assert len(found.items) == len(pairs) - 1  # equal words are no question
    for item in found.items:
        assert len(set(item.distractors)) == 9 and item.word not in item.distractors
        if item.answer == "mot1":
            assert not {"twin", "word1"} & set(item.distractors)


def test_hard_distractors_are_the_nearest_words(rng):
    vectors = {("eng", w): rng.normal(size=8).astype("f") for w, _ in PAIRS}
    found = word_translation.build_task(
        {("eng", "fra"): PAIRS}, NAMES, vectors=vectors, count=4
    )
    for item in found.items:
        own = vectors["eng", item.word]
        others = [w for w, _ in PAIRS if w != item.word]
        cosine = [
            own @ vectors["eng", w] / np.linalg.norm(vectors["eng", w]) for w in others
        ]
        expected = [others[i] for i in np.argsort(cosine)[::-1][:9]]
        assert list(item.distractors) == expected


def test_a_task_survives_its_file(tmp_path):
    built = task(seed=3)
    word_translation.save_task(built, tmp_path / "task.json")
    assert word_translation.load_task(tmp_path / "task.json") == built


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"names": {}, "examples": {}, "items": [{"a": 1}]}']
)
def test_a_file_that_is_no_task_is_named(tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match="bad.json is not"):
        word_translation.load_task(tmp_path / "bad.json")


@pytest.mark.parametrize("wrong", [["w"] * 9, ["a", "b"], [*"abcdefgh", ""]])
def test_an_item_without_nine_distractors_is_refused(tmp_path, wrong):
    path = tmp_path / "task.json"
    word_translation.save_task(task(1), path)
    content = json.loads(path.read_text())
    content["items"][0]["distractors"] = wrong
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="task.json is not.*(distractors|not empty)"):
        word_translation.load_task(path)


def test_scores_equal_one_prompt_after_the_other(model, tokenizer):
    built = task()
    found = word_translation.score_task(
        model, tokenizer, built, shots=2, draws=2, seed=5, batch=4
    )
    rng = np.random.default_rng(5)
    for i, item in enumerate(built.items):
        losses = []
        for _ in range(2):
            shots = word_translation.draw_examples(built, item, rng, 2)
            for word in (item.word, *item.distractors):
                text = word_translation.prompt(built, item, shots, word)
                whole = tokenizer.encode(text + " " + item.answer).ids
                start = len(tokenizer.encode(text).ids)
                log_probs = jax.nn.log_softmax(model(np.array([whole]))[0])
                own = [log_probs[t - 1, whole[t]] for t in range(start, len(whole))]
                losses.append(float(np.mean(own)))
        p = np.exp(np.mean(np.reshape(losses, (2, 10)), 0))
        # Two forward passes of float32 through other shapes.
        np.testing.assert_allclose(found.probability[i], p[0], rtol=1e-4)
        np.testing.assert_allclose(found.score[i], p[0] - p[1:].mean(), atol=1e-6)
        assert found.rank[i] == np.sum(p[1:] >= p[0])


def test_a_token_across_the_boundary_is_the_answers(model):
    """A prompt ends with a colon, which is joined to the answer's first letter."""
    pieces = [*string.ascii_letters, *string.digits, *" .:\n", ": ", ": m"]
    joined = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [(":", " "), (": ", "m")]
        )
    )
    built = word_translation.build_task(
        {("eng", "fra"): PAIRS}, {"eng": "E", "fra": "F"}, count=2
    )
    options = dict(shots=1, draws=1, seed=3)
    found = word_translation.score_task(model, joined, built, **options)
    rng = np.random.default_rng(3)
    for i, item in enumerate(built.items):
        shots = word_translation.draw_examples(built, item, rng, 1)
        text = word_translation.prompt(built, item, shots, item.word)
        coded = joined.encode(f"{text} {item.answer}")
        own = [t for t, (_, end) in enumerate(coded.offsets) if end > len(text)]
        assert coded.tokens[own[0]] == ": m"
        log_probs = jax.nn.log_softmax(model(np.array([coded.ids]))[0])
        expected = np.exp(np.mean([log_probs[t - 1, coded.ids[t]] for t in own]))
        np.testing.assert_allclose(found.probability[i], expected, rtol=1e-4)


def test_what_is_no_number_has_no_rank(tokenizer):
    broken = models.build(CONFIG, jax.random.key(0))
    broken.unembedding[...] = broken.unembedding[...].at[5, 5].set(np.nan)
    with pytest.raises(ValueError, match="2 of 2 questions have no probability"):
        word_translation.score_task(broken, tokenizer, task(1), shots=1, draws=1)


T5 = {
    "model_type": "t5",
    "vocab_size": 300,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
}


@pytest.mark.parametrize("by_tokens", [False, True])
def test_an_encoder_decoder_answers_in_its_decoder(tokenizer, by_tokens):
    model = models.build(T5, jax.random.key(2))
    built = task(2)
    codes = {"eng": "e", "fra": "f"} if by_tokens else None
    found = word_translation.score_task(
        model,
        tokenizer,
        built,
        shots=2,
        draws=1,
        seed=5,
        batch=7,
        language_tokens=codes,
    )
    rng = np.random.default_rng(5)
    for i, item in enumerate(built.items):
        shots = word_translation.draw_examples(built, item, rng, 0 if by_tokens else 2)
        answer = tokenizer.encode(" " + item.answer).ids
        p = []
        for word in (item.word, *item.distractors):
            if by_tokens:
                ids = {code: tokenizer.token_to_id(codes[code]) for code in codes}
                inputs = [ids[item.source], *tokenizer.encode(word).ids, 1]
                opening = [0, ids[item.target]]
            else:
                text = word_translation.prompt(built, item, shots, word)
                inputs, opening = tokenizer.encode(text).ids, [0]
            decoded = np.array([[*opening, *answer]])
            log_probs = jax.nn.log_softmax(
                model(np.array([inputs]), decoder_tokens=decoded)[0]
            )
            places = range(len(opening) - 1, len(opening) - 1 + len(answer))
            p.append(np.exp(np.mean([log_probs[t, a] for t, a in zip(places, answer)])))
        np.testing.assert_allclose(found.probability[i], p[0], rtol=1e-4)
        np.testing.assert_allclose(found.score[i], p[0] - np.mean(p[1:]), atol=1e-6)


def test_summaries_are_means_within_their_intervals():
    built = task(6)
    score = np.arange(12.0)
    rank = np.array([0, 3] * 6)
    scores = word_translation.Scores(score, score, rank)
    first, second = word_translation.summarize(built, scores)
    assert (first.source, first.items, second.score.mean) == ("eng", 6, 8.5)
    assert first.first.mean == 0.5 and first.rank.mean == 1.5
    # The standard error of six consecutive numbers' mean is 0.70.
    assert 0.8 < first.score.low < 1.6 and 3.4 < first.score.high < 4.2
    codes, table = word_translation.matrix([p[:2] for p in (first, second)], [1, 2])
    assert codes == ["eng", "fra"] and table[0, 1] == 1 and np.isnan(table[0, 0])


def test_lexicons_are_read_in_both_directions(tmp_path):
    (tmp_path / "a.txt").write_text("dog chien\ncat chat\n")
    found = word_translation.read_lexicons([f"eng-fra:{tmp_path}/a.txt"])
    assert found["fra", "eng"] == [("chien", "dog"), ("chat", "cat")]
    for entry in ("eng:a.txt", "eng-eng:a.txt", "zh-hans-eng:a.txt", "eng-fra"):
        with pytest.raises(ValueError, match="source-target:path"):
            word_translation.read_lexicons([entry])


def test_a_lexicon_of_several_languages_joins_each_two(tmp_path):
    path = tmp_path / "concepts.tsv"
    path.write_text("eng\tfra\tzho\ndog\tchien\t狗\r\ncat\t\t猫\n\n")
    found = word_translation.read_lexicons([str(path)])
    assert len(found) == 6
    assert found["zho", "eng"] == [("狗", "dog"), ("猫", "cat")]
    assert found["fra", "zho"] == [("chien", "狗")]


@pytest.mark.parametrize(
    "content, told",
    [
        (b"eng\ndog\n", "two or more different languages"),
        (b"eng\teng\ndog\tchien\n", "two or more different languages"),
        (b"eng\tzh-hans\ndog\tx\n", "without hyphens"),
        (b"eng\tfra\ndog\n", "line 2: 2 fields are needed"),
        (b"eng\tfra\ndog\t\xff\n", "must be UTF-8"),
    ],
)
def test_a_damaged_lexicon_of_several_languages_is_named(tmp_path, content, told):
    path = tmp_path / "concepts.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"concepts.tsv.*{told}|{told}.*concepts.tsv"):
        word_translation.read_lexicons([str(path)])


def test_only_listed_words_are_kept_on_either_side():
    lexicons = {
        ("eng", "fra"): [("dog", "chien"), ("of", "de")],
        ("fra", "eng"): [("chien", "dog"), ("de", "of")],
        ("fra", "zho"): [("de", "的")],
    }
    kept = word_translation.keep_words(lexicons, {"eng": {"dog", "cat"}})
    assert kept == {
        ("eng", "fra"): [("dog", "chien")],
        ("fra", "eng"): [("chien", "dog")],
        ("fra", "zho"): [("de", "的")],
    }


def test_word_vectors_are_means_of_rows(tokenizer, rng):
    rows = rng.normal(size=(300, 4))
    found = word_translation.word_vectors(rows, tokenizer, [("eng", "word1x")])
    ids = tokenizer.encode(" word1x").ids
    np.testing.assert_allclose(found["eng", "word1x"], rows[ids].mean(0), rtol=1e-6)


def test_what_cannot_be_asked_is_said(model, tokenizer):
    with pytest.raises(ValueError, match="the task holds 13"):
        word_translation.score_task(model, tokenizer, task(), shots=20)
    with pytest.raises(ValueError, match="configured for 128"):
        word_translation.score_task(model, tokenizer, task(1), shots=12, draws=1)
    codes = {"eng": "e", "fra": "f"}
    with pytest.raises(ValueError, match="llama, is asked in words"):
        word_translation.score_task(model, tokenizer, task(1), language_tokens=codes)
    for vectors in (None, {("eng", word): np.ones(4) for word, _ in PAIRS}):
        with pytest.raises(ValueError, match="No item"):
            word_translation.build_task(
                {("eng", "fra"): PAIRS[:1], ("fra", "eng"): []}, NAMES, vectors=vectors
            )
    with pytest.raises(ValueError, match="No prompt name"):
        word_translation.build_task({("eng", "deu"): PAIRS}, NAMES)
