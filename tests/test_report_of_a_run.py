"""A training's report and its images in TensorBoard: they show its best evaluation, whatever the classes are called."""

import base64
import html
import io
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import train
from tests.helpers import folders, runs
from utils import figures, fonts
from utils.evaluation import EvalResult

RUN = [
    "--name", "a", *runs.TINY, "--pretrained_dir", "", "--train_batch_size", "8", "--num_steps", "6",
    "--warmup_steps", "2", "--eval_every", "4", "--learning_rate", "0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of six steps with two evaluations."""
    folder, before = tmp_path_factory.mktemp("trained"), os.getcwd()
    os.chdir(folder)
    try:
        assert train.main([*RUN, "--resume", "none"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def page(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return Path("output/a_report.html").read_text(encoding="utf-8")


def events_of(name, kind):
    """{tag: [event, ...]} as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(f"logs/{name}", size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    return {tag: getattr(events, kind.capitalize())(tag) for tag in events.Tags()[kind]}


def test_the_report_and_the_images_show_the_best_evaluation(page):
    lines = [line for line in runs.lines() if "test/accuracy" in line]
    result = EvalResult(**runs.last_state().best_result)
    metadata = json.loads(Path("output/a_checkpoint.json").read_text())
    matrix = np.zeros((10, 10), dtype=int)
    np.add.at(matrix, (result.truth.numpy(), result.predicted.numpy()), 1)
    assert np.trace(matrix) / 360 == metadata["accuracy"] == result.accuracy
    drawn = figures.confusion(matrix, [str(i) for i in range(10)])
    assert base64.b64encode(figures.png(drawn)).decode() in page
    for words in (
        "6 of 6 steps",
        f"{100 * metadata['accuracy']:.2f} %",
        "testing on digits",
        "1,437 to train on, 360 to",
    ):
        assert words in page
    for flag, value in (("--learning_rate", "0.1"), ("--name", "a")):
        assert re.search(rf'<th scope="row">{flag}</th><td>{value}</td>', page)
    assert page.count("<img ") == 1 + min(24, 360 - np.trace(matrix))
    rows = re.findall(r'<th scope="row">(\d+)</th>(?:<td>[^<]*</td>)?<td>([\d.]+) %</td><td>([\d.]+)</td>', page)
    assert rows == [
        (str(line["step"]), f"{100 * line['test/accuracy']:.2f}", f"{line['test/loss']:.5f}") for line in lines
    ]

    images = events_of("a", "images")
    steps = [line["step"] for i, line in enumerate(lines)
             if all(line["test/accuracy"] > earlier["test/accuracy"] for earlier in lines[:i])]  # fmt: skip
    assert [(tag, [event.step for event in images[tag]]) for tag in sorted(images)] == [
        ("test/confusion", steps), ("test/worst_mistakes", steps), ("train/pictures", [1]),
    ]  # fmt: skip
    shown = Image.open(io.BytesIO(images["test/confusion"][-1].encoded_image_string))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(drawn))
    logs = sorted(name for name in os.listdir("logs/a") if not name.startswith("."))
    assert logs[0].startswith("events.")
    assert len(logs) == 2  # hparams make no run of their own


def test_its_commands_are_of_this_run(page, caplog):
    """The first evaluates the checkpoint; the last resumes, though the run itself had started over."""
    caplog.set_level("INFO")
    texts = re.findall("<code>(.*?)</code>", page)
    commands = [shlex.split(html.unescape(re.sub("<.*?>", "", text))) for text in texts if ">python<" in text]
    assert train.main(commands[0][2:]) == 0
    assert "Valid Accuracy" in caplog.text
    caplog.clear()
    assert train.main(commands[-1][2:]) == 0
    assert "This run is finished" in caplog.text


def test_names_in_any_script_and_of_any_bytes_are_text(tmp_path, monkeypatch, rng):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fonts, "FONTS", ())
    evil = "<img src=x onerror=alert(1)>"
    for split in ("train", "test"):
        for name in ("<b>ant", evil, "猫", os.fsdecode(b"\xffe")):
            for i in range(4):
                folders.save(folders.noise(rng), Path("pets"), split, name, f"{i}.png")
    assert train.main([*RUN, "--name", "a&b", "--dataset", "pets"]) == 0
    text = Path("output/a&b_report.html").read_text(encoding="utf-8")
    assert evil not in text
    assert "<b>ant" not in text
    for words in ("&lt;b&gt;ant", "<h1>a&amp;b</h1>", "猫", "\\udcffe"):
        assert words in text
    texts = [
        event.tensor_proto.string_val[0].decode() for event in events_of("a&b", "tensors")["train/classes/text_summary"]
    ]
    assert "猫" in texts[0]


def test_a_report_that_cannot_be_written_does_not_end_a_training(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    os.makedirs("output/a_report.html")
    assert train.main(RUN) == 0
    assert "The report output/a_report.html could not be written" in caplog.text
    assert os.path.isfile("output/a_checkpoint.bin")


def test_drawing_that_fails_does_not_end_a_training(tmp_path, monkeypatch, caplog):
    def fail(image):
        raise RuntimeError("no pencil")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ImageDraw, "Draw", fail)
    assert train.main(RUN) == 0
    for words in ("train/pictures of step 1", "test/confusion of step 4", "The report output/a_report.html"):
        assert re.search(rf"{words} .*\(RuntimeError: no pencil\)", caplog.text), words


def test_a_curve_of_tiny_values_is_in_the_report(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert train.main([*RUN, "--learning_rate", "1e-14", "--log_every", "1"]) == 0
    assert "could not be written" not in caplog.text
    page = Path("output/a_report.html").read_text(encoding="utf-8")
    assert re.search('aria-label="Learning rate over steps, from [0-9.]+e-15 to', page)
