"""What a check found, and words for which ranks it is about."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

OK, WARN, FAIL = "ok", "WARN", "FAIL"
MAX_HOSTS = 4  # named in one sentence

# What one rank found out: plain values that JSON takes. `rank` and `host` are always among them.
Facts = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One line of the table: a check, how it went, and what was found."""

    check: str
    level: str
    text: str


def runs(numbers: Iterable[int]) -> str:
    """Whole numbers as people write them: 0-3, 5."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def who(facts: Sequence[Facts]) -> str:
    """`rank 1 (n2)`, `ranks 0-3 (n1), 4-7 (n2)`."""
    by_host: dict[str, list[int]] = {}
    for one in facts:
        by_host.setdefault(one["host"], []).append(one["rank"])
    parts = [f"{runs(ranks)} ({host})" for host, ranks in by_host.items()]
    more = f" and more on {len(parts) - MAX_HOSTS} other nodes" if len(parts) > MAX_HOSTS else ""
    return ("rank " if len(facts) == 1 else "ranks ") + ", ".join(parts[:MAX_HOSTS]) + more


def hosts(facts: Sequence[Facts]) -> list[str]:
    """The nodes, in rank order."""
    return list(dict.fromkeys(one["host"] for one in facts))


def at(*path: str, default: Any = None) -> Callable[[Facts], Any]:
    """What reads the value at a path of nested facts, `default` where it is not there."""

    def read(facts: Facts) -> Any:
        node: Any = facts
        for name in path:
            if name not in node:
                return default
            node = node[name]
        return node

    return read


def by_value(facts: Sequence[Facts], value: Callable[[Facts], Any]) -> list[tuple[Any, list[Facts]]]:
    """Ranks grouped by what they have, the most common first."""
    groups: dict[str, tuple[Any, list[Facts]]] = {}
    for one in facts:
        groups.setdefault(repr(value(one)), (value(one), []))[1].append(one)
    return sorted(groups.values(), key=lambda group: -len(group[1]))


def differing(facts: Sequence[Facts], value: Callable[[Facts], Any]) -> str:
    """`2.13.0 on rank 0 (n1), 2.12.0 on rank 1 (n2)`; "" where all have the same."""
    groups = by_value(facts, value)
    return "" if len(groups) < 2 else ", ".join(f"{found} on {who(of)}" for found, of in groups)
