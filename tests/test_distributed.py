"""Several processes are one run: the same losses, each gradient reduced once, errors told once."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers.launching import TINY, job, ranks, torchrun, train_main, values_of
from utils import dist_util, hardware
from utils.precision import Precision

SHORT = ["--num_steps", "4", "--warmup_steps", "1", "--eval_every", "4", "--name", "a"]


# ---- the same run, whatever the number of processes ----


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Training losses and test results of 1 x 64, 2 x 32 and 4 x 16 pictures an update."""
    found = {}
    for number in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"ranks{number}")
        flags = [*TINY, *SHORT, "--train_batch_size", str(64 // number)]
        with ranks(number, train_main, (flags,), folder) as run:
            assert run.results() == [0] * number, run.output()
            assert run.output().count("Total train batch size = 64 ") == 1
            assert run.output().count("***** Running training *****") == 1
        tags = ("train/loss", "test/loss", "test/accuracy")
        found[number] = [values_of(folder, "a", tag) for tag in tags]
    return found


@pytest.mark.parametrize("number", [2, 4])
def test_more_processes_of_the_same_total_have_the_same_curve(curves, number):
    losses, test_losses, accuracies = curves[1]
    assert len(losses) == 4
    assert abs(losses[0] - losses[-1]) > 1e-3  # the updates do something
    assert curves[number][0] == pytest.approx(losses, abs=1e-5)
    assert curves[number][1] == pytest.approx(test_losses, abs=1e-5)
    assert curves[number][2] == pytest.approx(accuracies, abs=2 / 360)  # a prediction on the edge may fall


def write_images(root: Path, num_test: int) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, number in (("train", 8), ("test", num_test)):
        for i in range(number):
            folder = root / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")


def evaluated(flags: list[str]) -> list:
    """Accuracy and loss of -v, and the pictures that this process evaluated."""
    import train

    found: dict[str, list] = {"pictures": []}

    def note(self, pictures, draws):
        found["pictures"] += [x.flatten().tolist()[:64:7] for x in pictures]
        return original(self, pictures, draws)

    original = train.augment.EvalTransform.batch
    train.augment.EvalTransform.batch = note
    report = train.report
    train.report = lambda step, x: (found.update(results=[x.accuracy, x.loss]), report(step, x))
    assert train.main(flags) == 0
    return json.loads(json.dumps([found["results"], found["pictures"]]))


def test_361_pictures_on_four_processes_are_each_evaluated_once(tmp_path):
    write_images(tmp_path / "pets", 361)
    torch.manual_seed(0)
    model = VisionTransformer(CONFIGS["testing"], 32, 2)
    nn.init.normal_(model.head.weight, std=0.3)
    torch.save(model.state_dict(), tmp_path / "a.bin")
    flags = ["--name", "a", "--dataset", str(tmp_path / "pets"), "--model_type", "testing", "--img_size", "32"]
    flags += ["-v", "--load_model_dir", str(tmp_path / "a.bin"), "--eval_batch_size", "64", "--device", "cpu"]
    found = {}
    for number in (1, 4):
        with ranks(number, evaluated, (flags,), tmp_path / str(number)) as run:
            results = run.results()
            assert None not in results, run.output()
        assert all(result[0] == results[0][0] for result in results)  # every process knows the whole
        found[number] = (results[0][0], [picture for _, pictures in results for picture in pictures])
        assert run.output().count("Valid Accuracy") == 1
    (accuracy, loss), pictures = found[1]
    assert found[4][0][0] == accuracy
    assert found[4][0][1] == pytest.approx(loss, abs=1e-6)
    assert len(pictures) == len(found[4][1]) == 361
    assert sorted(found[4][1]) == sorted(pictures)


# ---- gradients ----


def updated(level: str, accumulation: int, num_steps: int, clip: float) -> dict:
    """A few updates of this process's share of 8 pictures each, as the training loop makes them."""
    device = dist_util.setup("cpu", -1)
    rank, world = dist_util.rank(), dist_util.world_size()
    torch.manual_seed(0)
    model = VisionTransformer(CONFIGS["testing"], 32, 4)
    nn.init.normal_(model.head.weight)
    precision = Precision(device, level)
    optimizer = precision.make_optimizer(model, weight_decay=0.0)
    wrapped = dist_util.wrap(model).eval()  # no dropout
    reduced: list[tuple[str, int]] = []

    def count(group, bucket):
        reduced.append((str(bucket.buffer().dtype), bucket.buffer().numel()))
        return allreduce_hook(group, bucket)

    if world > 1:
        wrapped.register_comm_hook(None, count)
    counts, norms = [], []
    clip_grad_norm = torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = lambda p, limit: norms.append(clip_grad_norm(p, limit).item())
    for step in range(1, num_steps + 1):
        generator = torch.Generator().manual_seed(step)
        images = torch.rand(8, 3, 32, 32, generator=generator) * 2 - 1
        labels = torch.randint(4, (8,), generator=generator)
        part = 8 // world // accumulation
        for i in range(accumulation):
            at = slice(rank * 8 // world + i * part, rank * 8 // world + (i + 1) * part)
            with dist_util.sync_gradients(wrapped, now=i == accumulation - 1):
                with precision.autocast():
                    loss = wrapped(images[at], labels[at]) / accumulation
                precision.backward(loss)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        precision.step(optimizer, clip)
        counts.append(reduced[:])
        reduced.clear()
    masters = torch.cat([p.detach().flatten().double() for p in precision.parameters()])
    halves = sum(p.numel() for p in model.parameters() if p.dtype != torch.float32)
    dist_util.cleanup()
    return {"counts": counts, "norms": norms, "masters": masters.tolist(), "halves": halves}


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """What ``updated`` finds, by precision, accumulation and number of processes."""
    found = {}
    for level, accumulation in (("O0", 1), ("O0", 4), ("O2", 1)):
        for number in (1, 2):
            folder = tmp_path_factory.mktemp("updates")
            with ranks(number, updated, (level, accumulation, 3, 0.05), folder) as run:
                found[level, accumulation, number] = run.results()
                assert None not in found[level, accumulation, number], run.output()
    return found


@pytest.mark.parametrize("accumulation", [1, 4])
def test_each_gradient_is_reduced_once_an_update_however_many_parts_it_has(updates, accumulation):
    whole = sum(p.numel() for p in VisionTransformer(CONFIGS["testing"], 32, 4).parameters())
    for result in updates["O0", accumulation, 2]:
        for counts in result["counts"]:
            assert sum(numel for _, numel in counts) == whole


@pytest.mark.parametrize("accumulation", [1, 4])
def test_clipping_sees_the_reduced_gradients(updates, accumulation):
    one, two = updates["O0", accumulation, 1][0], updates["O0", accumulation, 2]
    assert min(one["norms"]) > 0.1  # it does clip
    for result in two:
        assert result["norms"] == pytest.approx(one["norms"], rel=1e-4)
        assert result["masters"] == pytest.approx(one["masters"], abs=1e-6)
    assert two[0]["masters"] == two[1]["masters"]  # bit for bit


def test_half_gradients_are_reduced_in_half_and_the_masters_agree(updates):
    one, two = updates["O2", 1, 1][0], updates["O2", 1, 2]
    assert two[0]["masters"] == two[1]["masters"]
    assert two[0]["masters"] == pytest.approx(one["masters"], abs=2e-3)  # bfloat16 sums
    for counts in two[0]["counts"]:
        sizes = {"torch.bfloat16": 0, "torch.float32": 0}
        for dtype, numel in counts:
            sizes[dtype] += numel
        assert sizes["torch.bfloat16"] == two[0]["halves"] > sizes["torch.float32"] > 0


# ---- errors reach the user once ----


ERRORS = {
    "flags": (["--num_steps", "0"], 2, "--num_steps is 0, expected at least 1"),
    "unknown flag": (["--turbo"], 2, "unrecognized arguments: --turbo"),
    "files": (["--pretrained_dir", "none.npz"], 2, "there is no file none.npz"),
    "loss": (["--learning_rate", "1e38", "--max_grad_norm", "inf"], 1, "train/loss is "),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_all_processes_get_wrong_is_said_once(tmp_path, case):
    flags, status, text = ERRORS[case]
    with ranks(2, train_main, ([*TINY, *SHORT, *flags],), tmp_path) as run:
        assert run.results() == [status] * 2, run.output()
        assert len(run.errors()) == 1, run.output()
        assert text in run.errors()[0]
        assert "Traceback" not in run.output()


def test_flags_that_differ_between_processes_are_refused(tmp_path):
    args = [([*TINY, *SHORT, "--seed", str(rank)],) for rank in range(2)]
    with ranks(2, train_main, args, tmp_path) as run:
        assert run.results() == [2, 2], run.output()
        assert len(run.errors()) == 1
        assert "--seed is 0 on process 0 " in run.errors()[0]


def test_what_only_one_process_lacks_is_said_with_its_number(tmp_path):
    """A file that is on one machine only: the other must not wait for the first in a reduction."""
    args = [([*TINY, *SHORT, "--pretrained_dir", "" if rank == 0 else "none.npz"],) for rank in range(2)]
    with ranks(2, train_main, args, tmp_path, nodes=2) as run:
        assert run.results() == [2, 2], run.output()
        assert len(run.errors()) == 1
        assert "there is no file none.npz" in run.errors()[0]
        assert "(says process 1 of 2, on " in run.errors()[0]


def with_gpus(numbers: list[int], flags: list[str]) -> int:
    """What ``python train.py`` does where this process believes in so many GPUs, by rank."""
    there = numbers[dist_util.rank()]
    torch.cuda.is_available = lambda: there > 0
    torch.cuda.device_count = lambda: there
    torch.cuda.set_device = lambda device: None
    return train_main(flags)


@pytest.mark.parametrize(
    ("gpus", "text"),
    [
        ([1, 1], "local rank 1 finds 1 GPUs; start fewer processes"),
        ([0, 2], "--device is cpu on process 0 ("),  # NCCL and Gloo would wait for each other
    ],
)
def test_a_device_that_a_later_process_lacks_is_said(tmp_path, gpus, text):
    with ranks(2, with_gpus, (gpus, [*TINY, *SHORT, "--device", "auto"]), tmp_path) as run:
        assert run.results() == [2, 2], run.output()
        assert len(run.errors()) == 1, run.output()
        assert text in run.errors()[0]


def test_a_flag_that_only_another_machine_does_not_know_is_said_there(tmp_path):
    args = [([*TINY, *SHORT, *(["--turbo"] if rank == 1 else [])],) for rank in range(2)]
    with ranks(2, train_main, args, tmp_path, nodes=2, env={"TRAIN_TIMEOUT_SECS": "2"}) as run:
        assert run.results() == [1, 2], run.output()
        assert "unrecognized arguments: --turbo" in (tmp_path / "1.txt").read_text()
        assert "(1 of 2 processes came)" in (tmp_path / "0.txt").read_text()
        assert len(run.errors()) == 2, run.output()


def hang_first(flags: list[str]) -> int:
    """A run whose process 0 does not get to where it meets the others."""
    if dist_util.rank() == 0:
        time.sleep(120)
    return train_main(flags)


def test_who_waits_in_vain_for_the_first_process_says_so_once(tmp_path):
    with ranks(3, hang_first, ([*TINY, *SHORT],), tmp_path, env={"TRAIN_TIMEOUT_SECS": "1"}) as run:
        for process in run.processes[1:]:
            process.join(30)
        assert [json.loads((tmp_path / f"{i}.txt.json").read_text()) for i in (1, 2)] == [1, 1], run.output()
        assert len(run.errors()) == 1, run.output()
        assert " does not reach the others by 127.0.0.1:" in run.errors()[0]
        assert "Traceback" not in run.output()


def test_what_no_launcher_would_set_is_an_error_without_a_stack(tmp_path):
    with ranks(2, train_main, ([*TINY, *SHORT],), tmp_path, env={"RANK": "first"}) as run:
        assert run.results() == [2, 2], run.output()
        assert len(run.errors()) == 1, run.output()
        assert "what the launcher set cannot be used: " in run.errors()[0]
        assert "Traceback" not in run.output()


def checksums_taken(flags: list[str]) -> int:
    """How often this process of a run reads all its pictures for their checksum."""
    from utils import datasets

    taken, original = [], datasets.DataSets.checksum
    datasets.DataSets.checksum = lambda self: taken.append(0) or original(self)
    assert train_main(flags) == 0
    return len(taken)


def test_the_pictures_checksum_is_taken_once(tmp_path):
    with ranks(2, checksums_taken, ([*TINY, *SHORT],), tmp_path) as run:
        assert run.results() == [1, 1], run.output()


def fail_late(flags: list[str]) -> int:
    """A training whose process 1 cannot read a picture in its third update."""
    import train
    from utils import data_utils, datasets

    original = data_utils.train_batches

    def failing(*args):
        for i, batch in enumerate(original(*args)):
            if i == 2 and dist_util.rank() == 1:
                raise datasets.ImageError("b.png cannot be read as a picture; repair or remove it")
            yield batch

    data_utils.train_batches = failing
    return train.main(flags)


def test_an_error_of_one_process_in_the_training_ends_the_others_without_a_word(tmp_path):
    with ranks(2, fail_late, ([*TINY, *SHORT],), tmp_path) as run:
        assert run.results() == [1, 2], run.output()
        assert run.errors() == ["train.py: error: b.png cannot be read as a picture; repair or remove it"]
        assert "Traceback" not in run.output()


# ---- downloads ----


def download(folder: str) -> list:
    """Pretends to download CIFAR-10 as torchvision would, and tells whether this process did."""
    import numpy as np
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
                did.append(dist_util.rank())
            if not path.exists():
                raise RuntimeError("Dataset not found or corrupted")

    torchvision.datasets.CIFAR10 = Fake
    dist_util.setup("cpu", -1)
    with dist_util.all_ranks_or_none():
        datasets.load_datasets("cifar10", folder, 0)
    dist_util.cleanup()
    return did


@pytest.mark.parametrize("disk", ["shared", "of its own"])
def test_each_machine_has_the_download_and_a_shared_disk_has_it_once(tmp_path, disk):
    folders = [str(tmp_path / ("data" if disk == "shared" else f"data{rank // 2}")) for rank in range(4)]
    with ranks(4, download, [(folder,) for folder in folders], tmp_path, nodes=2) as run:
        assert run.results() == ([[0], [], [], []] if disk == "shared" else [[0], [], [2], []]), run.output()


# ---- the launchers themselves ----


def test_the_old_launcher_and_its_flag(tmp_path):
    """``torch.distributed.launch`` passes --local-rank; a user's OMP_NUM_THREADS is left alone."""
    command = torchrun(
        ["--nproc_per_node=2", "--master_port=0", "--standalone"], [*TINY, *SHORT, "--train_batch_size", "8"]
    )
    command[command.index("torch.distributed.run")] = "torch.distributed.launch"
    share = max(hardware.num_cpus() // 2, 1)
    threads = 1 if share > 1 else min(2, hardware.num_cpus())  # another number, where there can be one
    env = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}  # PyTorch asks MKL first
    env["OMP_WAIT_POLICY"] = "passive"  # they are more than there are processors
    with job(command, tmp_path, **env) as run:
        assert run.wait(90) == 0, run.output()
        state = torch.load(tmp_path / "output" / "a_last.pt", weights_only=True)
        assert state["circumstances"]["threads"] == threads
        assert run.output().count("End Training!") == 1
        assert "Total train batch size = 16 (8 per process" in run.output()


def test_torchrun_with_a_mistake_prints_ours_once_and_without_a_stack(tmp_path):
    with job(torchrun(["--standalone", "--nproc_per_node=2"], [*TINY, *SHORT, "--img_size", "40"]), tmp_path) as run:
        assert run.wait(90) == 1  # torchrun's own
        assert len(run.errors()) == 1
        assert "--img_size 40 is not a multiple" in run.errors()[0]
        ours = run.output().split("torch/distributed/elastic/multiprocessing/api.py")[0]
        assert "Traceback" not in ours
        assert "exitcode  : 2" in run.output()
