import os
import subprocess
import sys

_MEASURE = """
import numpy as np
from vitscale.telemetry import peak_rss_bytes, reset_peak_rss

held = reset_peak_rss()
np.ones(8 * 2**20).sum()
risen = peak_rss_bytes() - held
again = reset_peak_rss()
print(risen, peak_rss_bytes() - again)
"""


def test_the_peak_is_seen_after_it_is_over_and_can_be_started_anew():
    # In a process of its own, where no earlier test left free memory that 64 MB could fill unseen.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}
    command = [sys.executable, "-c", _MEASURE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
    risen, anew = (int(number) / 2**20 for number in done.stdout.split())
    assert 60 <= risen <= 90
    assert anew < 8
