"""Lists every experiment: its question, what runs with no flags, the number to expect.

python -m experiments
"""

import ast
import os
import pathlib
import sys
import textwrap

FIELDS = ("Default:", "Expect:")


def describe(path: pathlib.Path) -> dict[str, str]:
    """Question, command, default and expectation from a script's docstring.

    Raises:
      ValueError: the docstring lacks one of them.
    """
    paragraphs = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split(
        "\n\n"
    )
    found = {"name": path.stem, "question": " ".join(paragraphs[0].split())}
    for paragraph in paragraphs:
        if paragraph.strip().startswith("python -m experiments."):
            found.setdefault("command", paragraph.strip().splitlines()[0])
        for field in FIELDS:
            if paragraph.startswith(field):
                text = " ".join(paragraph.removeprefix(field).split())
                found[field.rstrip(":").lower()] = text
    missing = {"command", "default", "expect"} - set(found)
    if missing or not found["question"].endswith("?"):
        raise ValueError(
            f"The docstring of {path.name} must open with a question and hold a command"
            f" and paragraphs that begin with {FIELDS}; missing {sorted(missing)}."
        )
    return found


def scripts() -> list[pathlib.Path]:
    """The experiments' files, in alphabetical order."""
    folder = pathlib.Path(__file__).parent
    skip = {"__init__", "__main__", "common"}
    return sorted(path for path in folder.glob("*.py") if path.stem not in skip)


def markdown() -> str:
    """The list as the README's table."""
    rows = ["| experiment | question | with no flags | expect |", "|---|---|---|---|"]
    for path in scripts():
        found = describe(path)
        cells = (
            f"`{path.stem}`",
            *(found[f] for f in ("question", "default", "expect")),
        )
        rows.append(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        )
    return "\n".join(rows)


def main() -> None:
    """Prints the list."""
    if sys.argv[1:] == ["--markdown"]:
        print(markdown())
        return
    for path in scripts():
        found = describe(path)
        print(f"{found['name']}\n    {found['question']}")
        for field in ("command", "default", "expect"):
            text = f"{field}: {found[field]}"
            print(textwrap.indent(textwrap.fill(text, 84), "    "))
        print()


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads (`head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
