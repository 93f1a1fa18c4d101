"""Peak memory of this process."""

import contextlib
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def peak_rss_bytes() -> int:
    """Largest resident set since the process began, or since `reset_peak_rss` where the system can reset it."""
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> int:
    """Start the measurement of the peak anew; gives the resident set that it starts from.

    Where the system cannot reset it (only Linux can), the peak goes on counting from the process's beginning.
    """
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    return peak_rss_bytes()
