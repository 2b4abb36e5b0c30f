"""The variables that network.interface and network.env set or refuse."""

import socket

import pytest

from cogds.config.schema import NetworkConfig
from cogds.distributed.network import (
    gloo_interface,
    interface_addresses,
    matching_interfaces,
    nccl_interfaces,
    network_env,
    set_network,
)
from cogds.distributed.world import World
from cogds.errors import UserError

PRESENT = {"lo": "127.0.0.1", "eth10": "10.0.0.10", "eth1": "10.0.0.1", "ib0": "", "docker0": "172.17.0.1"}
WORLD = World(1, 2, 1, 2)


@pytest.mark.parametrize(
    "selection, nccl, gloo",
    [
        ("eth1", ["eth1", "eth10"], "eth1"),
        ("eth", ["eth10", "eth1"], "eth10"),
        ("=eth1", ["eth1"], "eth1"),
        ("=eth", [], ""),
        ("ib,eth1", ["ib0", "eth1", "eth10"], "eth1"),  # gloo needs an address
        ("^docker,lo,eth10", ["eth1", "ib0"], "eth1"),
        ("^=eth1", ["lo", "eth10", "ib0", "docker0"], "eth10"),  # the loopback is the last choice
        ("=eth10:4000,docker0", ["eth10", "docker0"], "eth10"),
        ("lo", ["lo"], "lo"),
        ("ib", ["ib0"], "ib0"),
    ],
)
def test_interfaces_match_as_in_nccl_and_gloo_gets_a_single_interface(selection, nccl, gloo):
    assert matching_interfaces(selection, PRESENT) == nccl
    assert gloo_interface(selection, PRESENT) == gloo


def test_without_a_selection_nccl_chooses():
    assert nccl_interfaces("", PRESENT) == ["eth10", "eth1"]
    assert nccl_interfaces("", {**PRESENT, "ib0": "10.1.0.1"}) == ["ib0"]
    assert nccl_interfaces("", {"lo": "127.0.0.1", "docker0": "172.17.0.1"}) == ["docker0"]
    assert nccl_interfaces("", {"lo": "127.0.0.1"}) == ["lo"]
    assert nccl_interfaces("^docker", PRESENT)[0] == "lo"


def test_interface_and_env_set_variables():
    assert network_env(None, {}, PRESENT, "rank 0 on n1") == {}
    assert network_env("eth1", {"NCCL_IB_HCA": "mlx5"}, PRESENT, "rank 0 on n1") == {
        "NCCL_SOCKET_IFNAME": "eth1",
        "GLOO_SOCKET_IFNAME": "eth1",
        "NCCL_IB_HCA": "mlx5",
    }


def test_an_error_about_a_missing_interface_lists_the_others():
    with pytest.raises(UserError, match=r"^network\.interface: rank 3 on n2 .*ib7.*lo, eth10, eth1"):
        network_env("ib7", {}, PRESENT, "rank 3 on n2")


def test_a_variable_that_is_set_twice_is_refused():
    with pytest.raises(UserError, match=r"^network\.env: NCCL_SOCKET_IFNAME .*network\.interface"):
        network_env("eth1", {"NCCL_SOCKET_IFNAME": "eth1"}, PRESENT, "rank 0 on n1")


@pytest.mark.parametrize(
    "name",
    ["RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID", "CUDA_VISIBLE_DEVICES", "PATH", "LD_PRELOAD",
     "ld_library_path", "PYTHONPATH", "OMP_NUM_THREADS", "NCCL DEBUG", "A=B", ""],
)  # fmt: skip
def test_variables_that_would_break_the_run_or_have_no_effect_are_refused(name):
    with pytest.raises(UserError, match=rf"^network\.env: '?{name}"):
        network_env(None, {name: "1"}, PRESENT, "rank 0 on n1")


@pytest.mark.parametrize("name", ["NCCL_DEBUG", "TORCH_NCCL_BLOCKING_WAIT", "PYTORCH_CUDA_ALLOC_CONF", "FI_PROVIDER"])
def test_variables_of_the_network_and_of_torch_are_accepted(name):
    assert network_env(None, {name: "1"}, PRESENT, "rank 0 on n1") == {name: "1"}


def test_the_config_wins_over_the_environment_which_is_logged_once(capsys):
    network = NetworkConfig(env={"NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1"})
    environ = {"NCCL_DEBUG": "WARN"}
    for _ in range(2):
        set_network(WORLD, network, environ)
        assert environ == {"NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1"}
    (message,) = capsys.readouterr().out.splitlines()
    assert "NCCL_DEBUG=WARN" in message


def test_interfaces_of_this_machine():
    addresses = interface_addresses()
    assert addresses["lo"] == "127.0.0.1"
    assert set(addresses) == {name for _, name in socket.if_nameindex()}
    environ: dict[str, str] = {}
    set_network(WORLD, NetworkConfig(interface="=lo"), environ)
    assert environ == {"NCCL_SOCKET_IFNAME": "=lo", "GLOO_SOCKET_IFNAME": "lo"}
    with pytest.raises(UserError, match=f"rank 1 on {socket.gethostname()} .*nowhere.*lo"):
        set_network(WORLD, NetworkConfig(interface="nowhere"), {})
