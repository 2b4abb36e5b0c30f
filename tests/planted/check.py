#!/usr/bin/env python
"""Plant each bug of bugs.json in a copy of the project and run the test that must catch it.

    python tests/planted/check.py [TEXT]    # only bugs whose file or description contains TEXT

First runs the tests without any bug, when they must pass. Prints a line per bug. The exit code is 1 if a test passes
with its bug or does not run.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "outputs", "wheelhouse", "*.egg-info")
TIMEOUT_S = 900
TESTS_FAILED = 1  # pytest's exit code; others mean that the test did not run


@dataclass(frozen=True)
class PlantedBug:
    """A change of one file that one test of `make test` must catch. old: text that occurs once in the file."""

    file: str
    old: str
    new: str
    bug: str
    test: str


def read_bugs() -> list[PlantedBug]:
    """Return the list of planted bugs."""
    return [PlantedBug(**bug) for bug in json.loads((ROOT / "tests/planted/bugs.json").read_text())]


def run_tests(tests: list[str], bug: PlantedBug | None = None) -> int:
    """Run tests in a copy of the project, with the bug if there is one. Returns pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "cogds"
        shutil.copytree(ROOT, copy, ignore=IGNORED)
        if bug is not None:
            file = copy / bug.file
            file.write_text(file.read_text().replace(bug.old, bug.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        environment.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".testdata/torch_extensions"))
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode not in (0, TESTS_FAILED):
        print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
    return done.returncode


def is_caught(bug: PlantedBug) -> bool:
    """Return whether the test fails with the bug."""
    return run_tests([bug.test], bug) == TESTS_FAILED


def main(text: str = "") -> int:
    """Check the bugs whose file or description contains `text`, two at a time. Return the exit code."""
    bugs = [bug for bug in read_bugs() if text in bug.file or text in bug.bug]
    if run_tests(list(dict.fromkeys(bug.test for bug in bugs))) != 0:
        print("error: the tests must pass without a bug. Run make test.")
        return 1
    with ThreadPoolExecutor(2) as pool:
        caught = []
        for bug, result in zip(bugs, pool.map(is_caught, bugs)):
            caught.append(result)
            print(f"{'caught' if result else 'MISSED'}  {bug.file}: {bug.bug}\n        {bug.test}", flush=True)
    print(f"{sum(caught)} of {len(bugs)} planted bugs caught")
    return 0 if bugs and all(caught) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
