"""The help text and the page of all keys."""

from pathlib import Path

from cogds.config.reference import help_text, reference
from cogds.config.schema import KEYS, choices, element_section

ROOT = Path(__file__).parents[2]


def test_help_lists_every_key_with_default_choices_and_line():
    lines = help_text().splitlines()
    for name, field in KEYS.items():
        at = next(i for i, line in enumerate(lines) if line.split()[:1] == [name])
        assert lines[at + 1].strip() == field.description != ""
        assert all(word in lines[at] for word in choices(field.annotation))
        assert ("(required)" if name == "model.path" else " = ") in lines[at]
        inner = element_section(field)
        for leaf, one in inner.model_fields.items() if inner else ():
            line = next(i for i in range(at, len(lines)) if lines[i].startswith(f"      {leaf} "))
            assert lines[line + 1].strip() == one.description != ""
    assert "  train.num_steps = 1000" in lines


def test_keys_of_time_and_memory_say_their_unit():
    for name, field in KEYS.items():
        if unit := {"s": "[s]", "gb": "[GB]"}.get(name.rpartition("_")[2]):
            assert unit in field.description, name


def test_the_page_is_current():
    """`python docs/configuration.py` writes it."""
    assert (ROOT / "docs/configuration.md").read_text() == reference()
