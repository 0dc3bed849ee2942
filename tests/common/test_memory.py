"""Available memory: what the machine has, capped by control groups."""

from __future__ import annotations

from runner.common.memory import available_memory, resident_memory


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 20000 kB\nMemAvailable: 10000 kB\n"}


def test_without_a_limit_it_is_what_the_machine_has(tmp_path):
    files = {**MEMINFO, "proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "max\n"}
    assert available_memory(write(tmp_path, files)) == 10_000 * 1024


def test_a_control_group_caps_it_and_its_cached_files_count_as_free(tmp_path):
    files = {
        **MEMINFO,
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": "5000000\n",
        "sys/fs/cgroup/a/memory.current": "4000000\n",
        "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 500000\n",
    }
    assert available_memory(write(tmp_path, files)) == 1_500_000


def test_version_1_of_control_groups_is_read_at_the_root_of_a_container_too(tmp_path):
    files = {
        **MEMINFO,
        "proc/self/cgroup": "5:memory:/docker/x\n3:cpu:/docker/x\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000\n",
    }
    assert available_memory(write(tmp_path, files)) == 2_000_000


def test_a_system_that_does_not_say_still_has_some(tmp_path):
    assert available_memory(tmp_path) > 0
    assert resident_memory(tmp_path) == 0
