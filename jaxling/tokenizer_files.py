"""The tokens and ids that a tokenizer's files hold, whatever the format.

They are as untrusted as the tensors beside them, and no link among them may leave the
checkpoint's directory either. Only data are read (`tokenizer.json`, `vocab.txt`, a
SentencePiece model); where a folder has none of them, transformers makes the tokenizer,
without remote code. What the tokens mean to people is the business of `vocabulary`.
"""

import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxling.checkpoints import tensors

# As transformers names them for the families that are handled.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_OWN = (
    *_VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
FILES = (*_OWN, "config.json")  # whose model_type may be all that names a class
_LARGEST_ID = 2**24  # no vocabulary is near it; a damaged file may name any number


class Pieces(NamedTuple):
    """A tokenizer's own strings with their ids, as its file writes them.

    `special` are the control tokens among them; `byte_level` says that the characters
    stand for bytes.
    """

    ids: dict[str, int]
    special: set[str]
    byte_level: bool


def read_pieces(folder: pathlib.Path) -> Pieces:
    """Reads the tokenizer in `folder`.

    Raises:
      ValueError: a file is not what it claims to be, or there is no tokenizer.
      OSError: a file cannot be read.
    """
    if (path := folder / "tokenizer.json").exists():
        return _checked(_described(_json(path), path), path)
    if (path := folder / "vocab.txt").exists():
        return _checked(_lines(path), path)
    for name in ("spiece.model", "tokenizer.model"):
        if (path := folder / name).exists():
            return _checked(_sentencepiece(path), path)
    return _checked(_made_by_transformers(folder), folder)


def read_tokenizer(folder: pathlib.Path) -> Any:
    """The `tokenizers.Tokenizer` in `folder`, without padding and truncation.

    Raises:
      ValueError: there is none, or it cannot be read.
    """
    import tokenizers

    path = folder / "tokenizer.json"
    if path.exists():
        content = _content(path)
        try:
            found = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the only type it raises
            raise ValueError(f"{path} is no tokenizer: {error}") from None
    else:
        backend = getattr(_by_transformers(folder), "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"transformers has no fast tokenizer for {folder}.")
        found = backend
    found.no_padding()
    found.no_truncation()
    return found


def copy(folder: pathlib.Path, to: pathlib.Path) -> list[str]:
    """Copies the tokenizer's files beside a model of the same kind; says which.

    There are none where `folder` has no tokenizer. `to` holds no other tokenizer
    afterwards.

    Raises:
      ValueError: as `check`. Nothing was copied or removed.
    """
    check(folder)
    names = [name for name in _OWN if (folder / name).is_file()]
    if not folder.samefile(to):
        for name in _OWN:
            (to / name).unlink(missing_ok=True)
        for name in names:
            shutil.copyfile(folder / name, to / name)
    return names


def check(folder: pathlib.Path) -> None:
    """Looks at what others will read: what is there are files, and inside `folder`.

    Raises:
      ValueError: one leads out of it, is no regular file, or is too long.
    """
    for path in (folder / name for name in FILES):
        if path.exists():
            _check(path)


def _check(path: pathlib.Path) -> None:
    tensors.inside(path.parent, path.name)
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file.")
    if (size := path.stat().st_size) > tensors.LONGEST_JSON:
        raise ValueError(f"{path} has {size} bytes: too long for a tokenizer's file.")


def _content(path: pathlib.Path) -> bytes:
    _check(path)
    return path.read_bytes()


def _checked(pieces: Pieces, path: pathlib.Path) -> Pieces:
    if not pieces.ids:
        raise ValueError(f"{path} holds no token.")
    for token, i in pieces.ids.items():
        if type(i) is not int or not 0 <= i < _LARGEST_ID:
            raise ValueError(
                f"{path}: the id of token {tensors.short(token)} must be an integer in"
                f" [0, {_LARGEST_ID}); got {tensors.short(i)}."
            )
        try:
            token.encode("utf-8")
        except (AttributeError, UnicodeEncodeError):
            raise ValueError(
                f"{path}: token {i} must be Unicode text; got {tensors.short(token)}."
            ) from None
    return pieces


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(_content(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON in UTF-8: {error}.") from None


def _described(description: Any, path: pathlib.Path) -> Pieces:
    """What `tokenizer.json`, the format of the tokenizers library, says."""
    try:
        vocabulary = description["model"]["vocab"]
        if isinstance(vocabulary, dict):
            ids = dict(vocabulary)
        else:
            ids = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        special = set()
        for added in description.get("added_tokens") or []:
            ids[added["content"]] = added["id"]
            if added.get("special"):
                special.add(added["content"])
        steps = [*_steps(description.get("decoder"), "decoders")]
        steps += _steps(description.get("pre_tokenizer"), "pretokenizers")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a tokenizer's description ({type(error).__name__}: {error})"
            "; it needs a `model` with a `vocab` and `added_tokens` with `id` and"
            " `content`."
        ) from None
    return Pieces(ids, special, "ByteLevel" in steps)


def _steps(step: Mapping[str, Any] | None, children: str) -> Iterator[str]:
    """The types of a pipeline's steps, those inside sequences too."""
    if step is not None:
        yield step["type"]
        for child in step.get(children) or []:
            yield from _steps(child, children)


def _lines(path: pathlib.Path) -> Pieces:
    """What `vocab.txt` says: WordPiece, one token a line."""
    try:
        lines = _content(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8: {error}.") from None
    tokens = [line.rstrip("\r") for line in lines]
    ids = {token: i for i, token in enumerate(tokens) if token}
    return Pieces(ids, {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}, False)


def _sentencepiece(path: pathlib.Path) -> Pieces:
    """What a SentencePiece model says; the place of a piece is its id.

    The file is a protocol buffer: `pieces` are messages in field 1, each with its text
    in field 1 and its type in field 3 (2 unknown, 3 control). Tokens added to it stand
    in `added_tokens.json` or `tokenizer_config.json`.
    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    ids: dict[str, int] = {}
    special = set()
    content = _content(path)
    try:
        pieces = [m for field, m in _fields(content) if field == 1]
        for i, piece in enumerate(dict(_fields(message)) for message in pieces):
            text = piece[1].decode("utf-8")
            ids.setdefault(text, i)
            if piece.get(3) in (2, 3):
                special.add(text)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a SentencePiece model ({type(error).__name__}: {error})."
        ) from None
    for name in ("added_tokens.json", "tokenizer_config.json"):
        if (other := path.parent / name).exists():
            added = _added(_json(other), other)
            ids |= added
            special |= set(added)
    return Pieces(ids, special, False)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """A protocol buffer's fields: integers, or the bytes of any other kind."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, wire = key >> 3, key & 7
        value: Any
        if wire == 0:
            value, at = _varint(message, at)
        else:
            size, at = {1: (8, at), 5: (4, at)}.get(wire) or _varint(message, at)
            if wire not in (1, 2, 5) or at + size > len(message):
                raise ValueError(f"field {field} does not fit at byte {at}")
            value, at = message[at : at + size], at + size
        yield field, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"an integer of more than ten bytes ends at byte {at}")


def _added(content: Any, path: pathlib.Path) -> dict[str, int]:
    try:
        if path.name == "added_tokens.json":
            return dict(content)
        listed = content.get("added_tokens_decoder") or {}
        return {token["content"]: int(i) for i, token in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not list added tokens: {error!r}.") from None


def _by_transformers(folder: pathlib.Path) -> Any:
    """Any other tokenizer, made by transformers from local files alone."""
    # Where no file holds tokens, transformers makes up a tokenizer of a few.
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ValueError(
            f"{folder} holds no tokenizer: none of the files {', '.join(_VOCABULARIES)}"
            " is there."
        )
    import transformers

    check(folder)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a foreign reader makes of foreign files
        raise ValueError(
            f"{folder} holds no tokenizer that can be read: neither tokenizer.json,"
            " vocab.txt nor spiece.model, and transformers says"
            f" {type(error).__name__}: {error}"
        ) from None


def _made_by_transformers(folder: pathlib.Path) -> Pieces:
    tokenizer = _by_transformers(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _described(json.loads(backend.to_str()), folder)
    return Pieces(tokenizer.get_vocab(), set(tokenizer.all_special_tokens), False)
