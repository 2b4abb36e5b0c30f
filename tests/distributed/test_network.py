"""What network.interface and network.env set, and what they must not."""

import socket

import pytest

from cogds.config.schema import NetworkConfig
from cogds.distributed.network import (
    gloo_interface,
    interface_addresses,
    matching_interfaces,
    nccl_interfaces,
    network_env,
    replaced,
    set_network,
)
from cogds.distributed.world import World
from cogds.errors import UserError

PRESENT = {
    "lo": "127.0.0.1",
    "eth10": "10.0.0.10",
    "eth1": "10.0.0.1",
    "ib0": "",
    "docker0": "172.17.0.1",
}


@pytest.mark.parametrize(
    "selection, nccl, gloo",
    [
        ("eth1", ["eth1", "eth10"], "eth1"),
        ("eth", ["eth10", "eth1"], "eth10"),
        ("=eth1", ["eth1"], "eth1"),
        ("=eth", [], ""),
        ("ib,eth1", ["ib0", "eth1", "eth10"], "eth1"),  # gloo needs an address
        ("^docker,lo,eth10", ["eth1", "ib0"], "eth1"),
        ("^=eth1", ["lo", "eth10", "ib0", "docker0"], "eth10"),  # and not the loopback
        ("=eth10:4000,docker0", ["eth10", "docker0"], "eth10"),
        ("lo", ["lo"], "lo"),
        ("ib", ["ib0"], "ib0"),
    ],
)
def test_interfaces_are_chosen_as_nccl_does_and_gloo_is_given_one(selection, nccl, gloo):
    assert matching_interfaces(selection, PRESENT) == nccl
    assert gloo_interface(selection, PRESENT) == gloo


def test_what_nccl_takes_by_itself():
    assert nccl_interfaces("", PRESENT) == ["eth10", "eth1"]
    assert nccl_interfaces("", {**PRESENT, "ib0": "10.1.0.1"}) == ["ib0"]
    assert nccl_interfaces("", {"lo": "127.0.0.1", "docker0": "172.17.0.1"}) == ["docker0"]
    assert nccl_interfaces("", {"lo": "127.0.0.1"}) == ["lo"]
    assert nccl_interfaces("^docker", PRESENT)[0] == "lo"


def test_the_interface_and_the_free_variables_are_set():
    assert network_env(None, {}, PRESENT, "rank 0 on n1") == {}
    assert network_env("eth1", {"NCCL_IB_HCA": "mlx5"}, PRESENT, "rank 0 on n1") == {
        "NCCL_SOCKET_IFNAME": "eth1",
        "GLOO_SOCKET_IFNAME": "eth1",
        "NCCL_IB_HCA": "mlx5",
    }


def test_an_interface_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(UserError, match=r"ib7, but rank 3 on n2 has no such interface: it has lo, eth10, eth1"):
        network_env("ib7", {}, PRESENT, "rank 3 on n2")


def test_two_words_on_one_variable_are_refused():
    with pytest.raises(UserError, match=r"network\.interface and NCCL_SOCKET_IFNAME in network\.env are both set"):
        network_env("eth1", {"NCCL_SOCKET_IFNAME": "eth1"}, PRESENT, "rank 0 on n1")


@pytest.mark.parametrize(
    "name, why",
    [
        ("RANK", "the launcher sets it"),
        ("LOCAL_WORLD_SIZE", "the launcher sets it"),
        ("MASTER_PORT", "the launcher sets it"),
        ("SLURM_PROCID", "the launcher sets it"),
        ("CUDA_VISIBLE_DEVICES", "deals the GPUs"),
        ("PATH", "before the launch"),
        ("LD_PRELOAD", "before the launch"),
        ("ld_library_path", "before the launch"),
        ("PYTHONPATH", "before the launch"),
        ("OMP_NUM_THREADS", "before the launch"),
        ("NCCL DEBUG", "no name"),
        ("A=B", "no name"),
        ("", "no name"),
    ],
)
def test_dangerous_and_useless_variables_are_refused(name, why):
    with pytest.raises(UserError, match=why):
        network_env(None, {name: "1"}, PRESENT, "rank 0 on n1")


@pytest.mark.parametrize("name", ["NCCL_DEBUG", "TORCH_NCCL_BLOCKING_WAIT", "PYTORCH_CUDA_ALLOC_CONF", "FI_PROVIDER"])
def test_variables_of_the_network_and_of_torch_are_taken(name):
    assert network_env(None, {name: "1"}, PRESENT, "rank 0 on n1") == {name: "1"}


def test_the_config_wins_over_the_environment_and_the_log_says_so_once(capsys):
    assert replaced({"A": "1", "B": "2"}, {"A": "1", "C": "3"}) == []
    network = NetworkConfig(env={"NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1"})
    environ = {"NCCL_DEBUG": "WARN"}
    for _ in range(2):
        set_network(World(1, 2, 1, 2), network, environ)
        assert environ == {"NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1"}
    assert capsys.readouterr().out.count("NCCL_DEBUG=WARN") == 1


def test_the_loopback_of_this_machine_is_found():
    addresses = interface_addresses()
    assert addresses["lo"] == "127.0.0.1"
    assert set(addresses) == {name for _, name in socket.if_nameindex()}
    environ: dict[str, str] = {}
    set_network(World(1, 2, 1, 2), NetworkConfig(interface="=lo"), environ)
    assert environ == {"NCCL_SOCKET_IFNAME": "=lo", "GLOO_SOCKET_IFNAME": "lo"}
    with pytest.raises(UserError, match=f"rank 1 on {socket.gethostname()} has no such interface: it has .*lo"):
        set_network(World(1, 2, 1, 2), NetworkConfig(interface="nowhere"), {})
