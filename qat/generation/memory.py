"""How much memory this process took at most."""

from __future__ import annotations

import sys
from pathlib import Path


def memory() -> str:
    """The process's peak resident memory, in words."""
    return f"peak memory {peak_bytes() / 2**20:,.0f} MiB"


def peak_bytes() -> int:
    """Linux keeps it by process; getrusage's value, taken elsewhere, begins with that of the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
