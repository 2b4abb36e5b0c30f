"""The findings that rank 0 derives from the results of all ranks, without running any rank."""

import io

import pytest

from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.preflight import software
from cogds.preflight.addresses import assess_addresses, inspect_addresses
from cogds.preflight.exchange import assess_exchange, bandwidths
from cogds.preflight.findings import (
    FAIL,
    OK,
    WARN,
    Finding,
    describe_differences,
    describe_ranks,
    format_ranges,
)
from cogds.preflight.machine import assess_disk, assess_gpu, free_bytes
from cogds.preflight.main import assess_results, parse_skipped_checks
from cogds.preflight.preflight_job import assess_config
from cogds.preflight.software import (
    assess_tools,
    assess_versions,
    code_digest,
    find_import_error,
    inspect_tools,
    inspect_versions,
)
from cogds.preflight.table import format_verdict, print_findings
from cogds.preflight.timeouts import STOPPED
from cogds.preflight.trial_step import assess_trial_step, one_step_config
from cogds.process.host_memory import available_memory_bytes

GB = 10**9


def rank_results(*values, per_node=1):
    """The results of ranks 0, 1, ... on the nodes n1, n2, ..."""
    return [
        {"rank": rank, "host": f"n{rank // per_node + 1}", "errors": {}, **value} for rank, value in enumerate(values)
    ]


def only(findings):
    assert len(findings) == 1, findings
    return findings[0]


def assert_finding(finding, level, *parts):
    """Check the level of a finding, and that its text has these parts."""
    assert finding.level == level, finding
    for part in parts:
        assert part in finding.text, finding


def levels(findings):
    return [finding.level for finding in findings]


# ------------------------------------------------------------------------------------------------------ descriptions


def test_ranges_and_ranks_as_text():
    assert format_ranges([3, 0, 1, 2, 7, 9, 8]) == "0-3, 7-9"
    assert format_ranges([]) == ""
    assert describe_ranks(rank_results({}, {})[1:]) == "rank 1 (n2)"
    assert describe_ranks(rank_results(*[{}] * 8, per_node=4)) == "ranks 0-3 (n1), 4-7 (n2)"
    many = describe_ranks(rank_results(*[{}] * 6))
    assert many.startswith("ranks 0 (n1), 1 (n2), 2 (n3), 3 (n4)")
    assert "2 other nodes" in many
    assert "n5" not in many


def test_differences_as_text():
    results = rank_results({}, {}, {})
    assert describe_differences(results, [1, 2, 1]) == "1 on ranks 0 (n1), 2 (n3), 2 on rank 1 (n2)"
    assert describe_differences(results, [0, 0, 0]) == ""


# ---------------------------------------------------------------------------------------------- software and configs


def versions(**changes):
    return {"versions": {"python": "3.11.7", "torch": "2.13.0", "driver": "550.1", "NCCL": "none"} | changes}


def test_versions_that_differ_name_the_rank():
    same = only(assess_versions(rank_results(versions(), versions())))
    assert (same.level, same.text) == (OK, "python 3.11.7, torch 2.13.0, driver 550.1")
    different = only(assess_versions(rank_results(versions(), versions(torch="2.12.0"), versions())))
    assert (different.level, different.text) == (FAIL, "torch: 2.13.0 on ranks 0 (n1), 2 (n3), 2.12.0 on rank 1 (n2)")
    assert only(assess_versions(rank_results(versions(), versions(driver="550.2")))).level == WARN
    code = only(assess_versions(rank_results(versions(), versions(**{"cogds code": "abc"}))))
    assert (code.level, code.text) == (FAIL, "cogds code: none on rank 0 (n1), abc on rank 1 (n2)")


def test_inspect_versions():
    inspected = inspect_versions()["versions"]
    assert inspected["deepspeed"].count(".") == 2
    assert len(inspected["cogds code"]) == 12
    assert "missing" not in inspected.values()


def test_the_code_digest_changes_with_a_file(tmp_path):
    (tmp_path / "cogds/core").mkdir(parents=True)
    (tmp_path / "cogds/core/a.py").write_text("1")
    before = code_digest(tmp_path)
    assert code_digest(tmp_path) == before
    (tmp_path / "cogds/core/a.py").write_text("2")
    assert code_digest(tmp_path) != before


def test_configs_that_differ_name_key_and_rank():
    assert only(assess_config(rank_results({"config": {"seed": 0}}, {"config": {"seed": 0}}))).level == OK
    different = only(assess_config(rank_results({"config": {"seed": 0}}, {"config": {"seed": 1, "x": 2}})))
    assert_finding(different, FAIL, "2 of 2", "seed: 0 on rank 0 (n1), 1 on rank 1 (n2)")
    assert_finding(different, FAIL, "x: None on rank 0 (n1), 2 on rank 1 (n2)")


def test_tool_problems_name_the_rank():
    sound = {"broken_modules": {}, "missing_programs": [], "stale_locks": []}
    assert only(assess_tools(rank_results(sound, sound))).level == OK
    broken = {"broken_modules": {"av": "no libav"}, "missing_programs": ["g++", "ninja"], "stale_locks": ["/x/lock"]}
    decoder, compiler, lock = assess_tools(rank_results(sound, broken))
    assert_finding(decoder, FAIL, "av: ", "rank 1 (n2)", "no libav")
    assert_finding(compiler, FAIL, "g++ and ninja: ", "rank 1 (n2)")
    assert_finding(lock, WARN, "/x/lock: ", "rank 1 (n2)")


def test_inspect_tools_reports_broken_modules_and_missing_programs(monkeypatch):
    ds_config = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    assert inspect_tools(World(0, 1, 0, 1), "decord", ds_config)["broken_modules"] == {}
    monkeypatch.setattr(software.shutil, "which", lambda *_, **__: None)
    monkeypatch.setenv("PATH", "")  # restored after the test
    assert inspect_tools(World(0, 1, 0, 1), "pyav", ds_config)["missing_programs"] == []  # nothing is compiled
    ds_config["optimizer"]["params"] = {}
    assert "g++" in inspect_tools(World(0, 1, 0, 1), "pyav", ds_config)["missing_programs"]
    assert find_import_error("no_such_decoder") == "ModuleNotFoundError: No module named 'no_such_decoder'"
    assert find_import_error("os; os._exit(9)") == "exit code 9"


def disk(**changes):
    sound = {
        "output": ["out", 100 * GB, 10 * GB], "num_checkpoints": 4, "cache": ["cache", 100 * GB, 5 * GB],
        "tmp": ["/tmp", 9 * GB, GB], "shm": ["/dev/shm", 9 * GB, GB], "memory": ["memory", 90 * GB, 20 * GB],
    }  # fmt: skip
    return {"disk": sound | changes}


def test_disks():
    assert set(levels(assess_disk(rank_results(disk(), disk())))) == {OK}
    (full, *_) = assess_disk(rank_results(disk(output=["out", GB, 10 * GB])))
    assert_finding(full, FAIL, "output_dir: 1.0 GB", " out;", "4 checkpoints", "10.0 GB")
    findings = assess_disk(rank_results(disk(), disk(shm=["/dev/shm", 64_000_000, GB]), {"disk": {}}))
    failed = only([finding for finding in findings if finding.level == FAIL])
    assert_finding(failed, FAIL, "/dev/shm: 64 MB", "1.0 GB", "rank 1 (n2)", "--shm-size", "data.num_workers")
    findings = assess_disk(rank_results(disk(cache=["c", 1, 2], tmp=["t", 1, 2], memory=["m", 1, 2])))
    assert levels(findings) == [OK, WARN, WARN, OK, WARN]
    assert assess_disk(rank_results({"disk": {}})) == []


def test_free_space_of_a_folder_that_does_not_exist_yet(tmp_path):
    assert free_bytes(str(tmp_path / "a/b")) > 0
    assert available_memory_bytes() > 10**8


def gpu(**changes):
    sound = {"name": "H100", "id": "u", "total": 80 * GB, "free": 79 * GB, "needed": 40 * GB, "bucket": "81x768x1360",
             "num_visible": 2}  # fmt: skip
    return {"gpu": sound | changes, "num_local": 2}


def test_gpus():
    without = rank_results({"gpu": None, "cuda": "12.8"}, {"gpu": None, "cuda": "12.8"})
    assert_finding(only(assess_gpu(without)), WARN, "no GPU", "CPUs", "nvidia-smi")
    assert_finding(only(assess_gpu(rank_results({"gpu": None, "cuda": None}))), WARN, "no GPU", "build for CPUs")
    sound = rank_results(gpu(id="a"), gpu(id="b"), gpu(id="a"), gpu(id="b"), per_node=2)
    assert_finding(only(assess_gpu(sound)), OK, "H100", "79.0 GB", "81x768x1360", "40.0 GB")
    assert_finding(assess_gpu(rank_results(gpu(), gpu(), per_node=2))[0], FAIL, "ranks 0-1 (n1)")
    assert_finding(only(assess_gpu(rank_results(gpu(), {"gpu": None}))), FAIL, "rank 1 (n2)")


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"name": "A100"}, ("H100 on rank 0 (n1)", "A100 on rank 1 (n2)")),
        ({"free": 60 * GB}, ("20.0 GB", "rank 1 (n2)")),
        ({"num_visible": 8}, ("8 GPUs", "2 ranks", "rank 1 (n2)")),
        ({"free": 79 * GB, "needed": 90 * GB}, ("79.0 GB", "90.0 GB")),
    ],
)
def test_gpu_warnings(change, parts):
    warnings = [finding for finding in assess_gpu(rank_results(gpu(), gpu(**change))) if finding.level == WARN]
    assert_finding(only(warnings), WARN, *parts)


# ---------------------------------------------------------------------------------------------------------- network


def net(address, **changes):
    sound = {
        "master": "n1", "master_ip": "10.0.0.1", "own_ip": address, "interface": "eth0", "host_ip": address, "gloo": "",
        "nccl": ["eth0"], "uses_nccl": True, "interfaces": {"lo": "127.0.0.1", "eth0": address}, "env": {},
        "clock_s": 5.0,
    }  # fmt: skip
    return {"net": sound | changes}


def test_networks():
    sound = only(assess_addresses(rank_results(net("10.0.0.1"), net("10.0.0.2"))))
    assert_finding(sound, OK, "2 nodes", "n1 (eth0 10.0.0.1), n2 (eth0 10.0.0.2)")
    # A single node may use the loopback interface.
    single = rank_results(net("127.0.0.1", master_ip="127.0.0.1", nccl=["lo"]))
    assert only(assess_addresses(single)).level == OK


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"master_ip": "127.0.0.1"}, ("MASTER_ADDR: n1", "rank 1 (n2)", "2 nodes")),
        ({"master_ip": ""}, ("MASTER_ADDR: n1", "rank 1 (n2)")),
        ({"host_ip": "127.0.1.1"}, ("network.interface: ", "n2", "127.0.1.1", "lo, eth0")),
        ({"host_ip": ""}, ("network.interface: ", "n2", "lo, eth0")),
        ({"gloo": "lo"}, ("network.interface: ", "gloo", "lo", "rank 1 (n2)")),
        ({"nccl": ["lo", "eth0"]}, ("network.interface: ", "NCCL", "rank 1 (n2)")),
        ({"nccl": []}, ("network.interface: ", "NCCL", "rank 1 (n2)")),
    ],
)
def test_a_loopback_interface_between_nodes_fails(change, parts):
    assert_finding(only(assess_addresses(rank_results(net("10.0.0.1"), net("10.0.0.2", **change)))), FAIL, *parts)


def test_the_host_name_is_irrelevant_with_an_interface_for_gloo():
    results = rank_results(net("10.0.0.1"), net("10.0.0.2", host_ip="127.0.1.1", gloo="eth0"))
    assert only(assess_addresses(results)).level == OK


def test_the_interface_of_nccl_is_irrelevant_without_gpus():
    results = rank_results(net("10.0.0.1"), net("10.0.0.2", uses_nccl=False, nccl=["lo"]))
    assert only(assess_addresses(results)).level == OK


def test_variables_and_clocks_that_differ_are_warnings():
    different, ok = assess_addresses(rank_results(net("10.0.0.1", env={"NCCL_DEBUG": "INFO"}), net("10.0.0.2")))
    assert_finding(different, WARN, "NCCL_DEBUG: INFO on rank 0 (n1), not set on rank 1 (n2)", "network.env")
    assert ok.level == OK
    close = rank_results(net("10.0.0.1", clock_s=0.0), net("10.0.0.2", clock_s=59.0))
    assert only(assess_addresses(close)).level == OK
    far, _ = assess_addresses(rank_results(net("10.0.0.1", clock_s=0.0), net("10.0.0.2", clock_s=3600.0)))
    assert_finding(far, WARN, "+3600 s on rank 1 (n2)")


def test_inspect_addresses(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    inspected = inspect_addresses(7.0)["net"]
    addresses = (inspected["master_ip"], inspected["own_ip"], inspected["interface"])
    assert addresses == ("127.0.0.1", "127.0.0.1", "lo")
    assert inspected["env"]["NCCL_DEBUG"] == "WARN"
    assert "MASTER_ADDR" not in inspected["env"]
    assert inspected["clock_s"] == 7.0
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    assert inspect_addresses(7.0)["net"]["master_ip"] == ""


# -------------------------------------------------------------------------------------------------------- exchanges


def exchange(**changes):
    sound = {"wrong_sizes": [], "is_flag_received": True, "large_bytes": 2**28, "large_s": 0.01, "small_s": 2e-5,
             "device": "cuda", "gradient_bytes": 2**28}  # fmt: skip
    return {"exchange": sound | changes}


def test_exchanges():
    assert bandwidths(8e9, 2.0, 4) == (4e9, 6e9)
    sound = only(assess_exchange(rank_results(exchange(), exchange(large_s=0.02))))
    assert_finding(sound, OK, "13.42 GB/s, bus 13.42 GB/s", "0.020 s")
    assert only(assess_exchange(rank_results(exchange()))).level == OK
    wrong = assess_exchange(rank_results(exchange(), exchange(wrong_sizes=[1, 1000])))[0]
    assert_finding(wrong, FAIL, "1, 1,000", "rank 1 (n2)")
    assert assess_exchange(rank_results(exchange(is_flag_received=False), exchange()))[0].level == FAIL
    slow = only(assess_exchange(rank_results(exchange(), exchange(large_s=2.0))))
    assert_finding(slow, WARN, "network.interface")
    assert only(assess_exchange(rank_results(exchange(), exchange(large_s=2.0, device="cpu")))).level == OK


def trial(**changes):
    sound = {"bucket": "81x768x1360", "batch_size": 1, "checkpointing": "full", "error": "", "estimate": 41 * GB,
             "device": "cuda", "advice": "", "build_s": 3.0, "loss": 1.0, "peak": 40 * GB, "total": 80 * GB,
             "steps_s": [9.0, 8.0]}  # fmt: skip
    return {"trial": sound | changes}


def test_trial_steps():
    sound = only(assess_trial_step(rank_results(trial(), trial(steps_s=[9.0, 8.5], peak=42 * GB))))
    assert_finding(
        sound, OK, "81x768x1360, batch 1", "checkpointing full: 9.00 s, 8.50 s", "42.0 GB of 80.0 GB", "41.0 GB"
    )
    failed = only(assess_trial_step(rank_results(trial(), trial(error="CUDA out of memory", peak=79 * GB))))
    parts = ("81x768x1360", "79.0 GB of 80.0 GB", "41.0 GB", "CUDA out of memory", "ds_configs/zero3.json")
    assert_finding(failed, FAIL, "rank 1 (n2)", *parts)
    advised = only(assess_trial_step(rank_results(trial(error="CUDA out of memory", advice="Use less."))))
    assert advised.text.endswith("Use less.")
    assert "zero3.json" not in advised.text
    assert levels(assess_trial_step(rank_results(trial(), trial(loss=None)))) == [OK, WARN]


def test_the_trial_step_has_one_micro_step():
    ds_config = {
        "train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "x": {"y": 1}
    }  # fmt: skip
    changed = one_step_config(ds_config, 4)
    assert changed == {**ds_config, "train_batch_size": 8, "gradient_accumulation_steps": 1}
    assert ds_config["train_batch_size"] == 32


# -------------------------------------------------------------------------------------------------- errors and table


def test_errors_are_reported_but_not_ranks_that_stopped_because_of_them():
    def assess_sound(results):
        return [Finding("step", OK, f"{len(results)} results")]

    def assess_full(_):
        return [Finding("step", FAIL, "full")]

    def fail_if_called(_):
        pytest.fail("there are no results to assess")

    failed, stopped, sound = rank_results(
        {"errors": {"step": "RuntimeError: x"}}, {"errors": {"step": STOPPED}}, {"errors": {}}
    )
    failed_finding = Finding("step", FAIL, "on rank 0 (n1): RuntimeError: x")
    stopped_finding = Finding("step", FAIL, f"on rank 1 (n2): {STOPPED}")
    assert assess_results("step", [failed, stopped, sound], assess_sound) == [failed_finding, *assess_sound([sound])]
    assert assess_results("step", [failed, stopped], fail_if_called) == [failed_finding]
    assert assess_results("step", [stopped, sound], assess_full) == assess_full([])
    assert assess_results("step", [stopped, sound], assess_sound) == [stopped_finding, *assess_sound([sound])]
    assert assess_results("step", [sound], assess_sound) == assess_sound([sound])


def test_skipped_checks():
    assert parse_skipped_checks("") == frozenset()
    assert parse_skipped_checks("step, exchange") == {"step", "exchange"}
    with pytest.raises(UserError, match=r"--skip: .*'stp' \(did you mean 'step'\?\)"):
        parse_skipped_checks("stp")


FINDINGS = [
    Finding("disk", OK, "plenty at /a/[bold]b"),
    Finding("disk", FAIL, "word " * 40),
    Finding("disk", FAIL, "again"),
    Finding("gpu", WARN, "odd"),
]


def test_the_verdict_counts_checks():
    assert format_verdict(FINDINGS[:1], 16, 2) == "ready: 16 ranks on 2 nodes"
    assert format_verdict(FINDINGS[:1], 1, 1) == "ready: 1 rank on 1 node"
    assert format_verdict(FINDINGS[3:], 2, 1) == "ready: 2 ranks on 1 node, 1 warning"
    assert format_verdict(FINDINGS, 2, 1) == "not ready: 1 check failed, 1 warning"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_table_keeps_all_words_and_fits_the_width(is_terminal):
    from rich.console import Console

    out = io.StringIO()
    print_findings(FINDINGS, Console(file=out, force_terminal=is_terminal, color_system=None, width=100))
    lines = out.getvalue().splitlines()
    assert any("disk" in line and "ok" in line and "plenty at /a/[bold]b" in line for line in lines)
    assert any("FAIL" in line for line in lines)
    assert out.getvalue().count("word") == 40
    assert max(map(len, lines)) <= 120
