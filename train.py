r"""Fine-tunes a Vision Transformer: the training loop, the evaluation, and their wiring.

    python train.py --name cifar10 --dataset cifar10 --model_type ViT-B_32 \
        --pretrained_dir checkpoint/imagenet21k_ViT-B_32.npz
    python train.py --name cifar10 --dataset cifar10 --model_type ViT-B_32 -v

The flags are in utils/args.py, what a run that goes on needs in utils/run.py.
Only these and the tools see ``args``; everything else takes the values it needs.
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

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from models import commands, pretrained, published
from models.configs import CONFIGS, canonical_name
from models.modeling import VisionTransformer
from utils import augment, checkpoint, data_utils, datasets, dist_errors, dist_util, figures, fonts, hardware
from utils import report as page
from utils.apex import ApexPrecision, import_apex_amp
from utils.args import check_args, checkpoint_path, last_path, log_dir, make_parser, report_path
from utils.errors import UserError
from utils.evaluation import EvalResult, Predictions
from utils.hardware import make_deterministic
from utils.memory import OutOfMemory, explain_out_of_memory
from utils.metrics import MetricsWriter, TrainingLog
from utils.precision import Precision
from utils.run import (
    BestWeights,
    begin,
    check_processes,
    circumstances,
    claim,
    logs_to_keep,
    restore,
    resumes_own,
    settings,
    take_name,
)
from utils.scheduler import make_schedule
from utils.signals import Stopped, StopSignal, handlers_restored, leave

logger = logging.getLogger("train")


def train(
    args: argparse.Namespace,
    model: VisionTransformer,
    data: datasets.DataSets,
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
    best_weights = take_name(args, state)  # every process is past reading what another run of this name left

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
                        save_best(args, model, precision, data.classes, state, best_weights)
                        show_best(writer, found, data, step)
                    if step == args.num_steps:
                        writer.hyperparameters(step, {**state.settings, "--dataset": args.dataset})
                    if is_best or step == args.num_steps:
                        write_report(args, state, data, precision, log.speed(), start)
                log.restart_clock()
            signal_number = stop.any_rank()
            if signal_number or is_due(step, args.save_every or args.eval_every, args.num_steps):
                save_last(args, state, model, optimizer, precision, writer, log)
            if signal_number:
                how = "the same command" if resumes_own(args) else "the same command, but with --resume auto,"
                raise Stopped(signal_number, f"stopped after update {step}; {how} goes on from there")

    logger.info("Best Accuracy: \t%.5f", state.best_accuracy)
    logger.info(
        "End Training! Wall time: %.2f s, %.1f images/s while training", time.perf_counter() - start, log.speed()
    )


def is_due(step: int, every: int, num_steps: int) -> bool:
    """Whether what happens every so many updates, and after the last, happens after this one."""
    return step > 0 and (step % every == 0 or step == num_steps)


def make_batches(
    args: argparse.Namespace, pictures: datasets.Images, steps: range, device: torch.device
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
    pictures: datasets.Images,
    precision: Precision,
    stop: StopSignal | None = None,
) -> EvalResult | None:
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
    with explain_out_of_memory(f"evaluating {args.eval_batch_size} pictures at once; give a smaller --eval_batch_size"):
        for images, labels in bar:
            if stop is not None and stop.now():
                return None
            with precision.autocast():
                logits = model(images)[0].float()
            loss_sum += F.cross_entropy(logits, labels, reduction="sum").to(exact)
            predictions.add(logits)
    return predictions.evaluation(pictures.labels, dist_util.sum_over_ranks(loss_sum), *share)


def report(step: int | None, found: EvalResult) -> None:
    """Logs an evaluation as the reference does."""
    logger.info("Validation Results")
    if step is not None:
        logger.info("Global Steps: %d", step)
    logger.info("Valid Loss: %.5f", found.loss)
    logger.info("Valid Accuracy: %.5f", found.accuracy)


def show_batch(writer: MetricsWriter, images: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> None:
    """Shows the first images in TensorBoard as the model sees them."""
    if writer.enabled:
        writer.picture(1, "train/pictures", figures.training_batch(images, labels, classes))
        if legend := fonts.legend(classes):
            writer.text(1, "train/classes", legend)


def show_best(writer: MetricsWriter, result: EvalResult, data: datasets.DataSets, step: int) -> None:
    """Shows in TensorBoard which classes and which images an evaluation took for others."""
    if writer.enabled:
        writer.picture(step, "test/confusion", figures.confusion(result.confusion(len(data.classes)), data.classes))
        if (mistakes := figures.mistakes(result, data)) is not None:
            writer.picture(step, "test/worst_mistakes", mistakes)


def write_report(
    args: argparse.Namespace,
    state: checkpoint.TrainingState,
    data: datasets.DataSets,
    precision: Precision,
    speed: float,
    start: float,
) -> None:
    """Writes the run's report as far as it has come."""
    if not dist_util.is_main():
        return
    parser = make_parser()
    contents = page.Contents(
        name=args.name,
        subject=f"{args.model_type} on {args.dataset}",
        num_steps=args.num_steps,
        step=state.step,
        log_dir=log_dir(args),
        data=data,
        best=EvalResult(**state.best),
        best_step=state.best_step,
        flags={f"--{name}": (value, parser.get_default(name)) for name, value in vars(args).items()},
        facts={
            **page.versions(),
            "device": f"{precision.device}, {hardware.device_name(precision.device)}",
            "numbers": str(precision),
            "ranks": str(dist_util.world_size()),
            "threads of each": str(torch.get_num_threads()),
        },
        timing={
            "wall time since the last start": f"{time.perf_counter() - start:.1f} s, with evaluations",
            "images per second while training": f"{speed:.1f}",
            "images": f"{len(data.train):,} to train on, {len(data.test):,} to test on",
            "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        },
        commands=next_commands(args),
    )
    page.write_report(report_path(args), contents)


def next_commands(args: argparse.Namespace) -> list[tuple[str, str]]:
    """What a run's user may want to do next, and the commands for it."""
    changed = {name: x for name, x in vars(args).items() if x != make_parser().get_default(name)}

    def words(*left_out: str) -> list[str]:
        pairs = ((name, x) for name, x in changed.items() if name not in left_out)
        return [f"--{name}" if x is True else f"--{name}={x}" for name, x in pairs]

    training = ("resume", "num_steps", "train_batch_size", "pretrained_dir", "learning_rate", "warmup_steps",
                "eval_every", "save_every", "log_every", "hflip", "dropout", "zero_head", "seed")  # fmt: skip
    weights = ("--load_model_dir", checkpoint_path(args))
    return [
        ("Evaluate the best weights", commands.train_command(*words(*training), "-v")),
        ("Name what is on an image", commands.tool_command("predict", *weights, "IMAGE.jpg")),
        ("Draw what the model looks at", commands.tool_command("attention_map", *weights, "IMAGE.jpg")),
        ("Export, here for transformers", commands.tool_command(
            "export", *weights, "--format", "hf", "--output", f"{args.name}_hf")),
        ("Resume, if it was stopped", commands.train_command(*words("resume", "local_rank"))),
    ]  # fmt: skip


def save_best(
    args: argparse.Namespace,
    model: VisionTransformer,
    precision: Precision,
    classes: list[str],
    state: checkpoint.TrainingState,
    best_weights: BestWeights,
) -> None:
    """Writes the weights of the best evaluation so far, and what they are of."""
    if dist_util.is_main():
        description = checkpoint.CheckpointMetadata(
            canonical_name(args.model_type), args.img_size, classes, args.gelu, args.dataset,
            state.step, state.best_accuracy,
        )  # fmt: skip
        state.best_crc32 = best_weights.save(precision.state_dict(model), description)
        logger.info("Saved model checkpoint to %s", best_weights.path)


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


# ---- what a run needs before it starts ----


def prepare(
    args: argparse.Namespace, precision: Precision, state: checkpoint.TrainingState | None
) -> tuple[VisionTransformer, datasets.DataSets, checkpoint.TrainingState | None]:
    """The model with its weights, those of ``state`` if a run goes on, and the data it is for; downloads come last.

    Returns:
        The model, the data, and the state that the training begins with.

    Raises:
        UserError: the user got something wrong.
    """
    config = replace(CONFIGS[args.model_type], gelu=args.gelu)
    if args.dropout is not None:
        config = replace(config, dropout_rate=args.dropout)
    config.check_img_size(args.img_size)
    datasets.check_layout(args.dataset)
    path, source = start_path(args, state), None
    if state is None and path:
        source = pretrained.load(path, args.model_type, strict=False)
    elif state is None:
        logger.warning("--pretrained_dir is empty: training starts from random weights")
    data = datasets.load_datasets(args.dataset, args.data_dir, args.num_workers)
    goes_on, resumed = state is not None, {} if state is None else state.model
    if not args.eval_only:
        start = path if args.pretrained_dir is None else args.pretrained_dir
        now = settings(args, start, config, data, precision)
        state = begin(args, state, now, circumstances(args, precision.device))
    if source is not None:
        pretrained.warn_of_contradictions(source, args.model_type, args.gelu)
    keeps_head = args.eval_only or (source is not None and pretrained.keeps_head(source, data.classes, args.zero_head))
    torch.manual_seed(args.seed)
    with torch.device("meta" if goes_on or source else "cpu"):  # else it would draw weights that are then overwritten
        model = VisionTransformer(config, args.img_size, len(data.classes), zero_head=not keeps_head)
    try:
        if goes_on:
            model.load_finetuned(resumed)
        elif source is not None and args.eval_only:
            pretrained.warn_of_other_classes(source, args.dataset, data.classes)
            model.load_exactly(source.arrays)
        elif source is not None:
            model.load_from(source.arrays)
    except UserError as e:
        where = source.path if source else "the state to go on from"
        raise UserError(f"{where} cannot be loaded as {args.model_type}: {e}") from e
    return model, data, state


def start_path(args: argparse.Namespace, state: checkpoint.TrainingState | None) -> str:
    """The weights to evaluate, or to start from; '' for random ones.

    Raises:
        UserError: there are none.
    """
    if args.eval_only:
        path = args.load_model_dir or checkpoint_path(args)
        if not os.path.exists(path):
            raise UserError(f"there is no checkpoint {path}; train first, or name one with --load_model_dir")
        return path
    if state is not None:  # which has the weights: the flag is compared if it is given
        return state.settings.get("--pretrained_dir", "") if args.pretrained_dir is None else args.pretrained_dir
    if args.pretrained_dir == "":
        return ""
    return published.find(args.pretrained_dir, args.model_type)


def make_precision(args: argparse.Namespace, device: torch.device) -> Precision:
    """The number formats that the flags ask for; raises UserError if they need what is not there."""
    if args.fp16 and args.amp_backend == "apex":
        return ApexPrecision(import_apex_amp(device), device, args.fp16_opt_level, args.loss_scale)
    return Precision(device, args.fp16_opt_level if args.fp16 else "O0", args.amp_dtype, args.loss_scale)


def log_start(args: argparse.Namespace, model: nn.Module, data: datasets.DataSets, precision: Precision) -> None:
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
        "  Images: %d to train on, %d to test on, %d classes", len(data.train), len(data.test), len(data.classes)
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
            with dist_util.all_ranks_or_none(), explain_out_of_memory("while reading the weights and the pictures"):
                check_args(args)
                if args.deterministic and device.type == "cuda":
                    make_deterministic()
                elif args.deterministic:
                    logger.warning("--deterministic has no effect on %s: it is for CUDA", device.type)
                precision = make_precision(args, device)
                state = None if args.eval_only else claim(args, held)
                model, data, state = prepare(args, precision, state)
                check_processes(args, model, data, state)
        except dist_util.FailedElsewhere as e:
            return 2 if e.input_error else 1
        except UserError as e:
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
            with explain_out_of_memory(f"moving the weights and the pictures to {device}"):
                model, data = model.to(device), data.to(device)
            if args.compile:
                model.compile()  # in place: the names of its weights stay
            if state is None:
                precision.prepare(model)
                found = evaluate(args, model, data.test, precision)
                assert found is not None
                report(None, found)
            else:
                with StopSignal() as stop, explain_out_of_memory(out_of_memory_advice(args)):
                    train(args, model, data, precision, state, stop)
        except compile_errors(args.compile) as e:
            reason = str(e).strip().partition("\n")[0]
            return fail(
                RuntimeError(f"torch.compile failed ({reason}); install what it lacks, or leave --compile out"), 1
            )
        except (datasets.ImageError, FloatingPointError, OSError, RuntimeError) as e:
            return fail_at_work(args, e, state.best_step if state else 0)
    return 0


def fail_at_work(args: argparse.Namespace, error: Exception, best_step: int = 0) -> int:
    """Says in one line what ended a run that had begun, and what is left of it; raises what only we can mend."""
    text = str(error)
    if dist_util.is_lost_contact(error):
        text = dist_errors.lost_contact(error)
    elif isinstance(error, RuntimeError) and not isinstance(error, OutOfMemory):
        if not data_utils.worker_died(error):
            dist_errors.is_error_reporter()  # the others need not say that they miss this process
            raise error
        text = data_utils.WORKER_DIED
    if os.path.exists(last_path(args)) and not args.eval_only:
        text += f"; the run up to its last save is in {last_path(args)}"
    elif best_step and os.path.exists(checkpoint_path(args)):  # saved less often than it was evaluated
        text += f"; the best weights so far, of step {best_step}, are in {checkpoint_path(args)}"
    return fail(RuntimeError(text), 2 if isinstance(error, datasets.ImageError) else 1)


def out_of_memory_advice(args: argparse.Namespace) -> str:
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
    if dist_errors.is_error_reporter():
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
    leave(main())
