r"""Fine-tunes a Vision Transformer: flags, wiring, the training loop and the evaluation.

    python train.py --name cifar10 --dataset cifar10 --model_type ViT-B_32 \
        --pretrained_dir checkpoint/imagenet21k_ViT-B_32.npz
    python train.py --name cifar10 --dataset cifar10 --model_type ViT-B_32 -v

The flags and their defaults are the reference script's (github.com/jeonsworld/ViT-pytorch).  Only this
module and the tools see ``args``; everything else takes the values it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from models import npz
from models.configs import CONFIGS, ViTConfig, canonical_name
from models.modeling import VisionTransformer
from utils import augment, checkpoint, data_utils, dist_util, drawing
from utils import report as page
from utils.evaluation import Evaluation, Predictions
from utils.metrics import MetricsWriter, TrainingLog, read_lines
from utils.precision import AMP_BACKENDS, AMP_DTYPES, OPT_LEVELS, ApexPrecision, Precision, import_apex_amp
from utils.runs import (
    OutOfMemory,
    Stopped,
    StopSignal,
    handlers_restored,
    make_deterministic,
    memory_remedy,
    only_run,
)
from utils.scheduler import DECAY_TYPES, make_schedule

logger = logging.getLogger("train")


def train(
    args: argparse.Namespace,
    model: VisionTransformer,
    data: data_utils.DataSets,
    precision: Precision,
    state: checkpoint.TrainingState,
    stop: StopSignal,
) -> None:
    """The training loop: pictures -> batch -> loss -> gradients -> step -> log -> save."""
    optimizer = precision.make_optimizer(model, args.weight_decay)
    schedule = make_schedule(args.decay_type, args.warmup_steps, args.num_steps)
    rank, accumulation, device = dist_util.rank(), args.gradient_accumulation_steps, precision.device
    batches = make_batches(args, data.train, range(state.step + 1, args.num_steps + 1), device)
    images_per_step = args.train_batch_size * dist_util.world_size()
    evaluated = state.evaluated == state.step or not is_due(state.step, args.eval_every, args.num_steps)
    wrapped, start = dist_util.wrap(model), time.perf_counter()
    take_name(args, state)  # every process is past reading what another run of this name left

    with (
        MetricsWriter(log_dir(args), dist_util.is_main(), logs_to_keep(args, state), state.step) as writer,
        TrainingLog(writer, args.num_steps, images_per_step, args.log_every, state.step) as log,
    ):
        restore(state, optimizer, precision, log)
        for step in range(state.step + evaluated, args.num_steps + 1):
            if step > state.step:  # else it was stopped between this update and its evaluation
                torch.manual_seed(data_utils.derive_seed(args.seed, data_utils.DROPOUT, step, rank))
                wrapped.train()
                step_loss = torch.zeros((), device=device)
                for part in range(accumulation):
                    images, labels = next(batches)
                    if step == 1 and part == 0:
                        show_batch(writer, images, labels, data.classes)
                    with dist_util.sync_gradients(wrapped, now=part == accumulation - 1):
                        with precision.autocast():
                            loss = wrapped(images, labels) / accumulation
                        precision.backward(loss)
                    step_loss += loss.detach()
                learning_rate = args.learning_rate * schedule(step - precision.num_skipped())
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                applied = precision.step(optimizer, args.max_grad_norm)
                log.update(step, step_loss, learning_rate, applied)
                state.step = step

            if is_due(step, args.eval_every, args.num_steps):
                found = evaluate(args, model, data.test, precision, stop)
                if found is not None:
                    state.evaluated = step
                    writer.write(step, {"test/accuracy": found.accuracy, "test/loss": found.loss})
                    report(step, found)
                    is_best = found.accuracy > state.best_accuracy
                    if is_best:
                        state.best_accuracy, state.best_step, state.best = found.accuracy, step, vars(found)
                        save_best(args, model, precision, data.classes, state)
                        show_best(writer, found, data, step)
                    if step == args.num_steps:
                        writer.hyperparameters(step, {**state.settings, "--dataset": args.dataset})
                    if is_best or step == args.num_steps:
                        write_report(args, state, data, precision, log.speed(), start)
                log.restart_clock()
            signal_number = stop.agreed()
            if signal_number or is_due(step, args.save_every or args.eval_every, args.num_steps):
                save_last(args, state, model, optimizer, precision, writer, log)
            if signal_number:
                how = "the same command" if resumes_own(args) else "it, but with --resume auto,"
                raise Stopped(signal_number, f"stopped after update {step}; {how} goes on from there")

    logger.info("Best Accuracy: \t%.5f", state.best_accuracy)
    logger.info(
        "End Training! Wall time: %.2f s, %.1f images/s while training", time.perf_counter() - start, log.speed()
    )


def is_due(step: int, every: int, num_steps: int) -> bool:
    """Whether what happens every so many updates, and after the last, happens after this one."""
    return step > 0 and (step % every == 0 or step == num_steps)


def make_batches(
    args: argparse.Namespace, pictures: data_utils.Pictures, steps: range, device: torch.device
) -> Iterator[data_utils.Batch]:
    """The pictures of ``steps``, each update's in as many parts as are accumulated."""
    transform = augment.TrainTransform(args.img_size, args.hflip)
    world = (dist_util.rank(), dist_util.world_size())
    sampler = data_utils.StepSampler(len(pictures), args.train_batch_size, transform.num_draws, args.seed, *world)
    part_size = args.train_batch_size // args.gradient_accumulation_steps
    return data_utils.train_batches(pictures, sampler, steps, part_size, transform, device, args.num_workers)


@torch.inference_mode()
def evaluate(
    args: argparse.Namespace,
    model: nn.Module,
    pictures: data_utils.Pictures,
    precision: Precision,
    stop: StopSignal | None = None,
) -> Evaluation | None:
    """What the model makes of all pictures, each seen once, whatever the number of processes.

    None if a signal to stop came meanwhile: a training saves its state sooner so.
    """
    model.eval()
    share = (dist_util.rank(), dist_util.world_size())
    transform = augment.EvalTransform(args.img_size)
    batches = data_utils.eval_batches(
        pictures, args.eval_batch_size, transform, precision.device, args.num_workers, *share
    )
    num_batches = data_utils.num_eval_batches(pictures, args.eval_batch_size, *share)
    exact = torch.float32 if precision.device.type == "mps" else torch.float64
    loss_sum, predictions = torch.zeros((), dtype=exact, device=precision.device), Predictions()
    bar = tqdm(batches, "Validating", num_batches, leave=False, **dist_util.bar_options())
    with memory_remedy(f"evaluating {args.eval_batch_size} pictures at once; give a smaller --eval_batch_size"):
        for images, labels in bar:
            if stop is not None and stop.now():
                return None
            with precision.autocast():
                logits = model(images)[0].float()
            loss_sum += F.cross_entropy(logits, labels, reduction="sum").to(exact)
            predictions.add(logits)
    return predictions.evaluation(pictures.labels, dist_util.sum_over_ranks(loss_sum), *share)


def report(step: int | None, found: Evaluation) -> None:
    """Logs an evaluation as the reference does."""
    logger.info("Validation Results")
    if step is not None:
        logger.info("Global Steps: %d", step)
    logger.info("Valid Loss: %.5f", found.loss)
    logger.info("Valid Accuracy: %.5f", found.accuracy)


def checkpoint_path(args: argparse.Namespace) -> str:
    """Where the run's fine-tuned weights are."""
    return os.path.join(args.output_dir, f"{args.name}_checkpoint.bin")


def log_dir(args: argparse.Namespace) -> str:
    """Where the run's TensorBoard events and metrics are."""
    return os.path.join("logs", args.name)


def save_best(
    args: argparse.Namespace,
    model: VisionTransformer,
    precision: Precision,
    classes: list[str],
    state: checkpoint.TrainingState,
) -> None:
    """Writes the weights of the best evaluation so far, and what they are of."""
    if dist_util.is_main():
        description = checkpoint.Description(
            canonical_name(args.model_type), args.img_size, classes, args.gelu, args.dataset,
            state.step, state.best_accuracy,
        )  # fmt: skip
        checkpoint.save_weights(checkpoint_path(args), precision.state_dict(model), description)
        logger.info("Saved model checkpoint to %s", checkpoint_path(args))


def last_path(args: argparse.Namespace) -> str:
    """Where the state is from which the run can go on."""
    return os.path.join(args.output_dir, f"{args.name}_last.pt")


def save_last(
    args: argparse.Namespace,
    state: checkpoint.TrainingState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    writer: MetricsWriter,
    log: TrainingLog,
) -> None:
    """Writes the run's state, after what it has logged; every process must take part."""
    state.log, state.precision = log.training_state(), precision.training_state()
    if dist_util.is_main():
        weights = precision.state_dict(model)
        if not torch.stack([x.isfinite().all() for x in weights.values()]).all():
            raise FloatingPointError(
                f"the weights are not finite after step {state.step}; a lower --learning_rate or "
                "a longer --warmup_steps may help"
            )
        state.log["files"] = writer.flush()
        checkpoint.save_state(last_path(args), replace(state, model=weights, optimizer=optimizer.state_dict()))
    log.restart_clock()


# ---- what a run shows ----

#: So many of the first update's pictures and of the worst mistakes are shown, with so long sides.
SHOWN_PICTURES, SHOWN_MISTAKES, PICTURE_PX, MISTAKE_PX = 64, 24, 96, 128


def show_batch(writer: MetricsWriter, images: Tensor, labels: Tensor, classes: list[str]) -> None:
    """Shows the first update's pictures in TensorBoard as the model sees them: cropped, resized, mirrored."""
    if writer.enabled:
        pictures = drawing.from_tensor(images[:SHOWN_PICTURES])
        panels = [(classes[label], drawing.scaled(x, PICTURE_PX)) for label, x in zip(labels.tolist(), pictures)]
        writer.picture(1, "train/pictures", drawing.arrange(panels, columns=8))


def show_best(writer: MetricsWriter, found: Evaluation, data: data_utils.DataSets, step: int) -> None:
    """Shows in TensorBoard which classes and which pictures an evaluation took for others."""
    if writer.enabled:
        writer.picture(step, "test/confusion", drawing.confusion(found.confusion(len(data.classes)), data.classes))
        panels = [(f"{m.predicted}, is {m.truth}", picture) for m, picture in worst_mistakes(found, data)]
        if panels:
            writer.picture(step, "test/worst_mistakes", drawing.arrange(panels, columns=4))


def worst_mistakes(found: Evaluation, data: data_utils.DataSets) -> list[tuple[page.Mistake, Image]]:
    """The mistakes that were made with the most confidence, with their pictures."""
    mistakes = []
    for i in found.worst_mistakes(SHOWN_MISTAKES):
        name, picture = data_utils.picture_at(data.test, i)
        picture = drawing.scaled(picture, MISTAKE_PX)
        truth, predicted = (data.classes[int(labels[i])] for labels in (found.truth, found.predicted))
        mistakes.append(
            (page.Mistake(drawing.png(picture), name, truth, predicted, float(found.confidence[i])), picture)
        )
    return mistakes


def report_path(args: argparse.Namespace) -> str:
    """Where the run's report is."""
    return os.path.join(args.output_dir, f"{args.name}_report.html")


def write_report(
    args: argparse.Namespace,
    state: checkpoint.TrainingState,
    data: data_utils.DataSets,
    precision: Precision,
    speed: float,
    start: float,
) -> None:
    """Writes the run's report as far as it has come; a training does not end for the lack of one."""
    if not dist_util.is_main():
        return
    best, parser = Evaluation(**state.best), make_parser()
    contents = page.Contents(
        name=args.name,
        subject=f"{args.model_type} on {args.dataset}",
        num_steps=args.num_steps,
        step=state.step,
        lines=read_lines(log_dir(args)),
        classes=data.classes,
        best_step=state.best_step,
        confusion=best.confusion(len(data.classes)),
        mistakes=[mistake for mistake, _ in worst_mistakes(best, data)],
        settings={f"--{name}": (value, parser.get_default(name)) for name, value in vars(args).items()},
        facts={
            **page.versions(),
            "device": f"{precision.device}, {dist_util.device_name(precision.device)}",
            "numbers": str(precision),
            "processes": str(dist_util.world_size()),
            "threads of each": str(torch.get_num_threads()),
        },
        timing={
            "wall time": f"{time.perf_counter() - start:.1f} s, with evaluations",
            "images per second while training": f"{speed:.1f}",
            "pictures": f"{len(data.train):,} to train on, {len(data.test):,} to test on",
            "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        },
    )
    try:
        checkpoint.write_text(report_path(args), page.render(contents))
    except OSError as e:
        logger.warning("The report %s could not be written (%s)", report_path(args), e)


# ---- going on from where a run was stopped ----

#: Flags whose value decides on a run's result; ``settings`` adds what follows from several.
RESULT_FLAGS = (
    "pretrained_dir", "img_size", "learning_rate", "weight_decay", "num_steps", "decay_type", "warmup_steps",
    "max_grad_norm", "gelu", "hflip", "seed", "eval_every", "loss_scale",
)  # fmt: skip


def settings(
    args: argparse.Namespace, config: ViTConfig, data: data_utils.DataSets, precision: Precision
) -> dict[str, Any]:
    """What decides on a run's result: a run goes on only under the same."""
    return {
        "--model_type": canonical_name(args.model_type),
        "--dataset": f"{args.dataset if args.dataset in data_utils.NAMED_DATASETS else 'folder'} {data.checksum()}",
        **{f"--{name}": getattr(args, name) for name in RESULT_FLAGS},
        "--dropout": config.dropout_rate,
        "--train_batch_size of all processes": args.train_batch_size * dist_util.world_size(),
        "precision": str(precision),
    }


def circumstances(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What decides on the last digits of a run's result."""
    return {
        "--device": device.type,
        "--train_batch_size": args.train_batch_size,
        "--gradient_accumulation_steps": args.gradient_accumulation_steps,
        "--eval_batch_size": args.eval_batch_size,
        "--compile": args.compile,
        "--deterministic": args.deterministic,
        "processes": dist_util.world_size(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def find_state(args: argparse.Namespace) -> checkpoint.TrainingState | None:
    """The state that ``--resume`` asks for, or None: a new run.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    there = os.path.exists(last_path(args))
    if there and not resumes_own(args):
        logger.warning("--resume %s: this run replaces the one that %s is of", args.resume, last_path(args))
    if args.resume in ("auto", "none"):
        return checkpoint.load_state(last_path(args)) if there and args.resume == "auto" else None
    return checkpoint.load_state(args.resume)


def resumes_own(args: argparse.Namespace) -> bool:
    """Whether the state to go on from, if there is one, is of this very run."""
    return args.resume == "auto" or os.path.realpath(args.resume) == os.path.realpath(last_path(args))


def take_name(args: argparse.Namespace, state: checkpoint.TrainingState) -> None:
    """Leaves nothing under the run's name that could be taken for its own, and has its best weights there.

    A run that replaces another and is killed before its first save must not go on as the other one.
    """
    if dist_util.is_main() and not resumes_own(args) and os.path.exists(last_path(args)):
        os.unlink(last_path(args))
    if state.best_accuracy < 0 or (resumes_own(args) and os.path.exists(checkpoint_path(args))):
        return
    source = (last_path(args) if resumes_own(args) else args.resume).removesuffix("_last.pt") + "_checkpoint.bin"
    try:
        weights = checkpoint.load_weights(source)
        told = checkpoint.read_description(source, weights)
        if told is None or (told.step > state.step or told.accuracy != state.best_accuracy):
            raise ValueError(f"{source} is of another evaluation")
    except ValueError as e:
        logger.warning("The best weights so far, of accuracy %.5f, are not there (%s): the next evaluation's are saved",
                       state.best_accuracy, e)  # fmt: skip
        state.best_accuracy = -1.0
    else:
        if dist_util.is_main():
            checkpoint.save_weights(checkpoint_path(args), weights, told)


def begin(
    args: argparse.Namespace, state: checkpoint.TrainingState | None, now: dict[str, Any], here: dict[str, Any]
) -> checkpoint.TrainingState:
    """The state that the run begins with: the one found, if it is of a run with the same settings.

    Raises:
        ValueError: it is of another run; the message lists every difference.
    """
    if state is None:
        return checkpoint.TrainingState(now, here)
    was = dict(state.settings)
    if type(n := was.get("--num_steps")) is int and n < args.num_steps:
        logger.warning("--num_steps was %s and is %d: the updates to come have the longer schedule's learning rates",
                       n, args.num_steps)  # fmt: skip
        was["--num_steps"] = args.num_steps
    differences = [
        f"{name} was {was.get(name)}, is {now.get(name)}" for name in now | was if was.get(name) != now.get(name)
    ]
    if differences:
        path = last_path(args) if args.resume == "auto" else args.resume
        raise ValueError(
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
        precision.load_training_state(state.precision)
        log.load_training_state(state.log, precision.device)
        state.optimizer = {}  # let go of: it is as large as the model
        logger.info("Going on after update %d", state.step)


def logs_to_keep(args: argparse.Namespace, state: checkpoint.TrainingState) -> dict[str, int] | None:
    """The bytes of this name's logs that are of the run so far; None if they are of another run."""
    return state.log.get("files", {}) if resumes_own(args) and state.step else None


# ---- flags ----


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the thirty flags are for ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n" if dist_util.is_main() else None)


def parse_bool(text: str) -> bool:
    """true/false in the usual spellings."""
    if text.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if text.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def make_parser() -> Parser:
    """Every flag of the command line."""
    p = Parser(
        prog="train.py",
        description="Fine-tune a Vision Transformer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--name", required=True, help="name of this run: of its checkpoint and its logs")
    p.add_argument("--dataset", default="cifar10", help="cifar10, cifar100, digits, or a folder of pictures")
    p.add_argument("--data_dir", default="./data", help="where cifar10 and cifar100 are downloaded to")
    p.add_argument("--model_type", choices=CONFIGS, default="ViT-B_16", metavar="MODEL", help=", ".join(CONFIGS))
    p.add_argument(
        "--pretrained_dir",
        default="checkpoint/ViT-B_16.npz",
        help="Google's .npz file, or a folder that has it; '' trains from random weights",
    )
    p.add_argument("--output_dir", default="output", help="where checkpoints are written")
    p.add_argument("--img_size", type=int, default=224, help="side of the pictures the model sees, in pixels")
    p.add_argument("--train_batch_size", type=int, default=512, help="pictures of one update, per process")
    p.add_argument("--eval_batch_size", type=int, default=64, help="pictures evaluated at once")
    p.add_argument("--eval_every", type=int, default=100, help="updates between two evaluations")
    p.add_argument("--log_every", type=int, default=10, help="updates between two lines of metrics")
    p.add_argument("--learning_rate", type=float, default=3e-2, help="of SGD, at its highest")
    p.add_argument("--weight_decay", type=float, default=0.0, help="of SGD, on all weights")
    p.add_argument("--num_steps", type=int, default=10000, help="updates")
    p.add_argument("--decay_type", choices=DECAY_TYPES, default="cosine", help="how the learning rate falls")
    p.add_argument("--warmup_steps", type=int, default=500, help="updates over which the learning rate rises")
    p.add_argument("--max_grad_norm", type=float, default=1.0, help="norm to which gradients are clipped")
    p.add_argument("--dropout", type=float, default=None, help="dropout rate, instead of the model's own")
    p.add_argument("--gelu", choices=("erf", "tanh"), default="erf", help="tanh is what Google's code computes")
    p.add_argument("--hflip", action="store_true", help="mirror half of the training pictures")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="what computes")
    p.add_argument("--num_workers", type=int, default=None, help="decoding processes, for folders of large pictures")
    p.add_argument(
        "--resume", default="auto", metavar="auto|none|PATH",
        help="auto: go on where a run of this name was stopped; none: start over; or a <name>_last.pt",
    )  # fmt: skip
    p.add_argument(
        "--save_every", type=int, default=None, help="updates between two saved states; default: at each evaluation"
    )
    p.add_argument("--deterministic", action="store_true", help="the same bits in each run on CUDA, too; costs speed")
    p.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by torch.distributed.launch")
    p.add_argument("--seed", type=int, default=42, help="of the data order, crops, dropout and initial weights")
    p.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="parts into which the batch of an update is split"
    )
    p.add_argument("--fp16", action="store_true", help="mixed precision")
    p.add_argument("--fp16_opt_level", choices=OPT_LEVELS, default="O2", help="how much of it, as apex counts")
    p.add_argument("--amp_dtype", choices=AMP_DTYPES, default="auto", help="auto: float16 on CUDA, else bfloat16")
    p.add_argument("--amp_backend", choices=AMP_BACKENDS, default="native", help="apex needs one that still has amp")
    p.add_argument("--compile", action="store_true", help="torch.compile the model, for long runs")
    p.add_argument("--loss_scale", type=float, default=0, help="fixed loss scale for --fp16; 0: dynamic if needed")
    p.add_argument(
        "-v", "--eval_only", type=parse_bool, nargs="?", const=True, default=False, metavar="BOOL",
        help="evaluate a fine-tuned checkpoint instead of training",
    )  # fmt: skip
    p.add_argument("--load_model_dir", default=None, help="what -v evaluates, if not OUTPUT_DIR/NAME_checkpoint.bin")
    return p


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError for what the types of the flags let through; fills in the defaults that depend on others."""
    at_least_one = (
        "img_size", "train_batch_size", "eval_batch_size", "eval_every", "log_every", "num_steps",
        "gradient_accumulation_steps", "save_every",
    )  # fmt: skip
    for name in at_least_one:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected at least 1")
    for name in ("learning_rate", "weight_decay", "warmup_steps", "seed", "loss_scale"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise ValueError(f"--{name} is {getattr(args, name)}, expected 0 or more")
    if not args.max_grad_norm > 0:
        raise ValueError(f"--max_grad_norm is {args.max_grad_norm}, expected more than 0 (inf never clips)")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout is {args.dropout}, expected at least 0 and less than 1")
    if os.path.basename(args.name) != args.name or args.name in ("", ".", "..") or not args.name.isprintable():
        raise ValueError(f"--name {args.name!r} names files; it must not be empty, a path or unprintable")
    if len(os.fsencode(args.name)) > 200:
        raise ValueError(f"--name has {len(args.name)} characters, too many for the names of files")
    if args.train_batch_size % args.gradient_accumulation_steps:
        raise ValueError(
            f"--train_batch_size {args.train_batch_size} is not a multiple of "
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}"
        )
    if args.seed >= 2**63:
        raise ValueError(f"--seed is {args.seed}, expected less than 2**63")
    if args.warmup_steps >= args.num_steps and not args.eval_only:
        logger.warning(
            "--warmup_steps %d of --num_steps %d: the learning rate does not get to fall",
            args.warmup_steps,
            args.num_steps,
        )
    half = (args.fp16_opt_level, args.amp_dtype, args.amp_backend, args.loss_scale) != ("O2", "auto", "native", 0)
    if half and not args.fp16:
        logger.warning("--fp16_opt_level, --amp_dtype, --amp_backend and --loss_scale have no effect without --fp16")
    if args.fp16 and args.amp_backend == "apex" and args.amp_dtype == "bfloat16":
        raise ValueError("--amp_backend apex computes in float16 only; use --amp_backend native for bfloat16")
    if args.load_model_dir is not None and not args.eval_only:
        raise ValueError("--load_model_dir names what -v evaluates; training starts from --pretrained_dir")
    if args.num_workers is None:
        args.num_workers = min(8, dist_util.num_cpus())
    if args.num_workers < 0:
        raise ValueError(f"--num_workers is {args.num_workers}, expected 0 or more")


# ---- what a run needs before it starts ----


def prepare(
    args: argparse.Namespace, precision: Precision, state: checkpoint.TrainingState | None
) -> tuple[VisionTransformer, data_utils.DataSets, checkpoint.TrainingState | None]:
    """The model with its weights, those of ``state`` if a run goes on, and the data it is for; downloads come last.

    Returns:
        The model, the data, and the state that the training begins with.

    Raises:
        ValueError: the user got something wrong.
    """
    config = replace(CONFIGS[args.model_type], gelu=args.gelu)
    if args.dropout is not None:
        config = replace(config, dropout_rate=args.dropout)
    config.check_img_size(args.img_size)
    data_utils.check_name(args.dataset)
    pretrained = None
    if args.eval_only:
        path = args.load_model_dir or checkpoint_path(args)
        finetuned = checkpoint.load_weights(path)
    elif state is not None:
        path, finetuned = "the state to go on from", state.model
    elif args.pretrained_dir:
        pretrained = npz.load(args.pretrained_dir, args.model_type)
    else:
        logger.warning("--pretrained_dir is empty: training starts from random weights")
    data = data_utils.load_datasets(args.dataset, args.data_dir, args.num_workers)
    has_weights = args.eval_only or state is not None or pretrained is not None
    goes_on = state is not None
    if not args.eval_only:
        state = begin(args, state, settings(args, config, data, precision), circumstances(args, precision.device))
    torch.manual_seed(args.seed)
    with torch.device("meta" if has_weights else "cpu"):  # else it would draw weights that are then overwritten
        model = VisionTransformer(config, args.img_size, len(data.classes), zero_head=not args.eval_only)
    if args.eval_only:
        warn_of_contradictions(args, path, finetuned, data.classes)
    if args.eval_only or goes_on:
        try:
            model.load_finetuned(finetuned)
        except ValueError as e:
            raise ValueError(f"{path} cannot be loaded as {args.model_type}: {e}") from e
    elif pretrained is not None:
        model.load_from(pretrained)
    return model, data, state


def make_precision(args: argparse.Namespace, device: torch.device) -> Precision:
    """The number formats that the flags ask for; raises ValueError if they need what is not there."""
    if args.fp16 and args.amp_backend == "apex":
        return ApexPrecision(import_apex_amp(device), device, args.fp16_opt_level, args.loss_scale)
    return Precision(device, args.fp16_opt_level if args.fp16 else "O0", args.amp_dtype, args.loss_scale)


def warn_of_contradictions(args: argparse.Namespace, path: str, state: dict[str, Tensor], classes: list[str]) -> None:
    """Warns where an evaluation differs from the training that the file beside the weights tells of."""
    try:
        told = checkpoint.read_description(path, state)
    except ValueError as e:
        logger.warning("%s", e)
        return
    if told is None:
        return
    if canonical_name(told.model_type) != canonical_name(args.model_type):
        logger.warning("%s was trained with --model_type %s, not %s", path, told.model_type, args.model_type)
    if told.gelu != args.gelu:
        logger.warning("%s was trained with --gelu %s, not %s", path, told.gelu, args.gelu)
    if len(told.classes) == len(classes) and told.classes != classes:
        first = next(i for i, name in enumerate(classes) if told.classes[i] != name)
        logger.warning(
            "%s was trained on other classes than %s has: number %d was %s, here it is %s",
            path, args.dataset, first, told.classes[first], classes[first],
        )  # fmt: skip


def log_start(args: argparse.Namespace, model: nn.Module, data: data_utils.DataSets, precision: Precision) -> None:
    """Logs what is about to happen."""
    num_parameters = sum(p.numel() for p in model.parameters())
    logger.info("%s on %s: %.2f M parameters, %s, %s", args.model_type, args.dataset, num_parameters / 1e6,
                precision.device, precision)  # fmt: skip
    if args.eval_only:
        logger.info("***** Running Validation *****")
        logger.info("  Num pictures = %d, classes = %d", len(data.test), len(data.classes))
        return
    total = args.train_batch_size * dist_util.world_size()
    logger.info("***** Running training *****")
    logger.info(
        "  Pictures: %d to train on, %d to test on, %d classes", len(data.train), len(data.test), len(data.classes)
    )
    logger.info(
        "  Total optimization steps = %d (%.1f epochs)", args.num_steps, args.num_steps * total / len(data.train)
    )
    logger.info("  Total train batch size = %d (%d per process, %d at a time)", total, args.train_batch_size,
                args.train_batch_size // args.gradient_accumulation_steps)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Trains or evaluates, and returns the exit status."""
    with contextlib.ExitStack() as held:
        try:
            device = dist_util.setup(args.device, args.local_rank)
            with dist_util.together(), memory_remedy("while reading the weights and the pictures"):
                check_args(args)
                if args.deterministic and device.type == "cuda":
                    make_deterministic()
                elif args.deterministic:
                    logger.warning("--deterministic has no effect on %s: it is for CUDA", device.type)
                precision = make_precision(args, device)
                state = None if args.eval_only else claim(args, held)
                model, data, state = prepare(args, precision, state)
                check_processes(args, model, data)
        except dist_util.FailedElsewhere as e:
            return 2 if e.input_error else 1
        except ValueError as e:
            return fail(e, 2)
        except (OSError, OutOfMemory) as e:
            return fail(e, 1)
        except RuntimeError as e:
            return fail_at_work(args, e)
        if state is not None and state.step == args.num_steps == state.evaluated:
            logger.info("This run is finished: Best Accuracy: \t%.5f (--resume none starts over)", state.best_accuracy)
            return 0
        log_start(args, model, data, precision)
        try:
            with memory_remedy(f"moving the weights and the pictures to {device}"):
                model, data = model.to(device), data.to(device)
            if args.compile:
                model.compile()  # in place: the names of its weights stay
            if state is None:
                precision.prepare(model)
                found = evaluate(args, model, data.test, precision)
                assert found is not None
                report(None, found)
            else:
                with StopSignal() as stop, memory_remedy(smaller_parts(args)):
                    train(args, model, data, precision, state, stop)
        except compile_errors(args.compile) as e:
            reason = str(e).strip().partition("\n")[0]
            return fail(
                RuntimeError(f"torch.compile failed ({reason}); install what it lacks, or leave --compile out"), 1
            )
        except (data_utils.PictureError, FloatingPointError, OSError, RuntimeError) as e:
            return fail_at_work(args, e)
    return 0


def claim(args: argparse.Namespace, held: contextlib.ExitStack) -> checkpoint.TrainingState | None:
    """Makes sure that nobody else trains under this name until ``held`` closes, and finds the state to go on from.

    Raises:
        ValueError: somebody does, files cannot be written, or the state cannot be read.
    """
    checkpoint.check_writable(args.output_dir)
    checkpoint.check_writable(log_dir(args))
    if dist_util.is_main():
        for lock in (os.path.join(args.output_dir, f".{args.name}.lock"), os.path.join(log_dir(args), ".lock")):
            held.enter_context(only_run(lock))
        best = checkpoint_path(args)
        checkpoint.remove_stale(best, checkpoint.description_path(best), last_path(args), report_path(args))
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
    found = dist_util.newest(state and vars(state), version)
    return checkpoint.TrainingState(**found) if found else None


def follow_processes(args: argparse.Namespace, state: checkpoint.TrainingState) -> None:
    """Keeps the batch of all processes when the same command goes on with more or fewer of them.

    The parts of an update do not grow: what fitted into memory still does.

    Raises:
        ValueError: so many processes cannot share the batch.
    """
    total = state.settings.get("--train_batch_size of all processes", 0)
    was, now = state.circumstances.get("processes", 1), dist_util.world_size()
    given = args.train_batch_size
    if not total or total == given * now or state.circumstances.get("--train_batch_size") != given:
        return
    if total % now:
        fitting = [n for n in range(1, min(total, 2 * max(was, now)) + 1) if total % n == 0]
        raise ValueError(
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


#: Flags that may differ between processes: folders of their machines, and what does not change the result.
OWN_FLAGS = ("local_rank", "dataset", "data_dir", "pretrained_dir", "output_dir", "load_model_dir", "num_workers")


def check_processes(args: argparse.Namespace, model: nn.Module, data: data_utils.DataSets) -> None:
    """Raises ValueError unless all processes have the same flags, data and weights."""
    if dist_util.world_size() == 1:
        return
    same = {f"--{name}": value for name, value in vars(args).items() if name not in OWN_FLAGS}
    same["the checksum of --dataset"] = data.checksum()
    if dist_util.several_machines():
        same["the checksum of the weights"] = checkpoint.checksum(model.state_dict())
    dist_util.check_same(same, "start every process with the same")


def fail_at_work(args: argparse.Namespace, error: Exception) -> int:
    """Says in one line what ended a run that had begun, and what is left of it; raises what only we can mend."""
    text = str(error)
    if dist_util.is_lost_contact(error):
        text = dist_util.lost_contact(error)
    elif isinstance(error, RuntimeError) and not isinstance(error, OutOfMemory):
        if not data_utils.worker_died(error):
            dist_util.tells()  # the others need not say that they miss this process
            raise error
        text = data_utils.WORKER_DIED
    if os.path.exists(last_path(args)) and not args.eval_only:
        text += f"; the run up to its last save is in {last_path(args)}"
    return fail(RuntimeError(text), 2 if isinstance(error, data_utils.PictureError) else 1)


def smaller_parts(args: argparse.Namespace) -> str:
    """What a training that is short of memory can do about it."""
    batch, parts = args.train_batch_size, args.gradient_accumulation_steps
    text = f"with {batch // parts} pictures at a time (--train_batch_size {batch}); "
    more = next((n for n in range(2 * parts, batch + 1) if batch % n == 0), None)
    if more is None:
        return f"{text}give a smaller --train_batch_size, --img_size or --model_type"
    return f"{text}--gradient_accumulation_steps {more} computes the same update {batch // more} at a time"


def compile_errors(compiled: bool) -> tuple[type[Exception], ...]:
    """What a compiled model may raise where one that is not compiled would run, such as for want of a C++ compiler."""
    if not compiled:
        return ()
    from torch._dynamo.exc import TorchDynamoException  # a second: not at the start

    return (TorchDynamoException,)


def fail(error: BaseException, status: int) -> int:
    """Says what went wrong in one line, on one process of the run."""
    if dist_util.tells():
        print("train.py: error:", " ".join(str(error).split()), file=sys.stderr)
    return status


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        level=logging.INFO if dist_util.is_main() else logging.ERROR,
    )
    with handlers_restored():
        try:
            with logging_redirect_tqdm():
                return run(args)
        except Stopped as e:
            return fail(e, 128 + e.number)
        except KeyboardInterrupt:
            return fail(KeyboardInterrupt("interrupted"), 128 + signal.SIGINT)
        finally:
            dist_util.cleanup()


if __name__ == "__main__":
    sys.exit(main())
