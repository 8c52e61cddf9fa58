"""The lines and curves that a run leaves: what is in them, when, and that none is ever lost."""

import contextlib
import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from utils import console, log_files
from utils.evaluation import EvalResult
from utils.log_files import MetricsWriter
from utils.metrics import TrainLog
from utils.signals import Stopped


def read_lines(folder):
    with open(os.path.join(folder, log_files.METRICS_FILE), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def read_events(folder):
    """{tag: [(step, value), ...]} as TensorBoard would show them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# ---- the writer ----


def test_lines_and_events_agree(tmp_path):
    writer = MetricsWriter(str(tmp_path / "logs" / "run"))
    written = [
        (10, {"train/loss": 2.25, "train/lr": 0.006, "images_per_sec": 900.0}),
        (20, {"train/loss": 1e-9, "train/lr": 0.012, "images_per_sec": 1e6}),
        (20, {"test/accuracy": 0.98, "test/loss": 0.07}),
    ]
    for step, values in written:
        writer.write(step, values)
    writer.close()
    lines = read_lines(tmp_path / "logs" / "run")
    assert lines == [{"step": step, **values} for step, values in written]
    events = read_events(tmp_path / "logs" / "run")
    from_lines = {}
    for line in lines:
        for tag in line.keys() - {"step"}:
            from_lines.setdefault(tag, []).append((line["step"], pytest.approx(line[tag], rel=1e-6)))
    assert events == from_lines


def test_each_line_is_on_the_disk_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(str(tmp_path))
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 0.5})
        assert [line["step"] for line in read_lines(tmp_path)] == list(range(1, step + 1))
    writer.close()


def test_a_disabled_writer_writes_nothing(tmp_path):
    writer = MetricsWriter(str(tmp_path / "run"), enabled=False)
    writer.write(1, {"train/loss": 0.5})
    writer.close()
    assert os.listdir(tmp_path) == []


def test_logs_of_earlier_runs_are_set_aside_whole(tmp_path, caplog):
    for run in (1, 2, 3):
        writer = MetricsWriter(str(tmp_path))
        writer.write(run, {"train/loss": float(run)})
        writer.close()
        if run == 1:
            assert "Moved" not in caplog.text
            (tmp_path / "notes").mkdir()
            (tmp_path / "notes" / "mine.txt").write_text("the user's")
    folders = {3: tmp_path, 1: tmp_path / "earlier-1", 2: tmp_path / "earlier-2"}
    for run, folder in folders.items():
        assert read_lines(folder) == [{"step": run, "train/loss": float(run)}]
        assert len([f for f in os.listdir(folder) if f.startswith("events.")]) == 1
    assert read_events(tmp_path / "earlier-2") == {"train/loss": [(2, 2.0)]}
    assert (tmp_path / "notes" / "mine.txt").read_text() == "the user's"
    assert caplog.text.count("Moved") == 2
    assert str(tmp_path / "earlier-2") in caplog.text


def test_a_folder_whose_name_has_wildcards_is_taken_literally(tmp_path):
    for step, name in enumerate(("run1", "run[1]", "run[1]")):
        writer = MetricsWriter(str(tmp_path / name))
        writer.write(step, {"train/loss": 1.0})
        writer.close()
    for step, folder in enumerate(("run1", "run[1]/earlier-1", "run[1]")):
        assert [line["step"] for line in read_lines(tmp_path / folder)] == [step]


# ---- pictures and hyper-parameters ----


def read_all(folder):
    """The accumulator of TensorBoard itself."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return events


def test_pictures_are_events_only_and_keep_their_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    with MetricsWriter(str(tmp_path)) as writer:
        writer.show(5, "test/confusion", lambda: Image.fromarray(pixels))
        writer.show(9, "test/confusion", lambda: Image.new("L", (4, 4), 7))
        writer.write(9, {"test/accuracy": 0.5})
    first, second = read_all(tmp_path).Images("test/confusion")
    assert (first.step, second.step) == (5, 9)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(first.encoded_image_string))), pixels)
    assert Image.open(io.BytesIO(second.encoded_image_string)).getpixel((0, 0)) == (7, 7, 7)
    assert read_lines(tmp_path) == [{"step": 9, "test/accuracy": 0.5}]


def hyperparameters_of(folder):
    """Returns what the hparams tab reads of a run, and whether that says that the run has ended."""
    from tensorboard.plugins.hparams import metadata

    found = read_all(folder).summary_metadata
    contents = {tag: found[tag].plugin_data.content for tag in found if found[tag].plugin_data.plugin_name == "hparams"}
    info = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    values = {name: getattr(x, x.WhichOneof("kind")) for name, x in info.hparams.items()}
    return values, metadata.SESSION_END_INFO_TAG in contents, metadata.EXPERIMENT_TAG in contents


def test_hyperparameters_belong_to_the_run_itself(tmp_path):
    with MetricsWriter(str(tmp_path / "run")) as writer:
        writer.write(8, {"test/accuracy": 0.5})
        writer.hyperparameters(8, {"learning_rate": 0.03, "num_steps": 8, "hflip": True, "dropout": None, "name": "x"})
    assert sorted(os.listdir(tmp_path)) == ["run"]
    assert sorted(f.split(".")[0] for f in os.listdir(tmp_path / "run")) == ["events", "metrics"]
    values = {"learning_rate": 0.03, "num_steps": 8, "hflip": "True", "dropout": "None", "name": "x"}
    assert hyperparameters_of(tmp_path / "run") == (values, True, False)
    assert read_events(tmp_path / "run") == {"test/accuracy": [(8, 0.5)]}


def test_a_run_that_goes_on_longer_has_its_new_hyperparameters(tmp_path):
    lengths, done = None, 0
    for num_steps in (8, 16):
        with MetricsWriter(str(tmp_path), lengths=lengths, step=done) as writer:
            writer.write(num_steps, {"test/accuracy": 0.5})
            writer.hyperparameters(num_steps, {"num_steps": num_steps})
            lengths, done = writer.flush(), num_steps
    assert hyperparameters_of(tmp_path)[0] == {"num_steps": 16}
    assert read_events(tmp_path) == {"test/accuracy": [(8, 0.5), (16, 0.5)]}


def test_a_disabled_writer_takes_pictures_and_hyperparameters_too(tmp_path):
    with MetricsWriter(str(tmp_path / "run"), enabled=False) as writer:
        writer.show(1, "train/pictures", lambda: pytest.fail("nobody sees it"))
        writer.hyperparameters(1, {"seed": 1})
    assert os.listdir(tmp_path) == []


def fail_with(error):
    raise error


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), OSError("a font"), MemoryError(), AssertionError()])
def test_a_picture_that_cannot_be_drawn_is_a_warning_and_the_next_is_shown(error, tmp_path, caplog):
    with MetricsWriter(str(tmp_path)) as writer:
        writer.show(5, "test/confusion", lambda: fail_with(error))
        writer.show(5, "test/worst_mistakes", lambda: Image.new("RGB", (0, 4)))  # TensorBoard's own fails
        writer.show(5, "test/words", lambda: "words")
        writer.show(6, "test/confusion", lambda: Image.new("RGB", (2, 2)))
    told = [record.getMessage() for record in caplog.records]
    assert [message.split(" of step 5")[0] for message in told] == ["test/confusion", "test/worst_mistakes"]
    assert f"({type(error).__name__}: {error})" in told[0]
    assert [x.step for x in read_all(tmp_path).Images("test/confusion")] == [6]
    assert read_all(tmp_path).Tensors("test/words/text_summary")[0].tensor_proto.string_val == [b"words"]


def test_a_signal_while_a_picture_is_drawn_ends_the_run(tmp_path):
    with MetricsWriter(str(tmp_path)) as writer, pytest.raises(Stopped):
        writer.show(5, "test/confusion", lambda: fail_with(Stopped(15, "at once")))


def test_flags_that_are_no_text_are_spelled_out(tmp_path):
    with MetricsWriter(str(tmp_path)) as writer:
        writer.hyperparameters(8, {"--dataset": os.fsdecode(b"pets\xff"), "--seed": 1})
    assert hyperparameters_of(tmp_path)[0] == {"--dataset": "pets\\udcff", "--seed": 1}


# ---- the training's log ----


DONE, SKIPPED = torch.tensor(True), torch.tensor(False)


@pytest.fixture
def make_log(tmp_path):
    """``make_log(num_steps, log_every)`` opens the log of a run of 8 images a step."""
    with contextlib.ExitStack() as stack:
        yield lambda num_steps=7, log_every=3: stack.enter_context(TrainLog(str(tmp_path), num_steps, 8, log_every))


def test_it_writes_the_mean_since_the_last_line_at_every_nth_and_the_last_step(make_log, tmp_path, clock):
    log = make_log()
    for step in range(1, 8):
        clock.now += 0.5
        log.step(step, torch.tensor(float(step**2)), 0.1 * step, DONE)
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line["train/loss"] for line in lines] == pytest.approx([(1 + 4 + 9) / 3, (16 + 25 + 36) / 3, 49])
    assert [line["train/lr"] for line in lines] == pytest.approx([0.3, 0.6, 0.7])
    assert [line["images_per_sec"] for line in lines] == pytest.approx([16, 16, 16])
    assert [line["secs"] for line in lines] == pytest.approx([1.5, 3, 3.5])
    assert set(read_events(tmp_path)) == {"train/loss", "train/lr", "images_per_sec"}  # secs are no curve


@pytest.mark.parametrize(("num_steps", "log_every", "steps"), [(4, 1, [1, 2, 3, 4]), (4, 100, [4]), (6, 3, [3, 6])])
def test_when_lines_are_due(make_log, tmp_path, num_steps, log_every, steps):
    log = make_log(num_steps, log_every)
    for step in range(1, num_steps + 1):
        log.step(step, torch.tensor(1.0), 0.1, DONE)
    assert [line["step"] for line in read_lines(tmp_path)] == steps


def test_evaluations_and_saves_do_not_count_as_training(make_log, tmp_path, clock):
    truth, predicted = torch.tensor([0, 0, 0, 0, 1, 2]), torch.tensor([0, 0, 0, 1, 0, 0])
    result = EvalResult(1.0, truth, predicted, torch.ones(6))
    log = make_log(num_steps=6, log_every=2)
    assert log.speed() == 0
    for step, secs in enumerate((1, 1, 4, 4, 1, 1), start=1):
        clock.now += secs
        log.step(step, torch.tensor(1.0), 0.1, DONE)
        if step in (3, 4):
            with log.paused():
                clock.now += 1000
                log.evaluation(step, result, 1000.0)
    assert log.speed() == pytest.approx(5 * 8 / 8)  # step 3 is in no line's time
    assert (log.train_secs, log.eval_secs) == (12, 2000)
    assert [line.get("eval_secs") for line in read_lines(tmp_path)] == [None, 1000, None, 2000, None]
    assert read_events(tmp_path)["test/accuracy"] == [(3, 0.5), (4, 0.5)]
    assert read_events(tmp_path)["test/balanced_accuracy"] == [(3, 0.25), (4, 0.25)]


def test_a_resumed_log_has_the_losses_and_the_seconds_so_far(make_log, tmp_path, clock):
    whole = make_log(num_steps=4, log_every=4)
    for step in (1, 2):
        clock.now += 1
        whole.step(step, torch.tensor(float(step)), 0.1, DONE)
    state = whole.state_dict()
    clock.now += 1000  # it was stopped
    with TrainLog(str(tmp_path), 4, 8, 4) as other:
        other.step(1, torch.tensor(9.0), 0.1, DONE)  # is in nobody's files
    log = TrainLog(str(tmp_path), 4, 8, 4)
    log.load_state_dict(state, 2, torch.device("cpu"), own_files=True, num_ranks=1)
    with log:
        for step in (3, 4):
            clock.now += 1
            log.step(step, torch.tensor(float(step)), 0.1, DONE)
    (line,) = read_lines(tmp_path)
    assert (line["step"], line["train/loss"], line["secs"]) == (4, 2.5, 4)


def test_sums_over_two_ranks_are_means_on_one(tmp_path):
    log = TrainLog(str(tmp_path), num_steps=3, images_per_step=8, log_every=3)
    state = {"losses": [2.0, 4.0], "applied": [True, True]}  # of ranks whose mean losses were 1 and 2
    log.load_state_dict(state, 2, torch.device("cpu"), own_files=False, num_ranks=2)
    with log:
        log.step(3, torch.tensor(3.0), 0.1, DONE)
    assert [line["train/loss"] for line in read_lines(tmp_path)] == [2.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_names_the_metric_the_first_such_step_and_a_remedy(make_log, tmp_path, bad):
    log = make_log(num_steps=9, log_every=3)
    for step in (1, 2, 3, 4):
        log.step(step, torch.tensor(1.0), 0.1, DONE)
    log.step(5, torch.tensor(bad), 0.1, DONE)
    with pytest.raises(FloatingPointError, match=r"train/loss is -?(nan|inf) at step 5; .*--learning_rate"):
        log.step(6, torch.tensor(float("nan")), 0.1, DONE)
    assert [line["step"] for line in read_lines(tmp_path)] == [3]


def test_skipped_steps_are_named_and_left_out_of_the_mean_and_of_what_must_be_finite(make_log, tmp_path, caplog):
    log = make_log(num_steps=9, log_every=3)
    for step in range(1, 10):
        skipped = step in (2, 7, 8, 9)
        loss = float("nan") if step in (2, 8) else float(step)
        log.step(step, torch.tensor(loss), 0.1, SKIPPED if skipped else DONE)
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 9]
    assert [line.get("train/loss") for line in lines] == [2.0, 5.0, None]
    assert [m for m in caplog.messages if "skipped" in m] == [
        f"Step {step} was skipped: its scaled gradients overflowed" for step in (2, 7, 8, 9)
    ]
    assert {record.levelname for record in caplog.records if "skipped" in record.message} == {"WARNING"}


@pytest.mark.parametrize(("terminal", "expected"), [(True, [0, 0, 1, 1, 1, 2]), (False, [1, 1, 2, 2, 2, 3])])
def test_losses_stay_where_they_are_until_a_line_is_due(make_log, monkeypatch, terminal, expected):
    monkeypatch.setattr(console, "on_terminal", lambda: terminal)
    log = make_log(num_steps=6, log_every=3)
    reads = []
    for name in ("item", "tolist", "numpy", "__float__", "__bool__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, m=method, n=name: (reads.append(n), m(x))[1])
    counts = []
    for step in range(1, 7):
        log.step(step, torch.tensor(1.0), 0.1, DONE)
        counts.append(len(reads))
    assert counts == expected


def test_a_disk_that_takes_no_line_is_told_of_at_once(tmp_path):
    full = "/dev/full"
    if not os.path.exists(full):
        pytest.skip(f"needs {full}")
    for name in ("_lines", "file"):
        writer = MetricsWriter(str(tmp_path / name))
        owner = writer if name == "_lines" else writer._events
        getattr(owner, name).close()
        setattr(owner, name, open(full, "wb"))  # noqa: SIM115
        if name == "file":
            owner._records._writer = owner.file
            with pytest.raises(OSError, match="could not be written"):  # half a picture would hide what follows it
                writer.show(1, "train/pictures", lambda: Image.new("RGB", (2, 2)))
        with pytest.raises(OSError, match=r"could not be written \(No space left on device\)"):
            writer.write(1, {"train/loss": 0.5})
        writer.close()


def test_logs_go_on_from_the_bytes_of_the_state(tmp_path):
    writer = MetricsWriter(str(tmp_path))
    writer.write(1, {"train/loss": 1.0})
    lengths = writer.flush()
    writer.write(2, {"train/loss": 2.0})
    writer.close()
    for _ in range(2):  # the second time there is a file more, begun after the state
        writer = MetricsWriter(str(tmp_path), lengths=lengths, step=1)
        writer.write(2, {"train/loss": 3.0})
        later = writer.flush()
        writer.close()
        assert [line["train/loss"] for line in read_lines(tmp_path)] == [1.0, 3.0]
        assert read_events(tmp_path) == {"train/loss": [(1, 1.0), (2, 3.0)]}
    assert set(lengths) < set(later)
