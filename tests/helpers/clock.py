"""Time for tests of what takes time."""

from __future__ import annotations


class Clock:
    """Time that stands still unless a test moves it."""

    now = 100.0

    def perf_counter(self) -> float:
        """Returns the time, as ``time.perf_counter`` does."""
        return self.now
