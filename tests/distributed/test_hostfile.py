"""Hostfiles: what is read, the line that an error names, and the check of the nodes with a replaced ssh."""

import stat
import sys

import pytest

from cogds.distributed import hostfile
from cogds.distributed.hostfile import Host, check_nodes, in_memory, read_hostfile, select_hosts
from cogds.errors import UserError

NODES = [Host("node1", 8), Host("node2.cluster.local", 4)]


@pytest.mark.parametrize(
    "text",
    [
        "node1 slots=8\nnode2.cluster.local slots=4\n",
        "\ufeffnode1 slots=8 \r\nnode2.cluster.local\tslots=4",  # from an editor on Windows
        "# two nodes\n\n  node1 slots=8 # rack 3\nnode2.cluster.local slots=4# größer\n",
        "node1  slots = 8 max_slots=8\nnode2.cluster.local slots=4 max-slots=4\n",  # as for mpirun
    ],
)
def test_the_spellings_of_a_hostfile(text, tmp_path):
    (tmp_path / "hosts").write_bytes(text.encode())
    assert read_hostfile(str(tmp_path / "hosts")) == NODES


def test_a_user_is_for_ssh_and_not_part_of_the_address(tmp_path):
    (tmp_path / "hosts").write_text("amd00@192.168.1.10 slots=2\nroot@192.168.1.7 slots=1\n")
    hosts = read_hostfile(str(tmp_path / "hosts"))
    assert [host.login for host in hosts] == ["amd00@192.168.1.10", "root@192.168.1.7"]
    assert hosts[0].name == "192.168.1.10"


@pytest.mark.parametrize(
    "text, line, parts",
    [
        ("node1 slots=8\nnode2 lots=8", 2, ["'node2 lots=8'", "Write 'node2 slots=8'"]),
        ("node1:4", 1, ["Write 'node1 slots=4'"]),  # MPICH
        ("# mine\nnode1", 2, ["Write 'node1 slots=8'", "number of GPUs"]),
        ("node1 8", 1, ["Write 'node1 slots=8'"]),
        ("node1 slots=", 1, ["Write 'node1 slots=8'"]),
        ("node1 slots=8 gpus=8", 1, ["'node1 slots=8 gpus=8'"]),
        ("node1 slots=eight", 1, ["slots=eight"]),
        ("node1 slots=-1", 1, ["slots=-1"]),
        ("node1 slots=0", 1, ["0 slots"]),
        ("node1 slots=8\nnode1 slots=8", 2, ["line 1"]),
        ("a@node1 slots=8\n\nb@Node1 slots=8", 3, ["line 1"]),
        ("node[1-4] slots=8", 1, ["'node[1-4]'", "one line per node"]),
        ("node1,node2 slots=8", 1, ["'node1,node2'", "one line per node"]),
        ("-oProxyCommand=x slots=8", 1, ["'-oProxyCommand=x'"]),
        ("knöten slots=8", 1, ["'knöten'"]),
        ("node1:2222 slots=8", 1, ["colon", "~/.ssh/config"]),
        ("fe80::1 slots=8", 1, ["colon", "IPv4"]),
        ("node1 slots=8\nlocalhost slots=8", 2, ["localhost is a different machine on each node"]),
    ],
)
def test_an_error_names_the_line_and_what_to_write(text, line, parts, tmp_path):
    file = tmp_path / "hosts"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_hostfile(str(file))
    assert str(error.value).startswith(f"{file}:{line}: ")
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize("data", [b"", b"# node1 slots=8\n", "node1 slots=8".encode("utf-16"), None])
def test_a_file_without_nodes_is_named(data, tmp_path):
    file = tmp_path / "hosts"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(UserError, match=str(file)):
        read_hostfile(str(file))


def test_deepspeed_reads_the_hostfile_in_memory():
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(in_memory([Host("root@n1", 2), Host("n2", 1)]))) == {"root@n1": 2, "n2": 1}


@pytest.mark.parametrize(
    "include, exclude, num_nodes, logins",
    [
        ("", "", -1, ["a", "b", "c"]),
        ("", "", 2, ["a", "b"]),
        ("c@a:0,1", "", -1, ["a", "c"]),
        ("", "a@b:0", -1, ["b", "c"]),
    ],
)
def test_nodes_are_selected_as_by_deepspeeds_launcher(include, exclude, num_nodes, logins):
    from deepspeed.launcher.runner import apply_num_nodes_and_gpus, parse_inclusion_exclusion

    hosts = [Host(name, 2) for name in "abc"]
    assert [host.login for host in select_hosts(hosts, include, exclude, num_nodes)] == logins
    pool = {host.login: host.num_slots for host in hosts}
    theirs = apply_num_nodes_and_gpus(parse_inclusion_exclusion(pool, include, exclude), num_nodes, -1)
    assert list(theirs) == logins


def test_selecting_an_unknown_node_is_refused():
    with pytest.raises(UserError, match="no node d"):
        select_hosts([Host("a", 2)], "d", "", -1)


# Runs the command here, like a node that has the same folders. What a node lacks is in its name.
SSH = """#!/bin/bash
login=${*: -2:1} command=${*: -1}
echo "$*" >>"$CALLS"
case $login in
  *down) echo "Warning: added" >&2; echo "ssh: connect to host $login port 22: Connection refused" >&2; exit 255 ;;
  *silent) exec sleep 30 ;;
  *no_folder) command=${command/cd /cd /no} ;;
  *no_python) command=${command/-x /-x /no} ;;
  *no_name) command=${command/getent/false_getent} ;;
esac
false_getent() { return 2; }
eval "$command"
"""


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """A folder of programs that replace ssh and pdsh, and the file with the arguments of ssh."""
    for name, text in {"ssh": SSH, "pdsh": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-o ConnectTimeout=2")
    monkeypatch.setattr(hostfile, "CHECK_TIMEOUT_S", 0.5)
    return tmp_path


def test_nodes_that_are_well_pass_the_check(nodes):
    check_nodes([Host("localhost", 1), Host("me@node2", 1)], ssh_port=2222)
    calls = sorted((nodes / "calls").read_text().splitlines())
    assert len(calls) == 2
    assert "BatchMode=yes" in calls[0]
    assert calls[0].index("ConnectTimeout=2 ") < calls[0].index("ConnectTimeout=15 ")
    assert "-p 2222 localhost cd " in calls[0]
    assert "-p 2222 me@node2 cd " in calls[1]


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize(
    "login, reason",
    [
        ("down", "down: ssh: connect to host down port 22: Connection refused"),
        ("me@silent", "me@silent: no answer within 0.5 s"),
        ("no_folder", "it has no folder /"),
        ("no_python", f"it has no interpreter {sys.executable}"),
        ("no_name", "it does not know the name localhost"),
    ],
)
def test_a_node_that_cannot_be_used_is_named_with_the_reason(login, reason):
    with pytest.raises(UserError, match="1 of 3 nodes") as error:
        check_nodes([Host("localhost", 1), Host(login, 1), Host("node3", 1)])
    assert reason in str(error.value)
    assert f"ssh {login} hostname" in str(error.value)


@pytest.mark.usefixtures("nodes")
def test_of_many_failures_the_first_are_listed():
    with pytest.raises(UserError, match=r"12 of 12 nodes .*n0down: .*n7down: .*; and 4 more\.") as error:
        check_nodes([Host(f"n{i}down", 1) for i in range(12)])
    assert "n8down" not in str(error.value)


def test_a_missing_program_and_an_odd_path_are_named(nodes, monkeypatch):
    with pytest.raises(UserError, match="path '/a b': "):
        check_nodes([Host("localhost", 1)], script_folder="/a b")
    monkeypatch.setenv("PATH", str(nodes))
    (nodes / "pdsh").unlink()
    with pytest.raises(UserError, match="pdsh: not found"):
        check_nodes([Host("localhost", 1)])
