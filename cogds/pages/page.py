"""Static HTML pages: one look, everything from users is escaped, nothing is requested from the network.

Each page is a template that extends `base.html.j2`. File names, captions and prompts come from whoever made the clips,
so the templates escape all of them (jinja2's autoescape). As a second line of defense, the pages' content security
policy forbids requests, and all scripts except those of this package (by their digest).
"""

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from cogds.files import whole_file
from cogds.formatting import counted, duration, gigabytes, number, percent

FOLDER = Path(__file__).parent


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
    """Escape control characters and lone surrogates, which a UTF-8 page cannot contain."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )


def data_uri(data: bytes, kind: str) -> str:
    """Return data as a URI for inlining. kind: its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture_uri(picture: Image.Image) -> str:
    """Return a picture as a JPEG data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return data_uri(buffer.getvalue(), "image/jpeg")
