r"""Fine-tunes a Vision Transformer: the training loop, the evaluation, and what a run needs before them.

    python train.py --name cifar10 --dataset cifar10 --model_type ViT-B_32 \
        --pretrained_dir checkpoint/imagenet21k_ViT-B_32.npz
    python train.py --name cifar10 --dataset cifar10 --model_type ViT-B_32 -v

The flags are in utils/args.py; what a run saves and restores is in utils/run.py; utils/exits.py turns errors into exit
codes.  Only this file and the tools see ``args``; everything else takes the values it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from models import commands, pretrained, published
from models.configs import ViTConfig, canonical_name, make_config
from models.cpu_ops import StepMasks
from models.modeling import VisionTransformer
from models.shapes import layer_shapes
from utils import args as flags
from utils import (
    augment,
    checkpoint,
    data_utils,
    datasets,
    dist_util,
    exits,
    figures,
    hardware,
    metadata,
    number_format,
    photos,
    report,
)
from utils.advice import class_sizes, for_small_set
from utils.apex import make_precision
from utils.batch import Batch
from utils.console import lasting_streams, log_lines
from utils.errors import UserError
from utils.evaluation import EvalResult, Predictions
from utils.fitting import Fitting
from utils.input_wait import InputWait
from utils.log_files import check_tensorboard
from utils.memory import explain_out_of_memory
from utils.metrics import TrainLog
from utils.optimizer import SGD
from utils.outlook import Outlook
from utils.precision import Precision
from utils.process import process_restored
from utils.run import Run
from utils.run_state import RunPaths
from utils.scheduler import make_schedule
from utils.signals import Stopped, StopSignal, handlers_restored, leave

logger = logging.getLogger("train")


def train(
    args: argparse.Namespace,
    run: Run,
    model: VisionTransformer,
    data: datasets.DataSets,
    precision: Precision,
    stop: StopSignal,
) -> None:
    """Trains from the step that the run has come to: images -> batch -> loss -> gradients -> step -> log -> save."""
    params = precision.prepare(model)
    optimizer = SGD(params, lr=0.0, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    precision.attach(model, optimizer)
    lr_factor = make_schedule(args.decay_type, args.warmup_steps, args.num_steps)
    outlook = Outlook(args.num_steps, args.eval_every, len(data.test) / run.batch.total)
    log = TrainLog(run.paths.log_dir, args.num_steps, run.batch.total, args.log_every, outlook)
    run.take_over()
    state = run.restore(model, optimizer, precision, log)
    ddp_model, rank = dist_util.wrap(model, bucket_views=not precision.stashes_gradients), dist_util.rank()
    batches = make_batches(args, run, data.train, state.step + 1, precision.device)
    if isinstance(data.train, datasets.FileImages) and precision.device.type != "mps":  # whose work hides in the wait
        batches = log.input_wait = InputWait(batches, precision.device, flags.decoding_workers(args))
    if model.config.dropout_rate and run.batch.num_micro_batches > 1 and precision.device.type != "cpu":
        logger.info("  Another number of micro-batches draws other dropout masks on %s", precision.device.type)

    with log, run.saving_before_image_errors():
        if state.step and not run.is_own:
            run.save()  # under its own name from now on
        if state.last_eval_step < state.step and is_due(state.step, args.eval_every, args.num_steps):
            after_step(args, run, model, data, precision, log, stop)  # it was stopped between a step and its evaluation
        if state.step == 0:
            batches = figures.show_first(log, batches, data.classes)
        for step in range(state.step + 1, args.num_steps + 1):
            torch.manual_seed(data_utils.derive_seed(args.seed, data_utils.DROPOUT, step, rank))
            loss = forward_backward(ddp_model, batches, precision, run.batch.sizes, run.masks_of_step)
            num_skipped = precision.collect_skipped()  # of the steps before; their outcomes have arrived meanwhile
            learning_rate = args.learning_rate * lr_factor(step - num_skipped)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            applied = precision.step(optimizer, args.max_grad_norm)  # unscale, clip, step, zero
            state.step = step
            log.step(step, loss, learning_rate, applied)
            after_step(args, run, model, data, precision, log, stop)

    logger.info("Best Accuracy: \t%.5f", state.best_accuracy)
    logger.info("End Training! %.2f s of training, %.1f images/s; %.2f s of evaluations; %.2f s in all",
                log.train_secs, log.speed(), log.eval_secs, log.wall_secs())  # fmt: skip


def forward_backward(
    model: nn.Module,
    batches: Iterator[data_utils.MicroBatch],
    precision: Precision,
    sizes: Sequence[int],
    masks_of_step: bool = True,
) -> torch.Tensor:
    """Adds up the gradients of one step's micro-batches; returns their mean loss over all images, a scalar.

    Args:
        model, precision: as they train.
        batches: gives the micro-batches.
        sizes: images of each of the step's micro-batches on this rank.
        masks_of_step: dropout masks do not depend on the division, on CPUs; see ``Run``.
    """
    model.train()
    step_loss, masks = torch.zeros((), device=precision.device), StepMasks()
    for i, size in enumerate(sizes):
        images, labels = next(batches)
        same_masks = masks.next_micro_batch() if masks_of_step else contextlib.nullcontext()
        now = precision.stashes_gradients or i == len(sizes) - 1
        with dist_util.sync_gradients(model, now), same_masks:
            with precision.autocast():
                loss = model(images, labels) / (sum(sizes) / size)
            precision.backward(loss)
        step_loss += loss.detach()
    return step_loss


def after_step(
    args: argparse.Namespace,
    run: Run,
    model: VisionTransformer,
    data: datasets.DataSets,
    precision: Precision,
    log: TrainLog,
    stop: StopSignal,
) -> None:
    """Evaluates, saves and stops, each where it is due; in this order a kill at any point loses nothing.

    The weights of the best evaluation come before the state that tells of them: a run that is killed between the two
    evaluates once more, and writes the same again.
    """
    state, step = run.state, run.state.step
    if is_due(step, args.eval_every, args.num_steps):
        if state.last_eval_step == 0 and isinstance(data.test, datasets.FileImages):
            run.save()  # no test image was decoded yet: one that crashes what decodes it must not cost the steps
        start, num_workers = time.perf_counter(), flags.decoding_workers(args)
        with log.paused():
            result = evaluate(model, data.test, precision, args.img_size, run.batch.evaluated, num_workers, stop)
            if result is not None:  # else a signal came meanwhile: the resumed run evaluates
                state.last_eval_step = step
                log.evaluation(step, result, time.perf_counter() - start)
                log_result(step, result)
                if result.accuracy > state.best_accuracy:
                    run.save_best(result, checkpoint.CheckpointMetadata(
                        canonical_name(args.model_type), args.img_size, data.classes, args.gelu, args.dataset, step,
                        result.accuracy, data.test_fraction,
                    ))  # fmt: skip
                show_result(args, run, data, precision, log, result)
    signal_number = stop.any_rank()
    if signal_number or is_due(step, args.save_every or args.eval_every, args.num_steps):
        run.save()
    if signal_number:
        how = "the same command" if run.is_own else "the same command with --resume auto"
        raise Stopped(signal_number, f"stopped after step {step}; rerun {how}: training resumes from there")


def show_result(
    args: argparse.Namespace, run: Run, data: datasets.DataSets, precision: Precision, log: TrainLog, result: EvalResult
) -> None:
    """Shows an evaluation in TensorBoard and in the report, if it is the best so far or the last."""
    state, is_last = run.state, run.state.step == args.num_steps
    if state.best_step == state.step:
        figures.show_result(log, state.step, result, data)
    if is_last:
        paths = {"--dataset": args.dataset, "--pretrained_dir": run.pretrained or run.settings["--pretrained_dir"]}
        log.hyperparameters(state.step, {**run.settings, **paths})
    if (state.best_step == state.step or is_last) and dist_util.is_main():
        report.write_report(run.paths.report, lambda: report.contents_of(
            run, log, data, precision, f"{args.model_type} on {args.dataset}", flags.with_defaults(args),
            commands.after_training(flags.to_resume(args), flags.to_evaluate(args), run.paths.checkpoint),
        ))  # fmt: skip


def is_due(step: int, every: int, num_steps: int) -> bool:
    """Tells whether what happens every so many steps, and after the last, happens after this one."""
    return step > 0 and (step % every == 0 or step == num_steps)


def make_batches(
    args: argparse.Namespace, run: Run, images: datasets.Images, first_step: int, device: torch.device
) -> Iterator[data_utils.MicroBatch]:
    """Returns the micro-batches of all steps from the first one on, in their order."""
    in_parts = run.settings.get("--jpeg_decoding") == photos.SCALED
    transform = augment.TrainTransform(args.img_size, args.hflip, in_parts=in_parts)
    share = (dist_util.rank(), dist_util.world_size())
    sampler = data_utils.StepSampler(len(images), run.batch.per_rank, transform.num_draws, args.seed, *share)
    steps = range(first_step, args.num_steps + 1)
    return data_utils.train_batches(
        images, sampler, steps, run.batch.sizes, transform, device, flags.decoding_workers(args)
    )


@torch.no_grad()  # autocast keeps no casts under inference_mode
def evaluate(
    model: nn.Module,
    images: datasets.Images,
    precision: Precision,
    img_size: int,
    batch_size: int,
    num_workers: int = 0,
    stop: StopSignal | None = None,
) -> EvalResult | None:
    """Evaluates a model on all images, each seen once, whatever the number of ranks.

    Args:
        model: prepared by ``precision``.
        images, img_size: with their labels; the side in pixels that the model sees.
        batch_size, num_workers: images evaluated at once, and processes that decode.
        stop: notes signals: after one the result is None, so that a training saves its state sooner.

    Raises:
        OutOfMemory: so many images do not fit into memory.
    """
    model.eval()
    share, transform = (dist_util.rank(), dist_util.world_size()), augment.EvalTransform(img_size)
    batches = data_utils.eval_batches(images, batch_size, transform, precision.device, num_workers, *share)
    num_batches = data_utils.num_eval_batches(images, batch_size, *share)
    exact = torch.float32 if precision.device.type == "mps" else torch.float64
    loss_sum, predictions = torch.zeros((), dtype=exact, device=precision.device), Predictions()
    bar = tqdm(batches, "Validating", num_batches, leave=False, **dist_util.bar_options())
    remedy = f"evaluating {batch_size} images at once; give a smaller --eval_batch_size"
    with explain_out_of_memory(remedy), precision.reusing_casts():
        for x, labels in bar:
            if stop is not None and stop.now():
                return None
            with precision.autocast():
                logits = model(x)[0].float()
            loss_sum += F.cross_entropy(logits, labels, reduction="sum").to(exact)
            predictions.add(logits)
    return predictions.result(images.labels, dist_util.sum_over_ranks(loss_sum), *share)


def log_result(step: int | None, result: EvalResult) -> None:
    """Logs an evaluation as the reference does."""
    logger.info("Validation Results")
    if step is not None:
        logger.info("Global Steps: %d", step)
    logger.info("Valid Loss: %.5f", result.loss)
    logger.info("Valid Accuracy: %.5f", result.accuracy)
    logger.info("Valid Balanced Accuracy: %.5f", result.balanced_accuracy)


def evaluate_only(args: argparse.Namespace) -> int:
    """Evaluates a fine-tuned checkpoint (-v)."""
    precision = set_up(args)
    with dist_util.all_ranks_or_none(), explain_out_of_memory("while reading the weights and the images"):
        config = make_config(args.model_type, args.img_size, args.gelu, args.dropout)
        found = datasets.find_test(args.dataset, args.test_fraction)
        path = args.load_model_dir or RunPaths(args.output_dir, args.name).checkpoint
        if not os.path.exists(path):
            raise UserError(f"there is no checkpoint {path}; train first, or name one with --load_model_dir")
        source = pretrained.load(metadata.open_weights(path, strict=False), args.model_type)
        labelled = datasets.for_head(found, *pretrained.trained_on(source))
        data = datasets.load(labelled, args.data_dir, flags.decoding_workers(args))
        pretrained.warn_of_contradictions(source, args.model_type, args.gelu)
        pretrained.warn_of_other_classes(source, args.dataset, data.classes)
        model = pretrained.model_to_evaluate(source, config, args.img_size, len(data.classes))
        check_ranks(args, model, data.checksum)
        number_format.choose(precision, layer_shapes(config, args.img_size), training=False)
        batch_size = make_fitting(args, config, data, precision).evaluated(args.eval_batch_size)
    log_start(args, "Validation", model, data, precision)
    model, data = to_device(args, model, data, precision.device)
    precision.prepare(model)
    precision.attach(model, None)
    result = evaluate(model, data.test, precision, args.img_size, batch_size, flags.decoding_workers(args))
    assert result is not None  # no signal is noted here
    log_result(None, result)
    return 0


def fine_tune(args: argparse.Namespace) -> int:
    """Trains, from wherever the run has come to; see utils/run.py."""
    precision = set_up(args)
    batch = Batch.from_flags(args.train_batch_size, args.gradient_accumulation_steps, dist_util.world_size())
    with contextlib.closing(Run(RunPaths(args.output_dir, args.name, args.log_dir), args.resume, batch)) as run:
        with dist_util.all_ranks_or_none(), explain_out_of_memory("while reading the weights and the images"):
            if dist_util.is_main():
                check_tensorboard()
            run.open()
            model, data = prepare(args, run, precision)
            check_ranks(args, model, lambda: run.settings["--dataset"])
        if run.is_own and run.state.step == run.state.last_eval_step == args.num_steps:
            best = run.state.best_accuracy
            logger.info("This run is finished: Best Accuracy: \t%.5f (--resume none starts over)", best)
            if dist_util.is_main() and not os.path.exists(run.paths.checkpoint):
                logger.warning("Its weights %s are not there any more", run.paths.checkpoint)
            return 0
        num_epochs = args.num_steps * run.batch.total / len(data.train)
        log_start(args, "training", model, data, precision, f", {num_epochs:.1f} epochs")
        logger.info("  Total optimization steps = %d (%.1f epochs)", args.num_steps, num_epochs)
        logger.info("  Total train batch size = %d (%d per rank, %d at a time)", run.batch.total, run.batch.per_rank,
                    run.batch.micro_batch)  # fmt: skip
        remark_on_images(run, data)
        with run.noting_what_is_left():
            model, data = to_device(args, model, data, precision.device)
            with StopSignal() as stop, explain_out_of_memory(run.batch.out_of_memory_advice()):
                train(args, run, model, data, precision, stop)
    return 0


# ---- what a run needs before it starts ----


def set_up(args: argparse.Namespace) -> Precision:
    """Joins the other ranks and picks the device; returns the number formats that the flags ask for.

    Raises:
        UserError: a flag is wrong, or needs what is not there.
    """
    device = dist_util.setup(args.device, args.local_rank)
    with dist_util.all_ranks_or_none():
        flags.check_args(args)
        if args.deterministic and device.type == "cuda":
            hardware.make_deterministic()
        elif args.deterministic:
            logger.warning("--deterministic has no effect on %s: it is for CUDA", device.type)
        opt_level = args.fp16_opt_level if args.fp16 else "O0"
        return make_precision(device, opt_level, args.amp_dtype, args.loss_scale, args.amp_backend)


def prepare(args: argparse.Namespace, run: Run, precision: Precision) -> tuple[VisionTransformer, datasets.DataSets]:
    """Returns the model with the weights that the run starts from, and the data; downloads come last.

    Raises:
        UserError: there are no such weights or data, or the saved run had other settings.
    """
    config = make_config(args.model_type, args.img_size, args.gelu, args.dropout)
    found = datasets.find(args.dataset, args.test_fraction)
    source = None if run.saved_settings is not None else find_start(args, run)
    start = compare_start(args.pretrained_dir, run) if source is None else pretrained.checksum(source)
    with run.remembering_unreadable(args.dataset):
        data = datasets.load(found, args.data_dir, flags.decoding_workers(args), run.fingerprint)
    processor = ", ".join(sorted(set(dist_util.gather(hardware.processor(precision.device)))))
    kept = run.saved_environment.get("number format") if run.saved_environment.get("processor") == processor else None
    number_format.choose(precision, layer_shapes(config, args.img_size), kept=kept)
    fitting = make_fitting(args, config, data, precision)
    is_finished = run.state.step >= args.num_steps
    run.batch = fitting.micro_batches(run.batch, run.num_saved_bytes, is_finished=is_finished)
    evaluated = fitting.evaluated(args.eval_batch_size, run.saved_environment.get("--eval_batch_size"))
    run.batch = replace(run.batch, evaluated=evaluated)
    dataset = f"{args.dataset if args.dataset in datasets.NAMED_DATASETS else 'folder'} {data.checksum()}"
    run.set_settings(
        flags.settings(args, start, dataset, config.dropout_rate, run.batch.total, precision.setting,
                       find_decoding(args.jpeg_decoding, run, data.train)),
        flags.environment(args, run.batch, precision.device.type, processor, precision.number_format),
        flags.defaults(),
        data.manifest,
    )  # fmt: skip
    keep_head = False
    if source is not None:
        pretrained.warn_of_contradictions(source, args.model_type, args.gelu)
        keep_head = pretrained.keeps_head(source, data.classes, args.zero_head)
    torch.manual_seed(args.seed)
    if run.saved_settings is not None:
        model = pretrained.model_to_resume(
            run.take_weights(), args.model_type, config, args.img_size, len(data.classes)
        )
    else:
        model = pretrained.model_to_train(source, config, args.img_size, len(data.classes), keep_head)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, data


def find_start(args: argparse.Namespace, run: Run) -> pretrained.Source | None:
    """Reads the weights that a new run starts from; None for random ones."""
    if args.pretrained_dir == "":
        logger.warning("--pretrained_dir is empty: training starts from random weights")
        return None
    file = published.find(args.pretrained_dir, args.model_type)
    run.pretrained = args.pretrained_dir or file
    return pretrained.load(metadata.open_weights(file, strict=False), args.model_type)


def compare_start(given: str | None, run: Run) -> str:
    """Returns the setting of the weights to start from: that of the saved run, unless ``given`` names others.

    The weights count, not their path.  A run that resumes needs no such file.

    Args:
        given: --pretrained_dir; None compares nothing.
        run: whose state is open.
    """
    saved = run.saved_settings or {}
    was = saved.get("--pretrained_dir", "")
    if given in (None, was):
        return was
    if not given:
        return f"random weights (it began with {run.pretrained or was})"
    if not was:  # it began with random weights
        return given
    if not run.pretrained:  # a state of an earlier version: no checksum, but the path
        if os.path.basename(os.path.normpath(given)) != os.path.basename(os.path.normpath(was)):
            return given
        if os.path.realpath(given) != os.path.realpath(was):
            logger.warning("--pretrained_dir was %s, is %s: taken for the same weights, for the training state "
                           "is of a version that kept no checksum of them", was, given)  # fmt: skip
        return was
    model_type = saved["--model_type"]
    try:
        file = published.find(given, model_type)
    except UserError:
        logger.info("--pretrained_dir %s is not there, and resuming does not need it", given)
        return was
    now = pretrained.checksum(pretrained.load(metadata.open_weights(file, strict=False), model_type))
    return was if now == was else f"{now} ({given}; it began with {run.pretrained})"


def find_decoding(given: str | None, run: Run, images: datasets.Images) -> str:
    """Returns how JPEGs are decoded for training: as ``given``, or as the saved run did; "" where there are none."""
    in_files, saved = isinstance(images, datasets.FileImages), run.saved_settings or {}
    if not (in_files and any(map(photos.is_taken, images.paths or []))):
        if given:
            reason = "no image to train on is named as a JPEG" if in_files else "the images are kept in memory"
            logger.warning("--jpeg_decoding %s has no effect: %s", given, reason)
        return saved.get("--jpeg_decoding", "")  # the last may have gone, for it could not be read
    unset = photos.SCALED if run.saved_settings is None else flags.defaults()["--jpeg_decoding"]
    return given or saved.get("--jpeg_decoding", unset)


def make_fitting(args: argparse.Namespace, config: ViTConfig, data: datasets.DataSets, precision: Precision) -> Fitting:
    """Returns what tells how many images of this run fit into memory."""

    def build(num_blocks: int) -> VisionTransformer:
        with torch.device("meta"):
            model = VisionTransformer(replace(config, num_layers=num_blocks), args.img_size, len(data.classes))
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model

    num_ahead = 2 * flags.decoding_workers(args)  # micro-batches: each of them has two in hand
    return Fitting(build, config.num_layers, precision, args.img_size, data, num_ahead)


def check_ranks(args: argparse.Namespace, model: nn.Module, dataset: Callable[[], str]) -> None:
    """Raises UserError unless all ranks have the same flags, data and weights."""
    if dist_util.world_size() > 1:
        same = flags.same_on_all_ranks(args)
        same["the checksum of --dataset"] = dataset()  # seconds for a large data set, which a training has computed
        if dist_util.several_machines():
            same["the checksum of the weights"] = checkpoint.checksum(model.state_dict())
        dist_util.check_same(same, "start every rank with the same")


def to_device(
    args: argparse.Namespace, model: VisionTransformer, data: datasets.DataSets, device: torch.device
) -> tuple[VisionTransformer, datasets.DataSets]:
    """Moves the weights and, where they are in memory, the images to the device, and compiles the model if asked."""
    with explain_out_of_memory(f"moving the weights and the images to {device}"):
        model, data = model.to(device), data.to(device)
    if args.compile:
        model.compile()  # in place: the names of its weights stay
    return model, data


def log_start(
    args: argparse.Namespace,
    title: str,
    model: nn.Module,
    data: datasets.DataSets,
    precision: Precision,
    epochs: str = "",
) -> None:
    """Logs what is about to begin; the line of the images ends with ``epochs``."""
    num_millions = sum(p.numel() for p in model.parameters()) / 1e6
    logger.info("%s on %s: %.2f M parameters, %s, %s", args.model_type, args.dataset, num_millions,
                precision.device, precision)  # fmt: skip
    logger.info("***** Running %s *****", title)
    trained_on = f"{len(data.train)} to train on, " if data.train else ""
    logger.info("  Images: %s%d to test on, %d classes%s", trained_on, len(data.test), len(data.classes), epochs)
    for note in data.notes:
        logger.info("  %s", note)


def remark_on_images(run: Run, data: datasets.DataSets) -> None:
    """Logs that classes are unequal, and flags for few images unless the run resumes: it keeps its settings."""
    if sizes := class_sizes(data.train.labels.numpy(), data.classes):
        logger.info("  Images per class: %s", sizes)
    small = for_small_set(run.batch, run.settings["--num_steps"], len(data.train))
    if small and run.saved_settings is None:
        logger.warning("%s", small)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    level = logging.INFO if dist_util.is_main() else logging.ERROR
    # What a notebook, or another program, finds afterwards as it was.
    with process_restored(), handlers_restored(), lasting_streams(), log_lines(level):
        args = flags.make_parser().parse_args(argv)
        try:
            return exits.exit_code("train.py", functools.partial(evaluate_only if args.eval_only else fine_tune, args))
        finally:
            dist_util.cleanup()


if __name__ == "__main__":
    leave(main())
