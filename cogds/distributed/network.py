"""Network settings of the run config (`network.interface`, `network.env`) as environment variables of every rank.

NCCL and gloo read environment variables when the process group is created. `connect` sets them just before that, on
every rank, so that no launcher has to pass them on. The config wins over the environment.
"""

import fcntl
import logging
import os
import re
import socket
import struct
from collections.abc import Mapping, MutableMapping

from cogds.config.schema import NetworkConfig
from cogds.distributed.world import World
from cogds.errors import UserError

logger = logging.getLogger(__name__)

# Variables that network.env must not set -> reason.
_REFUSED = {
    r"RANK|WORLD_SIZE|NODE_RANK|(LOCAL|GROUP|ROLE|MASTER|TORCHELASTIC|SLURM)_.*": "The launcher sets it.",
    r"(CUDA|HIP|ROCR|NVIDIA)_VISIBLE_DEVICES|CUDA_DEVICE_ORDER": "The launcher assigns the GPUs.",
    r"PATH|HOME|TMPDIR|SHELL|IFS|BASH_.*|LD_.*|PYTHON.*|OMP_.*|MKL_.*|KMP_.*": "It is read before the run config. "
    "Export it before the launch.",
}
_SIOCGIFADDR = 0x8915  # linux/sockios.h


def interface_addresses() -> dict[str, str]:
    """Return the IPv4 address of each network interface of this node, "" if it has none."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                addresses[name] = socket.inet_ntoa(answer[20:24])
            except OSError:
                addresses[name] = ""
    return addresses


def matching_interfaces(selection: str, present: Mapping[str, str]) -> list[str]:
    """Return the interfaces that match a selection in NCCL's syntax, in its order (in that of `present` for `^`).

    `eth` is a prefix, `=eth0` a whole name, `^` before either excludes, commas separate several.
    """
    excludes = selection.startswith("^")
    rest = selection.removeprefix("^")
    is_exact = rest.startswith("=")
    # A port may follow the name. Only NCCL uses it.
    wanted = [word.strip().partition(":")[0] for word in rest.removeprefix("=").split(",") if word.strip()]

    def matches(name: str, word: str) -> bool:
        return name == word if is_exact else name.startswith(word)

    if excludes:
        return [name for name in present if not any(matches(name, word) for word in wanted)]
    # The exact name comes first, so that `eth1` selects eth1 before eth10.
    names = [name for word in wanted for name in sorted(present, key=lambda name: name != word) if matches(name, word)]
    return list(dict.fromkeys(names))


def gloo_interface(selection: str, present: Mapping[str, str]) -> str:
    """Return the interface for gloo, which takes exact names: the first that matches and has an address.

    The loopback interface is the last choice. Returns "" if none matches.
    """
    names = matching_interfaces(selection, present)
    return min(names, key=lambda name: (name == "lo", not present[name]), default="")


def nccl_interfaces(selection: str, present: Mapping[str, str]) -> list[str]:
    """Return the interfaces that NCCL uses, in its order. selection: NCCL_SOCKET_IFNAME, "" if not set.

    Without a selection, NCCL uses InfiniBand interfaces. If there are none, it uses all others except docker's and
    the loopback, then docker's, then the loopback. Only interfaces with an address count.
    """
    usable = {name: address for name, address in present.items() if address}
    selections = [selection] if selection else ["ib", "^docker,lo", "docker", "lo"]
    return next((names for choice in selections if (names := matching_interfaces(choice, usable))), [])


def network_env(
    interface: str | None, env: Mapping[str, str], present: Mapping[str, str], place: str
) -> dict[str, str]:
    """Return the variables to set on this rank.

    present: this node's interfaces (`interface_addresses`). place: for messages, `rank 3 on node2`.

    Raises:
        UserError: The interface does not exist, or a variable must not be set.
    """
    for name, value in env.items():
        _check_variable(name, value)
    variables = {}
    if interface is not None:
        gloo = gloo_interface(interface, present)
        if not gloo:
            raise UserError(
                f"network.interface: {place} has no interface that matches {interface}; it has {', '.join(present)}. "
                "Choose one that every node has: eth (prefix), =eth0 (whole name) or ^docker (all others)."
            )
        variables = {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": gloo}
        for name in variables:
            if name in env:
                raise UserError(f"network.env: {name} is set, but network.interface sets it too. Remove one of them.")
    return {**variables, **env}


def _check_variable(name: str, value: str) -> None:
    for pattern, reason in _REFUSED.items():
        if re.fullmatch(pattern, name, re.IGNORECASE):
            raise UserError(f"network.env: {name} cannot be set there. {reason}")
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or "\0" in value:
        raise UserError(f"network.env: '{name}' is not an environment variable with a text value. Write NAME: 'text'.")


def set_network(world: World, network: NetworkConfig, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of the run config, and log those that have another value in the environment."""
    place = f"rank {world.rank} on {socket.gethostname()}"
    variables = network_env(network.interface, network.env, interface_addresses(), place)
    for name, value in variables.items():
        if environ.get(name, value) != value:
            logger.info(f"{name}={value} of the run config overrides {name}={environ[name]} of the environment")
    environ.update(variables)
