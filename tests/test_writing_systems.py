"""Categories by the paper's rule, and scripts by Unicode's."""

import collections
import time
import unicodedata

import numpy as np
import pytest

from jaxling.writing_systems import unicode_categories, writing_systems


def category_oracle(token: str) -> str:
    """The rule character by character, as the paper's appendix states it."""
    labels = []
    for character in token:
        category = unicodedata.category(character)
        if category.startswith("L"):
            labels.append(unicodedata.name(character).split(" ")[0])
        else:
            labels.append(category[0])
    return collections.Counter(labels).most_common(1)[0][0] if labels else "Unknown"


@pytest.mark.parametrize(
    "token, category",
    [
        ("▁a", "S"),
        ("▁1", "S"),
        ("▁the", "LATIN"),
        ("a▁", "LATIN"),
        ("▁हिं", "M"),
        ("में", "M"),
        ("ที่", "M"),
        ("<0x51>", "N"),
        ("<0xAB>", "LATIN"),
        ("<pad>", "LATIN"),
        ("", "Unknown"),
        ("ﾀ", "HALFWIDTH"),
        ("Ａ", "FULLWIDTH"),
        ("々", "IDEOGRAPHIC"),
        ("ー", "KATAKANA-HIRAGANA"),
        ("ʰ", "MODIFIER"),
        ("ᐃ", "CANADIAN"),
        ("ˇ", "CARON"),
        ("µ", "MICRO"),
        ("ª", "FEMININE"),
        ("中国", "CJK"),
        ("나라", "HANGUL"),
        ("слово", "CYRILLIC"),
        ("...", "P"),
        ("\n", "C"),
        (" ", "Z"),
    ],
)
def test_categories_follow_the_paper_to_the_letter(token, category):
    assert unicode_categories([token]) == [category]


def mixed_tokens(rng: np.random.Generator, count: int) -> list[str]:
    ranges = [(32, 0x250), (0x370, 0x530), (0x900, 0xE80), (0x3040, 0x3100)]
    ranges += [(0x4E00, 0x5000), (0xAC00, 0xAD00), (0x1F300, 0x1F400)]
    letters = [
        chr(point)
        for low, high in ranges
        for point in range(low, high)
        if unicodedata.name(chr(point), "") or point < 33
    ]
    sizes = rng.integers(0, 9, count)
    drawn = rng.choice(letters, sizes.sum())
    return ["".join(part) for part in np.split(drawn, np.cumsum(sizes)[:-1])]


def test_categories_equal_the_oracle_with_many_ties(rng):
    tokens = mixed_tokens(rng, 5_000)
    assert unicode_categories(tokens) == [category_oracle(token) for token in tokens]


@pytest.mark.parametrize(
    "token, system",
    [
        ("▁the", "Latin"),
        ("▁a", "Latin"),
        ("में", "Devanagari"),
        ("ที่", "Thai"),
        ("▁中", "Han"),
        ("々", "Han"),
        ("ー", "Katakana"),
        ("らーめん", "Hiragana"),
        ("ラーメン", "Katakana"),
        ("،", "Arabic"),
        ("؟", "Arabic"),
        ("।", "Devanagari"),
        ("e\u0301", "Latin"),
        ("\u0301", "Common"),
        ("▁1999", "Common"),
        ("...", "Common"),
        ("<0xE0>", "Bytes"),
        ("<E0 A4>", "Bytes"),
        ("▁<E0>", "Bytes"),
        ("д<D0>", "Cyrillic"),
        ("<pad>", "Latin"),
        ("aб", "Latin"),
        ("бa", "Cyrillic"),
        ("▁", "Common"),
        ("", "Unknown"),
    ],
)
def test_writing_systems_use_script_and_its_extensions(token, system):
    assert writing_systems([token]) == [system]


def test_special_tokens_are_named_by_their_mask():
    found = writing_systems(["<pad>", "pad"], special=np.array([True, False]))
    assert found == ["Special", "Latin"]


def test_no_tokens_no_labels():
    assert unicode_categories([]) == writing_systems([]) == []
    assert unicode_categories(["", ""]) == writing_systems(["", ""]) == ["Unknown"] * 2


def test_a_quarter_of_a_million_tokens_take_seconds(rng):
    tokens = mixed_tokens(rng, 250_000)
    begin = time.process_time()
    unicode_categories(tokens)
    writing_systems(tokens)
    assert time.process_time() - begin < 15  # both took 3 s on one busy core
