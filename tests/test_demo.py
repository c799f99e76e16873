"""The demo's text, lexicon, tokenizer and documents."""

import itertools
import math
import random

import numpy as np
import pytest

from jaxling import demo, dictionaries, vocabulary, word_translation
from jaxling.demo import documents, evaluation, lexicons, text, tokenizer


@pytest.fixture(scope="module")
def training_verses():
    return demo.verses("train")


@pytest.fixture(scope="module")
def pieces():
    return tokenizer.packaged()


@pytest.fixture(scope="module")
def mined(training_verses):
    return lexicons.mine(training_verses)


def test_every_verse_is_in_one_split_and_books_stay_whole():
    everything, train, held_out = (demo.verses(s) for s in (None, "train", "held_out"))
    assert len(everything.names) == 7957
    assert sorted(train.names + held_out.names) == sorted(everything.names)
    books = {name.split(".")[0] for name in held_out.names}
    assert books == demo.HELD_OUT_BOOKS
    assert not books & {name.split(".")[0] for name in train.names}
    assert 0.29 < len(held_out.names) / 7957 < 0.31
    assert list(everything.text) == list(demo.LANGUAGES)
    row = everything.names.index("JOH.11.35")
    assert everything.text["eng"][row] == "Jesus wept."
    assert all(len(column) == 7957 for column in everything.text.values())


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="'test'"):
        demo.verses("test")


def test_words_keep_their_marks():
    assert text.words("ઈસુ 12, maji-ya “ūdens”!") == ["ઈસુ", "maji", "ya", "ūdens"]


def test_associations_equal_a_count_by_hand():
    rng = random.Random(0)
    letters = "abcdefgh"
    left, right = (
        [" ".join(rng.choices(letters, k=rng.randrange(5))) for _ in range(80)]
        for _ in range(2)
    )
    left[3] = right[7] = ""
    words = [lexicons.occurrences(column) for column in (left, right)]
    found = lexicons.associations(*words)
    by_pair = {
        (words[0].forms[i], words[1].forms[j]): (ratio, dice)
        for i, j, ratio, dice in zip(*found)
    }
    verses = [(set(a.split()), set(b.split())) for a, b in zip(left, right) if a and b]
    for pair in itertools.product(words[0].forms, words[1].forms):
        table = np.zeros((2, 2))
        for a, b in verses:
            table[int(pair[0] in a), int(pair[1] in b)] += 1
        sums = table.sum(1, keepdims=True) * table.sum(0) / len(verses)
        ratio = 2 * sum(o * math.log(o / e) for o, e in zip(table.flat, sums.flat) if o)
        if table[1, 1] <= sums[1, 1]:
            assert pair not in by_pair
            continue
        dice = 2 * table[1, 1] / (2 * table[1, 1] + table[0, 1] + table[1, 0])
        # Float64 sums of a few terms in another order.
        np.testing.assert_allclose(by_pair[pair], (ratio, dice), rtol=1e-9, atol=1e-9)


def test_the_packaged_lexicon_is_what_is_mined(mined, tmp_path):
    lexicons.write(mined, tmp_path)
    for path in tmp_path.iterdir():
        left, right, split = path.stem.replace(".", "-").split("-")
        assert dictionaries.read_dictionary(path) == demo.lexicon(left, right, split)
    for language in list(demo.LANGUAGES)[1:]:
        sizes = [len(demo.lexicon("eng", language, s)) for s in lexicons.SPLITS]
        assert sum(sizes) > 300
        assert 0.35 < sizes[0] / sum(sizes) < 0.65


def test_the_cards_count_the_pairs_of_the_word_prompts(mined):
    pairs = {
        (languages, pair)
        for languages, known in lexicons.training_pairs(mined).items()
        if languages not in documents.UNSEEN_PAIRS
        for pair in known
    }
    for name in ("demo", "demo-small"):
        path = tokenizer.PACKAGED.parents[1] / name / "README.md"
        card = " ".join(path.read_text("utf-8").split())
        assert f"out of {len(pairs):,} associated pairs of words" in card


def test_no_concept_is_in_two_splits():
    for language in demo.LANGUAGES:
        found = {}
        for other, split in itertools.product(demo.LANGUAGES, lexicons.SPLITS):
            if other != language:
                for word, _ in demo.lexicon(language, other, split):
                    found.setdefault(word, set()).add(split)
        several = {word for word, splits in found.items() if len(splits) > 1}
        assert not several, (language, several)
    for split in lexicons.SPLITS:
        for language in list(demo.LANGUAGES)[1:]:
            for word, _ in demo.lexicon("eng", language, split):
                assert lexicons.split_of(lexicons.stem(word)) == split


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eng", "deu", "test"), "'deu'"),
        (("eng", "eng", "test"), "differ"),
        (("eng", "swh", "dev"), "'dev'"),
    ],
)
def test_bad_arguments_of_the_lexicon_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        demo.lexicon(*arguments)


def test_both_directions_of_a_lexicon_are_one_list():
    there, back = (demo.lexicon(*p, "test") for p in (("eng", "cop"), ("cop", "eng")))
    assert there == [pair[::-1] for pair in back]


def test_tokens_give_the_text_back(pieces, training_verses):
    held_out = demo.verses("held_out")
    texts = [
        verse
        for verses in (training_verses, held_out)
        for column in verses.text.values()
        for verse in column[:50]
    ]
    texts += ["Please translate words.\n\nA: b\n", "日本 €  two spaces ", "\t\u200d🙂"]
    for content in texts:
        assert pieces.decode(pieces.encode(content).ids) == content


def test_a_prompt_and_its_answer_are_tokenized_apart(pieces):
    prompt = documents.word_prompt("eng", "swh", [("water", "maji")], "fire")
    whole = pieces.encode(prompt + " moto").ids
    assert whole == pieces.encode(prompt).ids + pieces.encode(" moto").ids
    assert prompt.endswith("English: fire\nSwahili:")


def test_prompts_are_those_of_the_task():
    pair = ("eng", "swh")
    task = word_translation.build_task(
        {pair: demo.lexicon(*pair, "test")}, demo.LANGUAGES, count=1
    )
    shots = demo.lexicon(*pair, "train")[:3]
    item = task.items[0]
    asked = word_translation.prompt(task, item, shots, item.word)
    assert asked == documents.word_prompt(*pair, shots, item.word)


def test_the_tokenizer_is_what_is_trained(pieces, training_verses):
    again = tokenizer.train(training_verses)
    assert again.get_vocab() == pieces.get_vocab()
    content = " ".join(column[10] for column in training_verses.text.values())
    assert again.encode(content).ids == pieces.encode(content).ids


def test_transformers_opens_the_tokenizer(pieces):
    transformers = pytest.importorskip("transformers")
    folder = str(tokenizer.PACKAGED.parent)
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    content = "Swahili: maji\n ⲠⲞⲨⲢⲞ"
    assert opened(content).input_ids == pieces.encode(content).ids
    assert opened.decode(opened(content).input_ids) == content
    assert opened.eos_token == tokenizer.END


def test_the_vocabulary_is_balanced_over_scripts():
    from jaxling import writing_systems

    words = vocabulary.load_vocabulary("demo")
    assert 12_000 <= len(words.tokens) <= 16_000
    scripts = writing_systems.writing_systems(words.tokens, words.special)
    counts = {script: scripts.count(script) for script in set(scripts)}
    for script in "Latin Cyrillic Armenian Gujarati Syriac Coptic Cherokee".split():
        assert counts[script] >= 1000, counts
    assert counts["Bytes"] == 256


def test_documents_hold_nothing_that_is_held_out(pieces, training_verses, mined):
    pairs = lexicons.training_pairs(mined)
    drawn = list(
        documents.training_documents(
            pieces, training_verses, pairs, tokens=150_000, seed=3
        )
    )
    known = {
        language: set(training_verses.text[language]) for language in demo.LANGUAGES
    }
    code_of = {name: code for code, name in demo.LANGUAGES.items()}
    forbidden = {
        language: {
            word
            for other, split in itertools.product(
                demo.LANGUAGES, ("development", "test")
            )
            if other != language
            for word, _ in demo.lexicon(language, other, split)
        }
        for language in demo.LANGUAGES
    }
    kinds = {"verse": 0, "verse pair": 0, "word pairs": 0}
    first_verse = None
    for number, document in enumerate(drawn):
        assert len(document.tokens) <= documents.LONGEST
        content = pieces.decode(list(document.tokens), skip_special_tokens=True)
        cut = document.tokens[-1] != pieces.token_to_id(tokenizer.END)
        lines = [line.split(": ", 1) for line in content.split("\n") if line]
        if content.startswith("Please"):
            kinds["word pairs"] += 1
            for name, word in lines[1:]:
                assert cut or word not in forbidden[code_of[name]], word
            used = {code_of[name] for name, _ in lines[1:]}
        elif lines and lines[0][0] in code_of:
            kinds["verse pair"] += 1
            for name, verse in lines:
                assert cut or verse in known[code_of[name]]
            used = {code_of[name] for name, _ in lines if name in code_of}
        else:
            kinds["verse"] += 1
            assert cut or any(content[1:] in column for column in known.values())
            used = set()
        assert not any(set(pair) <= used for pair in documents.UNSEEN_PAIRS)
        if first_verse is None and not content.startswith("Please"):
            first_verse = number
    before = sum(len(document.tokens) for document in drawn[:first_verse])
    assert documents.WORDS_FIRST * 150_000 <= before < 0.1 * 150_000
    mixed = len(drawn) - first_verse
    for kind, share in documents.SHARES.items():
        count = kinds[kind] - (first_verse if kind == "word pairs" else 0)
        # Five standard deviations of a draw.
        slack = 5 * math.sqrt(share * (1 - share) / mixed)
        assert abs(count / mixed - share) < slack, (kind, count, mixed)


def test_targets_of_word_pairs_are_the_translations(pieces):
    document = documents.word_document(
        pieces, "eng", "swh", [("water", "maji"), ("fire", "moto")]
    )
    chosen = [t for t, on in zip(document.tokens, document.targets) if on]
    assert pieces.decode(chosen, skip_special_tokens=True) == " maji\n\n moto\n\n"
    expected = documents.word_prompt(
        "eng", "swh", [("water", "maji"), ("fire", "moto")]
    )
    assert pieces.decode(document.tokens, skip_special_tokens=True) == expected


def test_the_same_seed_draws_the_same_documents(pieces, training_verses, mined):
    pairs = lexicons.training_pairs(mined)
    first, again, other = (
        [
            list(document.tokens)
            for document in documents.training_documents(
                pieces, training_verses, pairs, tokens=5000, seed=seed
            )
        ]
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_bootstrap_resamples_concepts():
    values = np.array([1.0] * 50 + [0.0] * 50)
    apart = evaluation.bootstrap(values, [str(i) for i in range(100)])
    together = evaluation.bootstrap(values, ["a"] * 50 + ["b"] * 50)
    assert apart.mean == together.mean == 0.5
    # 1.96 sqrt(0.25 / 100), give or take the noise of 2,000 draws.
    np.testing.assert_allclose(apart[1:], (0.402, 0.598), atol=0.02)
    assert together[1:] == (0.0, 1.0)


def test_the_spot_check_is_of_pairs_drawn_with_a_seed():
    path = lexicons.__file__.replace("lexicons.py", "lexicon/spot_check.tsv")
    with open(path, encoding="utf-8") as file:
        heads, *rows = (line.rstrip("\n").split("\t") for line in file)
    assert heads == ["language", "english", "word", "verdict", "note"]
    draw = random.Random(0)
    expected = []
    for language in list(demo.LANGUAGES)[1:]:
        pairs = demo.lexicon("eng", language, "test")
        chosen = sorted(draw.sample(range(len(pairs)), 12))
        expected += [[language, *pairs[i]] for i in chosen]
    assert [row[:3] for row in rows] == expected
    verdicts = [row[3] for row in rows]
    counts = {v: verdicts.count(v) for v in ("right", "near", "wrong")}
    assert sum(counts.values()) == len(rows) == 108
    with open(path.replace("spot_check.tsv", "README.md"), encoding="utf-8") as file:
        card = " ".join(file.read().split())
    assert (
        "{right} are right, {near} are near and {wrong} are wrong".format(**counts)
        in card
    )
    for language in list(demo.LANGUAGES)[1:]:
        sizes = [len(demo.lexicon("eng", language, s)) for s in lexicons.SPLITS]
        row = "| {} | {} | {} | {} |".format(demo.LANGUAGES[language], *sizes)
        assert row in card
