"""The output of the preflight command: the findings as a table, and the verdict as one line."""

import textwrap
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cogds.formatting import counted
from cogds.preflight.findings import FAIL, OK, WARN, Finding

_STYLES = {OK: "green", WARN: "yellow", FAIL: "bold red"}
PLAIN_WIDTH = 120


def format_verdict(findings: Sequence[Finding], num_ranks: int, num_nodes: int) -> str:
    """Return `ready: 16 ranks on 2 nodes`, or the number of failed checks."""
    num_failed = len({finding.check for finding in findings if finding.level == FAIL})
    num_warned = len({finding.check for finding in findings if finding.level == WARN})
    warnings = f", {counted(num_warned, 'warning')}" if num_warned else ""
    if num_failed:
        return f"not ready: {counted(num_failed, 'check')} failed{warnings}"
    return f"ready: {counted(num_ranks, 'rank')} on {counted(num_nodes, 'node')}{warnings}"


def print_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print one row per finding. If the output is not a terminal, print wrapped lines of plain text instead."""
    console = console or Console()
    if not console.is_terminal:
        indent = " " * 20
        for finding in findings:
            head = f"{finding.check:<13}{finding.level:<7}"
            # Words stay whole, so that grep finds paths and keys.
            text = textwrap.fill(
                finding.text, PLAIN_WIDTH, initial_indent=head, subsequent_indent=indent, break_long_words=False,
                break_on_hyphens=False,
            )  # fmt: skip
            print(text, file=console.file, flush=True)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("check", "result", "details"):
        table.add_column(column)
    for finding in findings:
        # Paths may contain [brackets]: Text keeps rich from reading them as markup.
        table.add_row(finding.check, Text(finding.level, style=_STYLES[finding.level]), Text(finding.text))
    console.print(table)
