"""JSON lines with a text and a label, for models from Hugging Face directories."""

__all__ = ["read_texts"]

import json
from pathlib import Path
from typing import Any

from ...errors import ArgumentError, needing
from .examples import Examples, Request
from .tables import targets_of

_TEXTS = ("text", "sentence", "content")
_LABELS = ("label", "labels", "target", "class")


def read_texts(source: str, request: Request) -> Examples:
    """Read a text and, where it is asked for, a label from each line.

    Raises:
        ArgumentError: A line is no JSON object or lacks the text or the label, or there is no tokenizer.
    """
    rows = []
    try:
        text_of_file = Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"`{source}` is not in UTF-8: {error.reason} at byte {error.start}.") from error
    for number, line in enumerate(text_of_file.split("\n"), 1):  # splitlines would break a text at more than that
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ArgumentError(f"Line {number} of `{source}` is no JSON object.") from error
            if not isinstance(row, dict):
                raise ArgumentError(f"Line {number} of `{source}` is no JSON object.")
            rows.append(row)
    if not rows:
        raise ArgumentError(f"`{source}` has no lines.")
    text = _column(source, rows, "--text", request.text, _TEXTS)
    target = _column(source, rows, "--target", request.target, _LABELS, request.labelled)
    for number, row in enumerate(rows, 1):
        for column in filter(None, (text, target)):
            if column not in row:
                raise ArgumentError(f"Row {number} of `{source}` has no {column!r}.")
    if request.tokenizer is None:
        raise ArgumentError("Texts need the tokenizer of the network: pass its directory with --tokenizer.")
    with needing("transformers", "To read texts"):
        from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(request.tokenizer), local_files_only=True)
    except Exception as error:
        raise ArgumentError(f"`{request.tokenizer}` holds no tokenizer: {str(error).splitlines()[0]}.") from error
    texts = [str(row[text]) for row in rows]
    targets, classes = targets_of(source, None if target is None else [row[target] for row in rows], request)

    def tokenized(found: list[str]) -> dict[str, Any]:
        return dict(tokenizer(found, padding=True, truncation=True, return_tensors="pt"))

    return Examples(texts.__getitem__, texts, targets, classes, collate=tokenized)


def _column(
    source: str,
    rows: list[dict[str, Any]],
    option: str,
    wanted: str | None,
    usual: tuple[str, ...],
    needed: bool | None = True,
) -> Any:
    found = [wanted] if wanted is not None else [name for name in usual if name in rows[0]]
    if found and found[0] in rows[0]:
        return found[0]
    if needed:
        raise ArgumentError(f"Say with {option} which key of `{source}` is meant; it has {', '.join(rows[0])}.")
    return None
