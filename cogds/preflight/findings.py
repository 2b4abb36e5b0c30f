"""The findings of the checks, and text that says which ranks a finding is about."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

OK, WARN, FAIL = "ok", "WARN", "FAIL"
MAX_LISTED_HOSTS = 4

# What one rank measured, in types that JSON supports. Always contains `rank`, `host` and `errors` (check -> message).
RankResult = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        check: name of the check.
        level: OK, WARN or FAIL.
        text: the details and, unless all is well, what to do.
    """

    check: str
    level: str
    text: str


def format_ranges(numbers: Iterable[int]) -> str:
    """Return whole numbers as ranges: `0-3, 5`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def describe_ranks(results: Sequence[RankResult]) -> str:
    """Return the ranks with their hosts: `rank 1 (n2)` or `ranks 0-3 (n1), 4-7 (n2)`."""
    by_host: dict[str, list[int]] = {}
    for result in results:
        by_host.setdefault(result["host"], []).append(result["rank"])
    parts = [f"{format_ranges(ranks)} ({host})" for host, ranks in by_host.items()]
    num_more = len(parts) - MAX_LISTED_HOSTS
    more = f" and more on {num_more} other nodes" if num_more > 0 else ""
    return ("rank " if len(results) == 1 else "ranks ") + ", ".join(parts[:MAX_LISTED_HOSTS]) + more


def group_by_value(results: Sequence[RankResult], values: Iterable[Any]) -> list[tuple[Any, list[RankResult]]]:
    """Group the ranks by their values. Returns (value, results) pairs, the largest group first."""
    groups: dict[str, tuple[Any, list[RankResult]]] = {}
    for result, value in zip(results, values, strict=True):
        groups.setdefault(repr(value), (value, []))[1].append(result)
    return sorted(groups.values(), key=lambda group: -len(group[1]))


def describe_differences(results: Sequence[RankResult], values: Iterable[Any]) -> str:
    """Return `2.13.0 on rank 0 (n1), 2.12.0 on rank 1 (n2)`, or "" if the value is the same on all ranks."""
    groups = group_by_value(results, values)
    if len(groups) < 2:
        return ""
    return ", ".join(f"{value} on {describe_ranks(group)}" for value, group in groups)
