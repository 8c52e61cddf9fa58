"""Files of earlier versions, in tests/data/old: a training resumes from them and the tools read them, for ever.

Everything here goes through the command line and the files, so that it holds whatever the code inside becomes.
The names listed below are users' data: none is ever renamed.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from tests.conftest import REPOSITORY
from tools import predict

OLD = REPOSITORY / "tests" / "data" / "old"
#: By the name of the run: its flags, and what the code that wrote its files made of them when it resumed.
EXPECTED: dict[str, dict[str, Any]] = json.loads((OLD / "expected.json").read_text())
NAMES = list(EXPECTED)
#: Relative differences of losses and of how far each tensor moved, and images that an evaluation may see otherwise.
#: Other instruction sets or two threads change losses by 2e-7 in float32, 1e-4 in float16 and 6e-4 in bfloat16, and
#: the accuracy by one image at most; a lost momentum, other dropout or a forgotten skipped step by 2e-2 or more.
TOLERANCES = {"float32": (1e-4, 1e-2, 2), "half": (5e-3, 2e-2, 4)}
NUM_TEST_IMAGES = 360

STATE_KEYS = {
    "format", "settings", "circumstances", "step", "evaluated", "best_accuracy", "best_step", "best", "best_crc32",
    "model", "optimizer", "precision", "log",
}  # fmt: skip
SETTINGS_KEYS = {
    "--pretrained_dir", "--model_type", "--dataset", "--zero_head", "--img_size", "--learning_rate", "--weight_decay",
    "--num_steps", "--decay_type", "--warmup_steps", "--max_grad_norm", "--gelu", "--hflip", "--seed", "--eval_every",
    "--loss_scale", "--dropout", "--train_batch_size of all processes", "precision",
}  # fmt: skip
CIRCUMSTANCES_KEYS = {
    "--device", "--train_batch_size", "--gradient_accumulation_steps", "--eval_batch_size", "--compile",
    "--deterministic", "processes", "threads", "torch",
}  # fmt: skip
JSON_KEYS = {"model_type", "img_size", "classes", "gelu", "dataset", "step", "accuracy", "crc32"}
TRAIN_LINE_KEYS = {"step", "train/loss", "train/lr", "images_per_sec"}
TEST_LINE_KEYS = {"step", "test/accuracy", "test/loss", "test/balanced_accuracy"}
SCALAR_TAGS = (TRAIN_LINE_KEYS | TEST_LINE_KEYS) - {"step"}
IMAGE_TAGS = {"train/pictures", "test/confusion", "test/worst_mistakes"}


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    """Runs write output/ and logs/ below the working directory."""
    monkeypatch.chdir(tmp_path)


def bring(name: str) -> list[str]:
    """Copies an old run's files to where the run left them; returns its flags."""
    Path("output").mkdir()
    for path in OLD.glob(f"output/{name}_*"):
        shutil.copy(path, "output")
    if (OLD / "logs" / name).is_dir():
        shutil.copytree(OLD / "logs" / name, f"logs/{name}")
    # Which number format a processor prefers is another test's subject.
    return [*EXPECTED[name]["flags"], *(["--amp_dtype", "bfloat16"] if name == "bfloat16" else [])]


def load(path: str | Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def edit_settings(name: str, **values: Any) -> None:
    """Changes settings in a state as if an earlier version had written it; None removes one."""
    state = load(f"output/{name}_last.pt")
    settings = {**state["settings"], **{f"--{key}": x for key, x in values.items()}}
    state["settings"] = {key: x for key, x in settings.items() if x is not None}
    torch.save(state, f"output/{name}_last.pt")


def metrics_of(folder: Path, name: str) -> list[dict[str, float]]:
    path = folder / "logs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best_of(name: str) -> dict[str, Any]:
    return json.loads(Path(f"output/{name}_checkpoint.json").read_text())


def tolerances(name: str) -> tuple[float, float, int]:
    return TOLERANCES["half" if name.startswith(("bfloat16", "float16")) else "float32"]


# ---- reading ----


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_resumes_and_ends_as_it_did_then(name):
    flags, expected = bring(name), EXPECTED[name]
    loss_rtol, moved_rtol, images = tolerances(name)
    began = load(f"output/{name}_last.pt")["model"]
    old_lines = metrics_of(OLD, name)

    assert train.main(flags) == 0

    lines = metrics_of(Path(), name)
    assert lines[: len(old_lines)] == old_lines  # its logs go on, or begin where it was stopped
    new_lines = lines[len(old_lines) :]
    assert [line["step"] for line in new_lines] == [line["step"] for line in expected["lines"]]
    for line, then in zip(new_lines, expected["lines"]):
        assert set(then) <= set(line)
        for key, value in then.items():
            if key == "test/accuracy":
                assert abs(line[key] - value) * NUM_TEST_IMAGES <= images, (then, line)
            else:
                assert math.isclose(line[key], value, rel_tol=loss_rtol), (then, line)
    best = best_of(name)
    assert best["step"] == expected["best"]["step"] == 40
    assert best["accuracy"] == new_lines[-1]["test/accuracy"]
    ended = load(f"output/{name}_checkpoint.bin")
    assert list(ended) == list(began) == list(expected["moved"])
    for key, distance in expected["moved"].items():
        moved = float((ended[key] - began[key]).norm())
        assert math.isclose(moved, distance, rel_tol=moved_rtol, abs_tol=1e-3), (key, moved, distance)


@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_is_evaluated(name, caplog):
    flags = bring(name)
    best = best_of(name)
    with caplog.at_level(logging.INFO):
        assert train.main([*flags, "-v"]) == 0
    accuracy = next(float(text.split()[-1]) for text in caplog.messages if text.startswith("Valid Accuracy:"))
    assert abs(accuracy - best["accuracy"]) * NUM_TEST_IMAGES <= tolerances(name)[2]


@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_predicts_with_its_own_classes(name, draw, capsys):
    bring(name)
    picture = draw("a.png", (8, 8))
    flags = ["--load_model_dir", f"output/{name}_checkpoint.bin", "--device", "cpu", "--json", "--top_k", "10"]
    assert predict.main([*flags, picture]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert sorted(found["probabilities"]) == sorted(best_of(name)["classes"]) == [str(i) for i in range(10)]


@pytest.mark.parametrize("key", ["zero_head", "hflip", "gelu", "seed", "loss_scale", "max_grad_norm"])
def test_a_setting_that_a_state_lacks_counts_as_its_flags_default(key):
    flags = bring("evaluation_due")
    edit_settings("evaluation_due", **{key: None})
    assert train.main(flags) == 0
    assert best_of("evaluation_due")["step"] == 40


@pytest.mark.parametrize("flags", [["--hflip"], ["--gelu", "tanh"], ["--seed", "1"]], ids=lambda flags: flags[0])
def test_a_setting_that_a_state_lacks_is_no_other_value(flags, capsys):
    before = bring("float32")
    edit_settings("float32", **{flags[0].removeprefix("--"): None})
    assert train.main([*before, *flags]) == 2
    assert flags[0] in capsys.readouterr().err


def test_what_an_old_state_was_trained_with_is_compared(capsys):
    flags = bring("float32")
    assert train.main([*flags, "--learning_rate", "0.1"]) == 2
    error = capsys.readouterr().err
    assert "--learning_rate" in error
    assert "0.2" in error


# ---- names that are data ----


@pytest.mark.parametrize("name", NAMES)
def test_old_states_hold_these_keys(name):
    """Format 1, which is read for ever: no file here is written anew in another."""
    state = load(OLD / f"output/{name}_last.pt")
    assert state["format"] == 1
    assert set(state) == STATE_KEYS
    assert set(state["settings"]) == SETTINGS_KEYS
    assert set(state["circumstances"]) == CIRCUMSTANCES_KEYS
    assert set(state["best"]) == {"loss", "truth", "predicted", "confidence"}
    assert set(state["optimizer"]) == {"state", "param_groups"}
    assert set(state["precision"]) == {"scaler", "skipped", "in_a_row"}
    assert set(state["log"]) == {"losses", "applied", "files"}
    assert set(state["model"]) == set(load(OLD / f"output/{name}_checkpoint.bin"))


def test_old_states_are_of_the_moments_they_are_named_after():
    states = {name: load(OLD / f"output/{name}_last.pt") for name in NAMES}
    assert states["float32"]["settings"]["precision"] == "float32"
    assert states["bfloat16"]["settings"]["precision"] == "bfloat16 O2"
    assert states["float16_skipped"]["settings"]["precision"] == "float16 O2"
    assert states["float16_skipped"]["precision"]["skipped"] > 0
    assert len(states["between_lines"]["log"]["losses"]) == 3
    due = states["evaluation_due"]
    assert due["step"] % due["settings"]["--eval_every"] == 0
    assert due["evaluated"] < due["step"]


@pytest.fixture(scope="module")
def new_run(tmp_path_factory):
    """The folder of a run of 4 steps, stopped by nothing, and what it logged."""
    folder = tmp_path_factory.mktemp("new")
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    flags = ["--dataset", "digits", "--model_type", "testing", "--img_size", "32", "--device", "cpu", "--num_steps",
             "4", "--warmup_steps", "1", "--log_every", "1", "--eval_every", "2", "--train_batch_size", "16",
             "--pretrained_dir", ""]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        logging.getLogger().addHandler(handler)
        try:
            assert train.main(["--name", "new", *flags]) == 0
        finally:
            logging.getLogger().removeHandler(handler)
    return folder, messages


def test_a_run_writes_files_of_these_names(new_run):
    folder, _ = new_run
    output = {path.name for path in (folder / "output").iterdir() if not path.name.startswith(".")}
    assert output == {"new_checkpoint.bin", "new_checkpoint.json", "new_last.pt", "new_report.html"}
    logs = {path.name for path in (folder / "logs" / "new").iterdir() if not path.name.startswith(".")}
    assert "metrics.jsonl" in logs
    assert [name.startswith("events.out.tfevents.") for name in logs - {"metrics.jsonl"}] == [True]


def test_a_checkpoint_and_its_json_hold_these_names(new_run):
    folder, _ = new_run
    assert set(json.loads((folder / "output/new_checkpoint.json").read_text())) >= JSON_KEYS
    assert list(load(folder / "output/new_checkpoint.bin")) == list(load(OLD / "output/float32_checkpoint.bin"))


def test_lines_of_metrics_have_these_keys(new_run):
    folder, _ = new_run
    lines = metrics_of(folder, "new")
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4]
    for line in lines:
        assert set(line) >= (TEST_LINE_KEYS if "test/loss" in line else TRAIN_LINE_KEYS)


def test_tensorboard_has_these_tags(new_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(new_run[0] / "logs" / "new"))
    accumulator.Reload()
    tags = accumulator.Tags()
    assert set(tags["scalars"]) >= SCALAR_TAGS
    assert set(tags["images"]) >= IMAGE_TAGS


def test_a_run_logs_the_lines_that_users_grep(new_run):
    folder, messages = new_run
    accuracies = [line["test/accuracy"] for line in metrics_of(folder, "new") if "test/accuracy" in line]
    assert [text for text in messages if text.startswith("Global Steps:")] == ["Global Steps: 2", "Global Steps: 4"]
    valid = [text for text in messages if text.startswith("Valid Accuracy:")]
    assert valid == [f"Valid Accuracy: {accuracy:.5f}" for accuracy in accuracies]
    best = [text for text in messages if text.startswith("Best Accuracy:")]
    assert best == [f"Best Accuracy: \t{max(accuracies):.5f}"]
