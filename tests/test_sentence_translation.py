"""Sentences to translate: prompts, greedy answers one by one, and chrF."""

import jax
import numpy as np
import pytest
import sacrebleu
import tokenizers

from jaxling import models, sentence_translation
from jaxling.sentence_translation import Sentence

NAMES = {"eng": "English", "fra": "French"}
TEXTS = {
    "eng": ["one", "two words", "", "four of them", "five"],
    "fra": ["un", "deux mots", "trois", "quatre", "cinq mots ici"],
}


@pytest.fixture(scope="module")
def tokenizer():
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    found.train_from_iterator(
        ["English: one\nFrench: un\n"],
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return found


def model(tokenizer, seed, **config):
    return models.build(
        {
            "model_type": "llama",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 160,
            "eos_token_id": 7,
            **config,
        },
        jax.random.key(seed),
    )


def test_a_prompt_holds_the_sentence_before_as_its_example():
    built = sentence_translation.build_sentences(TEXTS, [("eng", "fra")])
    assert [s.text for s in built] == ["two words", "four of them", "five"]
    # The third row has no English: the example is the last one that both have.
    assert built[1].example == ("two words", "deux mots")
    assert sentence_translation.prompt(built[2], NAMES) == (
        "Translate the sentence from English to French.\n\n"
        "English: four of them\nFrench: quatre\n\n"
        "English: five\nFrench:"
    )
    few = sentence_translation.build_sentences(TEXTS, [("fra", "eng")], count=2)
    assert [s.answer for s in few] == ["two words", "five"]
    short = sentence_translation.build_sentences(
        TEXTS, [("eng", "fra")], fits=lambda s: len(s.text) < 6
    )
    assert [s.text for s in short] == ["five"]


@pytest.mark.parametrize(
    "texts, pairs, options, message",
    [
        (TEXTS, [("eng", "deu")], {}, r"no sentences in \['deu'\]"),
        ({"eng": ["a", ""], "fra": ["b", "c"]}, [("eng", "fra")], {}, "got 1"),
        (TEXTS, [("eng", "fra")], {"fits": lambda s: False}, "leaves room"),
    ],
)
def test_sentences_that_cannot_be_asked_are_named(texts, pairs, options, message):
    with pytest.raises(ValueError, match=message):
        sentence_translation.build_sentences(texts, pairs, **options)


@pytest.mark.parametrize("seed", [0, 3])
def test_batches_say_what_one_sentence_after_the_other_would(tokenizer, seed):
    decoder = model(tokenizer, seed)
    built = sentence_translation.build_sentences(
        TEXTS, [("eng", "fra"), ("fra", "eng")]
    )
    found = sentence_translation.translate(
        decoder, tokenizer, built, NAMES, most=12, batch=4
    )
    for sentence, answer in zip(built, found):
        ids = tokenizer.encode(sentence_translation.prompt(sentence, NAMES)).ids
        said = []
        while len(said) < 12 and said[-1:] != [7]:
            # Padded behind, where nothing looks: one length to compile.
            row = np.zeros((1, 160), int)
            row[0, : len(ids + said)] = ids + said
            logits = decoder(row)[0, len(ids + said) - 1]
            said.append(int(np.argmax(logits)))
        text = tokenizer.decode([t for t in said if t != 7]).strip(" ")
        assert answer == text.split("\n")[0].strip()


def test_an_answer_is_cut_at_the_end_of_the_line_and_of_the_text(tokenizer):
    [newline], [a] = tokenizer.encode("\n").ids, tokenizer.encode("a").ids
    end = 7
    for ids, expected in (
        ([a, a, newline, a, a], "aa"),
        ([a, end, a, newline, a], "a"),
        ([newline, a, a], ""),
        ([end, a], ""),
        ([a, a], "aa"),
    ):
        assert sentence_translation.line(ids, tokenizer, end) == expected
    assert sentence_translation.line([a, a], tokenizer, None) == "aa"


def test_answers_shrink_to_the_room_there_is(tokenizer):
    decoder = model(tokenizer, 1, eos_token_id=None)
    sentence = Sentence("eng", "fra", "x" * 30, "y", ("p", "q"))
    length = len(tokenizer.encode(sentence_translation.prompt(sentence, NAMES)).ids)
    narrow = model(tokenizer, 1, eos_token_id=None, max_position_embeddings=length + 3)
    [short] = sentence_translation.translate(narrow, tokenizer, [sentence], NAMES)
    [long] = sentence_translation.translate(
        decoder, tokenizer, [sentence], NAMES, most=3
    )
    assert short == long
    full = model(tokenizer, 1, max_position_embeddings=length)
    with pytest.raises(ValueError, match="leaves no room"):
        sentence_translation.translate(full, tokenizer, [sentence], NAMES)


def test_chrf_is_sacrebleu_s():
    answers = ["the cat sat", "", "même chose"]
    references = ["the cat sits", "the dog", "même chose"]
    found = sentence_translation.sentence_chrf(answers, references)
    expected = [
        sacrebleu.sentence_chrf(a, [r]).score for a, r in zip(answers, references)
    ]
    np.testing.assert_allclose(found, expected)
    assert found[1] == 0 and found[2] == 100
    with pytest.raises(ValueError):
        sentence_translation.sentence_chrf(answers, references[:2])


def test_without_sacrebleu_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r"jaxling\[eval\]"):
        sentence_translation.sentence_chrf(["a"], ["b"])
