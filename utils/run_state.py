"""The facts of a run: the names of its files, and how far it has come.

utils/run.py reads and writes these files.  This module must not open any.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunPaths:
    """The files of a run.

    Args:
        output_dir: folder of the checkpoint, the state and the report.
        name: the run's.
        log_root: folder of the runs' folders of logs.
        log_number: of the folder among those of this name; see utils/log_folder.py.
    """

    output_dir: str
    name: str
    log_root: str = "logs"
    log_number: int = 1

    @property
    def checkpoint(self) -> str:
        """The weights of the best evaluation; their metadata stand beside."""
        return self._in_output("checkpoint.bin")

    @property
    def state(self) -> str:
        """Everything that the run needs to resume."""
        return self._in_output("last.pt")

    @property
    def report(self) -> str:
        """The page for a person to read."""
        return self._in_output("report.html")

    @property
    def log_dir(self) -> str:
        """Folder of the TensorBoard events and of metrics.jsonl."""
        return os.path.join(self.log_root, self.name if self.log_number == 1 else f"{self.name}-{self.log_number}")

    @property
    def lock(self) -> str:
        """A file that is locked while the run trains."""
        return os.path.join(self.output_dir, f".{self.name}.lock")

    @property
    def log_lock(self) -> str:
        """The same in the folder of its logs."""
        return os.path.join(self.log_dir, ".lock")

    def _in_output(self, ending: str) -> str:
        return os.path.join(self.output_dir, f"{self.name}_{ending}")


@dataclass
class RunState:
    """Progress of a run.

    Attributes:
        step: steps done.
        last_eval_step: the last step after which the model was evaluated.
        best_accuracy: of all evaluations so far, 0 to 1; -1 before the first.
        best_step: the step after which that was.
        best_result: that evaluation, by the names of ``evaluation.EvalResult``.
        best_crc32: the checksum of the weights that were evaluated, 0 where it is not known.
    """

    step: int = 0
    last_eval_step: int = 0
    best_accuracy: float = -1.0
    best_step: int = 0
    best_result: dict[str, Any] = field(default_factory=dict)
    best_crc32: int = 0
