"""CPUs that may be used: affinity, control groups of both kinds, memory nodes, on machines made of files."""

from __future__ import annotations

import os

import pytest

from scout_hf.errors import ConfigError
from scout_hf.kernels.cpu import topology


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Sets up a machine: CPUs of the affinity mask, the CPU of the thread, and files by path below the root."""

    def build(cpus=range(8), here=0, files=None):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cpus), raising=False)
        monkeypatch.setattr(topology, "current_cpu", lambda: here)
        for name, text in (files or {}).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return build


def nodes(*cpulists):
    return {f"sys/devices/system/node/node{i}/cpulist": cpus for i, cpus in enumerate(cpulists)}


V2 = {"proc/self/cgroup": "0::/"}
V1 = {"proc/self/cgroup": "9:name=systemd:/\n4:memory:/job\n1:cpu,cpuacct:/job/step"}


def test_the_affinity_mask_counts_not_the_machine(machine):
    machine(cpus={9, 3, 5})
    assert topology.usable_cpus() == (3, 5, 9)


def test_without_affinity_masks_all_cpus_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert topology.usable_cpus() == (0, 1, 2)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert topology.usable_cpus() == (0,)


@pytest.mark.parametrize(
    "files, quota",
    [
        ({}, None),
        (V2, None),
        (V2 | {"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        (V2 | {"sys/fs/cgroup/cpu.max": "250000 100000"}, 2.5),
        (V2 | {"sys/fs/cgroup/unified/cpu.max": "50000 100000"}, 0.5),
        # The tightest of a group and its ancestors binds; a container sees only its own root.
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "max 1000",
                "sys/fs/cgroup/a/cpu.max": "3000 1000",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "3000 1000",
                "sys/fs/cgroup/cpu.max": "2000 1000",
            },
            2.0,
        ),
        ({"proc/self/cgroup": "0::/docker/0123", "sys/fs/cgroup/cpu.max": "4000 1000"}, 4.0),
        (V1, None),
        (V1 | {"sys/fs/cgroup/cpu,cpuacct/job/step/cpu.cfs_quota_us": "-1"}, None),
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/job/step/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/job/step/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "600000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            6.0,
        ),
        (
            V1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            1.5,
        ),
        (V2 | {"sys/fs/cgroup/cpu.max": "nonsense"}, None),
    ],
)
def test_quotas_of_both_kinds_of_control_groups(machine, files, quota):
    assert topology.cpu_quota(machine(files=files)) == quota


@pytest.mark.parametrize(
    "cpus, quota, requested, spare",
    [
        (8, None, None, 7),
        (8, None, 3, 3),
        (8, None, 0, 0),
        (8, None, 100, 7),
        (1, None, None, 0),
        (1, None, 4, 0),
        (8, "400000 100000", None, 3),
        (8, "400000 100000", 2, 2),
        (8, "190000 100000", 5, 0),
        (8, "50000 100000", 5, 0),
        (2, "400000 100000", None, 1),
    ],
)
def test_workers_leave_a_cpu_to_the_main_thread(machine, cpus, quota, requested, spare):
    root = machine(cpus=range(cpus), files=V2 | ({"sys/fs/cgroup/cpu.max": quota} if quota else {}))
    assert topology.spare_workers(requested, root) == spare


def test_a_negative_number_of_threads_is_refused(machine):
    with pytest.raises(ConfigError, match="threads=-1"):
        topology.spare_workers(-1, machine())


def test_nodes_and_the_one_of_the_thread(machine):
    root = machine(here=5, files=nodes("0-3,8", "4-7", ""))
    assert topology.numa_nodes(root) == {0: (0, 1, 2, 3, 8), 1: (4, 5, 6, 7)}
    assert topology.current_node(root) == 1
    assert topology.current_node(root, cpu=8) == 0
    assert topology.current_node(root, cpu=99) is None


@pytest.mark.parametrize(
    "cpus, here, lists, workers, expected",
    [
        (range(8), 5, ("0-3", "4-7"), 3, (4, 5, 6, 7)),  # the thread's own node has a CPU for it and for three more
        (range(8), 5, ("0-3", "4-7"), 4, tuple(range(8))),  # not for four
        (range(8), 5, ("0-3", "4-7"), None, tuple(range(8))),
        ((2, 3, 4, 5), 4, ("0-3", "4-7"), 1, (4, 5)),  # usable ones only
        ((2, 3, 4), 4, ("0-3", "4-7"), 1, (2, 3, 4)),
        (range(4), 1, ("0-3",), 1, (0, 1, 2, 3)),
        (range(4), 1, (), 1, (0, 1, 2, 3)),
        (range(4), None, ("0-1", "2-3"), 1, (0, 1, 2, 3)),  # the system does not say where the thread is
    ],
)
def test_workers_stay_on_the_node_of_the_thread_if_it_is_enough(machine, cpus, here, lists, workers, expected):
    assert topology.worker_cpus(workers, machine(cpus, here, nodes(*lists))) == expected


def test_on_this_machine():
    valid = topology.usable_cpus()
    assert valid and topology.current_cpu() in (*valid, None)
    assert set(topology.worker_cpus()) <= set(valid)
    assert 0 <= topology.spare_workers() < len(valid)
    quota = topology.cpu_quota()
    assert quota is None or quota > 0
