"""How ranks reach one another: what `network.interface` and `network.env` of the run config set on every rank.

NCCL and gloo read environment variables when the process group is made. `world.connect` sets them just before, on
every rank by itself, so that no launcher has to pass them on. The config wins over the environment.
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

# Names that must not be set here -> why.
_REFUSED = {
    r"RANK|WORLD_SIZE|NODE_RANK|(LOCAL|GROUP|ROLE|MASTER|TORCHELASTIC|SLURM)_.*": "the launcher sets it",
    r"(CUDA|HIP|ROCR|NVIDIA)_VISIBLE_DEVICES|CUDA_DEVICE_ORDER": "the launcher deals the GPUs",
    r"PATH|HOME|TMPDIR|SHELL|IFS|BASH_.*|LD_.*|PYTHON.*|OMP_.*|MKL_.*|KMP_.*": "it is read before the run config is: "
    "export it before the launch",
}
_SIOCGIFADDR = 0x8915  # linux/sockios.h


def interface_addresses() -> dict[str, str]:
    """The network interfaces of this node -> their IPv4 address, empty where they have none."""
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
    """The interfaces that NCCL would choose from: `eth` is a beginning, `=eth0` the whole name, `^` before either
    excludes, commas separate several. In the order of the selection, or of `present` where it excludes."""
    excludes = selection.startswith("^")
    rest = selection.removeprefix("^")
    exact = rest.startswith("=")
    # A port may stand behind the name; it is NCCL's alone.
    wanted = [one.strip().partition(":")[0] for one in rest.removeprefix("=").split(",") if one.strip()]

    def matches(name: str, one: str) -> bool:
        return name == one if exact else name.startswith(one)

    if excludes:
        return [name for name in present if not any(matches(name, one) for one in wanted)]
    # The very name first: `eth1` is not meant to be eth10.
    chosen = [name for one in wanted for name in sorted(present, key=lambda name: name != one) if matches(name, one)]
    return list(dict.fromkeys(chosen))


def gloo_interface(selection: str, present: Mapping[str, str]) -> str:
    """The one interface that gloo, which takes exact names, is given: the first that matches and has an address.

    The loopback only where nothing else is left. "" where nothing matches.
    """
    found = matching_interfaces(selection, present)
    return min(found, key=lambda name: (name == "lo", not present[name]), default="")


def nccl_interfaces(selection: str, present: Mapping[str, str]) -> list[str]:
    """The interfaces that NCCL uses, the first of them to get started. selection: NCCL_SOCKET_IFNAME, "" if not set.

    By itself it takes InfiniBand's, else any but docker's and the loopback, else those. Only ones with an address.
    """
    usable = {name: address for name, address in present.items() if address}
    choices = [selection] if selection else ["ib", "^docker,lo", "docker", "lo"]
    return next((found for choice in choices if (found := matching_interfaces(choice, usable))), [])


def network_env(
    interface: str | None, env: Mapping[str, str], present: Mapping[str, str], place: str
) -> dict[str, str]:
    """What to set on this rank. present: this node's interfaces (`interface_addresses`); place: for the errors, `rank
    3 on node2`. Raises UserError where the interface is not there, or a name must not be set."""
    for name, value in env.items():
        _check_variable(name, value)
    wanted = {}
    if interface is not None:
        gloo = gloo_interface(interface, present)
        if not gloo:
            raise UserError(
                f"network.interface is {interface}, but {place} has no such interface: it has {', '.join(present)}; "
                "set one that every node has (eth means all that begin so, =eth0 this one, ^docker all others)"
            )
        wanted = {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": gloo}
        for name in wanted:
            if name in env:
                raise UserError(f"network.interface and {name} in network.env are both set: remove one of them")
    return {**wanted, **env}


def _check_variable(name: str, value: str) -> None:
    for pattern, why in _REFUSED.items():
        if re.fullmatch(pattern, name, re.IGNORECASE):
            raise UserError(f"{name} cannot be set in network.env: {why}")
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or "\0" in value:
        raise UserError(f"network.env: '{name}' is no name of an environment variable with a text; write NAME: 'text'")


def replaced(wanted: Mapping[str, str], environ: Mapping[str, str]) -> list[str]:
    """Sentences on the variables that the environment has with another value."""
    return [
        f"{name}={value} of the run config replaces {name}={environ[name]} of the environment"
        for name, value in wanted.items()
        if environ.get(name, value) != value
    ]


def set_network(world: World, network: NetworkConfig, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of the run config. Those that replace a value of the environment are logged."""
    place = f"rank {world.rank} on {socket.gethostname()}"
    wanted = network_env(network.interface, network.env, interface_addresses(), place)
    for sentence in replaced(wanted, environ):
        logger.info(sentence)
    environ.update(wanted)
