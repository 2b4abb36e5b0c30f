"""How the nodes find one another: names, addresses, interfaces, variables and clocks."""

import socket
from collections.abc import Mapping
from typing import Any

import torch

from cogds.distributed.network import interface_addresses, nccl_interfaces
from cogds.preflight.finding import FAIL, OK, WARN, Facts, Finding, at, by_value, differing, hosts, who
from cogds.process.environment import environment_variables

VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "UCX_", "FI_")
MAX_SKEW_S = 60.0
MAX_SHOWN = 4


def _resolve(name: str) -> str:
    """IPv4 address of a host name, "" where there is none."""
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def _own_address_towards(address: str) -> str:
    """The address that this node would send from. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((address, 9))
            return sock.getsockname()[0]
    except OSError:
        return ""


def look_addresses(clock_s: float) -> Facts:
    """`net`: how this node sees the master and itself. clock_s: its time of day, taken when all ranks took theirs."""
    environ, present = environment_variables("MASTER_", *VARIABLES), interface_addresses()
    master = environ.get("MASTER_ADDR", "")
    master_ip = _resolve(master) if master else ""
    own_ip = _own_address_towards(master_ip) if master_ip else ""
    by_address = {address: name for name, address in present.items()}
    return {
        "net": {
            "master": master,
            "master_ip": master_ip,
            "own_ip": own_ip,
            "interface": by_address.get(own_ip, ""),
            "name_ip": _resolve(socket.gethostname()),
            "nccl": nccl_interfaces(environ.get("NCCL_SOCKET_IFNAME", ""), present),
            "uses_nccl": torch.cuda.is_available(),
            "gloo": environ.get("GLOO_SOCKET_IFNAME", ""),
            "present": present,
            "env": {name: value for name, value in environ.items() if not name.startswith("MASTER_")},
            "clock_s": clock_s,
        }
    }


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


def judge_addresses(facts: list[Facts]) -> list[Finding]:
    """Every node can reach the others: no loopback between nodes, names that resolve, variables and clocks alike."""
    found: list[Finding] = []
    nodes = list({one["host"]: one for one in reversed(facts)}.values())[::-1]  # the first rank of each
    if len(nodes) > 1:
        found += _between_nodes(nodes)
    text = {
        name: unlike
        for name in sorted({name for one in facts for name in one["net"]["env"]})
        # Each node may have its own interfaces' names.
        if name != "GLOO_SOCKET_IFNAME" and (unlike := differing(facts, at("net", "env", name, default="not set")))
    }
    if text:
        listed = "; ".join(f"{name}: {unlike}" for name, unlike in text.items())
        found.append(Finding("network", WARN, f"variables differ, network.env sets them on all ranks: {listed}"))
    clocks = [one["net"]["clock_s"] for one in facts]
    if max(clocks) - min(clocks) > MAX_SKEW_S:
        late = by_value(facts, lambda one: round((one["net"]["clock_s"] - clocks[0]) / MAX_SKEW_S) * int(MAX_SKEW_S))
        listed = ", ".join(f"{offset:+} s on {who(of)}" for offset, of in late)
        found.append(Finding("network", WARN, f"the clocks differ, which confuses caches of files: {listed}"))
    if not any(one.level == FAIL for one in found):
        found.append(Finding("network", OK, _summary(nodes)))
    return found


def _between_nodes(nodes: list[Facts]) -> list[Finding]:
    def fail(text: str) -> Finding:
        return Finding("network", FAIL, text)

    found = []
    master = nodes[0]["net"]["master"]
    if lost := [one for one in nodes if not one["net"]["master_ip"]]:
        found.append(fail(f"MASTER_ADDR {master} does not resolve to an address on {who(lost)}"))
    if local := [one for one in nodes if _is_loopback(one["net"]["master_ip"])]:
        found.append(
            fail(f"MASTER_ADDR {master} is the loopback on {who(local)}, but there are {len(nodes)} nodes: set "
                 "MASTER_ADDR to an address of rank 0's node that the others reach, or mend /etc/hosts")
        )  # fmt: skip
    if chosen := [one for one in nodes if one["net"]["uses_nccl"] and one["net"]["nccl"][:1] in ([], ["lo"])]:
        found.append(
            fail(f"NCCL would use the loopback first on {who(chosen)}: set network.interface, and where it excludes "
                 "(^) exclude lo too")
        )  # fmt: skip
    for one in nodes:
        net: Mapping[str, Any] = one["net"]
        if net["gloo"]:
            address = net["present"].get(net["gloo"].split(",")[0], "")
            if _is_loopback(address):
                found.append(
                    fail(f"gloo is to use {net['gloo']}, the loopback, on {who([one])}: set network.interface")
                )
        elif _is_loopback(net["name_ip"]) or not net["name_ip"]:
            # Without a name, gloo announces what the host's name resolves to.
            what = f"resolves to {net['name_ip']}" if net["name_ip"] else "does not resolve"
            found.append(
                fail(f"the name of {one['host']} {what} on itself, and gloo tells that to the other nodes: set "
                     f"network.interface (there is {', '.join(net['present'])}), or mend /etc/hosts")
            )  # fmt: skip
    return found


def _summary(nodes: list[Facts]) -> str:
    if len(nodes) == 1:
        return f"one node, {nodes[0]['host']}"
    shown = [f"{one['host']} ({one['net']['interface']} {one['net']['own_ip']})" for one in nodes[:MAX_SHOWN]]
    more = f" and {len(nodes) - MAX_SHOWN} more" if len(nodes) > MAX_SHOWN else ""
    chosen = {name: value for name, value in nodes[0]["net"]["env"].items() if name.endswith("SOCKET_IFNAME")}
    words = "".join(f", {name}={value}" for name, value in chosen.items())
    if nodes[0]["net"]["uses_nccl"] and "NCCL_SOCKET_IFNAME" not in chosen:
        words += f", NCCL will choose {', '.join(nodes[0]['net']['nccl'])}"
    return f"{len(hosts(nodes))} nodes reach {nodes[0]['net']['master']} from {', '.join(shown)}{more}{words}"
