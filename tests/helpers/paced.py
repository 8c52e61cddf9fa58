"""train.py, which a file slows down or holds, so that a test can hurt it in the middle; see ``launching.set_pace``.

Leaves the number of its process in the file ``pid`` and the rank.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import train
from utils import data_utils


def main(flags: list[str] | None = None) -> int:
    """Trains; returns the exit code."""
    original = data_utils.train_batches

    def paced(*args: Any, **options: Any) -> Iterator[data_utils.MicroBatch]:
        for i, batch in enumerate(original(*args, **options)):
            since = time.monotonic()
            while True:
                num_free, secs = Path(os.environ["PACE"]).read_text().split()
                if i < int(num_free) or time.monotonic() - since > float(secs):
                    break
                time.sleep(0.02)
            yield batch

    data_utils.train_batches = paced
    Path("pid" + os.environ["RANK"]).write_text(str(os.getpid()))
    return train.main(flags)


if __name__ == "__main__":
    sys.exit(main())
