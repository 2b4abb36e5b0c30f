"""Static HTML pages: one look, everything from users is escaped, nothing is requested from the network.

Each page is a template that extends `base.html.j2`. File names, captions and prompts come from whoever made the clips,
so the templates escape all of them (jinja2's autoescape). As a second line of defense, the pages' content security
policy forbids requests, and all scripts except those of this package (by their digest).
"""

import base64
import hashlib
import io
import unicodedata
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from cogds.files import whole_file
from cogds.formatting import counted, duration, gigabytes, number, percent

FOLDER = Path(__file__).parent
BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # embeddings, overrides and isolates


def render(template: str, *folders: Path, **values: Any) -> str:
    """Render a template of one of these folders, or of this package."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, FOLDER]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {function.__name__: function for function in (counted, percent, gigabytes, duration, number)}
    return environment.get_template(template).render(Markup=Markup, printable=printable, **values)


def write_page(file: Path, text: str) -> None:
    """Write a page into an existing folder, complete or not at all."""
    with whole_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


def read_script(name: str) -> tuple[Markup, str]:
    """Return a script of this package for inlining, and its digest for the content security policy."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    return Markup(text), "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def printable(text: str) -> str:
    """Escape control characters, which would garble the text, and lone surrogates, which UTF-8 cannot contain."""
    return "".join(char.encode("unicode_escape").decode() if _is_control(char) else char for char in text)


def _is_control(char: str) -> bool:
    return char != "\n" and (unicodedata.category(char) in ("Cc", "Cs") or char in BIDI_CONTROLS)


def data_uri(data: bytes, kind: str) -> str:
    """Return data as a URI for inlining. kind: its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture_uri(picture: Image.Image) -> str:
    """Return a picture as a JPEG data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return data_uri(buffer.getvalue(), "image/jpeg")
