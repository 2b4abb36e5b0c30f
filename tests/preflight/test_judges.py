"""What rank 0 makes of the ranks' facts, without any rank."""

import io

import pytest

from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.preflight import main
from cogds.preflight.addresses import judge_addresses, look_addresses
from cogds.preflight.exchange import bandwidths, judge_exchange
from cogds.preflight.finding import FAIL, OK, WARN, Finding, differing, runs, who
from cogds.preflight.job import judge_config
from cogds.preflight.machine import available_memory_bytes, free_bytes, judge_disk, judge_gpu
from cogds.preflight.roster import GIVEN_UP
from cogds.preflight.software import code_digest, judge_tools, judge_versions, look_tools, look_versions, needs_compiler
from cogds.preflight.text import print_findings, verdict
from cogds.preflight.trial import judge_trial, one_step_config

GB = 10**9


def ranks(*facts, per_node=1):
    """Facts of ranks 0, 1, ... on n1, n2, ..."""
    return [{"rank": rank, "host": f"n{rank // per_node + 1}", "errors": {}, **one} for rank, one in enumerate(facts)]


def only(findings):
    assert len(findings) == 1, findings
    return findings[0]


def test_ranks_in_words():
    assert runs([3, 0, 1, 2, 7, 9, 8]) == "0-3, 7-9"
    assert runs([]) == ""
    assert who(ranks({}, {})[1:]) == "rank 1 (n2)"
    assert who(ranks(*[{}] * 8, per_node=4)) == "ranks 0-3 (n1), 4-7 (n2)"
    assert who(ranks(*[{}] * 6)) == "ranks 0 (n1), 1 (n2), 2 (n3), 3 (n4) and more on 2 other nodes"
    three = ranks({"a": 1}, {"a": 2}, {"a": 1})
    assert differing(three, lambda one: one["a"]) == "1 on ranks 0 (n1), 2 (n3), 2 on rank 1 (n2)"
    assert differing(three, lambda one: one["rank"] > 5) == ""


def versions(**changes):
    return {"versions": {"python": "3.11.7", "torch": "2.13.0", "driver": "550.1", "NCCL": "none"} | changes}


def test_versions_that_differ_name_the_rank():
    assert only(judge_versions(ranks(versions(), versions()))).text == "python 3.11.7, torch 2.13.0, driver 550.1"
    other = only(judge_versions(ranks(versions(), versions(torch="2.12.0"), versions())))
    assert (other.level, other.text) == (FAIL, "torch: 2.13.0 on ranks 0 (n1), 2 (n3), 2.12.0 on rank 1 (n2)")
    assert only(judge_versions(ranks(versions(), versions(driver="550.2")))).level == WARN
    code = judge_versions(ranks(versions(), versions(**{"code of cogds": "abc"})))
    assert only(code).text == "code of cogds: none on rank 0 (n1), abc on rank 1 (n2)"


def test_versions_are_looked_up():
    found = look_versions()["versions"]
    assert found["deepspeed"].count(".") == 2
    assert len(found["code of cogds"]) == 12
    assert "missing" not in found.values()


def test_the_code_digest_changes_with_a_file(tmp_path):
    (tmp_path / "cogds/core").mkdir(parents=True)
    (tmp_path / "cogds/core/a.py").write_text("1")
    before = code_digest(tmp_path)
    assert code_digest(tmp_path) == before
    (tmp_path / "cogds/core/a.py").write_text("2")
    assert code_digest(tmp_path) != before


def test_configs_that_differ_name_key_and_rank():
    assert only(judge_config(ranks({"config": {"seed": 0}}, {"config": {"seed": 0}}))).level == OK
    found = only(judge_config(ranks({"config": {"seed": 0}}, {"config": {"seed": 1, "x": 2}})))
    assert found.level == FAIL
    assert "(2 keys): seed: 0 on rank 0 (n1), 1 on rank 1 (n2); x: None on rank 0 (n1), 2 on rank 1 (n2)" in found.text


def test_tools():
    whole = {"broken": {}, "missing": [], "locks": []}
    assert only(judge_tools(ranks(whole, whole))).level == OK
    found = judge_tools(ranks(whole, {"broken": {"av": "no libav"}, "missing": ["g++", "ninja"], "locks": ["/x/lock"]}))
    assert [one.level for one in found] == [FAIL, FAIL, WARN]
    assert "av cannot be imported on rank 1 (n2): no libav" in found[0].text
    assert "g++ and ninja, which DeepSpeed compiles with, is missing on rank 1 (n2)" in found[1].text
    assert "/x/lock" in found[2].text


def test_a_decoder_that_cannot_be_imported_is_seen(monkeypatch):
    from cogds.preflight import software

    optimizer = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    assert look_tools(World(0, 1, 0, 1), "decord", optimizer)["broken"] == {}
    monkeypatch.setattr(software.shutil, "which", lambda _: None)
    assert "g++" in look_tools(World(0, 1, 0, 1), "pyav", optimizer)["missing"]
    assert software._cannot_import("no_such_decoder") == "ModuleNotFoundError: No module named 'no_such_decoder'"
    assert software._cannot_import("os; os._exit(9)") == "exit code 9"


def test_who_needs_a_compiler():
    torchs, own = {"torch_adam": True}, {}
    assert needs_compiler("cpu", {"optimizer": {"type": "AdamW", "params": torchs}})
    assert not needs_compiler("cuda", {"optimizer": {"type": "AdamW", "params": torchs}})
    assert needs_compiler("cuda", {"optimizer": {"type": "AdamW", "params": own}})
    assert not needs_compiler("cuda", {"optimizer": {"type": "SGD", "params": own}})


def disk(**changes):
    whole = {
        "output": ["out", 100 * GB, 10 * GB], "checkpoints": 4, "cache": ["cache", 100 * GB, 5 * GB],
        "tmp": ["/tmp", 9 * GB, GB], "shm": ["/dev/shm", 9 * GB, GB], "memory": ["memory", 90 * GB, 20 * GB],
    }  # fmt: skip
    return {"disk": whole | changes}


def test_disks():
    assert {one.level for one in judge_disk(ranks(disk(), disk()))} == {OK}
    (full, *_) = judge_disk(ranks(disk(output=["out", GB, 10 * GB])))
    assert (full.level, full.text) == (FAIL, "1.0 GB are free at output_dir out; 4 checkpoints and LoRAs take 10.0 GB")
    small = judge_disk(ranks(disk(), disk(shm=["/dev/shm", 64_000_000, GB]), {"disk": {}}))
    failed = only([one for one in small if one.level == FAIL])
    assert "/dev/shm: 64 MB are free, 1.0 GB are needed on rank 1 (n2)" in failed.text
    assert "--shm-size" in failed.text
    levels = [one.level for one in judge_disk(ranks(disk(cache=["c", 1, 2], tmp=["t", 1, 2], memory=["m", 1, 2])))]
    assert levels == [OK, WARN, WARN, OK, WARN]
    assert judge_disk(ranks({"disk": {}})) == []


def test_free_space_is_of_the_folder_that_will_be_made(tmp_path):
    assert free_bytes(str(tmp_path / "a/b")) > 0
    assert available_memory_bytes() > 10**8


def gpu(**changes):
    whole = {"name": "H100", "id": "u", "total": 80 * GB, "free": 79 * GB, "needed": 40 * GB, "bucket": "81x768x1360",
             "num_visible": 2}  # fmt: skip
    return {"gpu": whole | changes, "num_local": 2}


def test_gpus():
    assert only(judge_gpu(ranks({"gpu": None}, {"gpu": None}))).level == OK
    fine = ranks(gpu(id="a"), gpu(id="b"), gpu(id="a"), gpu(id="b"), per_node=2)
    assert only(judge_gpu(fine)).text == "H100: 79.0 GB free, 81x768x1360 takes about 40.0 GB (an estimate)"
    twice = judge_gpu(ranks(gpu(), gpu(), per_node=2))
    assert twice[0].level == FAIL
    assert "ranks 0-1 (n1) are on the same GPU" in twice[0].text
    assert only(judge_gpu(ranks(gpu(), {"gpu": None}))).text == "rank 1 (n2) see no GPU, the others do"
    for change, words in (
        ({"name": "A100"}, "of several kinds"),
        ({"free": 60 * GB}, "20.0 GB are in use already on rank 1 (n2)"),
        ({"num_visible": 8}, "8 GPUs, but 2 ranks a node on rank 1 (n2)"),
        ({"free": 79 * GB, "needed": 90 * GB}, "takes about 90.0 GB"),
    ):
        warned = [one for one in judge_gpu(ranks(gpu(), gpu(**change))) if one.level == WARN]
        assert words in only(warned).text


def net(address, **changes):
    whole = {
        "master": "n1", "master_ip": "10.0.0.1", "own_ip": address, "interface": "eth0", "name_ip": address, "gloo": "",
        "nccl": ["eth0"], "uses_nccl": True, "present": {"lo": "127.0.0.1", "eth0": address}, "env": {}, "clock_s": 5.0,
    }  # fmt: skip
    return {"net": whole | changes}


def test_networks():
    found = only(judge_addresses(ranks(net("10.0.0.1"), net("10.0.0.2"))))
    assert found.level == OK
    assert "2 nodes reach n1 from n1 (eth0 10.0.0.1), n2 (eth0 10.0.0.2), NCCL will choose eth0" in found.text
    # One node may well be on the loopback.
    assert only(judge_addresses(ranks(net("127.0.0.1", master_ip="127.0.0.1", nccl=["lo"])))).level == OK


@pytest.mark.parametrize(
    "change, words",
    [
        ({"master_ip": "127.0.0.1"}, "MASTER_ADDR n1 is the loopback on rank 1 (n2), but there are 2 nodes"),
        ({"master_ip": ""}, "MASTER_ADDR n1 does not resolve to an address on rank 1 (n2)"),
        ({"name_ip": "127.0.1.1"}, "the name of n2 resolves to 127.0.1.1 on itself"),
        ({"name_ip": ""}, "the name of n2 does not resolve on itself"),
        ({"gloo": "lo"}, "gloo is to use lo, the loopback, on rank 1 (n2)"),
        ({"nccl": ["lo", "eth0"]}, "NCCL would use the loopback first on rank 1 (n2)"),
        ({"nccl": []}, "NCCL would use the loopback first on rank 1 (n2)"),
    ],
)
def test_a_loopback_between_nodes_fails(change, words):
    found = only(judge_addresses(ranks(net("10.0.0.1"), net("10.0.0.2", **change))))
    assert (found.level, words in found.text) == (FAIL, True)


def test_an_interface_for_gloo_makes_the_host_name_unimportant():
    assert only(judge_addresses(ranks(net("10.0.0.1"), net("10.0.0.2", name_ip="127.0.1.1", gloo="eth0")))).level == OK
    assert only(judge_addresses(ranks(net("10.0.0.1"), net("10.0.0.2", uses_nccl=False, nccl=["lo"])))).level == OK


def test_variables_and_clocks_that_differ_are_warnings():
    first, ok = judge_addresses(ranks(net("10.0.0.1", env={"NCCL_DEBUG": "INFO"}), net("10.0.0.2")))
    assert (first.level, ok.level) == (WARN, OK)
    assert "NCCL_DEBUG: INFO on rank 0 (n1), not set on rank 1 (n2)" in first.text
    assert only(judge_addresses(ranks(net("10.0.0.1", clock_s=0.0), net("10.0.0.2", clock_s=59.0)))).level == OK
    late, _ = judge_addresses(ranks(net("10.0.0.1", clock_s=0.0), net("10.0.0.2", clock_s=3600.0)))
    assert (late.level, "+3600 s on rank 1 (n2)" in late.text) == (WARN, True)


def test_addresses_are_looked_up(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    found = look_addresses(7.0)["net"]
    assert (found["master_ip"], found["own_ip"], found["interface"]) == ("127.0.0.1", "127.0.0.1", "lo")
    assert found["env"]["NCCL_DEBUG"] == "WARN"
    assert "MASTER_ADDR" not in found["env"]
    assert found["clock_s"] == 7.0
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    assert look_addresses(7.0)["net"]["master_ip"] == ""


def exchange(**changes):
    whole = {"wrong": [], "heard": True, "large_bytes": 2**28, "large_s": 0.01, "small_s": 2e-5, "device": "cuda",
             "gradient_bytes": 2**28}  # fmt: skip
    return {"exchange": whole | changes}


def test_exchanges():
    assert bandwidths(8e9, 2.0, 4) == (4e9, 6e9)
    found = only(judge_exchange(ranks(exchange(), exchange(large_s=0.02))))
    assert (found.level, "13.42 GB/s, 13.42 GB/s on the bus" in found.text) == (OK, True)
    assert "take about 0.020 s a step" in found.text
    assert only(judge_exchange(ranks(exchange()))).text == "one rank exchanges nothing"
    wrong = judge_exchange(ranks(exchange(), exchange(wrong=[1, 1000])))
    assert wrong[0] == Finding("exchange", FAIL, "an all-reduce of 1, 1,000 numbers gave a wrong result on rank 1 (n2)")
    assert judge_exchange(ranks(exchange(heard=False), exchange()))[0].level == FAIL
    assert only(judge_exchange(ranks(exchange(), exchange(large_s=2.0)))).level == WARN
    assert only(judge_exchange(ranks(exchange(), exchange(large_s=2.0, device="cpu")))).level == OK


def trial(**changes):
    whole = {"bucket": "81x768x1360", "batch_size": 1, "error": "", "estimate": 41 * GB, "device": "cuda", "advice": "",
             "build_s": 3.0, "loss": 1.0, "peak": 40 * GB, "total": 80 * GB, "steps_s": [9.0, 8.0]}  # fmt: skip
    return {"trial": whole | changes}


def test_trial_steps():
    found = only(judge_trial(ranks(trial(), trial(steps_s=[9.0, 8.5], peak=42 * GB))))
    assert found.level == OK
    assert "81x768x1360, batch 1: 9.00 s, 8.50 s for forward, backward" in found.text
    assert "peak 42.0 GB of 80.0 GB of GPU memory, the estimate is 41.0 GB" in found.text
    full = only(
        judge_trial(ranks(trial(), {"trial": {**trial()["trial"], "error": "CUDA out of memory", "peak": 79 * GB}}))
    )
    assert full.level == FAIL
    assert "does not fit into memory on rank 1 (n2): 79.0 GB of 80.0 GB taken, the estimate is 41.0 GB" in full.text
    assert "Try ds_configs/zero3.json" in full.text
    known = ranks(trial(error="CUDA out of memory", advice="take model.quantization=nf4"))
    assert only(judge_trial(known)).text.endswith("CUDA out of memory. take model.quantization=nf4")
    assert [one.level for one in judge_trial(ranks(trial(), trial(loss=None)))] == [OK, WARN]


def test_the_trial_is_one_micro_step():
    ds = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "x": {"y": 1}}
    changed = one_step_config(ds, 4)
    assert changed == {**ds, "train_batch_size": 8, "gradient_accumulation_steps": 1}
    assert ds["train_batch_size"] == 32


def test_errors_of_ranks_are_told_and_those_of_ranks_that_only_gave_up_are_not():
    def fine(answers):
        return [Finding("step", OK, f"{len(answers)} answers")]

    def full(_):
        return [Finding("step", FAIL, "full")]

    facts = ranks({"errors": {"step": "RuntimeError: x"}}, {"errors": {"step": GIVEN_UP}}, {"errors": {}})
    broken, gave_up = Finding("step", FAIL, "on rank 0 (n1): RuntimeError: x"), f"on rank 1 (n2): {GIVEN_UP}"
    assert main.judged("step", facts, fine) == [broken, *fine([1])]
    assert main.judged("step", facts[:2], lambda _: pytest.fail("nobody answered")) == [broken]
    assert main.judged("step", facts[1:], full) == full([])
    assert main.judged("step", facts[1:], fine) == [Finding("step", FAIL, gave_up), *fine([1])]
    assert main.judged("step", facts[2:], fine) == fine([1])


def test_parts_to_skip():
    assert main.parts_to_skip("") == frozenset()
    assert main.parts_to_skip("step, exchange") == {"step", "exchange"}
    with pytest.raises(UserError, match=r"--skip stp on the command line \(did you mean 'step'\?\)"):
        main.parts_to_skip("stp")


FINDINGS = [
    Finding("disk", OK, "plenty at /a/[bold]b"),
    Finding("disk", FAIL, "word " * 40),
    Finding("disk", FAIL, "again"),
    Finding("gpu", WARN, "odd"),
]


def test_the_verdict():
    assert verdict(FINDINGS[:1], 16, 2) == "ready: 16 ranks on 2 nodes"
    assert verdict(FINDINGS[:1], 1, 1) == "ready: 1 rank on 1 node"
    assert verdict(FINDINGS[3:], 2, 1) == "ready: 2 ranks on 1 node, 1 warning"
    assert verdict(FINDINGS, 2, 1) == "not ready: 1 check failed, 1 warning"


@pytest.mark.parametrize("terminal", [False, True])
def test_the_table(terminal):
    from rich.console import Console

    out = io.StringIO()
    print_findings(FINDINGS, Console(file=out, force_terminal=terminal, color_system=None, width=100))
    lines = out.getvalue().splitlines()
    assert any("disk" in line and "ok" in line and "plenty at /a/[bold]b" in line for line in lines)
    assert any("FAIL" in line for line in lines)
    assert out.getvalue().count("word") == 40
    assert max(map(len, lines)) <= 120
