"""The command line as its users type it: what it writes, what it prints, how it ends."""

import io
import itertools
import json
import logging
import math
import os
import re
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
from utils import datasets, figures, showing
from utils.checkpoint import CheckpointMetadata, save_weights
from utils.precision import MAX_SKIPPED_IN_A_ROW, Precision
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


def test_the_report_and_the_pictures_tell_of_the_best_evaluation(monkeypatch):
    shown = []
    best = showing.show_best
    monkeypatch.setattr(
        train, "show_best", lambda writer, found, *rest: (shown.append(found), best(writer, found, *rest))
    )
    args = ["--name", "a", *TINY, *SHORT, *SCRATCH, "--learning_rate", "0.1"]
    assert train.main(args) == 0
    lines = [line for line in lines_of("a") if "test/accuracy" in line]
    found, told = shown[-1], json.loads(Path("output/a_checkpoint.json").read_text())
    steps = [line["step"] for i, line in enumerate(lines)
             if all(line["test/accuracy"] > earlier["test/accuracy"] for earlier in lines[:i])]  # fmt: skip

    text = Path("output/a_report.html").read_text(encoding="utf-8")
    rows = re.findall(r'<tr><th scope="row">(\d)</th>((?:<td class="(?:right|wrong)".*?</td>)+)</tr>', text)
    matrix = [[int(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<td.*?>(.*?)</td>", cells)] for _, cells in rows]
    expected = np.zeros((10, 10), dtype=int)
    np.add.at(expected, (found.truth.numpy(), found.predicted.numpy()), 1)
    assert matrix == expected.tolist()
    assert np.trace(expected) / 360 == told["accuracy"] == found.accuracy
    for words in (
        "6 of 6 updates",
        f"{100 * told['accuracy']:.2f} %",
        "testing on digits",
        "1,437 to train on, 360 to",
    ):
        assert words in text
    for flag, value in (("--learning_rate", "0.1"), ("--seed", "42"), ("--name", "a")):
        assert re.search(rf'<th scope="row">{flag}</th><td>{value}</td>', text)
    assert text.count("<img ") == min(24, 360 - np.trace(expected))
    evaluations = re.findall(r'<th scope="row">(\d+)</th><td>([\d.]+) %</td><td>([\d.]+)</td>', text)
    assert evaluations == [
        (str(line["step"]), f"{100 * line['test/accuracy']:.2f}", f"{line['test/loss']:.5f}") for line in lines
    ]

    pictures = pictures_of("a")
    assert [(tag, [step for step, _ in pictures[tag]]) for tag in sorted(pictures)] == [
        ("test/confusion", steps), ("test/worst_mistakes", steps), ("train/pictures", [1]),
    ]  # fmt: skip
    assert sorted(os.listdir("logs/a"))[0].startswith("events.")
    assert len(os.listdir("logs/a")) == 2  # hparams make no run of their own


def test_the_first_pictures_are_those_that_the_model_sees():
    images = torch.rand(70, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shown = []

    class Writer:
        enabled = True

        def picture(self, step, tag, picture):
            shown.append((step, tag, np.asarray(picture)))

    showing.show_batch(Writer(), images, torch.arange(70) % 10, [str(i) for i in range(10)])
    (step, tag, pixels), side = shown[0], showing.IMAGE_PX
    assert (step, tag) == (1, "train/pictures")
    for i in (0, 9, 63):  # the 10th is the second of the second row
        x, y = i % 8 * (side + figures.GAP_PX), i // 8 * (figures.TITLE_PX + side + figures.GAP_PX) + figures.TITLE_PX
        cell = pixels[y : y + side : side // 8, x : x + side : side // 8]
        assert np.abs(cell / 127.5 - 1 - images[i].permute(1, 2, 0).numpy()).max() < 0.01
    assert len(pixels) == 8 * (figures.TITLE_PX + side + figures.GAP_PX) - figures.GAP_PX


def test_names_of_folders_cannot_break_into_the_report():
    evil = "<img src=x onerror=alert(1)>"
    write_images("pets", classes=("<b>ant", evil))
    args = ["--name", "a&b", *TINY, *SHORT, *SCRATCH, "--dataset", "pets", "--train_batch_size", "8"]
    assert train.main(args) == 0
    text = Path("output/a&b_report.html").read_text(encoding="utf-8")
    assert evil not in text
    assert "<b>ant" not in text
    assert "&lt;b&gt;ant" in text
    assert "<h1>a&amp;b</h1>" in text


def test_a_name_that_is_no_text_does_not_end_a_training():
    write_images("pets", classes=("ant", os.fsdecode(b"b\xffe")))
    assert train.main(["--name", "a", *TINY, *SHORT, *SCRATCH, "--dataset", "pets", "--train_batch_size", "8"]) == 0
    assert "b\\udcffe" in Path("output/a_report.html").read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_does_not_end_a_training(caplog):
    os.makedirs("output/a_report.html")
    assert train.main(["--name", "a", *TINY, *SHORT, *SCRATCH]) == 0
    assert "The report output/a_report.html could not be written" in caplog.text
    assert os.path.isfile("output/a_checkpoint.bin")


def test_logs_that_are_gone_do_not_end_a_training_for_the_report(caplog, monkeypatch):
    def write_report(*args):
        os.remove("logs/a/metrics.jsonl")
        showing.write_report(*args)
        Path("logs/a/metrics.jsonl").touch()

    monkeypatch.setattr(train, "write_report", write_report)
    assert train.main(["--name", "a", *TINY, *SHORT, *SCRATCH]) == 0
    assert "The report output/a_report.html could not be written" in caplog.text
    assert not os.path.exists("output/a_report.html")


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
    args = train.make_parser().parse_args(["--name", "x", "--model_type", "R50+ViT-B_16"])
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
    assert "processes</th><td>2<" in Path("output/two_report.html").read_text()


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


def test_gradients_that_overflow_without_end_stop_the_run(spoil_losses, capsys):
    spoil_losses(range(6, 1000), 1e30, where=Precision)
    args = ["--name", "a", *TINY, *TEN_STEPS, *SCRATCH, *FLOAT16, "--num_steps", "90", "--eval_every", "1000"]
    assert train.main(args) == 1
    error = capsys.readouterr().err.splitlines()
    assert sum("error:" in line for line in error) == 1
    last = 5 + MAX_SKIPPED_IN_A_ROW
    assert f"the gradients overflowed in {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {last}," in error[-1]
    assert "--amp_dtype bfloat16" in error[-1]
    assert lines_of("a")[-1]["step"] == last


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


def test_a_compiler_that_is_not_there_is_one_line():
    place = str(Path("nosuch", "g++").resolve())
    done = run_script("--name", "a", *TINY, *SHORT, *SCRATCH, "--compile", CXX=place, TORCHINDUCTOR_CACHE_DIR="cache")
    assert done.returncode == 1, done.stderr
    error = done.stderr.splitlines()
    assert "torch.compile failed (InvalidCxxCompiler: No working C++ compiler found" in error[-1]
    assert "leave --compile out" in error[-1]
    assert "Traceback" not in done.stderr


def test_other_errors_of_a_run_keep_their_traceback(monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(train, "train", fail)
    for more in ([], ["--compile"]):
        with pytest.raises(RuntimeError, match="a bug"):
            train.main(["--name", "a", *TINY, *SHORT, *SCRATCH, *more])


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


@pytest.mark.parametrize("size", [(32, 32), (31, 33)])
def test_an_unreadable_picture_is_reported_by_its_path(size, capsys):
    write_images("pets")
    Image.new("RGB", size).save("pets/train/bee/other.png")
    Path("pets/train/bee/3.png").write_bytes(Path("pets/train/bee/3.png").read_bytes()[:200])
    args = ["--name", "a", *TINY, *SHORT, *SCRATCH, "--dataset", "pets", "--train_batch_size", "16"]
    assert train.main(args) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "pets/train/bee/3.png" in error
    assert "Traceback" not in error


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(capsys):
    args = ["--name", "a", *TINY, *SHORT, *SCRATCH, "--learning_rate", "1e38", "--max_grad_norm", "inf"]
    assert train.main([*args, "--eval_every", "100", "--num_steps", "20"]) == 1
    assert "at step" in capsys.readouterr().err.splitlines()[-1]


def test_weights_that_went_bad_are_not_saved(capsys):
    args = ["--name", "a", *TINY, *SHORT, *SCRATCH, "--learning_rate", "1e38", "--max_grad_norm", "inf"]
    assert train.main([*args, "--eval_every", "3", "--log_every", "100"]) == 1
    assert "test/loss is nan at step 3" in capsys.readouterr().err.splitlines()[-1]
    assert not os.path.exists("output/a_checkpoint.bin")
    assert "NaN" not in Path("logs/a/metrics.jsonl").read_text()


def _truncated():
    with open("whole.npz", "wb") as f:
        model = VisionTransformer(CONFIGS["testing"], 32, 10)
        npz.write(f, npz.from_state_dict(model.state_dict(), model.config, 32))
    Path("cut.npz").write_bytes(Path("whole.npz").read_bytes()[:100_000])
    return ["--pretrained_dir", "cut.npz"]


def _not_npz():
    Path("text.npz").write_text("hello")
    return ["--pretrained_dir", "text.npz"]


def _another_model():
    model = VisionTransformer(CONFIGS["ViT-demo"], 32, 10)
    with open("demo.npz", "wb") as f:
        npz.write(f, npz.from_state_dict(model.state_dict(), model.config, 32))
    return ["--pretrained_dir", "demo.npz"]


def _empty_class():
    write_images("pets")
    os.mkdir("pets/train/cat")
    return [*SCRATCH, "--dataset", "pets"]


def _file_in_the_way():
    Path("taken").write_text("")
    return [*SCRATCH, "--output_dir", "taken/output"]


BAD_INPUT = {
    "missing npz": (
        lambda: ["--model_type", "ViT-B_32", "--pretrained_dir", "checkpoint/imagenet21k_ViT-B_32.npz"],
        ["checkpoint/imagenet21k_ViT-B_32.npz", "tools/download.py ViT-B_32"],
    ),
    "truncated npz": (_truncated, ["cut.npz", "only the beginning"]),
    "no npz": (_not_npz, ["text.npz", "text.npz cannot be loaded: it is neither an .npz nor"]),
    "npz of another model": (
        _another_model,
        ["expected (16, 16, 3, 32)", "found (8, 8, 3, 128)", "fits --model_type ViT-demo"],
    ),
    "unknown model": (lambda: ["--model_type", "ViT-B_33"], ["ViT-B_33", *CONFIGS]),
    "unknown data set": (lambda: [*SCRATCH, "--dataset", "mnist"], ["mnist", "cifar10", "cifar100", "digits"]),
    "empty class folder": (_empty_class, ["pets/train/cat", "no picture"]),
    "no train folder": (lambda: [*SCRATCH, "--dataset", "."], ["train/<class>"]),
    "size that patches do not divide": (lambda: [*SCRATCH, "--img_size", "40"], ["40", "16", "32", "48"]),
    "size below one patch": (lambda: [*SCRATCH, "--img_size", "8"], ["8", "16"]),
    "batch that parts do not divide": (
        lambda: [*SCRATCH, "--train_batch_size", "10", "--gradient_accumulation_steps", "3"],
        ["--train_batch_size 10", "--gradient_accumulation_steps 3"],
    ),
    "unwritable output": (_file_in_the_way, ["taken/output", "cannot be written"]),
    "no steps": (lambda: [*SCRATCH, "--num_steps", "0"], ["--num_steps", "0"]),
    "negative rate": (lambda: [*SCRATCH, "--learning_rate", "-1"], ["--learning_rate"]),
    "word for a number": (lambda: [*SCRATCH, "--num_steps", "many"], ["--num_steps", "many"]),
    "dropout of one": (lambda: [*SCRATCH, "--dropout", "1"], ["--dropout"]),
    "name too long for a file": (lambda: [*SCRATCH, "--name", "n" * 230], ["--name", "230"]),
    "seed too large": (lambda: [*SCRATCH, "--seed", str(2**63)], ["--seed", str(2**63)]),
    "name with a folder": (lambda: [*SCRATCH, "--name", "a/b"], ["--name", "a/b"]),
    "apex without a GPU": (
        lambda: [*SCRATCH, "--fp16", "--amp_backend", "apex"],
        ["--amp_backend apex needs a CUDA GPU, not cpu", "--amp_backend native"],
    ),
    "apex in bfloat16": (
        lambda: [*SCRATCH, "--fp16", "--amp_backend", "apex", "--amp_dtype", "bfloat16"],
        ["--amp_backend apex computes in float16 only", "--amp_backend native"],
    ),
    "unknown amp backend": (lambda: [*SCRATCH, "--fp16", "--amp_backend", "amp"], ["--amp_backend", "native", "apex"]),
    "unknown flag": (lambda: [*SCRATCH, "--turbo"], ["--turbo"]),
    "no checkpoint to evaluate": (lambda: ["-v"], ["output/a_checkpoint.bin"]),
    "checkpoint flag while training": (lambda: [*SCRATCH, "--load_model_dir", "x.bin"], ["--load_model_dir"]),
    "rank without a launcher": (lambda: [*SCRATCH, "--local_rank", "1"], ["--local_rank", "torchrun"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2_before_anything_is_written(case, capsys):
    make, expected = BAD_INPUT[case]
    extra = make()
    before = sorted(str(p) for p in Path().rglob("*"))
    try:
        status = train.main(["--name", "a", *TINY, *SHORT, *extra])
    except SystemExit as e:  # argparse's own
        status = e.code
    assert status == 2
    error = capsys.readouterr().err.splitlines()
    assert sum("error:" in line for line in error) == 1
    for words in expected:
        assert words in error[-1]
    created = set(map(str, Path().rglob("*"))) - set(before)
    assert not [p for p in created if Path(p).is_file()]


@pytest.mark.parametrize("missing", [["--pretrained_dir", "checkpoint/nosuch.npz"], ["-v"]])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: os.rename("pets/test", "pets/tests"), "--dataset pets needs the folders"),
        (lambda: os.mkdir("pets/train/wasp"), "pets/train/wasp holds no image"),
    ],
)
def test_a_folder_without_the_layout_is_told_before_weights_are_asked_for(capsys, missing, wrong, words):
    write_images("pets")
    wrong()
    assert train.main(["--name", "a", *TINY, *SHORT, "--dataset", "pets", *missing]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert words in error


def test_a_checkpoint_of_another_size_names_the_size_it_was_trained_for(checkpoint, capsys):
    assert train.main(["--name", "a", *TINY, "--img_size", "64", "-v"]) == 2
    assert "trained at --img_size 32, not 64" in capsys.readouterr().err


def test_a_checkpoint_of_other_classes_names_both_numbers(checkpoint, capsys):
    write_images("pets")
    assert train.main(["--name", "a", *TINY, "--dataset", "pets", "-v"]) == 2
    assert "10 classes" in capsys.readouterr().err


def describe(state, **changes):
    """Writes output/a_checkpoint.bin with a description."""
    told = dict(model_type="testing", img_size=32, classes=[str(i) for i in range(10)], gelu="erf", dataset="digits",
                step=4, accuracy=0.5)  # fmt: skip
    save_weights("output/a_checkpoint.bin", state, CheckpointMetadata(**{**told, **changes}))


@pytest.mark.parametrize(
    ("changes", "flags", "warning"),
    [
        ({}, ["--gelu", "tanh"], "was trained with --gelu erf, not tanh"),
        ({"gelu": "tanh"}, [], "was trained with --gelu tanh, not erf"),
        ({"model_type": "ViT-demo"}, [], "was trained with --model_type ViT-demo, not testing"),
        ({"classes": [*"01234567", "nine", "8"]}, [], "number 8 was nine, here it is 8"),
    ],
)
def test_an_evaluation_that_contradicts_the_training_is_a_warning(checkpoint, caplog, changes, flags, warning):
    describe(checkpoint.state_dict(), **changes)
    assert train.main(["--name", "a", *TINY, "-v", *flags]) == 0
    assert [warning in r.message for r in caplog.records if r.levelname == "WARNING"] == [True]


def test_an_evaluation_like_the_training_gives_no_warning(checkpoint, caplog):
    describe(checkpoint.state_dict())
    assert train.main(["--name", "a", *TINY, "-v"]) == 0
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_a_damaged_description_does_not_stop_an_evaluation(checkpoint, caplog):
    describe(checkpoint.state_dict())
    Path("output/a_checkpoint.json").write_text('{"model_type": ')
    assert train.main(["--name", "a", *TINY, "-v"]) == 0
    assert "output/a_checkpoint.json does not describe a checkpoint" in caplog.text


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
    args = train.make_parser().parse_args(["--name", "x"])
    assert published.find(args.pretrained_dir, args.model_type) == "checkpoint/ViT-B_16.npz"
