"""The share of the time that a training waits for images in files: that it is right, shown, and warned of once."""

import logging
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from tests.conftest import REPOSITORY
from tests.helpers import runs
from utils import console, hardware, images, input_wait, log_files
from utils.advice import for_slow_images
from utils.input_wait import InputWait
from utils.metrics import TrainLog

CPU, DONE = torch.device("cpu"), torch.tensor(True)


@pytest.fixture
def take_steps(tmp_path, clock, caplog):
    """``take_steps(waits, computes)``: each step waits, then computes, so many seconds; a line after three."""
    caplog.set_level(logging.INFO)

    def batches(waits):
        for secs in waits:
            clock.now += secs
            yield secs

    def take(waits, computes, paused_after=()):
        log = TrainLog(str(tmp_path), len(waits), 8, 3)
        log.input_wait = InputWait(batches(waits), CPU, 1)
        with log:
            for step, secs in enumerate(computes, start=1):
                assert next(log.input_wait) == waits[step - 1]
                clock.now += secs
                log.step(step, torch.tensor(1.0), 0.1, DONE)
                if step in paused_after:
                    with log.paused():
                        clock.now += 1e6

    return take


def shares(folder):
    return [line.get("input_share") for line in log_files.read_lines(str(folder))]


def warnings(caplog):
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [text for text in warned if "of the time for images" in text]


# ---- the share ----


def test_each_line_has_the_share_since_the_one_before(take_steps, tmp_path, caplog):
    take_steps([30, 0, 0, 3, 3, 3, 0, 0, 0, 1], [10, 10, 10, 7, 7, 7, 5, 5, 5, 1])
    assert shares(tmp_path) == pytest.approx([0.5, 0.3, 0, 0.5])
    told = [re.search(r"images/s, (\d+) % waiting for images, ", text) for text in caplog.messages]
    assert [m[1] for m in told if m] == ["75", "60", "50", "30", "30", "30", "0", "50"]  # a line every ten seconds


def test_the_bar_has_it_too(take_steps, monkeypatch, capsys):
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    take_steps([1, 1, 1], [3, 3, 3])
    assert "images/s, 25 % waiting for images" in capsys.readouterr().err


def test_evaluations_and_saves_are_no_part_of_the_time(take_steps, tmp_path):
    take_steps([4] * 6, [6] * 6, paused_after=(2, 3))
    assert shares(tmp_path) == pytest.approx([0.4, 0.4])


class Gpu:
    """A GPU that computes what it is given one after the other, while the host, whose time the clock has, goes on."""

    def __init__(self, clock):
        self.clock, self.free_at = clock, 0.0

    def compute(self, secs):
        self.free_at = max(self.free_at, self.clock.now) + secs

    def Event(self, enable_timing):
        return GpuEvent(self)


class GpuEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.free_at, self.gpu.clock.now)

    def query(self):
        return self.gpu.clock.now >= self.at

    def elapsed_time(self, later):
        assert self.query()
        assert later.query()
        return 1000 * (later.at - self.at)


@pytest.mark.parametrize(("gpu_secs", "expected"), [(5, 0.0), (3, 0.25)])
def test_on_a_gpu_it_is_the_gpu_that_waits(gpu_secs, expected, clock, monkeypatch):
    """A batch is there every four seconds, and the host is free for them: it waits all the time."""
    gpu = Gpu(clock)
    monkeypatch.setattr(torch.cuda, "Event", gpu.Event)

    def batches():
        while True:
            clock.now += 4
            yield None

    waits = InputWait(batches(), torch.device("cuda"), 2)
    for _ in range(3):
        next(waits)
        gpu.compute(gpu_secs)
    clock.now = max(clock.now, gpu.free_at)
    start, waited = clock.now, waits.secs()
    assert not waits.advice(start)
    for _ in range(100):
        next(waits)
        gpu.compute(gpu_secs)
    clock.now = gpu.free_at  # a line is due: the host waits for the loss
    assert (waits.secs() - waited) / (clock.now - start) == pytest.approx(expected, abs=0.02)
    assert bool(waits.advice(clock.now)) == (expected > 0.2)


# ---- the warning ----


def test_a_warning_comes_once_above_a_fifth(take_steps, caplog):
    take_steps([3] * 30, [7] * 30)
    (text,) = warnings(caplog)
    assert "30 % of the time" in text
    assert "--num_workers is 1" in text
    assert f" {hardware.num_cpus()} core" in text


@pytest.mark.parametrize(
    ("waits", "computes"),
    [
        ([2] * 30, [8] * 30),  # a fifth
        ([1000] + [1] * 29, [9] * 30),  # the first batch: workers start
        ([0.3] * 10, [0.6] * 10),  # too short to tell
        ([0] * 20 + [30], [8] * 21),  # one slow batch
    ],
)
def test_no_warning_comes_otherwise(waits, computes, take_steps, caplog):
    take_steps(waits, computes)
    assert not warnings(caplog)


@pytest.mark.parametrize(
    ("num_workers", "num_cpus", "num_ranks", "said", "unsaid"),
    [
        (2, 8, 1, ["--num_workers is 2", "8 cores:", "up to 8"], ["hardly", "decodes itself", "rank"]),
        (0, 4, 1, ["--num_workers is 0", "decodes itself", "up to 4"], ["hardly"]),
        (0, 1, 1, ["there is 1 core:", "up to 1"], ["hardly", "cores"]),
        (4, 4, 1, ["there are 4 cores", "more would hardly help"], ["raise", "decodes itself"]),
        (8, 4, 1, ["more would hardly help"], ["raise"]),
        (2, 4, 3, ["there are 4 cores for each of 3 ranks", "up to 4"], []),
    ],
)
def test_the_remedy_fits_the_processes_and_the_cores(num_workers, num_cpus, num_ranks, said, unsaid):
    text = for_slow_images(0.414, num_workers, num_cpus, num_ranks)
    assert "41 %" in text
    assert "resize the folder" in text
    assert [x for x in said if x not in text] == [x for x in unsaid if x in text] == []
    section, page = re.search(r'see "(.*)" in (\S+)$', text).groups()
    assert f"## {section}\n" in (REPOSITORY / page).read_text(encoding="utf-8")


# ---- in a training ----

SHORT = ["--resume", "none", "--train_batch_size", "8", "--num_steps", "9", "--log_every", "3", "--eval_every", "9"]


def slow_photos(root, size=(1200, 800)):
    """Makes a folder of photos for which a worker takes far longer than the tests' model."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    runs.write_images(root, runs.several_sizes())
    for path in Path(root).glob("train/*/*.png"):
        Image.fromarray(noise).save(path, "JPEG", quality=95)


def trained(caplog, *flags):
    """Trains on a folder; returns the shares of the lines after the first, and the warnings."""
    caplog.clear()
    assert train.main([*runs.RUN, *SHORT, *flags]) == 0
    return [share for share in shares("logs/a")[1:] if share is not None], warnings(caplog)


def test_trainings_warn_of_slow_images_and_not_of_a_slow_model_or_of_images_in_memory(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(input_wait, "ENOUGH_SECS", 0.1)
    caplog.set_level(logging.INFO)
    slow_photos("photos")
    runs.write_images("small", runs.several_sizes())
    for num_workers in ("0", "1"):
        found, told = trained(caplog, "--dataset", "photos", "--num_workers", num_workers)
        assert len(found) == 2
        assert all(0.3 < share <= 1 for share in found)
        assert len(told) == 1
        assert f"--num_workers is {num_workers}" in told[0]
    assert trained(caplog, "--dataset", "digits") == ([], [])
    assert "waiting for images" not in caplog.text

    compute = train.forward_backward
    monkeypatch.setattr(train, "forward_backward", lambda *args: (time.sleep(0.1), compute(*args))[1])
    found, told = trained(caplog, "--dataset", "small", "--num_workers", "1")
    assert len(found) == 2
    assert not told
    assert max(found) < 0.2
    assert "waiting for images" in caplog.text


# ---- the page ----


@pytest.mark.parametrize("page", ["data.md", "data.zh-CN.md"])
def test_the_script_of_the_page_makes_a_smaller_folder_of_the_same_form(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    Path("resize.py").write_text(script, encoding="utf-8")
    runs.write_images("pets", iter([(1400, 700), (700, 1400), (40, 30)] + [(900, 1000)] * 13))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open("pets/train/ant/0.png").save("pets/train/ant/turned.JPG", exif=turned)
    Image.open("pets/train/ant/0.png").convert("RGBA").save("pets/train/ant/0.png")
    Path("pets/notes.txt").write_text("no image")
    subprocess.run([sys.executable, "resize.py"], check=True, timeout=60)

    def names(root):
        return {str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file()}

    assert names("pets-672") == names("pets") - {"notes.txt"}
    sizes = {"0.png": (672, 336), "1.png": (336, 672), "2.png": (40, 30), "3.png": (605, 672), "turned.JPG": (336, 672)}
    for name, size in sizes.items():
        before, after = (images.read_image(f"{root}/train/ant/{name}") for root in ("pets", "pets-672"))
        assert after.size == size
        difference = np.asarray(before.resize(size), dtype=float) - np.asarray(after)
        assert np.abs(difference).mean() < 2
