from pathlib import Path

from vissl_lite.data.free_memory import free_memory

KILO = 1024


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal: 900 kB\nMemFree: 1 kB\nMemAvailable:     500 kB\n"}


def test_this_machine_says_what_is_free_or_nothing() -> None:
    free = free_memory()
    assert free is None or free >= 0


def test_without_linux_nothing_is_known(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None


def test_without_limits_it_is_what_is_available(tmp_path: Path) -> None:
    put(tmp_path, MEMINFO)
    assert free_memory(tmp_path) == 500 * KILO
    put(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"})
    assert free_memory(tmp_path) == 500 * KILO


def test_a_limit_of_a_group_above_counts_and_files_in_memory_do_not(tmp_path: Path) -> None:
    groups = {
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/memory.max": f"{300 * KILO}\n",
        "sys/fs/cgroup/user/memory.current": f"{200 * KILO}\n",
        "sys/fs/cgroup/user/memory.stat": f"anon 5\ninactive_file {50 * KILO}\n",
        "sys/fs/cgroup/user/job/memory.max": "max\n",
        "sys/fs/cgroup/user/job/memory.current": "7\n",
    }
    put(tmp_path, MEMINFO | groups)
    assert free_memory(tmp_path) == 150 * KILO


def test_a_container_sees_the_limit_at_its_root(tmp_path: Path) -> None:
    groups = {
        "proc/self/cgroup": "0::/docker/of/the/host\n",
        "sys/fs/cgroup/memory.max": f"{100 * KILO}\n",
        "sys/fs/cgroup/memory.current": f"{120 * KILO}\n",
    }
    put(tmp_path, MEMINFO | groups)
    assert free_memory(tmp_path) == 0


def test_groups_of_version_one(tmp_path: Path) -> None:
    groups = {
        "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{300 * KILO}\n",
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{100 * KILO}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
    }
    put(tmp_path, MEMINFO | groups)
    assert free_memory(tmp_path) == 200 * KILO
