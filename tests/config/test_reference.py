"""The help text and the documentation of all keys."""

from pathlib import Path

from cogds.config.reference import help_text, reference
from cogds.config.schema import KEYS, choices, element_section

ROOT = Path(__file__).parents[2]


def test_help_lists_every_key_with_default_choices_and_description():
    lines = help_text().splitlines()
    for name, field in KEYS.items():
        number = next(i for i, line in enumerate(lines) if line.split()[:1] == [name])
        assert lines[number + 1].strip() == field.description != ""
        assert all(word in lines[number] for word in choices(field.annotation))
        assert ("(required)" if name == "model.path" else " = ") in lines[number]
        inner = element_section(field)
        for leaf, inner_field in inner.model_fields.items() if inner else ():
            number = next(i for i in range(number, len(lines)) if lines[i].startswith(f"      {leaf} "))
            assert lines[number + 1].strip() == inner_field.description != ""
    assert "  train.num_steps = 1000" in lines


def test_descriptions_of_times_and_sizes_have_a_unit():
    for name, field in KEYS.items():
        if unit := {"s": "[s]", "gb": "[GB]"}.get(name.rpartition("_")[2]):
            assert unit in field.description, name


def test_the_page_is_current():
    """`python docs/configuration.py` writes it."""
    assert (ROOT / "docs/configuration.md").read_text() == reference()
