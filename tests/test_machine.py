"""Cores and memory by control group, read from trees as Linux lays them out (cgroup v2, v1, in containers)."""

import os

import pytest

from scaling import machine

NO_LIMIT_V1 = 9223372036854771712  # PAGE_COUNTER_MAX: what the kernel writes where nothing is set


def lay_out(root, files):
    for name, text in {"proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


V2 = {
    "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
    "sys/fs/cgroup/slurm/job_7/step_0/cpu.max": "max 100000\n",
    "sys/fs/cgroup/slurm/job_7/cpu.max": "250000 100000\n",
    "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max\n",
    "sys/fs/cgroup/slurm/job_7/memory.max": f"{3 << 30}\n",
    "sys/fs/cgroup/slurm/memory.max": f"{5 << 30}\n",
    "sys/fs/cgroup/slurm/job_7/step_0/memory.events": "low 0\nhigh 0\nmax 7\noom 2\noom_kill 2\noom_group_kill 0\n",
}
CONTAINER_V2 = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/cpu.max": "50000 100000\n",
    "sys/fs/cgroup/memory.max": f"{1 << 30}\n",
    "sys/fs/cgroup/memory.events": "oom_kill 0\n",
}
V1 = {
    "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/\n",
    # The host's path is not mounted in the container: its own group is the root it sees.
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 << 30}\n",
    "sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n",
}
UNLIMITED_V1 = V1 | {
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{NO_LIMIT_V1}\n",
    "sys/fs/cgroup/memory/memory.oom_control": "under_oom 0\n",  # kernels before 4.13 do not count
    "proc/vmstat": "nr_free_pages 1\noom_kill 9\n",
}


@pytest.mark.parametrize(
    "files, num_cores, memory, killed",
    [
        (V2, 3, 3 << 30, 2),
        (CONTAINER_V2, 1, 1 << 30, 0),
        (V1, 2, 2 << 30, 5),
        (UNLIMITED_V1, 8, 16 << 30, 9),
        ({}, 8, 16 << 30, None),  # no control groups at all
    ],
)
def test_what_a_process_may_use(tmp_path, monkeypatch, files, num_cores, memory, killed):
    lay_out(tmp_path, files)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8, 16)), raising=False)
    assert len(set(machine.cores())) == num_cores
    assert set(machine.cores()) <= set(range(8, 16))
    assert machine.memory_bytes() == memory
    assert machine.num_killed_for_memory() == killed


def test_jobs_of_one_machine_do_not_crowd_onto_its_first_cores(tmp_path, monkeypatch):
    lay_out(tmp_path, CONTAINER_V2)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    taken = []
    for parent in range(100, 104):
        monkeypatch.setattr(os, "getppid", lambda parent=parent: parent)
        taken += machine.cores()
    assert sorted(taken) == [0, 1, 2, 3]


def test_here_there_is_something():
    assert 1 <= len(machine.cores()) <= os.cpu_count()
    assert machine.memory_bytes() > 1 << 28
