"""Bad input for train.py: flags, weights, data, checkpoints, saved states, launchers.  Nothing may be written.

One table of many short rows, and the functions that provoke them: hence long.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import layouts, npz
from models.configs import CONFIGS
from tests.helpers import fake_npz
from tests.helpers.errors import Case, Group, Launch
from tests.helpers.folders import tree
from tests.helpers.forked import holding, run_forked
from tests.helpers.runs import ROOT, RUN, write_images
from utils import checkpoint

CONFIG, CLASSES = CONFIGS["testing"], 10
DEMO = str(ROOT / "checkpoint" / "ViT-demo.npz")


class Touch:
    """Unpickling this creates a file: what a malicious one could do with worse."""

    def __reduce__(self):
        return open, ("touched", "w")


# ---- pretrained weights ----


def weights(**changes: np.ndarray | None) -> list[str]:
    """A pretrained file of the testing model, changed; None takes an array away."""
    arrays = {**fake_npz.arrays(CONFIG, 32), **changes}
    fake_npz.save("weights.npz", {name: x for name, x in arrays.items() if x is not None})
    return ["--pretrained_dir", "weights.npz"]


def given(name: str, content: bytes) -> Callable[[], list[str]]:
    """Some other file in the place of weights."""

    def make() -> list[str]:
        Path(name).write_bytes(content)
        return ["--pretrained_dir", name]

    return make


def cut_npz() -> list[str]:
    weights()
    os.truncate("weights.npz", 50_000)
    return ["--pretrained_dir", "weights.npz"]


def damaged_npz() -> list[str]:
    weights()
    with zipfile.ZipFile("weights.npz") as f:
        member = f.getinfo("cls.npy")
    data = bytearray(Path("weights.npz").read_bytes())
    data[member.header_offset + 250] ^= 1
    return given("weights.npz", bytes(data))()


def npz_of(data: bytes, compressed: bool = False) -> list[str]:
    with zipfile.ZipFile("weights.npz", "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as f:
        f.writestr("cls.npy", data)
    return ["--pretrained_dir", "weights.npz"]


def malicious_npz() -> list[str]:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([Touch()], dtype=object), allow_pickle=True)
    return npz_of(file.getvalue())


def absurd_npz() -> list[str]:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})
    return npz_of(file.getvalue() + bytes(64))


def shapes() -> dict[str, tuple[int, ...]]:
    return {entry.ours: entry.ours_shape for entry in npz.layout(CONFIG, 32, CLASSES)}


def timm_weights() -> list[str]:
    state = layouts.from_ours({name: torch.zeros(shape) for name, shape in shapes().items()}, layouts.TIMM)
    torch.save({**state, "reg_token": torch.zeros(1, 4, 32)}, "timm.pth")
    return ["--pretrained_dir", "timm.pth"]


def state_as_weights() -> list[str]:
    torch.save({"format": 1, "step": 1, "optimizer": {}}, "b_last.pt")
    return ["--pretrained_dir", "b_last.pt"]


# ---- data ----


def pets(change: Callable[[], object] = lambda: None) -> Callable[[], list[str]]:
    """A folder of images, changed."""

    def make() -> list[str]:
        write_images("pets")
        change()
        return ["--dataset", "pets"]

    return make


def folder(*paths: str) -> Callable[[], list[str]]:
    """A folder with small images at these paths."""

    def make() -> list[str]:
        tree("pets", *paths)
        return ["--dataset", "pets"]

    return make


def parts(train: str = "{ant,bee}", test: str = "{ant,bee}", *paths: str) -> Callable[[], list[str]]:
    """A folder with the parts train and test, of one image a class."""
    return folder(f"train/{train}/1.png", f"test/{test}/1.png", *paths)


def cut_image() -> None:
    os.truncate("pets/train/bee/3.png", os.path.getsize("pets/train/bee/3.png") // 2)


def bomb_image() -> None:
    """The header of a PNG of 60,000 by 60,000 pixels, in 57 bytes."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(x)) + k + x + struct.pack(">I", zlib.crc32(k + x)) for k, x in chunks)
    Path("pets/train/bee/3.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def cifar(*names: str) -> Callable[[], Launch]:
    """A data folder with files of a CIFAR-10 that is not the published one, and no network."""

    def make() -> Launch:
        os.makedirs("data/cifar-10-batches-py")
        for name in names:
            Path("data", name).write_bytes(pickle.dumps(Touch()))
        nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
        return Launch(["--dataset", "cifar10"], env=nowhere, after=untouched)

    return make


def untouched() -> None:
    assert not os.path.exists("touched")


# ---- fine-tuned checkpoints and states ----


def finetuned(edit: Callable[[dict], Any] = lambda state: state, *flags: str, **options: Any) -> Callable[[], list]:
    """A fine-tuned checkpoint of ten classes at 32 px, changed."""

    def make() -> list[str]:
        os.makedirs("output")
        state = {name: torch.zeros(shape) for name, shape in shapes().items()}
        torch.save(edit(state), "output/a_checkpoint.bin", **options)
        return ["-v", *flags]

    return make


def described_pets(*folders: str) -> Callable[[], list[str]]:
    """A checkpoint of ant, bee and eight more with its metadata, and images to test on in these folders."""

    def make() -> list[str]:
        classes = ["ant", "bee", *(str(i) for i in range(8))]
        metadata = checkpoint.CheckpointMetadata("testing", 32, classes, "erf", "pets", 4, 0.5)
        state = {name: torch.zeros(shape) for name, shape in shapes().items()}
        os.makedirs("output")
        checkpoint.save_weights("output/a_checkpoint.bin", state, metadata)
        tree("pets/test", *(f"{name}/1.png" for name in folders))
        return ["-v", "--dataset", "pets"]

    return make


def bin_of(content: Callable[[bytes], bytes]) -> Callable[[], list[str]]:
    """The same with its bytes changed."""

    def make() -> list[str]:
        flags, path = finetuned()(), Path("output/a_checkpoint.bin")
        path.write_bytes(content(path.read_bytes()))
        return flags

    return make


def bomb_bin(data: bytes) -> bytes:
    """The file of torch.save with 40 MB of zeros more, which unpacks to 2000 times its size."""
    with zipfile.ZipFile(io.BytesIO(data)) as f, zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as g:
        for name in f.namelist():
            g.writestr(name, f.read(name) if "/data/0" not in name else bytes(40_000_000))
    return out.getvalue()


@functools.cache
def finished_run() -> tempfile.TemporaryDirectory:
    """The folder of a run of five steps that is over, made once; it goes when the tests end."""
    folder = tempfile.TemporaryDirectory()
    code, _, err = run_forked(["train.py", *RUN, "--num_steps", "5"], cwd=folder.name)
    assert code == 0, err
    return folder


def trained() -> None:
    """A run of five steps that is over, in the current folder."""
    shutil.copytree(finished_run().name, ".", dirs_exist_ok=True)


def state(spoil: Callable[[str], object]) -> Callable[[], list[str]]:
    """A saved state, spoiled."""

    def make() -> list[str]:
        trained()
        spoil("output/a_last.pt")
        return ["--name", "a"]

    return make


def another_format(path: str) -> None:
    torch.save({**torch.load(path, weights_only=True), "format": 0}, path)


def another_run() -> list[str]:
    trained()
    return ["--num_steps", "4", "--seed", "7", "--fp16"]


def other_weights() -> list[str]:
    weights()
    os.rename("weights.npz", "before.npz")
    short = ["--num_steps", "1", "--warmup_steps", "0"]
    code, _, err = run_forked(["train.py", *RUN, "--name", "c", *short, "--pretrained_dir", "before.npz"])
    assert code == 0, err
    return ["--name", "c", *short, *weights(cls=np.ones((1, 1, 32), np.float32))]


def lock_held() -> Launch:
    os.makedirs("output")
    return Launch(within=holding("output/.a.lock"))


def made_before(make: Callable[[], object], *flags: str) -> Callable[[], list[str]]:
    """Flags, after a file or folder has been made that they contradict."""

    def both() -> list[str]:
        make()
        return list(flags)

    return both


# ---- GPUs ----


def pretend_gpus(number: int) -> Callable[[], None]:
    """As if there were GPUs, in the child; errors come before anything is computed there."""

    def patch() -> None:
        torch.cuda.is_available, torch.cuda.device_count = lambda: number > 0, lambda: number
        torch.cuda.set_device = lambda device: None

    return patch


def with_gpu(*flags: str, gpus: int = 1, **env: str) -> Callable[[], Launch]:
    return lambda: Launch([*flags, "--device", "auto" if gpus else "cuda"], env=env, prepare=pretend_gpus(gpus))


INPUTS = [
    Group("Flags", flags=RUN, cases=[
        Case("name-missing", "no name", lambda: Launch(alone=True), "--name"),
        Case("flag-unknown", "an unknown flag", "--fp17"),
        Case("model-unknown", "an unknown model", "--model_type ViT-X"),
        Case("choice-unknown", "a word that is not offered", "--amp_backend amp"),
        Case("number-expected", "a word for a number", "--num_steps abc"),
        Case("yes-or-no-expected", "`-v` with another word", "-v maybe"),
        Case("steps-none", "no steps", "--num_steps 0"),
        Case("save-every-none", "saving every 0 steps", "--save_every 0"),
        Case("learning-rate-negative", "a negative learning rate", "--learning_rate -1"),
        Case("learning-rate-nan", "a learning rate that is no number", "--learning_rate nan"),
        Case("max-grad-norm-none", "a norm of 0", "--max_grad_norm 0"),
        Case("dropout-all", "all dropped", "--dropout 1"),
        Case("name-is-path", "a name with a folder", "--name a/b"),
        Case("name-too-long", "a name too long for a file", f"--name {'n' * 230}"),
        Case("img-size-not-multiple", "a size that patches do not divide", "--img_size 40"),
        Case("img-size-too-small", "a size below one patch", "--img_size 8"),
        Case("accumulation-not-divisor", "a batch that micro-batches do not divide",
             "--train_batch_size 8 --gradient_accumulation_steps 3"),
        Case("test-fraction-all", "all images to test on, in a training", "--test_fraction 1"),
        Case("seed-too-large", "a seed too large", f"--seed {2**63}"),
        Case("workers-negative", "negative workers", "--num_workers -1"),
        Case("checkpoint-while-training", "a checkpoint to evaluate, in a training", "--load_model_dir a.bin"),
        Case("device-missing", "a GPU that is not there", with_gpu(gpus=0), "--device cuda"),
        Case("apex-without-gpu", "apex without a GPU", "--fp16 --amp_backend apex", "--amp_backend"),
        Case("apex-bfloat16", "apex in bfloat16", "--fp16 --amp_backend apex --amp_dtype bfloat16", "bfloat16"),
        Case("apex-missing", "no apex, or another package of that name",
             with_gpu("--fp16", "--amp_backend", "apex"), "--amp_backend"),
        Case("deterministic-workspace", "a variable that forbids `--deterministic`",
             with_gpu("--deterministic", CUBLAS_WORKSPACE_CONFIG=":0:0"), "CUBLAS_WORKSPACE_CONFIG"),
        Case("tensorboard-missing", "the package tensorboard is not there, or too old for what it needs itself",
             lambda: Launch(prepare=lambda: sys.modules.update(tensorboard=None)), "pip install"),
    ]),
    Group("Pretrained weights", flags=RUN, cases=[
        Case("pretrained-missing", "no file",
             "--pretrained_dir checkpoint/ViT-B_16.npz --model_type ViT-B_16 --img_size 224", "ViT-B_16"),
        Case("pretrained-of-other-name", "no file, and another model's name",
             "--pretrained_dir checkpoint/ViT-B_16.npz --model_type ViT-B_32 --img_size 224", "ViT-B_32"),
        Case("pretrained-unknown-source", "no file of a model that has none to download",
             "--pretrained_dir checkpoint/ViT-B_16.npz", "--pretrained_dir"),
        Case("pretrained-not-in-folder", "a folder without it",
             "--pretrained_dir . --model_type ViT-B_32 --img_size 224", "imagenet21k_ViT-B_32.npz"),
        Case("pretrained-is-page", "a page that says why there is no file", given("weights.npz", b"<html>"), "HTML"),
        Case("pretrained-is-text", "another kind of file", given("weights.npz", b"hello"), "hello"),
        Case("pretrained-cut-off", "a download that broke off", cut_npz, "weights.npz"),
        Case("pretrained-damaged", "a damaged byte", damaged_npz, "cls.npy"),
        Case("pretrained-array-missing", "an array is missing", lambda: weights(cls=None), "cls"),
        Case("pretrained-nan", "not a number",
             lambda: weights(cls=np.full((1, 1, 32), np.nan, np.float32)), "NaN"),
        Case("pretrained-integers", "whole numbers", lambda: weights(cls=np.zeros((1, 1, 32), np.int32)), "int32"),
        Case("pretrained-other-model", "another model's weights", f"--pretrained_dir {DEMO}", "--model_type ViT-demo"),
        Case("pretrained-timm-extra", "timm's weights with a part without a place", timm_weights, "reg_token"),
        Case("pretrained-lfs-pointer", "a Git LFS pointer", given(
            "pointer.npz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 350000000\n"), "git lfs"),
        Case("pretrained-is-state", "a training state", state_as_weights, "b_checkpoint.bin"),
        Case("pretrained-pickle", "a pickle that would run code", malicious_npz, "weights.npz"),
        Case("pretrained-absurd-shape", "an absurd shape", absurd_npz, "1000000"),
        Case("pretrained-bomb", "a file that unpacks to fill the memory",
             lambda: npz_of(bytes(2**28 + 1), compressed=True), "0.3 GiB"),
    ]),
    Group("Data", flags=RUN, cases=[
        Case("dataset-unknown", "no such data set", "--dataset nosuch"),
        Case("dataset-is-file", "a file in the folder's place",
             made_before(lambda: Path("pets.zip").touch(), "--dataset", "pets.zip"), "pets.zip"),
        Case("dataset-empty", "a folder without class folders", folder("notes.txt"), "pets/<class>/"),
        Case("dataset-images-only", "images that are in no class folders", folder("{0..3}.png"), "4 images"),
        Case("dataset-no-train", "a folder with a part to test on only", pets(lambda: shutil.rmtree("pets/train")),
             "train/"),
        Case("dataset-classes-beside-test", "class folders beside the part to test on",
             folder("{ant,bee}/1.png", "test/ant/1.png", "test/bee/1.png"), "pets/train/"),
        Case("dataset-flat-train", "training images in no class folders", folder("train/{0..3}.png"),
             "pets/train/<class>/"),
        Case("dataset-flat-test", "test images in no class folders", folder("train/{ant,bee}/1.png", "test/1.png"),
             "tools.predict"),
        Case("dataset-before-weights", "the same, and the weights are missing as well",
             lambda: [*folder("train/{ant,bee}/1.png", "test/1.png")(), "--pretrained_dir", "nosuch.npz"], "test/"),
        Case("dataset-before-checkpoint", "the same, and the checkpoint to evaluate is missing as well",
             lambda: [*folder("train/{ant,bee}/1.png", "test/1.png")(), "-v"], "test/"),
        Case("dataset-nested", "the folder lies in another of its name", folder("pets/{ant,bee}/1.png"),
             "--dataset pets/pets"),
        Case("dataset-parts-nested", "so do the parts", folder("pets/train/ant/1.png", "docs/notes.txt"),
             "--dataset pets/pets"),
        Case("dataset-folder-between", "a folder between a part and its classes",
             folder("train/images/{ant,bee}/1.png", "test/ant/1.png"), "pets/train/images"),
        Case("dataset-parts-in-classes", "parts below the classes, instead of classes below the parts",
             folder("ant/{train,test}/1.png", "bee/{train,test}/1.png"), "pets/test/ant/"),
        Case("dataset-like-parts", "parts of other names", folder("training_set/{ant,bee}/1.png", "test_set/ant/1.png"),
             "training_set"),
        Case("dataset-same-folders", "class folders in each of several folders",
             folder("2019/{ant,bee}/1.png", "2020/{ant,bee}/1.png"), "2019"),
        Case("dataset-part-twice", "a part in two spellings", folder("train/ant/1.png", "Training/bee/1.png"),
             "Training/"),
        Case("dataset-train-or-class", "a folder `train/` that may be a part or a class",
             folder("bus/1.png", "train/{steam,diesel}/1.png"), "--dataset pets/train"),
        Case("test-fraction-no-effect", "a share to test on beside a part to test on",
             lambda: [*parts()(), "--test_fraction", "0.3"], "--test_fraction"),
        Case("test-fraction-of-named", "the same for a data set with a name", "--test_fraction 0.3"),
        Case("class-alone", "a single class", folder("ant/{0..3}.png"), "ant"),
        Case("class-of-one-image", "a class of one image, where there is no part to test on",
             folder("ant/1.png", "bee/{0..3}.png"), "pets/ant"),
        Case("class-in-other-case", "a class that each part spells differently", parts(test="{Ant,bee}"),
             "'Ant' and 'ant'"),
        Case("class-in-other-form", "the same to the eye, as on macOS: another Unicode form",
             parts("{ant,caf\u00e9}", "{ant,cafe\u0301}"), "Unicode form"),
        Case("class-twice", "the same in one part", folder("{caf\u00e9,cafe\u0301}/1.png"), "Unicode form"),
        Case("class-other-format", "a class of images in a format that is not read",
             folder("ant/{0..3}.png", "bee/{0..3}.cr2"), "convert them to JPEG"),
        Case("class-empty", "a class without images", pets(lambda: os.mkdir("pets/train/wasp")), "pets/train/wasp"),
        Case("class-not-trained", "a class that is not trained on",
             pets(lambda: shutil.copytree("pets/test/ant", "pets/test/wasp")), "wasp"),
        Case("class-not-tested", "a class that is not tested on", parts(test="ant"), "pets/test/bee"),
        Case("image-cut-off", "an image that is cut off", pets(cut_image),
             "pets/train/bee/3.png"),
        Case("image-bomb", "an image that unpacks to fill the memory", pets(bomb_image), "pets/train/bee/3.png"),
        Case("cifar-other-files", "CIFAR-10 whose files are others, which are not unpickled", cifar(*(
            f"cifar-10-batches-py/{x}" for x in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch",
                                                 "batches.meta"))), "--data_dir", code=1),
        Case("cifar-other-archive", "a CIFAR-10 archive that is another", cifar("cifar-10-python.tar.gz"),
             "c58f30108f718f92721af3b95e74349a"),
        Case("data-dir-is-file", "the archive in the place of its folder",
             made_before(lambda: Path("cifar-10-python.tar.gz").touch(), "--dataset", "cifar10", "--data_dir",
                         "cifar-10-python.tar.gz"), "expected a folder"),
    ]),
    Group("Fine-tuned checkpoints, for `-v`", flags=RUN, cases=[
        Case("checkpoint-missing", "no checkpoint", "-v", "output/a_checkpoint.bin"),
        Case("checkpoint-other-size", "another size", finetuned(lambda x: x, "--img_size", "64"), "--img_size 32"),
        Case("checkpoint-other-classes", "other classes", lambda: [*finetuned()(), *pets()()], "10"),
        Case("checkpoint-class-unknown", "a class that it was not trained for", described_pets("ant", "cat"), "cat"),
        Case("checkpoint-class-in-other-case", "the same but for its spelling", described_pets("Ant"),
             "'Ant' and 'ant'"),
        Case("checkpoint-folder-between", "a folder between the classes and what is given",
             described_pets("images/ant"), "--dataset pets/test/images"),
        Case("checkpoint-nothing-to-test", "no part to test on, after a training that had one",
             lambda: [*described_pets("ant")(), *(shutil.move("pets/test", "pets/train") and [])], "--test_fraction 1"),
        Case("checkpoint-other-model", "another model", finetuned(lambda x: x, "--model_type", "ViT-demo"),
             "--model_type testing"),
        Case("checkpoint-no-state-dict", "no state_dict", finetuned(lambda x: {"weights": list(x.values())}),
             "model.state_dict()"),
        Case("checkpoint-no-head", "no head", finetuned(lambda x: {k: v for k, v in x.items() if "head" not in k}),
             "head"),
        Case("checkpoint-extra", "a part without a place",
             finetuned(lambda x: {**x, "transformer.reg_token": x["head.bias"]}), "transformer.reg_token"),
        Case("checkpoint-is-text", "another kind of file", bin_of(lambda data: b"hello"), "hello"),
        Case("checkpoint-cut-off", "a file that is cut off", bin_of(lambda data: data[:20_000]),
             "output/a_checkpoint.bin"),
        Case("checkpoint-pickle", "a pickle that would run code", finetuned(lambda x: {**x, "more": Touch()}),
             "model.state_dict()"),
        Case("checkpoint-old-pickle", "such a pickle in the format of old",
             finetuned(lambda x: {**x, "more": Touch()}, _use_new_zipfile_serialization=False), "model.state_dict()"),
        Case("checkpoint-absurd-shape", "an absurd shape",
             finetuned(lambda x: {**x, "head.weight": torch.zeros(1).expand(10**6, 10**6)}), "1000000"),
        Case("checkpoint-bomb", "a file that unpacks to fill the memory", bin_of(bomb_bin),
             "output/a_checkpoint.bin"),
    ]),
    Group("Runs that resume", flags=RUN, cases=[
        Case("state-missing", "no such state", "--resume nosuch_last.pt", "nosuch_last.pt"),
        Case("state-cut-off", "a state that is cut off", state(lambda path: os.truncate(path, 500)), "--resume none"),
        Case("state-pickle", "a pickle that would run code",
             state(lambda path: torch.save({"format": 1, "x": Touch()}, path)), "--resume none"),
        Case("state-other-version", "another version's state", state(another_format), "--resume none"),
        Case("state-other-weights", "a run that began with other weights", other_weights,
             "weights.npz; it began with before.npz"),
        Case("state-other-settings", "another run's state", another_run, "--seed was 42, is 7"),
        Case("name-in-use", "a second process of the name", lock_held, "--name"),
        Case("folder-for-file", "a folder where the state is written",
             made_before(lambda: os.makedirs("output/a_last.pt"), "--name", "a"), "output/a_last.pt"),
        Case("output-not-writable", "a file in the folder's place",
             made_before(lambda: Path("afile").touch(), "--output_dir", "afile/output"), "afile/output"),
    ]),
]  # fmt: skip
