"""The preflight command: checks on all ranks whether a run can start. Rank 0 prints the findings as a table.

Ranks report through the store (`store_channel`), so that a broken network still ends in a table. Whatever may hang runs
in a thread with a time limit (`timeouts`).
"""

import argparse
import os
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogds.arguments import PREFLIGHT_CHECKS
from cogds.distributed.process_group import connect, disconnect, open_store
from cogds.distributed.world import World, read_world
from cogds.errors import EXIT_BUG, EXIT_USER_ERROR, BugReported, UserError, did_you_mean, refuse_to_run
from cogds.preflight.addresses import assess_addresses, inspect_addresses
from cogds.preflight.exchange import assess_exchange, measure_exchange
from cogds.preflight.findings import FAIL, Finding, RankResult, describe_ranks, format_ranges, group_by_value
from cogds.preflight.folders import (
    assess_folders,
    create_folders,
    find_unseen_ranks,
    inspect_folders,
    remove_markers,
)
from cogds.preflight.machine import assess_disk, assess_gpu, inspect_disk, inspect_gpu
from cogds.preflight.preflight_job import PreflightJob, assess_config, load_preflight_job
from cogds.preflight.software import assess_tools, assess_versions, inspect_tools, inspect_versions
from cogds.preflight.sources import assess_sources, inspect_sources
from cogds.preflight.store_channel import StoreChannel
from cogds.preflight.table import format_verdict, print_findings
from cogds.preflight.timeouts import STOPPED, CallResult, call_with_timeout
from cogds.preflight.trial_step import assess_trial_step, run_trial_step

LOAD_TIMEOUT_S = 60.0
INSPECT_TIMEOUT_S = 30.0  # per local check
MARKER_WAIT_S = 35.0  # NFS clients cache the content of a folder for 30 s
CONNECT_TIMEOUT_S = 180.0  # on CPUs, DeepSpeed compiles its communication library the first time
EXCHANGE_TIMEOUT_S = 60.0
STEP_TIMEOUT_S = 300.0
GATHER_MARGIN_S = 15.0

Inspect = Callable[[], RankResult]
Assess = Callable[[list[RankResult]], list[Finding]]


@dataclass(frozen=True)
class Check:
    """A check: `inspect` runs on every rank, `assess` on rank 0 with the results of all ranks."""

    name: str
    inspect: Inspect
    assess: Assess


def main(args: argparse.Namespace) -> None:
    """Run all checks and print the table.

    Raises:
        UserError: A check has failed. The table already reports it.
        BugReported: A check has a bug. Its traceback is printed.
    """
    skipped = parse_skipped_checks(args.skip)
    world = read_world()
    channel = StoreChannel(world, open_store(world, args.wait))
    preflight = Preflight(world, channel, skipped, args.wait)
    hosts = channel.gather_hosts(socket.gethostname(), args.wait)
    preflight.run(lambda: load_preflight_job(args, world))
    has_failed = preflight.print_results(hosts)
    sys.stdout.flush()
    if preflight.is_stuck:
        # A thread that hangs in a disk or a collective would keep the process alive, or crash it at its exit.
        os._exit(EXIT_BUG if preflight.has_bug else EXIT_USER_ERROR if has_failed else 0)
    disconnect()
    if preflight.has_bug:
        raise BugReported("a check has a bug")
    if has_failed:
        raise UserError("not ready", shared=True)


def parse_skipped_checks(text: str) -> frozenset[str]:
    """Return the names of a comma-separated list of checks. Raises UserError for an unknown name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PREFLIGHT_CHECKS:
            raise UserError(
                f"--skip: there is no check '{name}'{did_you_mean(name, PREFLIGHT_CHECKS)}. Choose from "
                f"{', '.join(PREFLIGHT_CHECKS)}."
            )
    return frozenset(names)


def error_findings(check: str, results: Sequence[RankResult]) -> list[Finding]:
    """Return one finding per different error of this check."""
    failed = [result for result in results if result["errors"].get(check)]
    groups = group_by_value(failed, [result["errors"][check] for result in failed])
    return [Finding(check, FAIL, f"on {describe_ranks(group)}: {error}") for error, group in groups]


def assess_results(check: str, results: Sequence[RankResult], assess: Assess) -> list[Finding]:
    """Return the findings of a check: the errors of some ranks and the assessment of the other ranks' results."""
    complete = [result for result in results if not result["errors"].get(check)]
    assessed = assess(complete) if complete else []
    not_stopped = [result for result in results if result["errors"].get(check) != STOPPED]
    # Ranks that stopped because another rank failed are reported only if nothing else explains the failure.
    is_explained = any(finding.level == FAIL for finding in assessed) or error_findings(check, not_stopped)
    return error_findings(check, not_stopped if is_explained else results) + assessed


class Preflight:
    """The sequence of checks on one rank and, on rank 0, their findings.

    Attributes:
        is_stuck: whether a thread hangs or the ranks no longer agree on the next collective, so that the process must
            end with os._exit.
        has_bug: whether a check has a bug. Its traceback is printed.
    """

    def __init__(self, world: World, channel: StoreChannel, skipped: frozenset[str], wait_s: float):
        """wait_s: how long to wait for other ranks and for their files."""
        self.world, self.channel, self.skipped, self.wait_s = world, channel, skipped, wait_s
        self.findings: list[Finding] = []
        self.is_stuck = False
        self.has_bug = False

    def run(self, load_job: Callable[[], PreflightJob]) -> None:
        """Run all checks, except those that depend on something that has failed."""
        # `gather_hosts` has just released all ranks within milliseconds, so their clocks can be compared.
        clock_s = time.time()
        loaded = self._call(load_job, LOAD_TIMEOUT_S)
        job: PreflightJob | None = loaded.value
        if not self._run_local_checks(self._local_checks(job, clock_s), loaded.error) or job is None:
            return
        if "folders" not in self.skipped:
            self._check_folders(job.shared_folders)
        if {"exchange", "step"} <= self.skipped:
            return
        # The time limits of the checks are shorter than that of the process group.
        group_timeout_s = CONNECT_TIMEOUT_S + EXCHANGE_TIMEOUT_S + STEP_TIMEOUT_S
        connecting = Check("connect", lambda: self._connect(group_timeout_s, job), lambda _: [])
        if not self._run_collective_check(connecting, CONNECT_TIMEOUT_S):
            return
        gradient_bytes = job.memory.trained.num_parameters * job.element_bytes
        exchange = Check("exchange", lambda: measure_exchange(self.world, gradient_bytes), assess_exchange)
        if "exchange" not in self.skipped and not self._run_collective_check(exchange, EXCHANGE_TIMEOUT_S):
            return
        if "step" not in self.skipped:
            step = Check("step", lambda: run_trial_step(job), assess_trial_step)
            self._run_collective_check(step, STEP_TIMEOUT_S)

    def _local_checks(self, job: PreflightJob | None, clock_s: float) -> list[Check]:
        """Return the local checks in the order of the table; without a job, only those that do not need one."""
        checks = [Check("versions", inspect_versions, assess_versions)]
        if job:
            cfg, model = job.cfg, job.model
            is_first_of_node, is_local = self.world.local_rank == 0, model.hub_id is None
            checks += [
                Check("config", lambda: {"config": job.flat_config()}, assess_config),
                Check("tools", lambda: inspect_tools(self.world, cfg.data.decoder, job.ds_config), assess_tools),
                Check(
                    "sources",
                    lambda: inspect_sources(job.data_paths, model.path, is_first_of_node, compare_weights=is_local),
                    assess_sources,
                ),
                Check("disk", lambda: inspect_disk(job), assess_disk),
                Check("gpu", lambda: inspect_gpu(job), assess_gpu),
            ]
        checks.append(Check("network", lambda: inspect_addresses(clock_s), assess_addresses))
        return [check for check in checks if check.name not in self.skipped]

    def _connect(self, timeout_s: float, job: PreflightJob) -> RankResult:
        connect(self.world, timeout_s, job.cfg.network)
        return {}

    def print_results(self, hosts: Sequence[str]) -> bool:
        """Print the table and the verdict on rank 0. Returns on every rank whether a check has failed."""
        # If one rank must end with os._exit, all do: the others would wait for it in the last barrier.
        states = self.channel.gather([self.is_stuck, self.has_bug], GATHER_MARGIN_S)
        stuck, bugs = ([state[number] for state in states if state is not None] for number in (0, 1))
        if self.world.rank == 0:
            print_findings(self.findings)
            print(format_verdict(self.findings, self.world.size, len(set(hosts))), flush=True)
        is_any_stuck = bool(self.channel.missing_ranks) or any(stuck)
        has_failed, self.is_stuck, self.has_bug = self.channel.broadcast(
            [any(finding.level == FAIL for finding in self.findings), is_any_stuck, any(bugs)], STEP_TIMEOUT_S
        )
        self.channel.close()
        return has_failed

    def _call(
        self, function: Callable[[], Any], timeout_s: float, should_stop: Callable[[], bool] = lambda: False
    ) -> CallResult:
        result = call_with_timeout(function, timeout_s, should_stop)
        self.is_stuck = self.is_stuck or result.is_hung
        if result.bug is not None:
            self.has_bug = True
            traceback.print_exception(result.bug)
        return result

    def _gather(self, values: Mapping[str, Any], errors: Mapping[str, str], timeout_s: float) -> list[RankResult]:
        """Return the results of all ranks that answer, on rank 0. Adds a finding for those that do not."""
        known = set(self.channel.missing_ranks)
        own = {"rank": self.world.rank, "host": socket.gethostname(), "errors": dict(errors), **values}
        results = self.channel.gather(own, timeout_s + GATHER_MARGIN_S)
        if lost := sorted(self.channel.missing_ranks - known):
            text = f"no answer from rank {format_ranges(lost)}: the process has ended or hangs. Check its output."
            self.findings.append(Finding("ranks", FAIL, text))
        return [result for result in results if result is not None]

    def _run_local_checks(self, checks: Sequence[Check], config_error: str) -> bool:
        """Run the checks that need no other rank. Returns whether all ranks answered and have a valid config."""
        values: RankResult = {"checks": [check.name for check in checks]}
        errors = {"config": config_error} if config_error else {}
        for check in checks:
            inspected = self._call(check.inspect, INSPECT_TIMEOUT_S)
            values |= inspected.value or {}
            if inspected.error:
                errors[check.name] = inspected.error
        timeout_s = LOAD_TIMEOUT_S + INSPECT_TIMEOUT_S * len(checks)
        results = self._gather(values, errors, timeout_s)
        is_ready = False
        if results:
            is_ready = not self.channel.missing_ranks and not any(result["errors"].get("config") for result in results)
            if "config" not in values["checks"]:  # rank 0 itself has no valid config
                self.findings += error_findings("config", results)
            for check in checks:
                # A rank without a valid config has skipped most checks.
                reported = [result for result in results if check.name in (*result["checks"], *result["errors"])]
                self.findings += assess_results(check.name, reported, check.assess)
        return self.channel.broadcast(is_ready, timeout_s + GATHER_MARGIN_S)

    def _check_folders(self, folders: Mapping[str, str]) -> None:
        """Check with marker files that all ranks share the folders, and delete the files."""
        token, rank = self.channel.broadcast(uuid.uuid4().hex[:8], INSPECT_TIMEOUT_S), self.world.rank
        wait_s = min(self.wait_s, MARKER_WAIT_S)
        created = self._call(lambda: create_folders(folders, token), INSPECT_TIMEOUT_S) if rank == 0 else CallResult({})
        created_keys = self.channel.broadcast(
            [] if created.error else [key for key in folders if key not in created.value], INSPECT_TIMEOUT_S
        )
        folders = {key: folders[key] for key in created_keys}
        inspected = self._call(lambda: inspect_folders(folders, token, rank, wait_s), wait_s + INSPECT_TIMEOUT_S)
        error = created.error or inspected.error
        timeout_s = wait_s + 2 * INSPECT_TIMEOUT_S
        results = self._gather(inspected.value or {}, {"folders": error} if error else {}, timeout_s)
        if results:
            complete = [result for result in results if not result["errors"]]
            unseen = self._call(lambda: find_unseen_ranks(folders, token, complete, wait_s), wait_s + INSPECT_TIMEOUT_S)
            self.findings += error_findings("folders", results)
            if results[0] in complete and not unseen.error:
                self.findings += assess_folders(complete, created.value, unseen.value)
        self.channel.broadcast(True, 2 * timeout_s)
        # Each rank deletes its own files, which rank 0 may not see. Rank 0 deletes all, because other ranks may have
        # ended.
        ranks = range(self.world.size) if rank == 0 else [rank]
        self._call(lambda: remove_markers(folders, token, ranks), INSPECT_TIMEOUT_S)

    def _run_collective_check(self, check: Check, timeout_s: float) -> bool:
        """Run a check with collectives, which stops on all ranks if one fails. Returns whether all ranks passed."""

        def inspect() -> RankResult:
            if self.world.device.type == "cuda":
                torch.cuda.set_device(self.world.device)  # the current device belongs to the thread
            return check.inspect()

        inspected = self._call(inspect, timeout_s, lambda: self.channel.is_aborted(check.name))
        values = inspected.value or {}
        if inspected.error or any(value.get("error") for value in values.values()):
            self.channel.abort(check.name)
        results = self._gather(values, {check.name: inspected.error} if inspected.error else {}, timeout_s)
        self.findings += assess_results(check.name, results, check.assess) if results else []
        has_failed = any(finding.level == FAIL for finding in self.findings if finding.check == check.name)
        has_passed = self.channel.broadcast(
            not self.channel.missing_ranks and not has_failed, timeout_s + GATHER_MARGIN_S
        )
        self.is_stuck = self.is_stuck or not has_passed
        return has_passed


if __name__ == "__main__":
    refuse_to_run("cogds.preflight.main", "preflight")
