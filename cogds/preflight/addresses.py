"""How the nodes reach each other: host names, addresses, interfaces, environment variables and clocks."""

import socket
from collections.abc import Mapping
from typing import Any

import torch

from cogds.distributed.network import interface_addresses, nccl_interfaces
from cogds.preflight.findings import (
    FAIL,
    OK,
    WARN,
    Finding,
    RankResult,
    describe_differences,
    describe_ranks,
    group_by_value,
)
from cogds.process.environment import environment_variables

VARIABLE_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "UCX_", "FI_")
MAX_CLOCK_SKEW_S = 60.0
MAX_LISTED_NODES = 4


def _resolve(name: str) -> str:
    """Return the IPv4 address of a host name, "" if it does not resolve."""
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def _source_address(destination: str) -> str:
    """Return the address from which this node would send to `destination`, "" without a route. Sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((destination, 9))
            return sock.getsockname()[0]
    except OSError:
        return ""


def inspect_addresses(clock_s: float) -> RankResult:
    """Return `net`: the addresses of the master and of this node, its interfaces and its network variables.

    Args:
        clock_s: this node's Unix time, read at the same moment on all ranks.
    """
    environ, interfaces = environment_variables("MASTER_", *VARIABLE_PREFIXES), interface_addresses()
    master = environ.get("MASTER_ADDR", "")
    master_ip = _resolve(master) if master else ""
    own_ip = _source_address(master_ip) if master_ip else ""
    names_by_address = {address: name for name, address in interfaces.items()}
    return {
        "net": {
            "master": master,
            "master_ip": master_ip,
            "own_ip": own_ip,
            "interface": names_by_address.get(own_ip, ""),
            "host_ip": _resolve(socket.gethostname()),
            "nccl": nccl_interfaces(environ.get("NCCL_SOCKET_IFNAME", ""), interfaces),
            "uses_nccl": torch.cuda.is_available(),
            "gloo": environ.get("GLOO_SOCKET_IFNAME", ""),
            "interfaces": interfaces,
            "env": {name: value for name, value in environ.items() if not name.startswith("MASTER_")},
            "clock_s": clock_s,
        }
    }


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


def assess_addresses(results: list[RankResult]) -> list[Finding]:
    """Every node must be able to reach the others. Different variables and clocks are warnings."""
    findings: list[Finding] = []
    first_ranks: dict[str, RankResult] = {}
    for result in results:
        first_ranks.setdefault(result["host"], result)
    nodes = list(first_ranks.values())
    if len(nodes) > 1:
        findings += _assess_routes(nodes)
    differences = {
        name: text
        for name in sorted({name for result in results for name in result["net"]["env"]})
        # The names of the interfaces may differ between nodes.
        if name != "GLOO_SOCKET_IFNAME"
        and (text := describe_differences(results, [result["net"]["env"].get(name, "not set") for result in results]))
    }
    if differences:
        listed = "; ".join(f"{name}: {text}" for name, text in differences.items())
        text = f"environment variables differ: {listed}. Set them in network.env, which applies to all ranks."
        findings.append(Finding("network", WARN, text))
    clocks = [result["net"]["clock_s"] for result in results]
    if max(clocks) - min(clocks) > MAX_CLOCK_SKEW_S:
        rounded = [round((clock_s - clocks[0]) / MAX_CLOCK_SKEW_S) * int(MAX_CLOCK_SKEW_S) for clock_s in clocks]
        offsets = group_by_value(results, rounded)
        listed = ", ".join(f"{offset:+} s on {describe_ranks(group)}" for offset, group in offsets)
        text = f"clocks differ: {listed}. Synchronize them: caches compare the modification times of files."
        findings.append(Finding("network", WARN, text))
    if not any(finding.level == FAIL for finding in findings):
        findings.append(Finding("network", OK, _summarize_network(nodes)))
    return findings


def _assess_routes(nodes: list[RankResult]) -> list[Finding]:
    def fail(text: str) -> Finding:
        return Finding("network", FAIL, text)

    findings = []
    master = nodes[0]["net"]["master"]
    if unresolved := [node for node in nodes if not node["net"]["master_ip"]]:
        findings.append(
            fail(f"MASTER_ADDR: {master} does not resolve to an address on {describe_ranks(unresolved)}. Set "
                 "MASTER_ADDR to an address of rank 0's node.")
        )  # fmt: skip
    if on_loopback := [node for node in nodes if _is_loopback(node["net"]["master_ip"])]:
        findings.append(
            fail(f"MASTER_ADDR: {master} is the loopback interface on {describe_ranks(on_loopback)}, but there are "
                 f"{len(nodes)} nodes. Set MASTER_ADDR to an address of rank 0's node that the other nodes can reach, "
                 "or correct /etc/hosts.")
        )  # fmt: skip
    if nccl_loopback := [
        node for node in nodes if node["net"]["uses_nccl"] and node["net"]["nccl"][:1] in ([], ["lo"])
    ]:
        findings.append(
            fail(f"network.interface: NCCL would use the loopback interface on {describe_ranks(nccl_loopback)}. Set an "
                 "interface that connects the nodes; if it starts with ^, also exclude lo.")
        )  # fmt: skip
    for node in nodes:
        net: Mapping[str, Any] = node["net"]
        if net["gloo"]:
            address = net["interfaces"].get(net["gloo"].split(",")[0], "")
            if _is_loopback(address):
                findings.append(
                    fail(f"network.interface: gloo would use {net['gloo']}, the loopback interface, on "
                         f"{describe_ranks([node])}. Set an interface that connects the nodes.")
                )  # fmt: skip
        elif _is_loopback(net["host_ip"]) or not net["host_ip"]:
            # Without an interface, gloo announces the address to which the host name resolves.
            problem = f"resolves to {net['host_ip']}" if net["host_ip"] else "does not resolve"
            findings.append(
                fail(f"network.interface: not set, and the host name {node['host']} {problem} on that node, so gloo "
                     "would announce an address that the other nodes cannot reach. Set the interface (of "
                     f"{', '.join(net['interfaces'])}), or correct /etc/hosts.")
            )  # fmt: skip
    return findings


def _summarize_network(nodes: list[RankResult]) -> str:
    if len(nodes) == 1:
        return f"one node, {nodes[0]['host']}"
    listed = [
        f"{node['host']} ({node['net']['interface']} {node['net']['own_ip']})" for node in nodes[:MAX_LISTED_NODES]
    ]
    more = f" and {len(nodes) - MAX_LISTED_NODES} more" if len(nodes) > MAX_LISTED_NODES else ""
    selected = {name: value for name, value in nodes[0]["net"]["env"].items() if name.endswith("SOCKET_IFNAME")}
    settings = "".join(f", {name}={value}" for name, value in selected.items())
    if nodes[0]["net"]["uses_nccl"] and "NCCL_SOCKET_IFNAME" not in selected:
        settings += f", NCCL will use {', '.join(nodes[0]['net']['nccl'])}"
    master = nodes[0]["net"]["master"]
    return f"{len(nodes)} nodes reach {master} from {', '.join(listed)}{more}{settings}"
