import numpy as np

from vitscale.telemetry import peak_rss_bytes, reset_peak_rss

MB = 2**20


def test_the_peak_is_seen_after_it_is_over_and_can_be_started_anew():
    held = reset_peak_rss()
    np.ones(64 * MB // 8).sum()
    assert 60 * MB <= peak_rss_bytes() - held <= 90 * MB
    again = reset_peak_rss()
    assert peak_rss_bytes() - again < 8 * MB
