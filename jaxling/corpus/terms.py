"""Words and phrases to look for, cut into the units in which documents are compared.

A text's units are its words: the longest runs of letters, marks and digits, folded to
one case. Scripts that are written without spaces have no such words, so each of their
characters is a unit of its own, and a term in them is found wherever it stands. A
document of token ids has its tokens for units.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Terms(NamedTuple):
    """What to count: term i is found where one of `variants[i]` stands.

    Of surface terms a variant is a text, of token terms a sequence of token ids.
    """

    names: list[str]
    variants: list[tuple]
    kind: str
    """`surface` or `tokens`."""
    fold_case: bool = True


def surface_terms(words: Sequence[str], *, fold_case: bool = True) -> Terms:
    """Terms that are matched in text, whole words where the script has them.

    The words of a phrase may be parted by any characters that are not letters, marks or
    digits; characters of a script without spaces stand next to each other as they do
    in the term. Duplicates are allowed: each is counted.

    Args:
      words: words or phrases.
      fold_case: whether "House" is "house" (simple case folding, one character for
        one).

    Raises:
      ValueError: a term without a letter, mark or digit; no term at all.
    """
    if not words:
        raise ValueError("`words` must hold a word; got none.")
    return Terms(list(words), [(word,) for word in words], "surface", fold_case)


def token_terms(words: Sequence[str], tokenizer: Any) -> Terms:
    """Terms that are matched as sequences of tokens.

    A word's variants are its tokens after a space and at the beginning of a text.
    `tokenizer` is a `tokenizers.Tokenizer`.

    Raises:
      ValueError: a word without tokens; no word at all.
    """
    if not words:
        raise ValueError("`words` must hold a word; got none.")
    variants = []
    for word in words:
        coded = [
            tuple(tokenizer.encode(text, add_special_tokens=False).ids)
            for text in (" " + word, word)
        ]
        if not all(coded):
            raise ValueError(f"The word {word!r} has no tokens.")
        variants.append(tuple(dict.fromkeys(coded)))
    return Terms(list(words), variants, "tokens")
