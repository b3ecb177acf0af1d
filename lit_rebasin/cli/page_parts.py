"""What a page of HTML is put together from; every text in it is escaped here."""

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

from lit_rebasin.cli.page_style import STYLE

_DPI = 192
_SCREEN_DPI = 96


def text(value: object) -> str:
    """Return a text such that HTML shows it as it is; what UTF-8 cannot hold becomes a question mark."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def document(title: str, body: str) -> str:
    """Return a page that loads nothing and runs nothing."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """Return a table that scrolls where it is too wide."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    lines = [
        f'<th scope="row">{text(row[0])}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in row[1:]) for row in rows
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll"><table><caption>{text(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def picture(name: str, figure: Figure, alt: str, caption: str) -> str:
    """Return a figure that holds its picture in itself, with ``figure-NAME`` as its id."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    width, height = (round(size * _SCREEN_DPI) for size in figure.get_size_inches())
    return png_picture(name, stream.getvalue(), (width, height), alt, caption)


def png_picture(name: str, png: bytes, size: tuple[int, int], alt: str, caption: str) -> str:
    """Return the same of a PNG file that there is already, ``size`` wide and high on the screen."""
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure id="figure-{text(name)}"><img src="data:image/png;base64,{data}" width="{size[0]}" height="{size[1]}" '
        f'alt="{text(alt)}"><figcaption>{text(caption)}</figcaption></figure>'
    )


def note(sentences: Sequence[str]) -> str:
    """Return what a reader should know before anything else, if there is such."""
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in sentences)
    return f'<div class="note" id="missing"><strong>What is missing</strong><ul>{items}</ul></div>' if items else ""


def slugs(names: Iterable[str]) -> dict[str, str]:
    """Return for each name a part of an id, all different."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
        found[name] = next(
            one for one in (plain, *(f"{plain}-{n}" for n in range(2, len(found) + 3))) if one not in found.values()
        )
    return found
