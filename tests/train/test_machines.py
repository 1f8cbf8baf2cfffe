"""Where processes run: hostfiles, Slurm jobs, Volcano jobs; what does not divide is refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mgm_exp.config import ExperimentConfig, Machines
from mgm_exp.errors import ConfigError
from mgm_exp.train.machines import Reach, cluster_of, is_this_machine, read_hostfile

from .conftest import experiment


def config(devices: int, hostfile: Path | None = None, machines: Machines = Machines.auto) -> ExperimentConfig:
    found = experiment(devices=devices, global_batch=devices)
    found.launch.hostfile = str(hostfile) if hostfile else None
    found.launch.machines = machines
    return found


def hosts(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hosts"
    path.write_text(text, encoding="utf-8")
    return path


def test_one_machine_unless_something_says_otherwise() -> None:
    found = cluster_of(config(4), {})
    assert (found.reach, found.size, found.per_machine, found.is_loopback) == (Reach.here, 1, 4, True)


def test_hostfiles_of_three_tools(tmp_path: Path) -> None:
    path = hosts(tmp_path, "# ours\n\nnode-1 slots=8\nnode2.lan:4   # MPICH\n10.0.0.3\nnode4 slots = 2 max-slots=4\n")
    assert read_hostfile(path) == {"node-1": 8, "node2.lan": 4, "10.0.0.3": None, "node4": 2}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no machine"),
        ("# nothing\n", "names no machine"),
        ("a slots=1\na slots=1\n", "line 2: a is named twice"),
        ("a slots=1\n$(rm -rf /) slots=2\n", "line 2"),
        ("-oProxyCommand=x slots=1\n", "line 1"),
    ],
)
def test_a_broken_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match="hosts") as caught:
        read_hostfile(hosts(tmp_path, text))
    assert says in str(caught.value)


def test_the_machines_of_a_hostfile_share_the_processes(tmp_path: Path) -> None:
    found = cluster_of(config(4, hosts(tmp_path, "127.0.0.1 slots=2\nlocalhost slots=2\n")), {})
    assert (found.reach, found.names, found.per_machine) == (Reach.shell, ("127.0.0.1", "localhost"), 2)
    assert [found.machine_of(rank) for rank in range(4)] == ["127.0.0.1"] * 2 + ["localhost"] * 2
    assert found.is_loopback


def test_processes_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    path = hosts(tmp_path, "127.0.0.1 slots=2\nlocalhost slots=1\n")
    with pytest.raises(ConfigError, match=r"devices=3 processes do not divide over the 2 machines .*multiple of 2"):
        cluster_of(config(3, path), {})
    with pytest.raises(ConfigError, match=r"allows localhost 1"):
        cluster_of(config(4, path), {})


def test_the_command_is_given_on_the_first_machine(tmp_path: Path) -> None:
    assert is_this_machine("localhost") and not is_this_machine("192.0.2.7")
    with pytest.raises(ConfigError, match=r"begins with 192\.0\.2\.7, which is not this machine"):
        cluster_of(config(2, hosts(tmp_path, "192.0.2.7\nlocalhost\n")), {})


def test_a_single_machine_of_a_hostfile_needs_no_shell(tmp_path: Path) -> None:
    assert cluster_of(config(2, hosts(tmp_path, "localhost slots=2\n")), {}).reach is Reach.here


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a job over n1 and n2, and a scontrol that knows them."""
    program = tmp_path / "scontrol"
    program.write_text(
        "#!/bin/sh\n"
        'case "$2" in\n'
        '  hostnames) [ "$3" = "n[1-2]" ] && printf "n1\\nn2\\n" ;;\n'
        '  node) echo "NodeName=$4 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=$4.lan" ;;\n'
        "esac\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n1",
    }  # fmt: skip


def test_the_nodes_of_a_slurm_job(slurm: dict[str, str]) -> None:
    found = cluster_of(config(4), slurm)
    assert (found.reach, found.names, found.per_machine, found.address) == (Reach.slurm, ("n1", "n2"), 2, "10.1.2.3")
    assert not found.is_loopback
    assert cluster_of(config(4, machines=Machines.here), slurm).reach is Reach.here
    assert cluster_of(config(1), slurm).reach is Reach.here


@pytest.mark.parametrize("node", ["n2", None])
def test_in_a_slurm_job_the_experiment_runs_once_on_the_first_node(slurm: dict[str, str], node: str | None) -> None:
    environment = {key: value for key, value in slurm.items() if key != "SLURMD_NODENAME"}
    with pytest.raises(ConfigError, match=r"one command on its first machine, n1.*Start it once"):
        cluster_of(config(2), environment | ({"SLURMD_NODENAME": node} if node else {}))


def test_the_pods_of_a_volcano_job() -> None:
    environment = {"VC_MAIN_HOSTS": "t-main-0.t", "VC_NODE_HOSTS": "t-node-0.t,t-node-1.t", "MGM_EXP_BOARD": "/out/b"}
    found = cluster_of(config(6), environment)
    assert (found.reach, found.per_machine) == (Reach.volcano, 2)
    assert found.names == ("t-main-0.t", "t-node-0.t", "t-node-1.t") and found.address == "t-main-0.t"
    with pytest.raises(ConfigError, match="the Volcano job"):
        cluster_of(config(4), environment)
