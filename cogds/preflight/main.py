"""The preflight command: is this cluster fit for this run? All ranks look, rank 0 judges and prints.

Ranks speak through the store (`roster`), so that a broken network still ends in a table. What may hang is called in a
thread and waited for only so long.
"""

import argparse
import os
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cogds.arguments import PREFLIGHT_CHECKS
from cogds.distributed.process_group import connect, disconnect, open_store
from cogds.distributed.world import World, read_world
from cogds.errors import EXIT_BUG, EXIT_USER_ERROR, BugReported, UserError, did_you_mean, refuse_to_run
from cogds.preflight.addresses import judge_addresses, look_addresses
from cogds.preflight.exchange import judge_exchange, look_exchange
from cogds.preflight.finding import FAIL, Facts, Finding, at, by_value, runs, who
from cogds.preflight.folders import (
    begin_marks,
    judge_marks,
    judge_sources,
    look_marks,
    look_sources,
    remove_marks,
    unseen_marks,
)
from cogds.preflight.job import CheckedJob, judge_config, load_checked_job
from cogds.preflight.machine import judge_disk, judge_gpu, look_disk, look_gpu
from cogds.preflight.roster import GIVEN_UP, Outcome, Roster, bounded
from cogds.preflight.software import judge_tools, judge_versions, look_tools, look_versions
from cogds.preflight.text import print_findings, verdict
from cogds.preflight.trial import judge_trial, look_trial

LOAD_LIMIT_S = 60.0
LOOK_LIMIT_S = 30.0  # of one look of a rank at its own machine
MARKS_WAIT_S = 35.0  # NFS clients believe what they know of a folder for 30 s
CONNECT_LIMIT_S = 180.0  # on CPUs DeepSpeed compiles its communication the first time
EXCHANGE_LIMIT_S = 60.0
STEP_LIMIT_S = 300.0
MARGIN_S = 15.0

Look = Callable[[], Facts]
Judge = Callable[[list[Facts]], list[Finding]]


def main(args: argparse.Namespace) -> None:
    """Check everything and print a table.

    Raises, after it was reported, UserError if a check failed and BugReported if a check has a bug.
    """
    skipped = parts_to_skip(args.skip)
    world = read_world()
    roster = Roster(world, open_store(world, args.wait))
    preflight = Preflight(world, roster, skipped, args.wait)
    nodes = roster.call(socket.gethostname(), args.wait)
    preflight.run(lambda: load_checked_job(args, world))
    failed = preflight.tell(nodes)
    sys.stdout.flush()
    if preflight.is_stuck:
        # Threads that hang in a disk or a collective would keep the process, or crash it on its way out.
        os._exit(EXIT_BUG if preflight.has_bug else EXIT_USER_ERROR if failed else 0)
    disconnect()
    if preflight.has_bug:
        raise BugReported("a check has a bug")
    if failed:
        raise UserError("not ready", shared=True)  # the findings are printed above


def parts_to_skip(text: str) -> frozenset[str]:
    """The parts named, separated by commas. Raises UserError for one that does not exist."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if part not in PREFLIGHT_CHECKS:
            near = did_you_mean(part, PREFLIGHT_CHECKS)
            raise UserError(f"--skip {part} on the command line{near}: there is {', '.join(PREFLIGHT_CHECKS)}")
    return frozenset(parts)


def errors_of(check: str, facts: Sequence[Facts]) -> list[Finding]:
    """What went wrong while ranks looked, alike ones together."""
    groups = by_value([one for one in facts if one["errors"].get(check)], at("errors", check))
    return [Finding(check, FAIL, f"on {who(of)}: {error}") for error, of in groups]


def judged(check: str, facts: Sequence[Facts], judge: Judge) -> list[Finding]:
    """The findings of one check: what went wrong on some ranks, and the judge's word on the others."""
    answers = [one for one in facts if not one["errors"].get(check)]
    found = judge(answers) if answers else []
    own = [one for one in facts if one["errors"].get(check) != GIVEN_UP]
    failed = any(one.level == FAIL for one in found) or errors_of(check, own)
    # Ranks that gave up because another failed are worth a word only where no other is to be had.
    return errors_of(check, own if failed else facts) + found


class Preflight:
    """The checks of one rank, in order, and on rank 0 what they found."""

    def __init__(self, world: World, roster: Roster, skipped: frozenset[str], wait_s: float):
        """wait_s: how long other ranks, and their files, are waited for."""
        self.world, self.roster, self.skipped, self.wait_s = world, roster, skipped, wait_s
        self.findings: list[Finding] = []
        self.is_stuck = False  # a thread hangs, or the ranks are not all at the same place of a collective
        self.has_bug = False  # in a check; the traceback is printed

    def run(self, load: Callable[[], CheckedJob]) -> None:
        """Everything. What cannot be looked at without something that failed is left out."""
        # All ranks have just been released by the roll call, within milliseconds.
        clock_s = time.time()
        outcome = self._bounded(load, LOAD_LIMIT_S)
        job: CheckedJob | None = outcome.value
        looks: dict[str, tuple[Look, Judge]] = {"versions": (look_versions, judge_versions)}
        if job:
            cfg, model = job.cfg, job.model
            looks |= {
                "config": (lambda: {"config": job.flat()}, judge_config),
                "tools": (lambda: look_tools(self.world, cfg.data.decoder, job.ds_config), judge_tools),
                "sources": (
                    lambda: look_sources(job.data_paths, model.path, looks=self.world.local_rank == 0),
                    judge_sources,
                ),
                "disk": (lambda: look_disk(job), judge_disk),
                "gpu": (lambda: look_gpu(job), judge_gpu),
            }
        looks["network"] = (lambda: look_addresses(clock_s), judge_addresses)
        looks = {name: look for name, look in looks.items() if name not in self.skipped}
        if not self._local(looks, outcome.error) or job is None:
            return
        if "folders" not in self.skipped:
            self._folders(job.shared_folders)
        if {"exchange", "step"} <= self.skipped:
            return
        timeout_s = CONNECT_LIMIT_S + EXCHANGE_LIMIT_S + STEP_LIMIT_S  # the bounds here come first
        if not self._together("connect", lambda: self._connect(timeout_s, job), lambda _: [], CONNECT_LIMIT_S):
            return
        numbers = job.memory.lora.num_parameters * job.bytes_each
        if "exchange" not in self.skipped and not self._together(
            "exchange", lambda: look_exchange(self.world, numbers), judge_exchange, EXCHANGE_LIMIT_S
        ):
            return
        if "step" not in self.skipped:
            self._together("step", lambda: look_trial(job), judge_trial, STEP_LIMIT_S)

    def _connect(self, timeout_s: float, job: CheckedJob) -> Facts:
        connect(self.world, timeout_s, job.cfg.network)
        return {}

    def tell(self, nodes: Sequence[str]) -> bool:
        """Print the table and the verdict on rank 0; returns on every rank whether a check failed."""
        # All leave in the same way: one that ends by force would leave the others in the last barrier.
        states = self.roster.gather([self.is_stuck, self.has_bug], MARGIN_S)
        stuck, bugs = ([state[number] for state in states if state is not None] for number in (0, 1))
        if self.world.rank == 0:
            print_findings(self.findings)
            print(verdict(self.findings, self.world.size, len(set(nodes))), flush=True)
        any_stuck = bool(self.roster.absent) or any(stuck)
        failed, self.is_stuck, self.has_bug = self.roster.share(
            [any(one.level == FAIL for one in self.findings), any_stuck, any(bugs)], STEP_LIMIT_S
        )
        self.roster.leave()
        return failed

    def _bounded(
        self, function: Callable[[], Any], limit_s: float, stop: Callable[[], bool] = lambda: False
    ) -> Outcome:
        outcome = bounded(function, limit_s, stop)
        self.is_stuck = self.is_stuck or outcome.hung
        if outcome.bug is not None:
            self.has_bug = True
            traceback.print_exception(outcome.bug)
        return outcome

    def _gather(self, facts: Mapping[str, Any], errors: Mapping[str, str], limit_s: float) -> list[Facts]:
        """All ranks' facts on rank 0, without those that did not answer, which are a finding."""
        known = set(self.roster.absent)
        every = {"rank": self.world.rank, "host": socket.gethostname(), "errors": dict(errors), **facts}
        answers = self.roster.gather(every, limit_s + MARGIN_S)
        if lost := sorted(self.roster.absent - known):
            self.findings.append(
                Finding("ranks", FAIL, f"no answer from rank {runs(lost)}: its process has ended or hangs, look at "
                        "its output")
            )  # fmt: skip
        return [one for one in answers if one is not None]

    def _local(self, looks: Mapping[str, tuple[Look, Judge]], trouble: str) -> bool:
        """What every rank finds on its own. Returns whether all could read the config and answered."""
        facts: Facts = {"looked": list(looks)}
        errors = {"config": trouble} if trouble else {}
        for name, (look, _) in looks.items():
            outcome = self._bounded(look, LOOK_LIMIT_S)
            facts |= outcome.value or {}
            if outcome.error:
                errors[name] = outcome.error
        limit_s = LOAD_LIMIT_S + LOOK_LIMIT_S * len(looks)
        everyone = self._gather(facts, errors, limit_s)
        if everyone:
            ready = not self.roster.absent and not any(one["errors"].get("config") for one in everyone)
            if "config" not in looks:  # rank 0 has none itself
                self.findings += errors_of("config", everyone)
            for name, (_, judge) in looks.items():
                # A rank without a config has looked at little.
                self.findings += judged(
                    name, [one for one in everyone if {name} & {*one["looked"], *one["errors"]}], judge
                )
        else:
            ready = False
        return self.roster.share(ready, limit_s + MARGIN_S)

    def _folders(self, folders: Mapping[str, str]) -> None:
        """The marks in the shared folders: rank 0's, then everyone's, then all of them are taken away."""
        token, rank = self.roster.share(uuid.uuid4().hex[:8], LOOK_LIMIT_S), self.world.rank
        wait_s = min(self.wait_s, MARKS_WAIT_S)
        begun = self._bounded(lambda: begin_marks(folders, token), LOOK_LIMIT_S) if rank == 0 else Outcome({})
        marked = self.roster.share(
            [] if begun.error else [key for key in folders if key not in begun.value], LOOK_LIMIT_S
        )
        folders = {key: folders[key] for key in marked}
        looked = self._bounded(lambda: look_marks(folders, token, rank, wait_s), wait_s + LOOK_LIMIT_S)
        error = begun.error or looked.error
        limit_s = wait_s + 2 * LOOK_LIMIT_S
        everyone = self._gather(looked.value or {}, {"folders": error} if error else {}, limit_s)
        if everyone:
            answers = [one for one in everyone if not one["errors"]]
            seen = self._bounded(lambda: unseen_marks(folders, token, answers, wait_s), wait_s + LOOK_LIMIT_S)
            self.findings += errors_of("folders", everyone)
            if everyone[0] in answers and not seen.error:
                self.findings += judge_marks(answers, begun.value, seen.value)
        self.roster.share(True, 2 * limit_s)
        # Each its own, which rank 0 may not see; and rank 0 all others', whose ranks may not be there any more.
        ranks = range(self.world.size) if rank == 0 else [rank]
        self._bounded(lambda: remove_marks(folders, token, ranks), LOOK_LIMIT_S)

    def _together(self, name: str, look: Look, judge: Judge, limit_s: float) -> bool:
        """A collective check: where one rank cannot go on, the others do not wait for it. Returns whether all could."""

        def on_device() -> Facts:
            if self.world.device.type == "cuda":
                torch.cuda.set_device(self.world.device)  # every thread has its own choice
            return look()

        outcome = self._bounded(on_device, limit_s, lambda: self.roster.given_up(name))
        facts = outcome.value or {}
        if outcome.error or any(one.get("error") for one in facts.values()):
            self.roster.give_up(name)
        everyone = self._gather(facts, {name: outcome.error} if outcome.error else {}, limit_s)
        self.findings += judged(name, everyone, judge) if everyone else []
        sound = not self.roster.absent and not any(one.level == FAIL for one in self.findings if one.check == name)
        sound = self.roster.share(sound, limit_s + MARGIN_S)
        self.is_stuck = self.is_stuck or not sound
        return sound


if __name__ == "__main__":
    refuse_to_run("cogds.preflight.main", "preflight")
