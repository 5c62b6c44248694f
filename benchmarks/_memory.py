"""Resident memory of this process on Linux, and its peak since a reset."""

from pathlib import Path

_STATUS = Path("/proc/self/status")


def reset_peak() -> int:
    """Forget the peak so far; returns the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _field("VmRSS")


def peak_bytes() -> int:
    """The most resident bytes since the last reset."""
    return _field("VmHWM")


def _field(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
