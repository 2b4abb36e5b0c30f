"""The findings as a table, and the verdict as one line."""

import textwrap
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cogds.formatting import counted
from cogds.preflight.finding import FAIL, OK, WARN, Finding

_STYLES = {OK: "green", WARN: "yellow", FAIL: "bold red"}
PLAIN_WIDTH = 120


def verdict(findings: Sequence[Finding], num_ranks: int, num_nodes: int) -> str:
    """`ready: 16 ranks on 2 nodes`, or how many checks failed."""
    failed = len({one.check for one in findings if one.level == FAIL})
    warned = len({one.check for one in findings if one.level == WARN})
    warnings = f", {counted(warned, 'warning')}" if warned else ""
    if failed:
        return f"not ready: {counted(failed, 'check')} failed{warnings}"
    ranks = f"{counted(num_ranks, 'rank')} on {counted(num_nodes, 'node')}"
    return f"ready: {ranks}{warnings}"


def print_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """One row a finding. On what is no terminal: lines of text, each whole enough to be found by grep."""
    console = console or Console()
    if not console.is_terminal:
        indent = " " * 20
        for one in findings:
            head = f"{one.check:<13}{one.level:<7}"
            text = textwrap.fill(
                one.text, PLAIN_WIDTH, initial_indent=head, subsequent_indent=indent, break_long_words=False,
                break_on_hyphens=False,
            )  # fmt: skip
            print(text, file=console.file, flush=True)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("check", "result", "what was found"):
        table.add_column(column)
    for one in findings:
        # What was found may hold paths: Text keeps rich from reading [brackets] in them.
        table.add_row(one.check, Text(one.level, style=_STYLES[one.level]), Text(one.text))
    console.print(table)
