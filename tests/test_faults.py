"""Bad inputs and faults, each with its one line and exit status: what docs/faults.md shows is written from here."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import urllib.error
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from models.configs import CONFIGS
from tests.helpers import fake_npz, faults
from tests.helpers.runs import (
    ROOT,
    RUN,
    assert_same,
    every_name_is_whole,
    last_state,
    lines,
    outcome,
    run,
    several_sizes,
    undisturbed,
    write_images,
)
from utils import checkpoint, precision
from utils.metrics import TrainingLog


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)


def status_of(*flags):
    """The exit status of a run in this process."""
    try:
        return run(*flags)
    except SystemExit as e:  # argparse's own
        return e.code


def told(capfd):
    """The message of the one line that says error."""
    found = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(found) == 1, found
    assert found[0].startswith("train.py: error: ")
    return found[0].removeprefix("train.py: error: ")


class Touch:
    """Unpickling this creates a file: what a malicious one could do with worse."""

    def __reduce__(self):
        return open, ("touched", "w")


# ---- what the user gave ----


def flags(*words):
    return lambda: list(words)


def weights(**changes):
    """A pretrained file of the testing model, changed."""
    arrays = fake_npz.arrays(CONFIGS["testing"], 32)
    for name, array in changes.items():
        arrays = {k: x for k, x in arrays.items() if k != name} if array is None else {**arrays, name: array}
    fake_npz.save("weights.npz", arrays)
    return ["--pretrained_dir", "weights.npz"]


def _text_npz():
    Path("weights.npz").write_text("<html>")
    return ["--pretrained_dir", "weights.npz"]


def _cut_npz():
    weights()
    os.truncate("weights.npz", 50_000)
    return ["--pretrained_dir", "weights.npz"]


def _damaged_npz():
    weights()
    with zipfile.ZipFile("weights.npz") as f:
        member = f.getinfo("cls.npy")
    data = bytearray(Path("weights.npz").read_bytes())
    data[member.header_offset + 250] ^= 1
    Path("weights.npz").write_bytes(data)
    return ["--pretrained_dir", "weights.npz"]


def _npz_of(name, data, compressed=False):
    with zipfile.ZipFile("weights.npz", "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as f:
        f.writestr(name, data)
    return ["--pretrained_dir", "weights.npz"]


def _malicious_npz():
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([Touch()], dtype=object), allow_pickle=True)
    return _npz_of("cls.npy", file.getvalue())


def _absurd_npz():
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})
    return _npz_of("cls.npy", file.getvalue() + bytes(64))


def _bomb_npz():
    return _npz_of("cls.npy", bytes(2**28 + 1), compressed=True)


def _demo_npz():
    return ["--pretrained_dir", str(ROOT / "checkpoint" / "ViT-demo.npz")]


def _folder(**kwargs):
    write_images("pets", **kwargs)
    return ["--dataset", "pets"]


def _without(path):
    def make():
        words = _folder()
        shutil.rmtree(path)
        return words

    return make


def _with_folder(path):
    def make():
        words = _folder()
        os.mkdir(path)
        return words

    return make


def _unknown_class():
    words = _folder()
    shutil.copytree("pets/test/ant", "pets/test/wasp")
    return words


def _cut_picture():
    words = _folder()
    os.truncate("pets/train/bee/3.png", 200)
    return words


def _bomb_picture():
    """The header of a PNG of 60,000 by 60,000 pixels, in 57 bytes."""
    words = _folder()
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(x)) + k + x + struct.pack(">I", zlib.crc32(k + x)) for k, x in chunks)
    Path("pets/train/bee/3.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return words


def _cifar(files, monkeypatch):
    """A data folder with files of a CIFAR-10 that is not the published one, on a machine without a network."""
    os.makedirs("data/cifar-10-batches-py")
    for name, data in files.items():
        Path("data", name).write_bytes(data)

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return ["--dataset", "cifar10"]


def _malicious_cifar(monkeypatch):
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    return _cifar({f"cifar-10-batches-py/{name}": pickle.dumps(Touch()) for name in names}, monkeypatch)


def _malicious_cifar_archive(monkeypatch):
    return _cifar({"cifar-10-python.tar.gz": pickle.dumps(Touch())}, monkeypatch)


def finetuned(edit=lambda state: state, **options):
    """A fine-tuned checkpoint of ten classes at 32 px, changed."""
    os.makedirs("output", exist_ok=True)
    state = {name: torch.zeros(shape) for name, shape in _shapes().items()}
    torch.save(edit(state), "output/a_checkpoint.bin", **options)
    return ["-v"]


def _shapes():
    from models.npz import layout

    return {entry.ours: entry.ours_shape for entry in layout(CONFIGS["testing"], 32, 10)}


def _pointer_npz():
    Path("pointer.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 350000000\n")
    return flags("--pretrained_dir", "pointer.npz")()


def _timm_npz():
    """Weights of timm's with a part that Google's models have not."""
    from models import layouts

    state = {name: torch.zeros(shape) for name, shape in _shapes().items()}
    torch.save({**layouts.from_ours(state, layouts.TIMM), "reg_token": torch.zeros(1, 4, 32)}, "timm.pth")
    return flags("--pretrained_dir", "timm.pth")()


def _state_npz():
    torch.save({"format": 1, "step": 1, "optimizer": {}}, "b_last.pt")
    return flags("--pretrained_dir", "b_last.pt")()


def _text_bin():
    finetuned()
    Path("output/a_checkpoint.bin").write_text("hello")
    return ["-v"]


def _cut_bin():
    finetuned()
    os.truncate("output/a_checkpoint.bin", 20_000)
    return ["-v"]


def _absurd_bin(state):
    return {**state, "head.weight": torch.zeros(1).expand(10**6, 10**6)}


def _malicious(state):
    return {**state, "more": Touch()}


def _bomb_bin():
    """The file of torch.save packed anew, so that it unpacks to 2000 times its size."""
    finetuned(lambda state: {"head.weight": torch.zeros(10_000_000)})
    with zipfile.ZipFile("output/a_checkpoint.bin") as f:
        members = {name: f.read(name) for name in f.namelist()}
    with zipfile.ZipFile("output/a_checkpoint.bin", "w", zipfile.ZIP_DEFLATED) as f:
        for name, data in members.items():
            f.writestr(name, data)
    return ["-v"]


def state(spoil):
    """A state to go on from, spoiled."""

    def make():
        Path("output").mkdir(exist_ok=True)
        checkpoint.save_state("output/a_last.pt", checkpoint.TrainingState({"--seed": 42}, {}, step=3))
        spoil(Path("output/a_last.pt"))
        return []

    return make


def _another_format(path):
    torch.save({**torch.load(path, weights_only=True), "format": 0}, path)


FLAGS, NPZ, DATA, BEST, STATE = (
    "Flags", "Pretrained weights", "Data", "Fine-tuned checkpoints, for `-v`", "Runs that go on",
)  # fmt: skip
INPUT = [
    (FLAGS, "an unknown flag", flags("--fp17")),
    (FLAGS, "an unknown model", flags("--model_type", "ViT-X")),
    (FLAGS, "a word for a number", flags("--num_steps", "abc")),
    (FLAGS, "`-v` with another word", flags("-v", "maybe")),
    (FLAGS, "no updates", flags("--num_steps", "0")),
    (FLAGS, "saving every 0 updates", flags("--save_every", "0")),
    (FLAGS, "a negative learning rate", flags("--learning_rate", "-1")),
    (FLAGS, "a learning rate that is no number", flags("--learning_rate", "nan")),
    (FLAGS, "a norm of 0", flags("--max_grad_norm", "0")),
    (FLAGS, "all dropped", flags("--dropout", "1")),
    (FLAGS, "a name with a folder", flags("--name", "a/b")),
    (FLAGS, "a name too long for a file", flags("--name", "n" * 230)),
    (FLAGS, "a size that patches do not divide", flags("--img_size", "40")),
    (FLAGS, "a batch that parts do not divide",
     flags("--train_batch_size", "8", "--gradient_accumulation_steps", "3")),
    (FLAGS, "a seed too large", flags("--seed", str(2**63))),
    (FLAGS, "negative workers", flags("--num_workers", "-1")),
    (FLAGS, "a checkpoint to evaluate, in a training", flags("--load_model_dir", "a.bin")),
    (FLAGS, "apex without a GPU", flags("--fp16", "--amp_backend", "apex")),
    (FLAGS, "apex in bfloat16", flags("--fp16", "--amp_backend", "apex", "--amp_dtype", "bfloat16")),
    (FLAGS, "a rank without a launcher", flags("--local_rank", "1")),
    (NPZ, "no file", flags("--model_type", "ViT-B_16", "--img_size", "224",
                           "--pretrained_dir", "checkpoint/ViT-B_16.npz")),
    (NPZ, "no file, and another model's name", flags(
        "--model_type", "ViT-B_32", "--img_size", "224", "--pretrained_dir", "checkpoint/ViT-B_16.npz")),
    (NPZ, "no file of a model that has none to download", flags("--pretrained_dir", "checkpoint/ViT-B_16.npz")),
    (NPZ, "a folder without it", flags("--model_type", "ViT-B_32", "--img_size", "224", "--pretrained_dir", ".")),
    (NPZ, "a page that says why there is no file", _text_npz),
    (NPZ, "a download that broke off", _cut_npz),
    (NPZ, "a damaged byte", _damaged_npz),
    (NPZ, "an array is missing", lambda: weights(cls=None)),
    (NPZ, "not a number", lambda: weights(cls=np.full((1, 1, 32), np.nan, np.float32))),
    (NPZ, "whole numbers", lambda: weights(cls=np.zeros((1, 1, 32), np.int32))),
    (NPZ, "another model's weights", _demo_npz),
    (NPZ, "timm's weights with a part without a place", _timm_npz),
    (NPZ, "a Git LFS pointer", _pointer_npz),
    (NPZ, "a training state", _state_npz),
    (NPZ, "a pickle that would run code", _malicious_npz),
    (NPZ, "an absurd shape", _absurd_npz),
    (NPZ, "a file that unpacks to fill the memory", _bomb_npz),
    (DATA, "no such data set", flags("--dataset", "nosuch")),
    (DATA, "a folder without a test part", _without("pets/test")),
    (DATA, "no classes", _without("pets/train")),
    (DATA, "a class without pictures", _with_folder("pets/train/wasp")),
    (DATA, "a class that is not trained on", _unknown_class),
    (DATA, "a picture that is cut off", _cut_picture),
    (DATA, "a picture that unpacks to fill the memory", _bomb_picture),
    (BEST, "no checkpoint", flags("-v")),
    (BEST, "another size", lambda: [*finetuned(), "--img_size", "64"]),
    (BEST, "other classes", lambda: [*finetuned(), *_folder()]),
    (BEST, "another model", lambda: [*finetuned(), "--model_type", "ViT-demo"]),
    (BEST, "no state_dict", lambda: finetuned(lambda x: {"weights": list(x.values())})),
    (BEST, "no head", lambda: finetuned(lambda x: {k: v for k, v in x.items() if "head" not in k})),
    (BEST, "a part without a place", lambda: finetuned(lambda x: {**x, "transformer.reg_token": x["head.bias"]})),
    (BEST, "another kind of file", _text_bin),
    (BEST, "a file that is cut off", _cut_bin),
    (BEST, "a pickle that would run code", lambda: finetuned(_malicious)),
    (BEST, "such a pickle in the format of old", lambda: finetuned(_malicious, _use_new_zipfile_serialization=False)),
    (BEST, "an absurd shape", lambda: finetuned(_absurd_bin)),
    (BEST, "a file that unpacks to fill the memory", _bomb_bin),
    (STATE, "no such state", flags("--resume", "nosuch_last.pt")),
    (STATE, "a state that is cut off", state(lambda path: os.truncate(path, 500))),
    (STATE, "a pickle that would run code", state(lambda path: torch.save({"format": 1, "x": Touch()}, path))),
    (STATE, "another version's state", state(_another_format)),
]  # fmt: skip


@pytest.mark.parametrize(("group", "what", "make"), INPUT, ids=[f"{g.split()[0]}: {w}" for g, w, _ in INPUT])
def test_what_the_user_got_wrong(group, what, make, capfd, record_fault):
    words = make()
    before = sorted(p for p in Path().rglob("*") if p.is_file())
    status = status_of(*words)
    record_fault(group, what, told(capfd).replace(f"{ROOT}/", ""), status)
    assert status == 2
    assert sorted(p for p in Path().rglob("*") if p.is_file()) == before  # and nothing that a pickle touched


def test_a_run_without_a_name(capfd, record_fault):
    with pytest.raises(SystemExit) as e:
        train.main([])
    record_fault(FLAGS, "no name", told(capfd), e.value.code)


def test_other_settings(capfd, record_fault):
    assert run("--num_steps", "5") == 0
    status = run("--num_steps", "4", "--seed", "7", "--fp16")
    record_fault(STATE, "another run's state", told(capfd), status)


def test_a_second_process(capfd, record_fault):
    os.makedirs("output")
    code = "import fcntl, os, sys; f = open('output/.a.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
    code += "f.write(f'{os.getpid()}\\n'); f.flush(); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline()
        status = run()
        holder.communicate()
    record_fault(STATE, "a second process of the name", told(capfd), status)


@pytest.mark.parametrize(
    ("what", "make"),
    [("CIFAR-10 whose files are others", _malicious_cifar), ("a CIFAR-10 archive that is another",
                                                              _malicious_cifar_archive)],
)  # fmt: skip
def test_cifar_is_compared_with_its_md5_before_it_is_unpickled(what, make, monkeypatch, capfd, record_fault):
    status = run(*make(monkeypatch))
    record_fault(DATA, what, told(capfd), status)
    assert status == 1
    assert not os.path.exists("touched")


# ---- the disk ----

DISK, MACHINE, LOSS, STOP = "The disk", "The machine", "Losses that are not finite", "Signals"


def mount(folder, size="1m"):
    """Gives a folder a small file system of its own; False where that needs rights that are not there."""
    os.makedirs(folder, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    return bool(shutil.which("mount")) and not subprocess.run(command, capture_output=True).returncode


@contextlib.contextmanager
def mounted(folder):
    """``mount`` for a while; skips where it cannot."""
    if not mount(folder):
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder):
    """Leaves no byte free."""
    with contextlib.suppress(OSError), open(os.path.join(folder, "filler"), "wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))


def at_update(monkeypatch, number, do):
    """Something happens to the run once it has logged an update."""
    real = TrainingLog.update

    def update(self, step, *args):
        real(self, step, *args)
        if step == number:
            do()

    monkeypatch.setattr(TrainingLog, "update", update)


def fails(capfd, status, *words, at=5):
    """The message of a run that fails, whose state of an earlier update is whole and untouched."""
    assert run(*words) == status
    every_name_is_whole()
    assert last_state().step == at
    assert not [f for f in os.listdir("output") if f.endswith(".tmp")]
    return told(capfd)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the run leaves that nothing befalls."""
    return undisturbed(tmp_path_factory.mktemp("whole"))


def test_a_full_disk_and_then_room(monkeypatch, capfd, record_fault, whole):
    with mounted("output"):
        with monkeypatch.context() as patch:
            at_update(patch, 7, lambda: fill("output"))
            record_fault(DISK, "no room for the state or the best weights", fails(capfd, 1), 1)
        os.remove("output/filler")
        assert run() == 0
        assert_same(outcome(), whole)


def test_a_full_disk_of_the_logs(monkeypatch, capfd, record_fault):
    small = ["--train_batch_size", "2", "--num_steps", "80", "--log_every", "1", "--eval_every", "100",
             "--save_every", "5"]  # fmt: skip
    with mounted("logs"):
        with monkeypatch.context() as patch:
            at_update(patch, 5, lambda: fill("logs"))
            assert run(*small) == 1
        error = told(capfd)
        every_name_is_whole()
        assert last_state().step >= 5
        os.remove("logs/filler")
        assert run(*small) == 0
        assert [line["step"] for line in lines()] == [*range(1, 81), 80]
    name = error.split()[0]
    assert name.startswith("logs/a/")
    record_fault(DISK, "no room for the logs", error.replace(name, "logs/a/..."), 1)


def test_a_disk_that_becomes_read_only(monkeypatch, capfd, record_fault):
    def read_only():
        subprocess.run(["mount", "--bind", "output", "output"], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", "output"], check=True)

    with mounted("output"):
        try:
            with monkeypatch.context() as patch:
                at_update(patch, 7, read_only)
                record_fault(DISK, "the disk becomes read-only", fails(capfd, 1), 1)
            status = run()
            record_fault(DISK, "a read-only folder, from the start", told(capfd), status)
            assert status == 2
        finally:
            subprocess.run(["umount", "output"], check=True)
        assert run() == 0


def test_a_file_in_the_way(capfd, record_fault):
    Path("afile").write_text("")
    status = run("--output_dir", "afile")
    record_fault(DISK, "a file in the folder's place", told(capfd), status)
    assert status == 2


def test_a_folder_that_vanishes(monkeypatch, capfd, record_fault):
    at_update(monkeypatch, 7, lambda: shutil.rmtree("output"))
    assert run() == 1
    record_fault(DISK, "the folder vanishes", told(capfd), 1)


def test_logs_that_vanish_cost_no_more_than_the_report(monkeypatch, caplog):
    at_update(monkeypatch, 7, lambda: shutil.rmtree("logs"))
    assert run() == 0
    assert "The report output/a_report.html could not be written (" in caplog.text
    every_name_is_whole()
    assert last_state().step == 13


def test_a_limit_to_the_size_of_files(monkeypatch, capfd, record_fault):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_update(
        monkeypatch, 7, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, limits[1]))
    )  # between the logs and the weights
    try:
        message = fails(capfd, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    record_fault(DISK, "files may not be that large", message, 1)


# ---- the machine ----


def test_a_worker_that_is_killed(monkeypatch, capfd, record_fault):
    write_images("pets", several_sizes())

    def kill():
        workers = [p for p in torch.multiprocessing.active_children() if p.is_alive()]
        assert len(workers) == 2
        for p in workers:
            os.kill(p.pid, signal.SIGKILL)

    at_update(monkeypatch, 7, kill)
    message = fails(capfd, 1, "--dataset", "pets", "--num_workers", "2", "--num_steps", "200", "--eval_every", "5")
    record_fault(MACHINE, "a process that decodes pictures is killed", message, 1)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_picture_that_turns_unreadable(workers, monkeypatch, capfd, record_fault):
    write_images("pets", several_sizes())
    at_update(monkeypatch, 7, lambda: [os.truncate(p, 100) for p in Path("pets/train").rglob("*.png")])
    message = fails(capfd, 2, "--dataset", "pets", "--num_workers", workers, "--num_steps", "40")
    name = message.split()[0]
    assert name.startswith("pets/train/")
    record_fault(DATA, "a picture that turned unreadable", message.replace(name, "pets/train/ant/3.png"), 2)


def short_of_memory(error, where, name, nth):
    real, calls = getattr(where, name), 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth:
            raise error
        return real(*args, **kwargs)

    return wrapper


def cpu_error():
    """What torch raises when the system gives it no memory."""
    with pytest.raises(RuntimeError) as e:
        torch.empty(2**60, dtype=torch.uint8)
    return e.value


CUDA_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")


@pytest.mark.parametrize(
    ("what", "error", "nth", "words"),
    [
        ("no memory for an update, on a CPU", cpu_error, 18, ()),
        ("no memory for an update, on a GPU", lambda: CUDA_ERROR, 11, ("--gradient_accumulation_steps", "1")),
        ("no memory for a single picture", MemoryError, 110, ("--gradient_accumulation_steps", "16")),
        ("no memory for an evaluation", lambda: CUDA_ERROR, 26, ()),
    ],
)
def test_out_of_memory(what, error, nth, words, monkeypatch, capfd, record_fault):
    functional = torch.nn.functional
    monkeypatch.setattr(
        functional, "cross_entropy", short_of_memory(error(), functional, "cross_entropy", nth)
    )  # fmt: skip
    record_fault(MACHINE, what, fails(capfd, 1, *words), 1)


def test_out_of_memory_for_real():
    """The system refuses: half a GiB of addresses more are enough for this model, and not for this batch."""
    code = (
        "import resource, sys, train\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + 2**29\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "sys.exit(train.main(sys.argv[1:]))"
    )
    words = ["--train_batch_size", "1024", "--gradient_accumulation_steps", "1", "--img_size", "192"]
    done = subprocess.run(
        [sys.executable, "-c", code, *RUN, *words], capture_output=True, text=True, timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "train.py: error: out of memory with 1024 pictures at a time (--train_batch_size 1024); "
        "--gradient_accumulation_steps 2 computes the same update 512 at a time"
    )


# ---- losses ----


def test_losses_that_are_not_finite(capfd, record_fault):
    bad = ["--learning_rate", "1e38", "--max_grad_norm", "inf"]
    assert run(*bad, "--eval_every", "100") == 1
    record_fault(LOSS, "the training diverges", told(capfd), 1)
    assert run(*bad, "--eval_every", "3", "--log_every", "100", "--name", "b") == 1
    record_fault(LOSS, "an evaluation finds it first", told(capfd), 1)
    assert run(*bad, "--save_every", "1", "--log_every", "100", "--eval_every", "100", "--name", "c") == 1
    record_fault(LOSS, "a save finds it first", told(capfd), 1)
    assert last_state("c").step >= 1
    assert all(x.isfinite().all() for x in last_state("c").model.values())
    for name in ("a", "b", "c"):
        assert not os.path.exists(f"output/{name}_checkpoint.bin")


@pytest.mark.parametrize(
    ("what", "save_every"),
    [("the training diverges after a save", "5"), ("the same after an evaluation, before the first save", "100")],
)
def test_the_last_good_file_is_named(what, save_every, monkeypatch, capfd, record_fault):
    functional = torch.nn.functional
    real, calls = functional.cross_entropy, 0

    def cross_entropy(*args, **kwargs):  # ten parts of updates, an evaluation in four, and update 7 begins
        nonlocal calls
        calls += 1
        return real(*args, **kwargs) * (float("nan") if calls == 17 else 1)

    monkeypatch.setattr(functional, "cross_entropy", cross_entropy)
    assert run("--save_every", save_every) == 1
    every_name_is_whole()
    assert os.path.exists("output/a_last.pt") == (save_every == "5")
    record_fault(LOSS, what, told(capfd), 1)


def test_no_loss_scale_fits(monkeypatch, capfd, record_fault):
    monkeypatch.setattr(precision, "MAX_SKIPPED_IN_A_ROW", 5)
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: real(*a, init_scale=2.0**60, **k))
    words = ["--fp16", "--fp16_opt_level", "O1", "--amp_dtype", "float16", "--save_every", "3"]
    status, message = run(*words), told(capfd)
    record_fault(LOSS, "float16 gradients overflow again and again (after 50 times; here 5)", message, status)
    assert status == 1
    assert run(*words) == 1  # goes on after the third update
    assert told(capfd) == message


# ---- signals ----


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signals(number, times, monkeypatch, capfd, record_fault):
    at_update(monkeypatch, 7, lambda: [os.kill(os.getpid(), number) for _ in range(times)])
    message = fails(capfd, 128 + number, at=7 if times == 1 else 5)
    what = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM, as from `kill` or a scheduler"}[number]
    record_fault(STOP, f"{what}, {'once' if times == 1 else 'twice'}", message, 128 + number)


# ---- the page ----


def test_the_page_has_what_the_tests_gave_and_nothing_else(request, recorded_faults):
    """The last test of the module: it compares where all the others ran."""
    mine = [item for item in request.session.items if item.module is request.module]
    ids = {item.name for item in mine}
    ran = len(mine) > 30 and {f"test_signals[{name}-2]" for name in ("SIGINT", "SIGTERM")} <= ids
    if not ran or request.session.testsfailed:
        pytest.skip("only a part of this module's tests ran")
    rows = list(dict.fromkeys(recorded_faults))
    assert len(rows) >= 40
    text = faults.PAGE.read_text(encoding="utf-8")
    if can_mount := mount("tried"):
        subprocess.run(["umount", "tried"], check=True)
    if request.config.getoption("--write_faults"):
        assert can_mount, "some rows need the right to mount"
        faults.PAGE.write_text(text.split(faults.BEGIN)[0] + faults.BEGIN + faults.tables(rows), encoding="utf-8")
        return
    known = [row for group in faults.rows_of(text).values() for row in group]
    assert len(known) == len(set(known))
    if can_mount:
        assert set(known) == {str(row) for row in rows}
