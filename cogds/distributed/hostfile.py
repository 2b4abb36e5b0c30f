"""Hostfiles: reading one, and checking its nodes before anything is started on them.

    hosts = read_hostfile("hostfile")  # `node1 slots=8` or `user@node1 slots=8`, one line per node
    check_nodes(hosts)

`cogds VERB --hostfile` calls this module. launch/hostfile.sh runs it as a program (`main`).
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cogds.errors import EXIT_USER_ERROR, UserError

_MAX_CONNECTIONS = 256  # at the same time
_MAX_SHOWN = 8  # nodes that an error names
# Limits for the answer of a node: for the connection and for the whole check. A slow login may take several seconds.
CONNECT_TIMEOUT_S, CHECK_TIMEOUT_S = 15, 30
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_LOGIN = re.compile(rf"({_NAME}@)?{_NAME}")
_LINE = re.compile(r"(\S+)\s+slots\s*=\s*([0-9]+)(\s+max[-_]slots\s*=\s*[0-9]+)?")
_PATH = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
_LOCAL = re.compile(r"localhost(\..*)?|127\..*", re.IGNORECASE)
# Exit codes of the check on a node. They differ from those of ssh (255) and of shells.
_NO_FOLDER, _NO_PYTHON, _NO_MASTER = 101, 102, 103


@dataclass(frozen=True)
class Host:
    """A node. login: its name for ssh, which may have a user: `user@node1`. num_slots: its number of ranks."""

    login: str
    num_slots: int

    @property
    def name(self) -> str:
        """The name without a user. The ranks connect to the first node by this name."""
        return self.login.rpartition("@")[2]


def read_hostfile(path: str) -> list[Host]:
    """Return the nodes of a hostfile, in its order. Raises UserError with the line of the first mistake."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"hostfile: no such file: {path}. Write one like hostfile.example.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}. Write one like hostfile.example, in UTF-8.") from None
    hosts: dict[str, Host] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        host = _parse_entry(entry, f"{path}:{number}")
        name = host.name.lower()
        if name in hosts:
            raise UserError(
                f"{path}:{number}: {host.name} is also in line {lines[name]}. Keep one line, with all of its slots."
            )
        hosts[name], lines[name] = host, number
    if not hosts:
        raise UserError(f"{path}: it lists no node. Write one line per node, such as 'node1 slots=8'.")
    local = next((name for name in hosts if _LOCAL.fullmatch(name)), None)
    if local and not all(map(_LOCAL.fullmatch, hosts)):
        raise UserError(
            f"{path}:{lines[local]}: {local} is a different machine on each node. Write the name that the other nodes "
            "know it by."
        )
    return list(hosts.values())


def _parse_entry(entry: str, place: str) -> Host:
    """Parse a line without its comment. place: the file and the line, for errors."""
    match = _LINE.fullmatch(entry)
    login = match[1] if match else re.split(r"[\s:]", entry)[0]
    if (match and ":" in login) or entry.count(":") > 1:
        raise UserError(
            f"{place}: '{entry}' has a colon in the host's name. Write the name or IPv4 address, as in "
            "'node1 slots=8'; the port of ssh belongs in ~/.ssh/config."
        )
    if not _LOGIN.fullmatch(login):
        raise UserError(
            f"{place}: '{login}' is not a host. Write one line per node, with its name or IPv4 address, as in "
            "'node1 slots=8'."
        )
    if not match:
        number = re.search(r"[=:\s]\s*([0-9]+)", entry)
        raise UserError(
            f"{place}: '{entry}' is not 'HOST slots=NUMBER'. Write '{login} slots={number[1] if number else 8}'"
            f"{'' if number else ', with its number of GPUs'}."
        )
    if int(match[2]) == 0:
        raise UserError(f"{place}: {login} has 0 slots. Write its number of GPUs, or delete the line.")
    return Host(login, int(match[2]))


def to_text(hosts: Iterable[Host]) -> str:
    """Return the nodes as a hostfile that DeepSpeed's launcher reads."""
    return "".join(f"{host.login} slots={host.num_slots}\n" for host in hosts)


def in_memory(hosts: Iterable[Host]) -> str:
    """Return the path of a hostfile in memory, which this process and those that inherit its files can read."""
    descriptor = os.memfd_create("hostfile", 0)
    os.write(descriptor, to_text(hosts).encode())
    return f"/proc/self/fd/{descriptor}"


def check_nodes(
    hosts: Sequence[Host], ssh_port: int | None = None, script_folder: str = "", environ: Mapping[str, str] = os.environ
) -> None:
    """Check that the ranks can be started on all nodes: over ssh, in this folder, with this interpreter.

    Every node must answer within CHECK_TIMEOUT_S and know the name of the first node. DeepSpeed's own check covers the
    first node only and waits for it without a limit. script_folder: a path that remote shells read, too.

    Raises:
        UserError: The message names the nodes, with the reasons.
    """
    for program in ("ssh", "pdsh"):
        if not shutil.which(program):
            raise UserError(f"{program}: not found. Install it on this machine; it starts the ranks on the nodes.")
    folder, python, master = os.getcwd(), sys.executable, hosts[0].name
    for path in (folder, python, script_folder or folder):
        if not _PATH.fullmatch(path):
            raise UserError(
                f"path '{path}': it contains characters that remote shells change. Use only letters, digits and "
                "_@+=:,./-"
            )
    command = (
        f"cd {folder} 2>/dev/null || exit {_NO_FOLDER}; test -x {python} || exit {_NO_PYTHON}; "
        f"getent ahosts {master} >/dev/null; test $? -ne 2 || exit {_NO_MASTER}"
    )
    reasons = {
        _NO_FOLDER: f"it has no folder {folder}",
        _NO_PYTHON: f"it has no interpreter {python}",
        _NO_MASTER: f"it does not know the name {master}",
    }
    # ssh must not ask for a password or about an unknown host. Of several values for an option, it takes the first.
    ssh = ["ssh", "-o", "BatchMode=yes", *shlex.split(environ.get("PDSH_SSH_ARGS_APPEND", ""))]
    ssh += ["-o", f"ConnectTimeout={CONNECT_TIMEOUT_S}", *(["-p", str(ssh_port)] if ssh_port else [])]
    with ThreadPoolExecutor(_MAX_CONNECTIONS) as threads:
        results = threads.map(lambda host: _failure([*ssh, host.login, command], reasons), hosts)
        failures = [(host.login, failure) for host, failure in zip(hosts, results) if failure]
    if failures:
        shown = "; ".join(f"{login}: {failure}" for login, failure in failures[:_MAX_SHOWN])
        more = f"; and {len(failures) - _MAX_SHOWN} more" if len(failures) > _MAX_SHOWN else ""
        raise UserError(
            f"hostfile: {len(failures)} of {len(hosts)} nodes cannot be used: {shown}{more}. Repair them (try: ssh "
            f"{failures[0][0]} hostname), or comment them out."
        )


def _failure(command: Sequence[str], reasons: Mapping[int, str]) -> str:
    """Run ssh and return why it failed, or "". reasons: for the exit codes of the command on the node."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=CHECK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {CHECK_TIMEOUT_S} s"
    if done.returncode == 0:
        return ""
    *_, said = ["", *done.stderr.decode(errors="replace").strip().splitlines()]
    # 255 is a failure of ssh itself, which then says why.
    return reasons.get(done.returncode) or (
        said if said and done.returncode == 255 else f"code {done.returncode} {said}"
    )


def select_hosts(hosts: Sequence[Host], include: str, exclude: str, num_nodes: int) -> list[Host]:
    """Return the nodes that DeepSpeed's launcher uses with --include, --exclude (`node1@node2:0,1`) or --num_nodes."""
    names = {spec.partition(":")[0]: spec.partition(":")[2] for spec in (include or exclude).split("@") if spec}
    if unknown := [name for name in names if name not in {host.login for host in hosts}]:
        raise UserError(
            f"COGDS_DEEPSPEED_ARGS: the hostfile has no node {unknown[0]}. Write its name as in the hostfile, without "
            "a user."
        )
    if include:
        return [host for host in hosts if host.login in names]
    kept = [host for host in hosts if host.login not in names or names[host.login]]
    return kept[:num_nodes] if num_nodes > 0 else kept


def main(argv: Sequence[str]) -> None:
    """Check the nodes for launch/hostfile.sh, and print them, separated by commas, and the options of ssh.

    argv: the hostfile, a hostfile to write for DeepSpeed's launcher, and further arguments of that launcher.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("hostfile")
    parser.add_argument("output", type=Path)
    parser.add_argument("script_folder")
    parser.add_argument("-i", "--include", default="")
    parser.add_argument("-e", "--exclude", default="")
    parser.add_argument("--num_nodes", type=int, default=-1)
    parser.add_argument("--ssh_port", type=int)
    args, _ = parser.parse_known_args(argv)
    hosts = read_hostfile(args.hostfile)
    used = select_hosts(hosts, args.include, args.exclude, args.num_nodes)
    check_nodes(used, args.ssh_port, args.script_folder)
    args.output.write_text(to_text(hosts))
    print(",".join(host.login for host in used))
    print(f"-p {args.ssh_port}" if args.ssh_port else "")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
