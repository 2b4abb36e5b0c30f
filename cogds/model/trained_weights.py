"""Which weights of the transformer are trained by `train.method=full`, chosen by patterns for their names."""

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Sequence

from cogds.errors import UserError, did_you_mean
from cogds.model.transformer.forward import Transformer


def match_weights(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names of weights that match a pattern, in their order; all of them without patterns.

    A pattern matches a weight if it matches the whole name of the weight or of a module around it, or the end of such a
    name: `attn1`, `transformer_blocks.4?`, `ff.net.2.weight`. `*` and `?` stand for any text and any character.
    Raises UserError for a pattern that matches nothing.
    """
    names = list(names)
    if not patterns:
        return names
    chosen: set[str] = set()
    for pattern in patterns:
        matches = [name for name in names if any(_matches(part, pattern) for part in _with_parents(name))]
        if not matches:
            parts = {part for name in names for part in _with_parents(name)}
            endings = parts | {part.rpartition(".")[2] for part in parts}
            raise UserError(
                f"full.modules: the transformer has no part '{pattern}'{did_you_mean(pattern, endings)}. Use the names "
                "of its modules, such as attn1 or transformer_blocks.0, or leave it empty to train everything."
            )
        chosen.update(matches)
    return [name for name in names if name in chosen]


def train_weights(transformer: Transformer, names: Collection[str]) -> Transformer:
    """Make the named weights of a frozen transformer trainable. Returns the transformer."""
    parameters = dict(transformer.named_parameters())
    for name in names:
        parameters[name].requires_grad_()
    return transformer


def _with_parents(name: str) -> Iterator[str]:
    """Yield the name of a weight, and those of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
