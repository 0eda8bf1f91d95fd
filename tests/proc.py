"""Which processes a process has started, as /proc tells."""

from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="no /proc")


def state_and_parent(pid) -> tuple[str, int]:
    """The letter of a process's state and the number of its parent; "" and 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    state, parent, *_ = status.rpartition(")")[2].split()  # a name in brackets stands before
    return state, int(parent)


def children_of(process) -> list[int]:
    """Numbers of the processes that a process has started.

    By the parent that each one names: some sandboxes have no /proc/PID/task/PID/children.
    """
    running = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in running if state_and_parent(pid)[1] == process.pid]
