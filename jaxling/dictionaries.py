"""Word pairs in the format of the MUSE dictionaries."""

import pathlib


def read_dictionary(path: str | pathlib.Path) -> list[tuple[str, str]]:
    """Reads a MUSE dictionary: one pair a line, two words parted by a tab or a space.

    https://github.com/facebookresearch/MUSE, ground-truth bilingual dictionaries.

    Raises:
      ValueError: a line is not a pair; the message names it.
      OSError: the file cannot be read.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8: {error}.") from None
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        words = line.split("\t") if "\t" in line else line.split()
        if not line:
            continue
        if len(words) != 2 or not all(word.strip() for word in words):
            raise ValueError(
                f"{path}, line {number}: a dictionary's line holds two words parted by"
                f" a tab or a space; got {line[:80]!r}."
            )
        pairs.append((words[0].strip(), words[1].strip()))
    if not pairs:
        raise ValueError(f"{path} holds no word pair.")
    return pairs
