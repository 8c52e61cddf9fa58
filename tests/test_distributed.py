"""Several ranks are one run: the same losses and weights, each gradient reduced once, errors told once."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.conftest import REPOSITORY
from tests.helpers.launching import TINY, job, ranks, real_torchrun, train_main, values_of, weights_of
from utils import checkpoint, data_utils, dist_util, hardware

SHORT = [*TINY, "--name", "a", "--num_steps", "4", "--warmup_steps", "1", "--eval_every", "4"]


# ---- the same run, whatever the number of ranks ----


def watched(flags: list[str]) -> list:
    """Trains; returns what was reduced, by the type of the gradients, and a checksum of the weights."""
    models: list[nn.Module] = []
    reduced = {"torch.float32": 0, "torch.bfloat16": 0}
    wrap = dist_util.wrap

    def count(group, bucket):
        reduced[str(bucket.buffer().dtype)] += bucket.buffer().numel()
        return allreduce_hook(group, bucket)

    def watch(model, **more):
        models.append(model)
        wrapped = wrap(model, **more)
        if wrapped is not model:
            wrapped.register_comm_hook(None, count)
        return wrapped

    dist_util.wrap = watch
    assert train_main(flags) == 0
    return [reduced, checkpoint.checksum(models[0].state_dict())]


#: Number of ranks, micro-batches a step and more flags of runs on 64 images a step, whose gradients are clipped.
CLIP = ["--learning_rate", "0.3", "--max_grad_norm", "0.05"]
HALF = ["--fp16", "--fp16_opt_level", "O2", "--amp_dtype", "bfloat16"]
RUNS = {
    "one": (1, 1, CLIP), "two": (2, 4, CLIP), "four": (4, 1, CLIP), "not clipped": (1, 1, CLIP[:2]),
    "half of one": (1, 1, CLIP + HALF), "half of two": (2, 1, CLIP + HALF),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of each of ``RUNS``, and what its ranks returned."""
    found = {}
    for name, (number, parts, more) in RUNS.items():
        folder = tmp_path_factory.mktemp("run")
        flags = [*SHORT, "--train_batch_size", str(64 // number), "--gradient_accumulation_steps", str(parts), *more]
        with ranks(folder, [flags] * number, watched) as run:
            results = run.results()
            assert all(isinstance(result, list) for result in results), run.output()
            assert run.output().count("Total train batch size = 64 ") == 1
            assert run.output().count("***** Running training *****") == 1
        found[name] = (folder, results)
    return found


def flat_weights(folder: Path) -> torch.Tensor:
    return torch.cat([x.flatten().double() for x in weights_of(folder, "a").values()])


@pytest.mark.parametrize("name", ["two", "four"])
def test_ranks_and_micro_batches_of_the_same_total_are_the_same_run(runs, name):
    expected, found = runs["one"][0], runs[name][0]
    losses = values_of(expected, "a", "train/loss")
    assert len(losses) == 4
    assert abs(losses[0] - losses[-1]) > 1e-3  # the steps do something
    assert values_of(found, "a", "train/loss") == pytest.approx(losses, abs=1e-5)
    assert values_of(found, "a", "test/loss") == pytest.approx(values_of(expected, "a", "test/loss"), abs=1e-5)
    accuracies = values_of(expected, "a", "test/accuracy")
    assert values_of(found, "a", "test/accuracy") == pytest.approx(accuracies, abs=2 / 360)  # one on the edge may fall
    # Clipping saw the reduced gradients: the weights are nearer than clipping moves them.
    unclipped = runs["not clipped"][0]
    assert (flat_weights(expected) - flat_weights(unclipped)).abs().max() > 1e-3
    assert (flat_weights(expected) - flat_weights(found)).abs().max() < 1e-5


def test_half_gradients_are_reduced_in_half_and_the_masters_agree(runs):
    folder, results = runs["half of two"]
    assert (flat_weights(runs["half of one"][0]) - flat_weights(folder)).abs().max() < 2e-3  # bfloat16 sums
    assert results[0][0]["torch.bfloat16"] > results[0][0]["torch.float32"] > 0


@pytest.mark.parametrize("name", ["two", "four", "half of two"])
def test_each_gradient_is_reduced_once_a_step_and_ranks_keep_the_same_bits(runs, name):
    folder, results = runs[name]
    for reduced, checksum in results:
        assert sum(reduced.values()) == 4 * len(flat_weights(folder))
        assert checksum == results[0][1]


def test_361_images_on_four_ranks_are_each_evaluated_once(tmp_path):
    rng = np.random.default_rng(0)
    for split, number in (("train", 8), ("test", 361)):
        for i in range(number):
            path = tmp_path / "pets" / split / "ab"[i % 2] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    model = VisionTransformer(CONFIGS["testing"], 32, 2)
    nn.init.normal_(model.head.weight, std=3)  # each image has a loss of its own: the mean tells which were seen
    torch.save(model.state_dict(), tmp_path / "a.bin")
    flags = [*TINY, "--name", "a", "--dataset", str(tmp_path / "pets")]
    flags += ["-v", "--load_model_dir", str(tmp_path / "a.bin"), "--eval_batch_size", "64"]
    found = {}
    for number in (1, 4):
        with ranks(tmp_path / str(number), [flags] * number) as run:
            assert run.results() == [0] * number, run.output()
            found[number] = [re.findall(rf"Valid {what}: ([\d.]+)", run.output()) for what in ("Accuracy", "Loss")]
    (accuracy,), (loss,) = found[1]
    assert found[4][0] == [accuracy]
    assert [float(x) for x in found[4][1]] == pytest.approx([float(loss)], abs=2e-5)


# ---- errors reach the user once ----


def hurt(flags: list[str]) -> int:
    """A training in which rank 1 gets a third batch that is not finite."""

    original = data_utils.train_batches

    def batches(*args, **options):
        for i, (images, labels) in enumerate(original(*args, **options)):
            yield images * (float("nan") if i == 2 and dist_util.rank() == 1 else 1), labels

    data_utils.train_batches = batches
    return train_main(flags)


def with_gpus(flags: list[str]) -> int:
    """A training on a rank that believes in so many GPUs as the last of the flags says."""
    number = int(flags[-1])
    torch.cuda.is_available = lambda: number > 0
    torch.cuda.device_count = lambda: number
    torch.cuda.set_device = lambda device: None
    return train_main([*flags[:-1], "--device", "auto"])


#: Flags of each rank, what they run and the variables they have, -> exit codes, and texts of the errors.
ERRORS = {
    "a flag's value": ([["--num_steps", "0"]] * 2, {}, [2, 2], ["--num_steps is 0, expected at least 1"]),
    "an unknown flag": ([["--turbo"]] * 2, {}, [2, 2], ["unrecognized arguments: --turbo"]),
    "a file": ([["--pretrained_dir", "none.npz"]] * 2, {}, [2, 2], ["there is no file none.npz"]),
    "the loss": ([["--learning_rate", "1e38", "--max_grad_norm", "inf"]] * 2, {}, [1, 1], ["train/loss is "]),
    "the loss of one rank": ([[]] * 2, {"body": hurt}, [1, 1], ["train/loss is nan at step 3"]),
    "flags that differ": ([["--seed", "0"], ["--seed", "1"]], {}, [2, 2], ["--seed is 0 on rank 0 "]),
    # The other rank must not wait for the first in a reduction.
    "a file of one machine": (
        [[], ["--pretrained_dir", "none.npz"]], {"num_machines": 2}, [2, 2],
        [r"there is no file none.npz.* \(on rank 1 of 2, "],
    ),
    "too few GPUs": ([["1"]] * 2, {"body": with_gpus}, [2, 2], ["local rank 1 finds 1 GPUs; start fewer ranks"]),
    # NCCL and Gloo would wait for each other.
    "a GPU on one rank": ([["0"], ["2"]], {"body": with_gpus}, [2, 2], [r"--device is cpu on rank 0 \("]),
    "an unknown flag on one machine": (
        [[], ["--turbo"]], {"num_machines": 2, "TRAIN_TIMEOUT_SECS": "2"}, [1, 2],
        [r"\(1 of 2 ranks joined\)", "unrecognized arguments: --turbo"],
    ),
    "no first rank": (
        [None, [], []], {"TRAIN_TIMEOUT_SECS": "1"}, [None, 1, 1], [" does not reach the others at 127.0.0.1:"],
    ),
    "a broken launcher": ([[]] * 2, {"RANK": "first"}, [2, 2], ["what the launcher set cannot be used: "]),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_said_once_and_end_every_rank(tmp_path, case):
    flags, options, statuses, texts = ERRORS[case]
    with ranks(tmp_path, [more if more is None else [*SHORT, *more] for more in flags], **options) as run:
        assert run.results() == statuses, run.output()
        assert len(run.errors()) == len(texts), run.output()
        assert all(re.search(text, line) for text, line in zip(texts, run.errors()))
        assert "Traceback" not in run.output()


# ---- downloads ----


def download(folder: str) -> int:
    """Pretends to download CIFAR-10 as torchvision would; returns how often this rank did."""
    import torchvision.datasets

    from utils import datasets

    did = []

    class Fake:
        url, tgz_md5, classes = "https://example.org/x.tar.gz", "0", ["a", "b"]
        data, targets = np.zeros((2, 32, 32, 3), np.uint8), [0, 1]

        def __init__(self, root, train, download):
            path = Path(root, "archive")
            if download and not path.exists():
                os.makedirs(root, exist_ok=True)
                fd = os.open(path.with_suffix(".part"), os.O_CREAT | os.O_EXCL)  # two at once: an error
                time.sleep(0.3)
                os.rename(path.with_suffix(".part"), path)
                os.close(fd)
                did.append(True)
            if not path.exists():
                raise RuntimeError("Dataset not found or corrupted")

    torchvision.datasets.CIFAR10 = Fake
    dist_util.setup("cpu", -1)
    with dist_util.all_ranks_or_none():
        datasets.load_datasets("cifar10", folder, 0)
    dist_util.cleanup()
    return len(did)


@pytest.mark.parametrize(("disk", "who"), [("shared", [1, 0, 0, 0]), ("own", [1, 0, 1, 0])])
def test_each_machine_has_the_download_and_a_shared_disk_has_it_once(tmp_path, disk, who):
    folders = [str(tmp_path / ("data" if disk == "shared" else f"data{rank // 2}")) for rank in range(4)]
    with ranks(tmp_path, folders, download, num_machines=2) as run:
        assert run.results() == who, run.output()


# ---- no launcher ----


@pytest.mark.parametrize("env", [{"RANK": "3", "LOCAL_RANK": "3"}, {"WORLD_SIZE": "1"}, {"SLURM_NTASKS": "2"}], ids=str)
def test_a_part_of_a_launchers_variables_trains_with_one_process(env, tmp_path):
    flags = [*SHORT, "--num_steps", "1", "--warmup_steps", "0", "--train_batch_size", "8"]
    with job(train_main, (flags,), tmp_path, **env) as run:
        assert run.wait(60) == 0, run.output()
        assert run.output().count("End Training!") == 1
    assert weights_of(tmp_path, "a")


# ---- the launchers themselves ----


def test_the_old_launcher_and_its_flag(tmp_path):
    """``torch.distributed.launch`` passes --local-rank; a user's OMP_NUM_THREADS is left alone."""
    flags = ["--nproc_per_node=2", "--master_port=0", "--standalone", str(REPOSITORY / "train.py"), *SHORT]
    share = max(hardware.num_cpus() // 2, 1)
    threads = 1 if share > 1 else min(2, hardware.num_cpus())  # another number, where there can be one
    env = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}  # PyTorch asks MKL first
    env["OMP_WAIT_POLICY"] = "passive"  # they are more than there are processors
    args = ([*flags, "--train_batch_size", "8"], "torch.distributed.launch")
    with job(real_torchrun, args, tmp_path, **env) as run:
        assert run.wait(90) == 0, run.output()
        state = torch.load(tmp_path / "output" / "a_last.pt", weights_only=True)
        assert state["environment"]["threads"] == threads
        assert run.output().count("End Training!") == 1
        assert "Total train batch size = 16 (8 per " in run.output()


def test_torchrun_with_a_mistake_prints_ours_once_and_without_a_stack(tmp_path):
    flags = ["--standalone", "--nproc_per_node=2", str(REPOSITORY / "train.py"), *SHORT, "--img_size", "40"]
    with job(real_torchrun, (flags,), tmp_path) as run:
        assert run.wait(90) == 1  # torchrun's own
        assert len(run.errors()) == 1
        assert "--img_size 40 is not a multiple" in run.errors()[0]
        ours = run.output().split("torch/distributed/elastic/multiprocessing/api.py")[0]
        assert "Traceback" not in ours
        assert "exitcode  : 2" in run.output()
