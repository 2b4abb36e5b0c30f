"""The keys of the run config as text for `--help` and as a page of the documentation (docs/configuration.md)."""

from pydantic.fields import FieldInfo

from cogds.config.loading import show
from cogds.config.schema import KEYS, choices, element_section

_INTRODUCTION = """# Configuration

All keys, as `--help` lists them. Set them in a YAML file (`--config run.yaml`) or as `key=value` on the command line,
which wins over the file. `python docs/configuration.py` writes this page.
"""


def help_text() -> str:
    """Every key with its default, choices and one line of help."""
    lines: list[str] = []
    for section, keys in _by_section().items():
        lines += [""] if section else []
        for name, field in keys.items():
            indent = "      " if "[]" in name else "  "
            words = f"  one of {', '.join(words)}" if (words := choices(field.annotation)) else ""
            default = "(required)" if field.is_required() else f"= {show(field.default)}"
            lines += [f"{indent}{name.rpartition('[].')[2]} {default}{words}", f"{indent}    {field.description}"]
    return "\n".join(lines)


def reference() -> str:
    """Every key as a page of Markdown, with a table for each section."""
    lines = [_INTRODUCTION]
    for section, keys in _by_section().items():
        lines += [f"## `{section}`" if section else "## The run", "", "| Key | Default | |", "|---|---|---|"]
        for name, field in keys.items():
            words = ", ".join(f"`{word}`" for word in choices(field.annotation))
            default = "required" if field.is_required() else f"`{show(field.default)}`"
            lines.append(f"| `{name}` | {default} | {field.description}{f': {words}' if words else ''} |")
        lines.append("")
    return "\n".join(lines)


def _by_section() -> dict[str, dict[str, FieldInfo]]:
    """Section -> dotted key -> field; `data.sets[].path` for a key of a list of mappings."""
    sections: dict[str, dict[str, FieldInfo]] = {}
    for name, field in KEYS.items():
        keys = sections.setdefault(name.rpartition(".")[0], {})
        keys[name] = field
        if inner := element_section(field):
            keys |= {f"{name}[].{leaf}": inner_field for leaf, inner_field in inner.model_fields.items()}
    return sections
