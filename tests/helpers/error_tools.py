"""Errors and warnings of the tools.  One table of many short rows, and the functions that provoke them: hence long."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models.modeling import VisionTransformer
from models.published import GoogleFile
from tests.helpers import fake_npz
from tests.helpers.downloads import publish
from tests.helpers.error_inputs import CONFIG
from tests.helpers.errors import Case, Group, Launch
from tests.helpers.exporting import make_checkpoint
from tests.helpers.forked import holding
from tests.helpers.servers import Bucket, Hub, make_content, serving

CHECKPOINT = "testing_checkpoint.bin"
LOAD = ["--load_model_dir", CHECKPOINT]
LOAD_CPU = [*LOAD, "--device", "cpu"]
NAMES = ",".join(f"class {i}" for i in range(10))


def checkpoint_and_image() -> None:
    """A checkpoint of ten classes at 32 px with its metadata, an image, and a text that is none."""
    make_checkpoint(Path(), "testing", 32)
    Image.new("RGB", (20, 20)).save("a.png")
    Path("text.png").write_text("no image")


def after(do: Callable[[], object], *flags: str) -> Callable[[], Sequence[str]]:
    """Flags, after something has been done to the files."""

    def make() -> Sequence[str]:
        do()
        return flags

    return make


def without_metadata() -> None:
    os.remove("testing_checkpoint.json")


def metadata_with(*flags: str, **changes: Any) -> Callable[[], Sequence[str]]:
    """The metadata changed."""

    def change() -> None:
        path = Path("testing_checkpoint.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return after(change, *(flags or ["a.png"]))


def out_of_memory() -> Launch:
    def prepare() -> None:
        def forward(self: VisionTransformer, x: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        VisionTransformer.forward = forward  # type: ignore[assignment]

    return Launch(["a.png", "--batch_size", "77"], prepare=prepare)


# ---- export ----

EXPORT = ["--format", "npz", "--output", "m.npz"]


def without_onnx() -> Launch:
    def prepare() -> None:
        import importlib.util

        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if "onnx" in name else real(name, *a)  # type: ignore

    return Launch(["--format", "onnx", "--output", "m.onnx"], prepare=prepare)


def another_opset_than_asked() -> Launch:
    """So torch.onnx does after a conversion that failed."""
    from types import SimpleNamespace

    def prepare() -> None:
        program = SimpleNamespace(model=SimpleNamespace(graph=[], opset_imports={"": 18}))
        torch.export.export = lambda *args, **options: None  # type: ignore[assignment]
        torch.onnx.export = lambda *args, **options: program  # type: ignore[assignment]

    pytest.importorskip("onnxscript")
    return Launch(["--format", "onnx", "--output", "m.onnx", "--opset", "20"], prepare=prepare)


def hybrid(kind: str) -> Callable[[], Sequence[str]]:
    def make() -> Sequence[str]:
        make_checkpoint(Path(), "testing-hybrid", 72)
        return ["--load_model_dir", "testing-hybrid_checkpoint.bin", "--format", kind, "--output", "m"]

    return make


# ---- download ----

FILE, REMOTE = "imagenet21k_ViT-B_32.npz", "/imagenet21k/ViT-B_32.npz"
REPOSITORY = "timm/testing.orig_in21k"


def without_pauses() -> None:
    """In the child: tries again at once, and the hub's library reads the environment anew."""
    real = time.sleep
    time.sleep = lambda seconds: real(min(seconds, 0.01))  # type: ignore[assignment]
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


def from_server(
    *flags: str, every: Mapping[str, Any] = {}, content: bytes = make_content(0),
    prepare: Callable[[], None] = without_pauses,
) -> Callable[[], Launch]:  # fmt: skip
    """A download from a server that does ``every`` to each request."""

    def make() -> Launch:
        server = Bucket()
        server.every, server.files = dict(every), {REMOTE: content}
        flags_given = [flag.replace("SERVER", server.url) for flag in flags]
        source = ["ViT-B_32", "--base_url", server.url]

        return Launch(flags_given or source, env={"no_proxy": "127.0.0.1"}, prepare=prepare, within=serving(server),
                      after=no_weights, writes=True)  # fmt: skip

    return make


def small_disk() -> None:
    usage = shutil.disk_usage(".")
    shutil.disk_usage = lambda path: usage._replace(free=10_000)  # type: ignore[assignment]
    without_pauses()


def from_hub(
    files: Mapping[str, bytes], *flags: str, status: int | None = None, every: Mapping[str, Any] = {}, **env: str
) -> Callable[[], Launch]:
    """A download of the testing model, as if Google published it, from a hub that has ``files`` of it."""

    def prepare() -> None:
        without_pauses()
        publish(GoogleFile("testing", "imagenet21k/testing", REPOSITORY))
        publish(GoogleFile("testing", "augreg/best", REPOSITORY, other_run="T-other"))

    def make() -> Launch:
        hub = Hub()
        hub.status, hub.every = status, dict(every)
        for name, content in files.items():
            hub.add(REPOSITORY, name, content)
        there = {"no_proxy": "127.0.0.1,localhost", "HF_ENDPOINT": hub.url, "HF_HOME": os.path.abspath("cache"),
                 "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": None, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
        return Launch(["testing", "--source", "hub", *flags], env={**there, **env}, prepare=prepare,
                      within=serving(hub), after=no_weights)  # fmt: skip

    return make


def no_weights() -> None:
    assert not list(Path().glob("**/*ViT*.npz"))


def being_downloaded() -> Launch:
    os.mkdir("checkpoint")
    lock = holding(f"checkpoint/{FILE}.part.lock")
    return Launch(["ViT-B_32", "--base_url", "http://127.0.0.1:9"], within=lock)


def another_models_file() -> bytes:
    fake_npz.save("demo.npz", fake_npz.arrays(CONFIG, 32))
    return Path("demo.npz").read_bytes()


# ---- reproduce ----


def trained_without_logs() -> Launch:
    """A row whose training is over, and its logs are gone; ``true`` stands for train.py, which finds nothing to do."""

    def prepare() -> None:
        sys.executable = shutil.which("true") or sys.executable

    def noted() -> None:
        results = json.loads(Path("output/results.json").read_text())
        assert results["rows"]["demo"]["status"] == "failed"

    demo_weights()
    return Launch(["--rows", "demo"], prepare=prepare, after=noted)


def demo_weights() -> None:
    os.mkdir("checkpoint")
    fake_npz.save("checkpoint/ViT-demo.npz", fake_npz.arrays(CONFIG, 32))


def not_results() -> list[str]:
    demo_weights()
    os.mkdir("output")
    Path("output/results.json").write_text('{"rows": {"demo": 3}}')
    return ["--rows", "demo"]


TOOLS = [
    Group("tools.download", program="tools.download", cases=[
        Case("download-nothing", "no model is named", lambda: Launch(), "--list"),
        Case("download-model-unknown", "a model without a file", "ViT-B_33"),
        Case("download-not-in-upstream", "an upstream that lacks the model", "ViT-H_14 --upstream augreg",
             "imagenet21k"),
        Case("download-base-url", "an address that is none", "ViT-B_32 --base_url ftp://host", "ftp://host"),
        Case("download-upstream-unknown", "an upstream that is not offered", "ViT-B_32 --upstream sam", "sam"),
        Case("download-endpoint", "a mirror of the hub that is no address", lambda: Launch(
             ["ViT-B_32"], env={"HF_ENDPOINT": "hf-mirror.com"}), "HF_ENDPOINT"),
        Case("download-url", "the same, of a file", "ViT-B_32 --url ftp://host/file", "ftp://host/file"),
        Case("download-one-file", "a file's name for two models", "ViT-B_32 ViT-B_16 --to one.npz", "one.npz"),
        Case("download-one-url", "a file's address for two models", "ViT-B_32 ViT-B_16 --url http://host/file",
             "--url"),
        Case("download-url-model", "an address for a model that is unknown", "ViT-B_33 --url http://host/file",
             "ViT-B_33"),
        Case("download-url-and-source", "an address, and where to look for it",
             "ViT-B_32 --url http://host/file --source hub", "--source"),
        Case("download-hub-and-base-url", "the hub, and an address of the bucket",
             "ViT-B_32 --source hub --base_url http://host", "--base_url"),
        Case("download-not-writable", "a file in the folder's place",
             after(lambda: Path("taken").touch(), "ViT-B_32", "--to", "taken/deeper"), "taken/deeper"),
        Case("download-in-progress", "the file is being downloaded", being_downloaded, FILE),
        Case("download-refused", "a server that does not have the file", from_server(every={"status": 404}), "404",
             1),
        Case("download-server-fails", "a server that fails again and again", from_server(every={"status": 503}),
             "503", 1),
        Case("download-cut-off", "a connection that breaks off again and again",
             from_server(every={"drop": 0}), f"{len(make_content(0)):,}", 1),
        Case("download-unreachable", "nobody listens",
             lambda: Launch(["ViT-B_32", "--base_url", "http://127.0.0.1:9"], prepare=without_pauses), "127.0.0.1",
             1),
        Case("download-damaged", "a file that comes twice with errors", from_server(every={"corrupt": 70_000}),
             "md5", 1),
        Case("download-is-page", "a page in place of the file",
             from_server(every={"headers": {"x-goog-hash": None}}, content=b"<html>log in</html>"), ".npz", 1),
        Case("download-no-room", "too little room on the disk", from_server(prepare=small_disk), "10,000", 1),
        Case("download-url-is-page", "an address of something else",
             from_server("ViT-B_32", "--url", f"SERVER{REMOTE}", content=b"<html>log in</html>" * 100), "HTML"),
        Case("download-url-other-model", "an address of another model's weights",
             lambda: from_server("ViT-demo", "--url", f"SERVER{REMOTE}", content=another_models_file())(), "convert"),
        Case("hub-absent", "a file that the hub does not give", from_hub({}), "HF_TOKEN", 1),
        Case("hub-no-weights", "a repository without weights", from_hub({"README.md": b"soon"}),
             "model.safetensors", 1),
        Case("hub-fails", "a hub that fails", from_hub({}, status=500), "500", 1),
        Case("hub-is-page", "a page in place of the weights", from_hub({"model.safetensors": b"<html>moved</html>"}),
             "HTML", 1),
        Case("hub-damaged", "a file of the hub that comes twice with errors",
             from_hub({"model.safetensors": make_content(0)}, every={"corrupt": 70_000}), "sha256", 1),
        Case("hub-offline", "an empty cache and no network allowed", from_hub({}, HF_HUB_OFFLINE="1"),
             "HF_HUB_OFFLINE", 1, "Unset it, or fill the cache."),
        Case("hub-other-run", "the name of the recommended run for another, which the hub has",
             from_hub({}, "--upstream", "augreg", "--to", "augreg_testing.npz"), "T-other", 1,
             "Give `--to` a folder, or a file of another name."),
        Case("hub-not-there", "a file that only the bucket has", "ViT-B_8 --source hub --upstream imagenet21k",
             "--upstream augreg", 1),
    ]),
    Group("tools.predict", program="tools.predict", flags=LOAD_CPU, setup=checkpoint_and_image, cases=[
        Case("predict-no-image", "no such image", "nosuch.png"),
        Case("predict-folder-empty", "a folder without images", after(lambda: os.mkdir("empty"), "empty")),
        Case("predict-image-unreadable", "an image that cannot be read; the others are classified all the same",
             lambda: Launch(["text.png", "a.png"], writes=True), "text.png"),
        Case("predict-no-checkpoint", "no checkpoint", "a.png --load_model_dir nosuch.bin", "nosuch.bin"),
        Case("predict-no-metadata", "a checkpoint without metadata, as the reference script writes it",
             after(without_metadata, "a.png"), "testing_checkpoint.json"),
        Case("predict-no-classes", "the same, and the names of the classes are missing",
             after(without_metadata, "a.png", "--model_type", "testing", "--img_size", "32"), "--classes"),
        Case("predict-default-size", "the same, trained at another size than the default",
             after(without_metadata, "a.png", "--model_type", "testing", "--classes", NAMES), "--img_size 32"),
        Case("predict-other-model", "the weights of another model",
             after(without_metadata, "a.png", "--model_type", "ViT-demo", "--img_size", "32"), "ViT-demo"),
        Case("predict-classes-too-few", "too few names of classes", "a.png --classes 0,1,2", "10"),
        Case("predict-classes-twice", "a name twice", f"a.png --classes '{NAMES},class 0'", "class 0"),
        Case("predict-class-empty", "an empty name", f"a.png --classes '{NAMES},'", "--classes"),
        Case("predict-classes-two-ways", "names of classes in two ways", "a.png --classes a --dataset digits",
             "--dataset"),
        Case("predict-dataset-unknown", "a data set that is not known", "a.png --dataset mnist", "mnist"),
        Case("predict-dataset-empty", "a data set without classes",
             after(lambda: os.mkdir("empty"), "a.png", "--dataset", "empty"), "empty/train/"),
        Case("predict-top-none", "no answers asked for", "a.png --top_k 0", "--top_k"),
        Case("predict-top-word", "a word for a number", "a.png --top_k many", "--top_k"),
        Case("predict-device-unknown", "a device that is not offered", "a.png --device tpu", "--device"),
        Case("predict-metadata-damaged", "metadata that cannot be read",
             after(lambda: Path("testing_checkpoint.json").write_text("{"), "a.png"), "testing_checkpoint.json"),
        Case("predict-metadata-other-weights", "metadata of other weights", metadata_with(crc32=1),
             "testing_checkpoint.json"),
        Case("predict-metadata-model", "metadata of a model that is not known", metadata_with(model_type="ViT-Z"),
             "ViT-Z", do="A newer version wrote it, or somebody edited it."),
        Case("predict-metadata-gelu", "metadata with an activation that is not known", metadata_with(gelu="relu"),
             "relu", do="A newer version wrote it, or somebody edited it."),
        Case("predict-metadata-size-multiple", "metadata with a size that patches do not divide",
             metadata_with(img_size=40), "40"),
        Case("predict-metadata-size", "metadata with another size", metadata_with(img_size=64), "32"),
        Case("predict-metadata-classes", "metadata with other classes", metadata_with(classes=["a"]), "10",
             do="Remove it, and give the flags."),
        Case("predict-memory", "no memory for so many images", out_of_memory, "--batch_size", 1),
        Case("predict-gelu-overruled", "a flag that overrules the metadata", "a.png --gelu tanh", "--gelu", 0),
        Case("predict-data-dir", "`--data_dir` where no images are needed",
             after(without_metadata, "a.png", "--model_type", "testing", "--img_size", "32", "--dataset", "cifar10",
                   "--data_dir", "data"), "--data_dir", 0),
    ]),
    Group("tools.attention_map", program="tools.attention_map", flags=LOAD, setup=checkpoint_and_image, cases=[
        Case("map-no-image", "no such image", "nosuch.png"),
        Case("map-folder", "a folder in place of the image", ". --output map.png", " ."),
        Case("map-image-unreadable", "an image that cannot be read", "text.png"),
        Case("map-not-png", "another format than is written", "a.png --output map.jpg", "map.jpg"),
        Case("map-not-writable", "a file in the folder's place", "a.png --output text.png/map.png", "text.png"),
        Case("map-over-image", "the image as the output", "a.png --output a.png", "a.png"),
        Case("map-classes-too-few", "too few names of classes", "a.png --classes x", "10"),
    ]),
    Group("tools.export", program="tools.export", flags=LOAD, setup=checkpoint_and_image, cases=[
        Case("export-format-unknown", "a format that is not offered", "--format tflite --output m", "tflite"),
        Case("export-no-output", "no name for the output", "--format npz", "--output"),
        Case("export-output-empty", "an empty name", "--format npz --output ''", "--output"),
        Case("export-folder-nameless", "an empty name of a folder", "--format hf --output ''", "--output"),
        Case("export-other-size", "another size than the metadata's", "--format npz --output m.npz --img_size 64",
             "--img_size 32"),
        Case("export-output-is-folder", "a folder as the output", "--format npz --output .", "--output ."),
        Case("export-over-checkpoint", "the checkpoint as the output", f"--format npz --output {CHECKPOINT}",
             CHECKPOINT),
        Case("export-over-metadata", "an output whose metadata would replace the checkpoint's",
             "--format npz --output testing_checkpoint.npz", "testing_checkpoint.json"),
        Case("export-over-json", "an output whose metadata would replace a file that is none",
             after(lambda: Path("m.json").write_text("{}"), *EXPORT), "m.json"),
        Case("export-not-writable", "a file in the folder's place", "--format npz --output text.png/m.npz",
             "text.png"),
        Case("export-folder-exists", "a folder that is there already",
             after(lambda: (os.mkdir("m"), Path("m/thesis.txt").touch()), "--format", "hf", "--output", "m"),
             "--output m"),
        Case("export-current-folder", "the current folder", "--format timm --output .", "--output ."),
        Case("export-hybrid-hf", "a hybrid for transformers", hybrid("hf"), "testing-hybrid"),
        Case("export-hybrid-timm", "a hybrid that timm lacks", hybrid("timm"), "testing-hybrid"),
        Case("export-onnx-missing", "ONNX without its packages", without_onnx, "pip install onnx onnxscript"),
        Case("export-opset-format", "an opset for another format", "--format npz --output m.npz --opset 17",
             "--opset"),
        Case("export-opset-low", "an opset that is too low", "--format onnx --output m.onnx --opset 16", "17"),
        Case("export-opset-other", "an opset that PyTorch does not write", another_opset_than_asked, "--opset 20"),
    ]),
    Group("tools.reproduce", program="tools.reproduce", cases=[
        Case("reproduce-row-unknown", "no such row", "--rows nosuch*", "nosuch*"),
        Case("reproduce-flag-of-row", "a flag that makes another training of a row",
             "--rows demo -- --num_steps 5", "--num_steps", do="Train it yourself, under a name of your own."),
        Case("reproduce-no-weights", "no weights for a row", "--rows predecessor-*", "tools"),
        Case("reproduce-no-demo", "no weights of the demo", "--rows demo --checkpoint_dir w", "--checkpoint_dir"),
        Case("reproduce-results-damaged", "results that somebody edited", not_results, "output/results.json"),
        Case("reproduce-no-logs", "a row that is trained, and its logs are gone", trained_without_logs, "--again", 1),
    ]),
]  # fmt: skip
