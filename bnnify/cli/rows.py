"""Predictions as rows of plain data, and as CSV and JSON lines."""

__all__ = ["make_rows", "sorted_rows", "written"]

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.atomic import replace_atomically
from ..decisions import Decision
from ..errors import ArgumentError
from ..prediction.averages import Prediction

Row = dict[str, Any]


def make_rows(
    prediction: Prediction, names: Sequence[str], classes: Sequence[str], decisions: Mapping[str, Decision]
) -> list[Row]:
    """Make a row for each example: of classes the most probable one, its probability, the entropy and the mutual
    information in nats, and the decisions that the file has rules for; of a regression mean, std and interval.

    A temperature changes probability and entropy. Sets and acceptance go by the networks' average, on which their rules
    were fitted.

    Raises:
        ArgumentError: The model gives more than one answer for an example.
    """
    count = len(prediction.mean)
    names = names or [str(number) for number in range(count)]
    rows = _classified if prediction.predictive_entropy is not None else _regressed
    columns = rows(prediction, classes, decisions)
    return [
        {"input": name, **{column: values[number] for column, values in columns.items()}}
        for number, name in enumerate(names)
    ]


def _classified(prediction: Prediction, classes: Sequence[str], decisions: Mapping[str, Any]) -> dict[str, list[Any]]:
    temperature = decisions.get("temperature")
    tempered = prediction if temperature is None else temperature(prediction)
    mean, entropy, information = tempered.mean, tempered.predictive_entropy, prediction.mutual_information
    if prediction.class_dim is None:  # yes or no
        mean = mean.reshape(len(mean), -1)
        if mean.shape[1] != 1:
            raise _several(prediction)
        probability, answer = mean[:, 0].maximum(1 - mean[:, 0]), (mean[:, 0] > 0.5).long()
    elif mean.ndim != 2:
        raise _several(prediction)
    else:
        probability, answer = mean.max(1)
    columns: dict[str, list[Any]] = {
        "class": [_name(classes, number) for number in answer.tolist()],
        "probability": probability.tolist(),
    }
    for name, values in {"entropy": entropy, "mutual_information": information}.items():
        if values is not None:
            columns[name] = values.flatten().tolist()
    if "abstention" in decisions:
        accepted = decisions["abstention"](prediction)
        columns["decision"] = ["accept" if each else "abstain" for each in accepted.flatten().tolist()]
    if "conformal_sets" in decisions:
        sets = decisions["conformal_sets"](prediction)
        columns["set"] = [[_name(classes, number) for number in each.nonzero().flatten().tolist()] for each in sets]
    return columns


def _regressed(prediction: Prediction, classes: Sequence[str], decisions: Mapping[str, Any]) -> dict[str, list[Any]]:
    if prediction.mean.numel() != len(prediction.mean):
        raise _several(prediction)
    found: dict[str, Any] = {"mean": prediction.mean, "epistemic_std": prediction.epistemic_std}
    if prediction.total_std is not None:
        found["total_std"] = prediction.total_std
    if "conformal_intervals" in decisions:
        found["low"], found["high"] = decisions["conformal_intervals"](prediction)
    elif prediction.total_std is not None:
        found["low"], found["high"] = prediction.interval(0.9)
    return {name: values.flatten().tolist() for name, values in found.items()}


def _several(prediction: Prediction) -> ArgumentError:
    return ArgumentError(
        f"predict writes a row with one answer for each example, and the network's output has the shape "
        f"{tuple(prediction.mean.shape)}. Choose a part with --output-part, or call bnn.predict from Python."
    )


def _name(classes: Sequence[str], number: int) -> str:
    return classes[number] if number < len(classes) else str(number)


def sorted_rows(rows: Sequence[Row]) -> list[int]:
    """Return the numbers of the rows, the least sure first: by the entropy, or the std, of what is predicted."""
    key = next((each for each in ("entropy", "total_std", "epistemic_std") if rows and each in rows[0]), None)
    return sorted(range(len(rows)), key=lambda number: -rows[number][key] if key else 0)


def written(path: Path | None, rows: Sequence[Row]) -> None:
    """Write the rows into a file, as CSV or, where it ends in ``.jsonl``, as JSON lines; or to standard output."""
    text = io.StringIO()
    if path is not None and path.suffix.lower() == ".jsonl":
        text.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        table = csv.writer(text, lineterminator="\n")
        table.writerow(rows[0] if rows else [])
        table.writerows([shown(value) for value in row.values()] for row in rows)
    if path is None:
        sys.stdout.write(text.getvalue())
        return
    with replace_atomically(path) as file:
        file.write(text.getvalue().encode())


def shown(value: Any) -> str:
    """Write a value as it stands in a table: six digits of a number, and a set with bars between its classes."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "|".join(value) if isinstance(value, list) else str(value)
