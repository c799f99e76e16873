"""The demo models' tokenizer: one byte-pair encoding a script, put together.

The scripts share no letter, so vocabularies and merges trained apart and concatenated
are exactly one byte-pair encoding with a set number of tokens for each script. Anything
else falls back to bytes. A space belongs to the word that it precedes ("▁water"), so
the tokens of a prompt and of " " + answer are the tokens of both together, and decoding
gives the text back unchanged.
"""

import functools
import json
import pathlib
from collections import Counter

from . import documents, text

# Tokens a script, its letters included: by the number of languages and the fertility.
SIZES = {
    ("eng", "swh", "eus", "lav"): 4600,
    ("ukr",): 1480,
    ("hye",): 1100,
    ("guj",): 1130,
    ("syc",): 1180,
    ("cop",): 1343,
    ("chr",): 1150,
}
SPACE = "▁"  # U+2581, as SentencePiece writes it
END = "</s>"  # closes every document
PAD = "<pad>"
PACKAGED = pathlib.Path(__file__).parent / "models" / "demo" / "tokenizer.json"
_RAREST = 3  # occurrences; characters seen less often are left to the bytes
_PATTERN = rf"{SPACE}?[\p{{L}}\p{{M}}]+|\n|[^\p{{L}}\p{{M}}]"


def train(verses: text.Verses):
    """Trains the `tokenizers.Tokenizer` of 12,288 tokens on the training verses."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    vocabulary = [PAD, END, *(f"<0x{byte:02X}>" for byte in range(256)), "\n", SPACE]
    characters = Counter(
        character
        for column in verses.text.values()
        for verse in column
        for character in verse
    )
    letters = {c for c in characters if text.words(c)}
    vocabulary += sorted(
        c for c, n in characters.items() if n >= _RAREST and c not in letters | {" "}
    )
    vocabulary += documents.TEMPLATE_TOKENS
    merges: list[tuple[str, str]] = []
    for languages, size in SIZES.items():
        counts = Counter(
            SPACE + word
            for language in languages
            for verse in verses.text[language]
            for word in text.words(verse)
            if all(characters[letter] >= _RAREST for letter in word)
        )
        part = tokenizers.Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
        words = [word for word, count in sorted(counts.items()) for _ in range(count)]
        part.train_from_iterator(words, trainer)
        model = json.loads(part.to_str())["model"]
        vocabulary += sorted(model["vocab"], key=model["vocab"].get)
        merges += [tuple(pair) for pair in model["merges"]]
    vocabulary = list(dict.fromkeys(vocabulary))
    whole = tokenizers.Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(vocabulary)},
            merges,
            byte_fallback=True,
            ignore_merges=True,  # the template's words have no merges of their own
        )
    )
    whole.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(" ", SPACE)]
    )
    whole.pre_tokenizer = pre_tokenizers.Split(
        tokenizers.Regex(_PATTERN), behavior="isolated"
    )
    whole.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    whole.add_special_tokens([PAD, END])
    return whole


@functools.cache
def packaged():
    """The demo models' `tokenizers.Tokenizer`."""
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(PACKAGED))


def save(tokenizer, directory: str | pathlib.Path) -> None:
    """Writes `tokenizer.json` and the configuration that `transformers` expects."""
    directory = pathlib.Path(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": documents.LONGEST,
    }
    (directory / "tokenizer_config.json").write_text(
        json.dumps(configuration, indent=2) + "\n", "utf-8"
    )
