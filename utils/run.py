"""Going on from where a run was stopped: whose state it is, whether it fits, and who shares the work now.

A run goes on only under the settings that decide on its result.  This module must not know how an update
is computed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.configs import ViTConfig, canonical_name
from utils import checkpoint, datasets, dist_util, files
from utils.args import checkpoint_path, deciding, default_of, last_path, log_dir, per_rank, report_path
from utils.errors import UserError
from utils.files import file_lock
from utils.metrics import TrainingLog
from utils.precision import Precision

logger = logging.getLogger("train")


def settings(
    args: argparse.Namespace, pretrained: str, config: ViTConfig, data: datasets.DataSets, precision: Precision
) -> dict[str, Any]:
    """Returns what decides on a run's result: a run resumes only under the same.

    Args:
        args: the flags.
        pretrained: the weights that the run starts from, given or found.
        config, data, precision: what is trained, on what, in which number formats.
    """
    return {
        "--pretrained_dir": pretrained,
        "--model_type": canonical_name(args.model_type),
        "--dataset": f"{args.dataset if args.dataset in datasets.NAMED_DATASETS else 'folder'} {data.checksum()}",
        **{f"--{name}": getattr(args, name) for name in deciding("result")},
        "--dropout": config.dropout_rate,
        "--train_batch_size of all processes": args.train_batch_size * dist_util.world_size(),
        "precision": str(precision),
    }


def circumstances(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What decides on the last digits of a run's result."""
    return {
        "--device": device.type,
        "--train_batch_size": args.train_batch_size,
        **{f"--{name}": getattr(args, name) for name in deciding("last digits")},
        "processes": dist_util.world_size(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def find_state(args: argparse.Namespace) -> checkpoint.TrainingState | None:
    """The state that ``--resume`` asks for, or None: a new run.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if args.resume == "none":
        return None
    if args.resume == "auto":
        return checkpoint.load_state(last_path(args)) if os.path.exists(last_path(args)) else None
    return checkpoint.load_state(args.resume)


def resumes_own(args: argparse.Namespace) -> bool:
    """Whether the state to go on from, if there is one, is of this very run."""
    return args.resume == "auto" or os.path.realpath(args.resume) == os.path.realpath(last_path(args))


class BestWeights:
    """The run's ``<name>_checkpoint.bin``.  The first write keeps what another run, or a person, left under its name.

    Args:
        path: of the weights.
        is_own: what is there was written by this run.
    """

    def __init__(self, path: str, is_own: bool) -> None:
        self.path, self.is_own = path, is_own

    def save(self, weights: dict[str, Tensor], description: checkpoint.CheckpointMetadata) -> int:
        """Writes weights and their description; returns the weights' checksum.

        The same weights need no second name: a run that is killed before its first state computes them again.
        """
        weights = {name: x.detach().cpu() for name, x in weights.items()}
        if not self.is_own and os.path.exists(self.path) and not _holds(self.path, weights):
            kept = checkpoint.keep_earlier(self.path)
            logger.warning("%s was not written by this run; it is kept as %s", self.path, kept)
        self.is_own = True
        return checkpoint.save_weights(self.path, weights, description)


def _holds(path: str, weights: dict[str, Tensor]) -> bool:
    try:
        return checkpoint.checksum(checkpoint.load_weights(path)) == checkpoint.checksum(weights)
    except UserError:  # damaged, or somebody else's
        return False


def wrote_best(args: argparse.Namespace, state: checkpoint.TrainingState) -> bool:
    """Tells the run's own weights: those of the state's best evaluation.

    Those of a later one, which a run leaves that is killed before it saves its state, are computed again.
    """
    path = checkpoint_path(args)
    if not resumes_own(args) or state.best_accuracy < 0 or not os.path.exists(path):
        return False
    if not dist_util.is_main():  # which writes nothing
        return True
    try:
        weights = checkpoint.load_weights(path)
        if state.best_crc32:  # which older states lack
            return checkpoint.checksum(weights) == state.best_crc32
        told = checkpoint.read_metadata(path, weights)
    except UserError:  # damaged, or copied without its description
        return False
    if told is None or told.model_type != state.settings.get("--model_type"):
        return False
    return (told.step, told.accuracy) == (state.best_step, state.best_accuracy)


def take_name(args: argparse.Namespace, state: checkpoint.TrainingState) -> BestWeights:
    """Leaves no state under the run's name that could be taken for its own, and has its best weights there.

    A run that replaces another and is killed before its first save must not go on as the other one.
    """
    best = BestWeights(checkpoint_path(args), wrote_best(args, state))
    if dist_util.is_main() and not resumes_own(args) and os.path.exists(last_path(args)):
        logger.warning("--resume %s: this run replaces the one that %s is of", args.resume, last_path(args))
        os.unlink(last_path(args))
    if state.best_accuracy < 0 or best.is_own:
        return best
    source = (last_path(args) if resumes_own(args) else args.resume).removesuffix("_last.pt") + "_checkpoint.bin"
    try:
        weights = checkpoint.load_weights(source)
        told = checkpoint.read_metadata(source, weights)
        others = state.best_crc32 and checkpoint.checksum(weights) != state.best_crc32
        if told is None or others or told.step > state.step or told.accuracy != state.best_accuracy:
            raise UserError(f"{source} is of another evaluation")
    except UserError as e:
        logger.warning("The best weights so far, of accuracy %.5f, are not there (%s): the next evaluation's are saved",
                       state.best_accuracy, e)  # fmt: skip
        state.best_accuracy, state.best_step = -1.0, 0
    else:
        if dist_util.is_main():
            best.save(weights, told)
    return best


def begin(
    args: argparse.Namespace, state: checkpoint.TrainingState | None, now: dict[str, Any], here: dict[str, Any]
) -> checkpoint.TrainingState:
    """The state that the run begins with: the one found, if it is of a run with the same settings.

    Raises:
        UserError: it is of another run; the message lists every difference.
    """
    if state is None:
        return checkpoint.TrainingState(now, here)
    # A flag that is younger than the state had its default's effect.
    defaults = {name: default_of(name.removeprefix("--")) for name in now}
    was = {name: x if defaults[name] is None else defaults[name] for name, x in now.items()} | state.settings
    if type(n := was.get("--num_steps")) is int and n < args.num_steps:
        logger.warning("--num_steps was %s and is %d: the updates to come have the longer schedule's learning rates",
                       n, args.num_steps)  # fmt: skip
        was["--num_steps"] = args.num_steps
    differences = [
        f"{name} was {was.get(name)}, is {now.get(name)}" for name in now | was if was.get(name) != now.get(name)
    ]
    if differences:
        path = last_path(args) if args.resume == "auto" else args.resume
        raise UserError(
            f"{path} is of a run with other settings: {'; '.join(differences)}; give it the same, "
            "or another --name, or start over with --resume none"
        )
    if changed := [
        f"{name} was {x}, is {here.get(name)}" for name, x in state.circumstances.items() if here.get(name) != x
    ]:
        logger.warning("%s: the last digits may differ from those of a run that was never stopped", "; ".join(changed))
    return replace(state, settings=now, circumstances=here, model={})


def restore(
    state: checkpoint.TrainingState, optimizer: torch.optim.Optimizer, precision: Precision, log: TrainingLog
) -> None:
    """Gives everything but the model, which has its weights, what the state holds for it."""
    if state.step:
        optimizer.load_state_dict(state.optimizer)
        precision.load_training_state(state.precision, state.step)
        log.load_training_state(state.log, precision.device)
        state.optimizer = {}  # let go of: it is as large as the model
        logger.info("Going on after update %d", state.step)


def logs_to_keep(args: argparse.Namespace, state: checkpoint.TrainingState) -> dict[str, int] | None:
    """The bytes of this name's logs that are of the run so far; None if they are of another run."""
    return state.log.get("files", {}) if resumes_own(args) and state.step else None


def claim(args: argparse.Namespace, held: contextlib.ExitStack) -> checkpoint.TrainingState | None:
    """Makes sure that nobody else trains under this name until ``held`` closes, and finds the state to go on from.

    Raises:
        UserError: somebody does, files cannot be written, or the state cannot be read.
    """
    files.check_writable(args.output_dir)
    files.check_writable(log_dir(args))
    if dist_util.is_main():
        for lock in (os.path.join(args.output_dir, f".{args.name}.lock"), os.path.join(log_dir(args), ".lock")):
            held.enter_context(file_lock(lock))
        best = checkpoint_path(args)
        own = (best, checkpoint.metadata_path(best), last_path(args))
        if taken := next((path for path in own if os.path.isdir(path)), None):  # a report may fail to be written
            raise UserError(f"{taken} is a folder where a file is written; move it, or give another --name")
        files.remove_stale(*own, report_path(args))
    state = newest_state(find_state(args))
    if state is not None:
        follow_processes(args, state)
    return state


def newest_state(state: checkpoint.TrainingState | None) -> checkpoint.TrainingState | None:
    """The newest state that any process found: machines may have disks of their own."""
    version: tuple[int, ...] = (-1,)
    if state is not None:
        contents = checkpoint.checksum(state.model) if dist_util.several_machines() else 0
        version = (state.step, state.evaluated, contents)
    found = dist_util.broadcast_newest(state and vars(state), version)
    return checkpoint.TrainingState(**found) if found else None


def follow_processes(args: argparse.Namespace, state: checkpoint.TrainingState) -> None:
    """Keeps the batch of all processes when the same command goes on with more or fewer of them.

    The parts of an update do not grow: what fitted into memory still does.

    Raises:
        UserError: so many processes cannot share the batch.
    """
    total = state.settings.get("--train_batch_size of all processes", 0)
    was, now = state.circumstances.get("processes", 1), dist_util.world_size()
    given = args.train_batch_size
    if not total or total == given * now or state.circumstances.get("--train_batch_size") != given:
        return
    if total % now:
        fitting = [n for n in range(1, min(total, 2 * max(was, now)) + 1) if total % n == 0]
        raise UserError(
            f"{now} processes cannot share equally the {total} pictures of an update, on which this run began; "
            f"numbers that can: {', '.join(map(str, fitting))}"
        )
    part, batch = given // args.gradient_accumulation_steps, total // now
    parts = next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= part)
    logger.log(
        logging.INFO if was == now else logging.WARNING,
        "--train_batch_size %d --gradient_accumulation_steps %d: %d processes share the %d pictures of an update",
        batch, parts, now, total,
    )  # fmt: skip
    args.train_batch_size, args.gradient_accumulation_steps = batch, parts


def check_processes(
    args: argparse.Namespace, model: nn.Module, data: datasets.DataSets, state: checkpoint.TrainingState | None
) -> None:
    """Raises UserError unless all processes have the same flags, data and weights."""
    if dist_util.world_size() == 1:
        return
    same = {f"--{name}": value for name, value in vars(args).items() if name not in per_rank()}
    # Which a training has taken already: seconds, for a large data set.
    same["the checksum of --dataset"] = state.settings["--dataset"] if state is not None else data.checksum()
    if dist_util.several_machines():
        same["the checksum of the weights"] = checkpoint.checksum(model.state_dict())
    dist_util.check_same(same, "start every process with the same")
