"""One training under its name: its files, lock, settings, batch, and what is saved and restored.

A run starts from the first of these that is there:

    1. its own state, output/<name>_last.pt     --resume auto, the default; the same bits as if it had never stopped
    2. another run's state                      --resume PATH
    3. pretrained weights                       --pretrained_dir
    4. random weights                           --pretrained_dir ''

It resumes only under the settings that decide on its result.  This module must not know flags, models or how a step is
computed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils import checkpoint, dist_errors, dist_util, files, log_folder, manifest
from utils.batch import Batch
from utils.errors import UserError, add_note
from utils.images import ImageError
from utils.manifest import Manifest
from utils.run_state import RunPaths, RunState

if TYPE_CHECKING:
    from utils.evaluation import EvalResult
    from utils.metrics import TrainLog
    from utils.precision import Precision

logger = logging.getLogger("train")


class Run:
    """Owns the files, the lock, the settings, the batch and the state of a training.

    ``open``, ``set_settings``, ``take_over`` and ``restore`` come in this order, then ``save_best`` and ``save`` as
    often as wanted, and ``close`` at the end.

    Args:
        paths: the run's files; ``open`` finds the folder of its logs.
        resume: auto, none, or the path of a state.
        batch: as the flags ask for.

    Attributes:
        run_id: tells the run from others of its name; there after ``open``.
        state: how far it has come.
        settings: what decides on the result.
        environment: what may change the last digits.
        batch: the division of a step's images, which a resume (see ``open``) and the memory change.
        masks_of_step: a step's dropout masks are the same in any number of micro-batches, on CPUs; not in a run that
            began with several before they were, so that it ends as it would have then.
        is_own: the state to resume from, if there is one, is of this very run.
        manifest: the files of the images, where they are a folder's.
        pretrained: path of the weights that it began with; "" for random ones, and where an older state does not tell.
    """

    def __init__(self, paths: RunPaths, resume: str, batch: Batch) -> None:
        self.paths, self.resume, self.batch = paths, resume, batch
        self.is_own = resume == "auto" or os.path.realpath(resume) == os.path.realpath(paths.state)
        self.run_id = ""
        self.state = RunState()
        self.pretrained = ""
        self.settings: dict[str, Any] = {}
        self.environment: dict[str, Any] = {}
        self.masks_of_step = True
        self.manifest: Manifest | None = None
        self._unreadable: set[str] = set()  # names of images that turned out so
        self._saved: dict[str, Any] | None = None  # what the file of the state holds, until ``restore``
        self._locks = contextlib.ExitStack()
        self._wrote_best = False  # the checkpoint under the run's name is its own
        self._has_state = False  # so is the state

    # ---- before any work ----

    def open(self) -> None:
        """Takes the locks, and reads the newest state that any rank has; writes nothing but the locks.

        Raises:
            UserError: another process trains under this name, files cannot be written, the state cannot be read, or
                its batch cannot be shared by so many ranks.
        """
        files.check_writable(self.paths.output_dir)
        if dist_util.is_main():
            self._locks.enter_context(files.file_lock(self.paths.lock))
            own = (self.paths.checkpoint, checkpoint.metadata_path(self.paths.checkpoint), self.paths.state)
            if taken := next((path for path in own if os.path.isdir(path)), None):  # a report may fail to be written
                raise UserError(f"{taken} is a folder where a file is written; move it, or give another --name")
            files.remove_stale(*own, self.paths.report)
        self._saved = _newest(self._find_state())
        # As the main process has it: folders of ranks may differ.
        self.is_own = bool(dist_util.max_over_ranks(int(dist_util.is_main() and self.is_own)))
        run_id = self._saved["run_id"] if self._saved is not None and self.is_own else ""
        if dist_util.is_main():
            self.paths = log_folder.claim(self.paths, run_id, self._locks)
        self.run_id = run_id or secrets.token_hex(8)
        if self._saved is not None:
            self._has_state = self.is_own
            self.pretrained = self._saved["pretrained"]
            self.state = RunState(**{name: self._saved[name] for name in vars(self.state)})
            was = self._saved["environment"]
            num_micro_batches = was.get("--gradient_accumulation_steps", 1)
            self.batch = self.batch.resumed(self._saved["batch"], was.get("processes", 1), num_micro_batches)
            self.masks_of_step = self._saved["batch"].get("masks_of_step", num_micro_batches == 1)

    def _find_state(self) -> dict[str, Any] | None:
        if self.resume == "none" or (self.resume == "auto" and not os.path.exists(self.paths.state)):
            return None
        return checkpoint.load_state(self._state_path)

    def close(self) -> None:
        """Lets go of the locks."""
        self._locks.close()

    @property
    def _state_path(self) -> str:
        """The state to resume from."""
        return self.paths.state if self.resume == "auto" else self.resume

    @property
    def saved_settings(self) -> dict[str, Any] | None:
        """The settings of the state to resume from; None for a new run."""
        return None if self._saved is None else self._saved["settings"]

    @property
    def saved_environment(self) -> dict[str, Any]:
        """The environment of the state to resume from; empty for a new run."""
        return {} if self._saved is None else self._saved["environment"]

    @property
    def num_saved_bytes(self) -> int:
        """The bytes of the state's weights and momentum, which model and optimizer take over; 0 for a new run."""
        held = [] if self._saved is None else [self._saved["model"], self._saved["optimizer"]]
        return sum(x.nbytes for x in checkpoint.tensors_in(held))

    def take_weights(self) -> dict[str, Tensor]:
        """Returns float32 weights by the model's names, of the state to resume from, and lets go of them."""
        assert self._saved is not None
        return self._saved.pop("model")

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the images that were looked at when the state was saved; "" if there are none."""
        return "" if self._saved is None else self._saved["data"].get("fingerprint", "")

    @contextlib.contextmanager
    def remembering_unreadable(self, root: str) -> Iterator[None]:
        """Notes in the state to resume from which images below ``root`` cannot be read: they may go.

        Not in another run's, nor in that of an earlier version, which has no names: there the message says so.
        """
        try:
            yield
        except ImageError as e:
            if self._saved is not None and not (self._saved["data"] and self.is_own):
                add_note(e, f"{self._state_path} is resumed only with all of its images")
            elif self._saved is not None and dist_util.is_main():
                data = self._saved["data"]
                data["unreadable"] = sorted({*data["unreadable"], *(os.path.relpath(path, root) for path in e.reasons)})
                try:
                    checkpoint.save_state(self.paths.state, {key: self._saved[key] for key in checkpoint.STATE_KINDS})
                except OSError as failed:  # the user still needs to know of the images
                    add_note(e, f"{failed}: the training resumes only with all of its images")
            raise

    def set_settings(
        self,
        settings: dict[str, Any],
        environment: dict[str, Any],
        defaults: Mapping[str, Any],
        images: Manifest | None = None,
    ) -> None:
        """Sets what decides on the result, and compares it with what the state was saved under.

        Args:
            settings: what decides on the result, by the names of the flags.
            environment: what may change the last digits.
            defaults: of the settings; a setting that a state lacks counts as its default.
            images: the files that the data's checksum is of, where they are a folder's.

        Raises:
            UserError: they differ; the message lists every difference.
        """
        self.settings, self.environment, self.manifest = settings, environment, images
        if self._saved is None:
            return
        was = {name: defaults.get(name, value) for name, value in settings.items()} | self._saved["settings"]
        steps = was.get("--num_steps")
        if type(steps) is int and steps < settings["--num_steps"]:
            logger.warning("--num_steps was %s and is %d: the steps to come have the longer schedule's learning rates",
                           steps, settings["--num_steps"])  # fmt: skip
            was["--num_steps"] = settings["--num_steps"]
        if (explained := self._compare_images(was)) is not None:
            was["--dataset"] = settings["--dataset"]
        if changed := [*(explained or []), *_differences(was, settings)]:
            raise UserError(
                f"{self._state_path} is of a run with other settings: {'; '.join(changed)}; give it the same, "
                "or another --name, or start over with --resume none"
            )
        before = self._saved["environment"]
        if changed := _differences(before, {name: environment.get(name) for name in before}):
            other = settings.get("--dropout") and _changes_masks(before, environment, self.masks_of_step)
            masks = "dropout masks and " if other else ""
            logger.warning("%s: the %slast digits may differ from those of a run that was never stopped",
                           "; ".join(changed), masks)  # fmt: skip

    def _compare_images(self, was: Mapping[str, Any]) -> list[str] | None:
        """Tells what changed in a folder of images since the settings ``was``; None where these are of no folder.

        The run resumes without images that it could not read.
        """
        assert self._saved is not None
        name, now, saved = "--dataset", self.manifest, self._saved["data"]
        if now is None or not str(was.get(name)).startswith("folder "):
            return None
        if not (gone := manifest.gone_without_harm(saved, now)):
            text = manifest.difference(saved, now, was[name] == self.settings[name])
            return [f"{name}: {text}"] if text else []
        logger.warning(
            "%s, which could not be read, are gone: the order of the images is that of the smaller folder from here on",
            ", ".join(gone),
        )
        self.state.best_result = manifest.without(self.state.best_result, saved, now)
        if not self.state.best_result:  # which accuracies to come cannot be compared with
            self.state.best_accuracy, self.state.best_step, self.state.last_eval_step = -1.0, 0, 0
        return []

    # ---- once the model is there ----

    def take_over(self) -> None:
        """Moves what another run left under this name out of the way; the best weights so far are there afterwards.

        A run that replaces another and is killed before its first save must not resume as the other one.
        """
        dist_util.barrier()  # every rank has read what is moved now
        lost = False
        if not self.is_own and dist_util.is_first_of_machine() and os.path.exists(self.paths.state):
            logger.warning("--resume %s: this run replaces the one that %s is of", self.resume, self.paths.state)
            with contextlib.suppress(FileNotFoundError):  # another machine's, on the same disk
                os.unlink(self.paths.state)
        if dist_util.is_main():
            log_folder.sign(self.paths, self.run_id)
            lost = self.state.best_accuracy >= 0 and not self._adopt_best()
        if dist_util.max_over_ranks(int(lost)):
            self.state.best_accuracy, self.state.best_step = -1.0, 0
            if self.state.step == self.settings["--num_steps"]:
                self.state.last_eval_step = 0  # no later evaluation would find other weights
        self._wrote_best = self.state.best_accuracy >= 0

    def _adopt_best(self) -> bool:
        """Finds the weights of the best evaluation, here or beside another run's state; False if they are not there."""
        source = self._state_path.removesuffix("_last.pt") + "_checkpoint.bin"
        source = self.paths.checkpoint if self.is_own else source  # which a link may name otherwise
        weights = self._read_best(source)
        if self.is_own and weights is not None:
            return True
        try:
            if weights is None:
                raise UserError(f"{source} is of another evaluation, or is not there")
            metadata = checkpoint.read_metadata(source, weights)
            if metadata is None:
                raise UserError(f"{checkpoint.metadata_path(source)} is not there")
        except UserError as e:
            text = "The best weights so far, of accuracy %.5f, are not there (%s): the next evaluation's are saved"
            logger.warning(text, self.state.best_accuracy, e)
            return False
        self._write_checkpoint(weights, metadata)
        return True

    def _read_best(self, path: str) -> dict[str, Tensor] | None:
        """Returns the weights in a file if they are those of the state's best evaluation, else None."""
        try:
            weights = checkpoint.load_weights(path)
            if self.state.best_crc32:  # which older states lack
                return weights if checkpoint.checksum(weights) == self.state.best_crc32 else None
            metadata = checkpoint.read_metadata(path, weights)
        except UserError:  # missing, damaged, or copied without its metadata
            return None
        if metadata is None or metadata.model_type != self.settings.get("--model_type", metadata.model_type):
            return None
        is_best = (metadata.step, metadata.accuracy) == (self.state.best_step, self.state.best_accuracy)
        return weights if is_best else None

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision, log: TrainLog
    ) -> RunState:
        """Gives everything but the model, which has its weights, what the state holds for it, and remembers all four.

        Returns:
            How far the run has come; a new run begins with step 0.
        """
        self._model, self._optimizer, self._precision, self._log = model, optimizer, precision, log
        if self._saved is not None:
            optimizer.load_state_dict(self._saved["optimizer"])
            precision.load_state_dict(self._saved["precision"], self.state.step)
            num_ranks = self._saved["environment"].get("processes", 1)
            log.load_state_dict(self._saved["log"], self.state.step, precision.device, self.is_own, num_ranks)
            self._saved = None  # it is as large as the model and the optimizer
            logger.info("Resumed after step %d", self.state.step)
        return self.state

    # ---- while it trains ----

    def save(self) -> None:
        """Saves everything that a resume needs; every rank must call it, the main process writes.

        Raises:
            FloatingPointError: the weights are not finite; the state saved before stays.
            OSError: the disk does not take it; the state saved before stays.
        """
        with self._log.paused():
            precision, log = self._precision.state_dict(), self._log.state_dict()
            if dist_util.is_main():
                weights = self._precision.float32_weights(self._model)
                _check_finite(weights, self.state.step)
                checkpoint.save_state(self.paths.state, {
                    "run_id": self.run_id,  # by which it knows the folder of its logs
                    "settings": self.settings,  # compared on resume: they decide on the result
                    "environment": self.environment,  # a change of it is a warning: it may change the last digits
                    "batch": {"total": self.batch.total, "given": self.batch.given,  # kept with other ranks
                              "masks_of_step": self.masks_of_step},
                    "pretrained": self.pretrained,  # for people: resuming compares a checksum, in the settings
                    "data": {} if self.manifest is None else self.manifest.state_dict(self._unreadable),  # file names
                    **vars(self.state),  # step, last_eval_step, best_accuracy, best_step, best_result, best_crc32
                    "model": weights,  # float32, by the checkpoint's names
                    "optimizer": self._optimizer.state_dict(),  # momentum
                    "precision": precision,  # loss scale, skipped steps
                    "log": log,  # losses since the last line, lengths of the log files, seconds
                })  # fmt: skip
        self._has_state = True

    def save_best(self, result: EvalResult, metadata: checkpoint.CheckpointMetadata) -> None:
        """Makes an evaluation the best so far, and writes the model's weights and their metadata.

        Raises:
            OSError: the disk does not take it; the checkpoint before stays.
        """
        self.state.best_accuracy, self.state.best_step = metadata.accuracy, metadata.step
        self.state.best_result = dict(vars(result))
        if dist_util.is_main():
            self._write_checkpoint(self._precision.float32_weights(self._model), metadata)
            logger.info("Saved model checkpoint to %s", self.paths.checkpoint)
        self._wrote_best = True

    def _write_checkpoint(self, weights: Mapping[str, Tensor], metadata: checkpoint.CheckpointMetadata) -> None:
        """Writes the checkpoint.  The first write keeps what another run, or a person, left under its name.

        The same weights need no second name: a run that is killed before its first state computes them again.
        """
        path, weights = self.paths.checkpoint, {name: x.detach().cpu() for name, x in weights.items()}
        if not self._wrote_best and os.path.exists(path) and not _holds(path, weights):
            kept = checkpoint.keep_earlier(path)
            logger.warning("%s was not written by this run; it is kept as %s", path, kept)
        self._wrote_best = True
        self.state.best_crc32 = checkpoint.save_weights(path, weights, metadata)

    @contextlib.contextmanager
    def saving_before_image_errors(self) -> Iterator[None]:
        """Saves the last complete step before an image that cannot be read ends the training on every rank."""
        try:
            yield
        except ImageError as e:
            if self.manifest is not None:
                self._unreadable |= self.manifest.names(e.reasons)
            if self.state.step and dist_errors.is_on_all_ranks(e):
                try:
                    self.save()
                except (OSError, FloatingPointError) as failed:  # the user still needs to know of the image
                    add_note(e, f"step {self.state.step} is not saved: {failed}")
                dist_util.barrier()  # a launcher ends all ranks once one is gone
            raise

    @contextlib.contextmanager
    def noting_what_is_left(self) -> Iterator[None]:
        """Adds to an error that ends the training where its last save, or its best weights, are."""
        try:
            yield
        except Exception as e:
            if self._has_state and os.path.exists(self.paths.state):
                add_note(e, f"the run up to its last save is in {self.paths.state}")
            elif self._wrote_best and os.path.exists(self.paths.checkpoint):  # saved less often than evaluated
                where = f"of step {self.state.best_step}, are in {self.paths.checkpoint}"
                add_note(e, f"the best weights so far, {where}")
            raise


def _newest(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the newest state that any rank has: machines may have disks of their own."""
    version: tuple[int, ...] = (-1,)
    if state is not None:
        contents = checkpoint.checksum(state["model"]) if dist_util.several_machines() else 0
        version = (state["step"], state["last_eval_step"], contents)
    return dist_util.broadcast_newest(state, version)


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lists what differs, as text."""
    names = [name for name in {**now, **was} if was.get(name) != now.get(name)]
    return [f"{name} was {was.get(name)}, is {now.get(name)}" for name in names]


def _changes_masks(was: Mapping[str, Any], now: Mapping[str, Any], masks_of_step: bool) -> bool:
    """Tells if dropout draws other masks in another environment: each rank has its own; see ``cpu_ops.StepMasks``."""
    deciding = ["--device", "processes"]
    if not (masks_of_step and was.get("--device") == now["--device"] == "cpu"):
        deciding += ["--gradient_accumulation_steps", "--compile"]
    return any(name in was and was[name] != now[name] for name in deciding)


def _check_finite(weights: Mapping[str, Tensor], step: int) -> None:
    if not torch.stack([x.isfinite().all() for x in weights.values()]).all():
        raise FloatingPointError(
            f"the weights are not finite after step {step}; a lower --learning_rate or a longer --warmup_steps may help"
        )


def _holds(path: str, weights: Mapping[str, Tensor]) -> bool:
    """Compares the weights in a file with others."""
    try:
        return checkpoint.checksum(checkpoint.load_weights(path)) == checkpoint.checksum(weights)
    except UserError:  # damaged, or somebody else's
        return False
