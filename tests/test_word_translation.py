"""The task's items and its score, against one prompt at a time."""

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
    """Bytes, and merges across the boundary of prompt and answer."""
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


def test_what_cannot_be_asked_is_said(model, tokenizer):
    with pytest.raises(ValueError, match="the task holds 13"):
        word_translation.score_task(model, tokenizer, task(), shots=20)
    with pytest.raises(ValueError, match="configured for 128"):
        word_translation.score_task(model, tokenizer, task(1), shots=12, draws=1)
    with pytest.raises(ValueError, match="No item"):
        word_translation.build_task({("eng", "fra"): PAIRS[:5]}, NAMES)
    with pytest.raises(ValueError, match="No prompt name"):
        word_translation.build_task({("eng", "deu"): PAIRS}, NAMES)
