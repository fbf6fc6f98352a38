"""Predictions as one page of HTML that needs nothing else, with the pictures in it."""

__all__ = ["write_page"]

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.atomic import replace_atomically
from ..errors import needing
from .rows import shown

_SIDE = 256
"""The longer side of a thumbnail in pixels."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; }}
body {{ margin: 1rem auto; max-width: 80rem; padding: 0 1rem; }}
h1 {{ font-size: 1.2rem; overflow-wrap: anywhere; }}
main {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }}
article {{ border: 1px solid #8886; border-radius: .5rem; overflow: hidden; padding-bottom: .5rem; }}
article.abstain {{ border-color: #c60; }}
img {{ width: 100%; aspect-ratio: 1; object-fit: contain; background: #8882; display: block; }}
h2 {{ font-size: 1rem; margin: .5rem .5rem 0; overflow-wrap: anywhere; }}
h2 + p {{ font-size: .8rem; margin: 0 .5rem; opacity: .7; overflow-wrap: anywhere; }}
dl {{ display: grid; grid-template-columns: minmax(0, 1fr) fit-content(65%); gap: 0 .5rem; margin: .25rem .5rem 0; }}
dt, dd {{ font-size: .8rem; margin: 0; overflow-wrap: anywhere; }}
dt {{ opacity: .7; }}
dd {{ text-align: right; }}
</style>
<h1>{title}</h1>
<p>{count} predictions{explained}.</p>
<main>
{cards}
</main>
</html>
"""


def write_page(path: Path, model: str, rows: Sequence[dict[str, Any]], pictures: Sequence[Path] | None) -> None:
    """Write a page with a card for each row, with its picture if there are any."""
    cards = [_card(row, None if pictures is None else _thumbnail(pictures[number])) for number, row in enumerate(rows)]
    nats = "; entropy: how unsure the answer is; mutual information: how much of that is because the networks disagree"
    explained = f"{nats}; both in nats" if rows and "entropy" in rows[0] else ""
    title = html.escape(f"Predictions of {Path(model).name}")
    with replace_atomically(path) as file:
        file.write(_PAGE.format(title=title, count=len(rows), explained=explained, cards="\n".join(cards)).encode())


def _card(row: dict[str, Any], picture: str | None) -> str:
    name = html.escape(str(row["input"]))
    heading = html.escape(shown(row["class"] if "class" in row else row["mean"]))
    image = "" if picture is None else f'<img loading="lazy" alt="{name}" src="{picture}">'
    listed = "".join(
        f"<dt>{html.escape(key.replace('_', ' '))}</dt><dd>{html.escape(_brief(value))}</dd>"
        for key, value in row.items()
        if key not in ("input", "class", "mean")
    )
    kind = ' class="abstain"' if row.get("decision") == "abstain" else ""
    return f"<article{kind}>{image}<h2>{heading}</h2><p>{name}</p><dl>{listed}</dl></article>"


def _brief(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else shown(value)


def _thumbnail(path: Path) -> str:
    with needing("pillow", "A page of pictures"):
        from PIL import Image
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((_SIDE, _SIDE))
        content = io.BytesIO()
        small.save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
