"""The time that a run takes, reckoned from what its steps and evaluations took so far; durations in words.

This module must not read a clock, nor show anything.
"""

from __future__ import annotations

#: An image takes a third of its time in a step where it is evaluated: the backward pass takes twice the forward's.
EVALUATED = 1 / 3
#: After so many steps, the first apart, the outlook is told with a line of the log; after so many seconds without.
TELL_STEPS, TELL_SECS = 2, 10


def duration(secs: float) -> str:
    """Returns a time in two units at most: 0.5 s; 45 s; 12 min 5 s; 3 h 20 min."""
    if secs < 60:
        return f"{secs:.3g} s"
    larger, smaller, names = (secs, 60, ("min", "s")) if secs < 3600 else (secs / 60, 60, ("h", "min"))
    whole, rest = divmod(round(larger), smaller)
    return f"{whole} {names[0]}" + (f" {rest} {names[1]}" if rest else "")


class Outlook:
    """Reckons how long a run takes, evaluations and saves included.

    What counts is what this process has seen, for a resumed run may be on another machine.  Its first step, which
    prepares much, does not count once there is another.

    Args:
        num_steps: of the whole run.
        eval_every: steps between two evaluations; the last step has one, too.
        eval_steps: images of an evaluation divided by those of a step.
    """

    def __init__(self, num_steps: int, eval_every: int, eval_steps: float) -> None:
        self._num_steps, self._eval_every, self._eval_steps = num_steps, eval_every, eval_steps
        self._first: tuple[int, float] | None = None  # of this process: the step, and the seconds trained after it
        self._num_evals, self._told = 0, False
        self.left_secs, self.whole_secs = 0.0, 0.0

    def step(self, step: int, train_secs: float, secs: float, earlier_secs: float) -> None:
        """Takes note of a step that is done.

        Args:
            step: its number, from 1; an evaluation after it is still to come.
            train_secs, secs: since this process began with its steps, without and with evaluations and saves.
            earlier_secs: that earlier processes took for the run.
        """
        first_step, first_secs = self._first = self._first or (step, train_secs)
        self._num_timed = step - first_step
        self.step_secs = (train_secs - first_secs) / self._num_timed if self._num_timed else train_secs
        self.eval_secs = self.step_secs * self._eval_steps * EVALUATED
        if self._num_evals:
            self.eval_secs = (secs - train_secs) / self._num_evals  # with what is saved and drawn after it
        num_evals = self._evals_until(self._num_steps) - self._evals_until(step - 1)
        self.left_secs = (self._num_steps - step) * self.step_secs + num_evals * self.eval_secs
        self.whole_secs = earlier_secs + secs + self.left_secs
        self._earlier_secs = earlier_secs

    def evaluated(self) -> None:
        """Takes note of an evaluation that is done."""
        self._num_evals += 1

    def text(self) -> str:
        """Returns the time left and the whole, for a line of progress; "" before the first step."""
        return f"{duration(round(self.left_secs))} left of {duration(round(self.whole_secs))}" if self._first else ""

    def first_words(self, line_is_due: bool) -> str:
        """Returns the whole outlook, once, as soon as it can be told: with a line of the log or after some seconds."""
        enough = (line_is_due and self._num_timed >= TELL_STEPS) or self._num_timed * self.step_secs >= TELL_SECS
        if self._told or not enough:
            return ""
        self._told = True
        whole, num_evals = duration(self.whole_secs), self._evals_until(self._num_steps)
        left = f", {duration(self.left_secs)} from here on" if self._earlier_secs else ""
        return (
            f"About {whole} for the whole run{left}, evaluations included: {self._num_steps} steps of "
            f"{duration(self.step_secs)}, {num_evals} evaluation{'s' * (num_evals > 1)} of {duration(self.eval_secs)}"
        )

    def _evals_until(self, step: int) -> int:
        """Counts the evaluations up to a step, its own included."""
        return step // self._eval_every + (step == self._num_steps and step % self._eval_every > 0)
