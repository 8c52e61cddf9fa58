"""The command line as its users type it: what it writes, what it prints, how it ends."""

import io
import itertools
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from models import npz, published
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers.fake_apex import FakeAmp
from utils import datasets
from utils.args import make_parser
from utils.checkpoint import CheckpointMetadata, save_weights
from utils.precision import Precision
from utils.scheduler import make_schedule

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--dataset", "digits", "--model_type", "testing", "--img_size", "32", "--device", "cpu"]
SHORT = ["--train_batch_size", "32", "--num_steps", "6", "--warmup_steps", "2", "--eval_every", "4", "--log_every", "2"]
SCRATCH = ["--pretrained_dir", ""]


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    """Runs write output/ and logs/ below the working directory."""
    monkeypatch.chdir(tmp_path)


def run_script(*args, **env):
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def lines_of(name):
    return [json.loads(line) for line in Path("logs", name, "metrics.jsonl").read_text().splitlines()]


def losses_of(name):
    return [line["train/loss"] for line in lines_of(name) if "train/loss" in line]


def test_training_then_evaluating_its_checkpoint_gives_the_same_accuracy():
    done = run_script("--name", "a", *TINY, *SHORT, *SCRATCH)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # PyTorch's about the order of scheduler and optimizer, for one
    lines = lines_of("a")
    assert [(line["step"], "train/loss" in line) for line in lines] == [
        (2, True), (4, True), (4, False), (6, True), (6, False),
    ]  # fmt: skip
    assert set(lines[0]) == {"step", "train/loss", "train/lr", "images_per_sec", "secs"}
    assert set(lines[2]) == {"step", "test/accuracy", "test/loss", "secs", "eval_secs"}
    assert lines[0]["train/lr"] == pytest.approx(0.03)
    assert lines[3]["train/lr"] == pytest.approx(0)
    best = max(line["test/accuracy"] for line in lines if "test/accuracy" in line)
    assert f"Best Accuracy: \t{best:.5f}" in done.stderr

    state = torch.load("output/a_checkpoint.bin", weights_only=True)
    assert list(state) == list(VisionTransformer(CONFIGS["testing"], 32, 10).state_dict())
    told = json.loads(Path("output/a_checkpoint.json").read_text())
    assert told.pop("crc32")
    assert told == {
        "model_type": "testing", "img_size": 32, "classes": [str(i) for i in range(10)], "gelu": "erf",
        "dataset": "digits", "step": next(line["step"] for line in lines if line.get("test/accuracy") == best),
        "accuracy": best,
    }  # fmt: skip
    again = run_script("--name", "a", *TINY, "-v", "true")
    assert again.returncode == 0, again.stderr
    assert "WARNING" not in again.stderr
    assert f"Valid Accuracy: {best:.5f}" in again.stderr


def pictures_of(name):
    """{tag: [(step, picture), ...]} as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(f"logs/{name}", size_guidance={"images": 0})
    events.Reload()
    return {
        tag: [(e.step, Image.open(io.BytesIO(e.encoded_image_string))) for e in events.Images(tag)]
        for tag in events.Tags()["images"]
    }


@pytest.fixture
def checkpoint():
    """A checkpoint of the testing model at 32 px with ten classes, where -v looks for it."""
    os.makedirs("output")
    torch.manual_seed(0)
    model = VisionTransformer(CONFIGS["testing"], 32, 10)
    torch.nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), "output/a_checkpoint.bin")
    return model


@pytest.mark.parametrize("flag", [["-v"], ["-v", "true"], ["-v", "True"], ["--eval_only"]])
def test_evaluation_only_needs_no_npz_and_writes_nothing(flag, checkpoint, caplog):
    with caplog.at_level(logging.INFO):
        assert train.main(["--name", "a", *TINY, *flag]) == 0
    assert "Valid Accuracy" in caplog.text
    assert sorted(os.listdir()) == ["output"]


def test_v_false_trains():
    assert train.main(["--name", "a", *TINY, *SHORT, *SCRATCH, "-v", "false"]) == 0
    assert losses_of("a")


def test_weights_of_a_wrapped_model_evaluate_alike(checkpoint, caplog):
    state = {f"module.{name}": x for name, x in checkpoint.state_dict().items()}
    torch.save(state, "wrapped.bin")
    accuracies = []
    for path in ("output/a_checkpoint.bin", "wrapped.bin"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert train.main(["--name", "b", *TINY, "-v", "--load_model_dir", path]) == 0
        accuracies.append(next(m for m in caplog.messages if "Valid Accuracy" in m))
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("model_type", ["testing", "testing-hybrid"])
def test_fine_tuned_weights_go_back_to_googles_layout_and_evaluate_to_the_same_logits(model_type):
    tiny = [*TINY, "--model_type", model_type]
    assert train.main(["--name", "a", *tiny, *SHORT, *SCRATCH]) == 0
    state = torch.load("output/a_checkpoint.bin", weights_only=True)
    config = CONFIGS[model_type]
    with open("a.npz", "wb") as f:
        npz.write(f, npz.from_state_dict(state, config, 32))
    model = VisionTransformer(config, 32, 10, zero_head=False)
    model.load_from(np.load("a.npz"))
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert train.main(["--name", "a", *tiny, "-v"]) == 0


def test_googles_model_names_are_model_types():
    args = make_parser().parse_args(["--name", "x", "--model_type", "R50+ViT-B_16"])
    assert CONFIGS[args.model_type] == CONFIGS["R50-ViT-B_16"]


def test_first_loss_from_a_zero_head_is_log_of_the_classes():
    model = VisionTransformer(CONFIGS["testing"], 48, 10)
    with open("testing.npz", "wb") as f:
        npz.write(f, npz.from_state_dict(model.state_dict(), model.config, 48))
    args = ["--name", "a", *TINY, *SHORT, "--log_every", "1", "--pretrained_dir", "."]  # found in the folder
    assert train.main(args) == 0
    assert losses_of("a")[0] == pytest.approx(math.log(10), rel=1e-5)


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_gives_the_loss_curve_of_the_whole_batch(parts):
    whole = [*TINY, *SHORT, *SCRATCH, "--dropout", "0"]
    assert train.main(["--name", "whole", *whole]) == 0
    assert train.main(["--name", "parts", *whole, "--gradient_accumulation_steps", str(parts)]) == 0
    assert losses_of("parts") == pytest.approx(losses_of("whole"), abs=1e-5)


def test_same_seed_same_run_and_another_seed_another():
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train.main(["--name", name, *TINY, *SHORT, *SCRATCH, "--seed", seed]) == 0
    assert losses_of("a") == losses_of("b")
    assert losses_of("a") != losses_of("c")


def test_two_processes_train_as_one_with_their_total_batch():
    args = [*TINY, *SHORT, *SCRATCH, "--dropout", "0"]
    assert train.main(["--name", "one", *args]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "train.py"), "--name", "two", *args, "--train_batch_size", "16"],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert losses_of("two") == pytest.approx(losses_of("one"), abs=1e-5)
    assert [line["test/loss"] for line in lines_of("two") if "test/loss" in line] == pytest.approx(
        [line["test/loss"] for line in lines_of("one") if "test/loss" in line], abs=1e-5
    )
    states = [torch.load(f"output/{name}_last.pt", weights_only=True) for name in ("one", "two")]
    if states[0]["best_step"] == states[1]["best_step"]:  # else a digit between two classes went the other way
        one, two = (state["best_result"] for state in states)
        assert two["truth"].equal(one["truth"])
        assert (two["predicted"] == one["predicted"]).float().mean() > 0.99
        torch.testing.assert_close(two["confidence"], one["confidence"], rtol=0, atol=1e-3)
    assert sorted(pictures_of("two")) == sorted(pictures_of("one"))
    assert "ranks</th><td>2<" in Path("output/two_report.html").read_text()


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_fp16_trains_and_writes_float32_weights(level):
    assert train.main(["--name", "a", *TINY, *SHORT, *SCRATCH, "--fp16", "--fp16_opt_level", level]) == 0
    state = torch.load("output/a_checkpoint.bin", weights_only=True)
    assert {x.dtype for x in state.values()} == {torch.float32}
    assert train.main(["--name", "a", *TINY, "-v"]) == 0


# ---- updates of float16 that are skipped ----

FLOAT16 = ["--fp16", "--fp16_opt_level", "O1", "--amp_dtype", "float16"]
TEN_STEPS = ["--train_batch_size", "16", "--num_steps", "10", "--warmup_steps", "4", "--log_every", "1"]


def skipped_steps(caplog):
    """The updates that the log says were skipped."""
    words = [m.split() for m in caplog.messages if "was skipped: its scaled gradients overflowed" in m]
    return [int(w[1]) for w in words]


@pytest.fixture
def spoil_losses(monkeypatch):
    """``spoil_losses(passes, factor)`` multiplies the loss of some backward passes, counted from 1."""

    def spoil(passes, factor, where=VisionTransformer):
        count = itertools.count(1)
        if where is Precision:  # the gradients overflow, the loss that is logged does not
            backward = Precision.backward
            monkeypatch.setattr(
                Precision, "backward", lambda self, x: backward(self, x * factor if next(count) in passes else x)
            )
        else:
            forward = VisionTransformer.forward

            def new_forward(self, x, labels=None):
                out = forward(self, x, labels)
                return out * factor if labels is not None and next(count) in passes else out

            monkeypatch.setattr(VisionTransformer, "forward", new_forward)

    return spoil


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_skipped_updates_do_not_advance_the_schedule_and_are_logged(level, parts, spoil_losses, caplog):
    spoil_losses({3 * parts, 4 * parts, 8 * parts}, 1e30, where=Precision)
    args = ["--name", "a", *TINY, *TEN_STEPS, *SCRATCH, *FLOAT16, "--fp16_opt_level", level, "--eval_every", "100"]
    assert train.main([*args, "--gradient_accumulation_steps", str(parts), "--learning_rate", "0.1"]) == 0
    assert skipped_steps(caplog) == [3, 4, 8]
    lines = {line["step"]: line for line in lines_of("a") if "train/lr" in line}
    schedule, skipped = make_schedule("cosine", 4, 10), 0
    for step in range(1, 11):
        assert lines[step]["train/lr"] == pytest.approx(0.1 * schedule(step - skipped), rel=1e-6, abs=1e-12)
        assert ("train/loss" in lines[step]) == (step not in (3, 4, 8))
        skipped += step in (3, 4, 8)
    assert lines[10]["train/lr"] > 0  # three updates are still missing from the schedule


def test_a_loss_that_is_not_finite_in_a_skipped_update_does_not_stop_the_run(spoil_losses, caplog):
    spoil_losses({2, 5}, float("inf"))
    args = ["--name", "a", *TINY, *TEN_STEPS, *SCRATCH, *FLOAT16, "--log_every", "5", "--eval_every", "100"]
    assert train.main(args) == 0
    assert skipped_steps(caplog) == [2, 5]
    losses = losses_of("a")
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("flags", [[], ["--fp16", "--amp_dtype", "bfloat16"], [*FLOAT16, "--loss_scale", "8"]])
def test_without_dynamic_scaling_the_same_loss_stops_it(flags, spoil_losses, caplog, capsys):
    spoil_losses({2, 5}, float("inf"))
    args = ["--name", "a", *TINY, *TEN_STEPS, *SCRATCH, *flags, "--log_every", "5", "--eval_every", "100"]
    assert train.main(args) == 1
    assert skipped_steps(caplog) == []
    assert "train/loss is inf at step 2" in capsys.readouterr().err.splitlines()[-1]


# ---- apex ----


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_the_loop_trains_and_evaluates_with_an_apex_that_has_amp(level, monkeypatch, caplog):
    amps = []
    monkeypatch.setattr(train, "import_apex_amp", lambda device: amps.append(FakeAmp()) or amps[-1])
    apex = ["--fp16", "--fp16_opt_level", level, "--amp_backend", "apex"]
    args = [*TINY, *SHORT, *SCRATCH, "--dropout", "0", "--log_every", "1", "--num_steps", "20"]
    with caplog.at_level(logging.INFO):
        assert train.main(["--name", "a", *args, *apex, "--gradient_accumulation_steps", "2"]) == 0
    assert len(amps[0].initialized) == 1
    skipped = skipped_steps(caplog)
    assert not skipped or level in ("O1", "O2")
    assert len(amps[0].scaled) == 40  # 20 updates of two parts
    assert len(amps[0].norms) == 20 - len(skipped)
    assert max(amps[0].norms) < 1.01  # --max_grad_norm
    state = torch.load("output/a_checkpoint.bin", weights_only=True)
    assert {x.dtype for x in state.values()} == {torch.float32}
    assert train.main(["--name", "float32", *args]) == 0
    if not skipped:
        assert losses_of("a") == pytest.approx(losses_of("float32"), abs=1e-5 if level == "O0" else 0.02)
    accuracies = [m for m in caplog.messages if "Valid Accuracy" in m]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert train.main(["--name", "a", *TINY, *apex, "-v"]) == 0
    assert amps[1].initialized[0][1] is None
    assert next(m for m in caplog.messages if "Valid Accuracy" in m) in accuracies


@pytest.mark.parametrize("evaluate", [False, True])
def test_apex_where_there_is_none_is_one_line_and_status_2(evaluate, checkpoint, monkeypatch, capsys):
    # As on a machine with a GPU, up to the import; nothing touches the GPU before it.
    monkeypatch.setattr(train.dist_util, "setup", lambda *_: torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "apex", None)
    args = ["--name", "a", *TINY, *SCRATCH, "--fp16", "--amp_backend", "apex", *(["-v"] if evaluate else [])]
    assert train.main(args) == 2
    error = capsys.readouterr().err.splitlines()
    assert sum("error:" in line for line in error) == 1
    assert "apex removed amp in 25.07" in error[-1]
    assert "--amp_backend native does the same" in error[-1]


# ---- --compile ----


@pytest.fixture
def compile_without_code(monkeypatch):
    """torch.compile traces and checks as always, then runs the graph without generating code, which takes a minute."""
    compiled = []

    def compile_model(self):
        compiled.append(self)
        torch.nn.Module.compile(self, backend="eager")

    monkeypatch.setattr(VisionTransformer, "compile", compile_model)
    torch._dynamo.reset()
    yield compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("flags", [[], ["--fp16"]], ids=["float32", "bfloat16"])
def test_a_compiled_model_trains_alike_and_keeps_its_weights_names(flags, compile_without_code, caplog):
    args = [*TINY, *SHORT, *SCRATCH, *flags, "--dropout", "0"]
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        assert train.main(["--name", name, *args, *more]) == 0
    assert len(compile_without_code) == 1
    assert losses_of("compiled") == pytest.approx(losses_of("plain"), abs=1e-5 if not flags else 0.02)
    state = torch.load("output/compiled_checkpoint.bin", weights_only=True)
    assert list(state) == list(VisionTransformer(CONFIGS["testing"], 32, 10).state_dict())
    caplog.clear()
    with caplog.at_level(logging.INFO):
        for more in ([], ["--compile"]):
            assert train.main(["--name", "compiled", *TINY, *flags, "-v", *more]) == 0
    assert len(compile_without_code) == 2
    accuracies = [m for m in caplog.messages if "Valid Accuracy" in m]
    assert accuracies[0] == accuracies[1]


def test_a_compiled_model_drops(compile_without_code):
    args = [*TINY, *SHORT, *SCRATCH]
    for name, rate in (("none", "0"), ("some", "0.5"), ("again", "0.5")):
        assert train.main(["--name", name, *args, "--compile", "--dropout", rate]) == 0
    assert losses_of("some") == losses_of("again")  # the seed decides here too
    assert losses_of("some")[-1] != losses_of("none")[-1]


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_code_trains_as_the_plain_model_does():
    args = [*TINY, *SHORT, *SCRATCH, "--dropout", "0"]
    assert train.main(["--name", "plain", *args]) == 0
    assert train.main(["--name", "compiled", *args, "--compile"]) == 0
    assert losses_of("compiled") == pytest.approx(losses_of("plain"), abs=1e-5)
    state = torch.load("output/compiled_checkpoint.bin", weights_only=True)
    assert list(state) == list(VisionTransformer(CONFIGS["testing"], 32, 10).state_dict())


# ---- data ----


def test_the_run_works_on_the_pictures_that_were_moved_once(monkeypatch):
    moved, seen = [], []
    to, evaluate = datasets.DataSets.to, train.evaluate
    monkeypatch.setattr(datasets.DataSets, "to", lambda self, device: moved.append(to(self, device)) or moved[-1])
    monkeypatch.setattr(train, "evaluate", lambda *args: seen.append(args[1]) or evaluate(*args))
    assert train.main(["--name", "a", *TINY, *SHORT, *SCRATCH]) == 0
    assert len(moved) == 1
    assert len(seen) == 2
    assert all(pictures is moved[0].test for pictures in seen)


def write_images(root, size=(32, 32), classes=("ant", "bee"), per_class=4):
    rng = np.random.default_rng(0)
    for split, name in itertools.product(("train", "test"), classes):
        os.makedirs(f"{root}/{split}/{name}")
        for i in range(per_class):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{root}/{split}/{name}/{i}.png")


def test_a_folder_of_pictures_trains_with_its_own_number_of_classes():
    write_images("pets", classes=("ant", "bee", "cat"))
    Image.new("L", (50, 20)).save("pets/train/ant/grey.jpg")  # sizes that differ go through the loader
    Image.new("RGBA", (9, 40)).save("pets/train/bee/clear.png")
    args = ["--name", "a", *TINY, *SHORT, *SCRATCH, "--dataset", "pets", "--train_batch_size", "8", "--hflip"]
    assert train.main(args) == 0
    state = torch.load("output/a_checkpoint.bin", weights_only=True)
    assert state["head.weight"].shape == (3, 32)


def describe(state, **changes):
    """Writes output/a_checkpoint.bin with a description."""
    told = dict(model_type="testing", img_size=32, classes=[str(i) for i in range(10)], gelu="erf", dataset="digits",
                step=4, accuracy=0.5)  # fmt: skip
    save_weights("output/a_checkpoint.bin", state, CheckpointMetadata(**{**told, **changes}))


def test_an_evaluation_like_the_training_gives_no_warning(checkpoint, caplog):
    describe(checkpoint.state_dict())
    assert train.main(["--name", "a", *TINY, "-v"]) == 0
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize(
    "flags", [["--fp16_opt_level", "O1"], ["--amp_dtype", "float16"], ["--amp_backend", "apex"], ["--loss_scale", "2"]]
)
def test_a_flag_without_effect_is_a_warning(flags, caplog):
    assert train.main(["--name", "a", *TINY, *SHORT, *SCRATCH, *flags]) == 0
    assert "no effect without --fp16" in caplog.text


def test_the_reference_scripts_default_weights_are_still_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("checkpoint")
    Path("checkpoint/ViT-B_16.npz").touch()
    args = make_parser().parse_args(["--name", "x"])
    assert published.find(args.pretrained_dir, args.model_type) == "checkpoint/ViT-B_16.npz"
