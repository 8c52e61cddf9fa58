"""The measurements of speed: they run, print what they should, and compare fairly."""

import functools
import os
import re
from dataclasses import replace

import pytest
import torch

from benchmarks import common, data, peak, peers, photos, start, step
from benchmarks.once import communication, saving, scaled_decoding, scaling
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.conftest import REPOSITORY
from tests.helpers import fake_npz
from tests.helpers.tables import TINY, check_ratios, tables_of
from utils import augment

CONFIG = replace(CONFIGS["testing"], dropout_rate=0.0)


@pytest.fixture
def forked(monkeypatch):
    """Contenders' processes have loaded what this one has."""
    monkeypatch.setattr(common, "START_METHOD", "fork")


# ---- fairness ----


def test_the_plain_formulation_gives_our_logits_and_gradients():
    torch.manual_seed(0)
    model = VisionTransformer(CONFIG, 48, 10)
    torch.nn.init.normal_(model.head.weight, std=CONFIG.hidden_size**-0.5)  # logits near 1
    plain = peers.plain_model(CONFIG, 48, 10, 0.0)
    plain.load_state_dict(model.state_dict())
    images, labels = torch.rand(4, 3, 48, 48) * 2 - 1, torch.randint(10, (4,))
    torch.testing.assert_close(plain(images), model(images)[0], rtol=0, atol=1e-5)
    for m in (plain, model):
        m.train()
        m(images, labels).backward()
    gradients = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0 or ".key.bias" in name  # softmax does not see what all scores share
        torch.testing.assert_close(gradients[name].grad, p.grad, rtol=0, atol=1e-5)
    dropping = peers.plain_model(CONFIG, 48, 10, 0.5).train()
    assert not torch.equal(dropping(images), dropping(images))


def test_the_plain_formulation_loads_the_same_weights():
    arrays = fake_npz.arrays(CONFIG, 32, 21, pre_logits=True)
    model, plain = VisionTransformer(CONFIG, 32, 10, zero_head=True), peers.plain_model(CONFIG, 32, 10, 0.0)
    model.load_from(arrays)
    plain.load_from(arrays)
    state = plain.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_pipelines_make_images_of_one_kind():
    images, _ = data.Setting(data.SYNTHETIC, "", 40, 4, 1, 4, 4, "testing", "cpu", 0).load()
    transform = augment.TrainTransform(40)
    mine = transform.batch(images.images[:4], torch.rand(4, transform.num_draws, dtype=torch.float64))
    for tensors in (False, True):
        theirs, label = data.StockDataset(images, data.stock_transform(40, tensors, True), tensors)[3]
        assert (theirs.shape, theirs.dtype, label) == (mine[3].shape, mine.dtype, images.labels[3])
        assert -1 <= theirs.min() < -0.5 < 0.5 < theirs.max() <= 1


# ---- the measurements ----


def test_data_prints_every_contender(capsys):
    data.main([*TINY, "--batch_size", "4", "--one_process", "--num_workers", "1", "--dataset", "digits"])
    _, (images, evaluation) = tables_of(capsys)
    names = [f"{name}, {n} workers" for name in ("torchvision", "torchvision v2") for n in (1, 0)]
    assert [row[""] for row in images] == ["ours", *names]
    assert [row[""] for row in evaluation[1:]] == ["ours, float32", "plain reference, float32"]
    assert re.fullmatch("ours, (float32 in place of )?bfloat16 O2", evaluation[0][""])  # as this processor is faster
    check_ratios(images)
    check_ratios(evaluation)
    assert all(re.fullmatch(r"\d+%", row["share of peak"]) for row in evaluation)


def test_loaders_of_photographs_are_measured_on_made_ones(capsys, monkeypatch):
    kept = ("ours", "decode_jpeg, transforms.v2")
    monkeypatch.setattr(photos, "LOADERS", {name: photos.LOADERS[name] for name in kept})
    data.main(["--photos", "large", "--quick", "--one_process", "--num_workers", "1", "--img_size", "32"])
    _, (table,) = tables_of(capsys)
    assert [row[""] for row in table] == list(kept)
    check_ratios(table)


def test_scaled_decoding_is_measured_on_photographs_and_text(capsys):
    scaled_decoding.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()[2:]
    names = [line.partition(":")[0] for line in lines]
    assert names == [f"{kind}, 1/{scale}" for kind in ("photographs", "text") for scale in (1, 2, 4)]
    assert lines[0].endswith("1 at most")


def test_start_prints_both_and_their_phases(capsys):
    pytest.importorskip("scipy")
    start.main([*TINY, "--batch_size", "2"])
    _, (table,) = tables_of(capsys)
    assert [row[""] for row in table] == ["ours", "plain reference"]
    check_ratios(table)
    for row in table:
        secs = [float(part.rsplit(" ", 1)[1]) for part in row["of these, s"].split(", ") if part[-1].isdigit()]
        assert sum(secs) == pytest.approx(float(row["start to first step, s"]), abs=0.05)


def test_start_reports_a_process_that_fails(tmp_path):
    with pytest.raises(RuntimeError, match="said why"):
        start.watch(["python3", "-c", "print('said why')"], str(tmp_path), 1, {"step": "never"})


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (step.main, ["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (step.main, ["--img_size", "225"], "--img_size 225 is not a multiple"),
        (step.main, ["--batch_size", "3", "--gradient_accumulation_steps", "2"], "is not a multiple of"),
        (data.main, ["--dataset", "nosuch"], "--dataset nosuch is neither"),
        (start.main, ["--pretrained_dir", "nosuch.npz"], "there is no file nosuch.npz"),
    ],
)
def test_wrong_flags_end_with_one_line(main, flags, message, capsys):
    with pytest.raises(SystemExit) as e:
        main(flags)
    assert e.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_saving_prints_the_seconds_the_megabytes_and_the_share(tmp_path, capsys):
    assert saving.main(["--model_type", "testing", "--folder", str(tmp_path), "--rounds", "2", "--threads", "1"]) == 0
    text, (table,) = tables_of(capsys)
    assert [row["file"] for row in table] == ["a_last.pt", "a_checkpoint.bin"]
    assert "share of saving both every 100 steps of 512: " in text
    assert os.listdir(tmp_path) == []
    assert saving.share(2.0, 0.98) == pytest.approx(0.02)


# ---- what they share ----


def test_turns_rotate():
    order = []
    secs = common.take_turns({name: lambda name=name: order.append(name) or len(order) for name in "abc"}, 3)
    assert "".join(order) == "abcbcacab"
    assert secs == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_speed_is_of_the_median_turn():
    speed = common.Speed([2.0, 1.0, 4.0], 100)
    assert speed.median == 50
    assert speed.spread == "25 - 100"


class Hoarder:
    """Holds some memory."""

    note = ("some",)

    def __init__(self, megabytes):
        if megabytes < 0:
            raise ValueError(f"{megabytes} MB")
        self._bytes = b"\1" * (megabytes << 20)

    def run(self):
        return 2.5


def job_of(megabytes):
    return common.Job(functools.partial(Hoarder, megabytes), (), "cpu", 1)


def test_a_contender_in_its_own_process_reports_time_and_memory():
    with common.crew({"a": job_of(300)}, one_process=False) as ready:
        assert ready["a"].note == ("some",)
        assert ready["a"].run() == 2.5
        memory = ready["a"].memory
    assert 280 < (memory.peak - memory.imports) / 2**20 < 380


@pytest.mark.usefixtures("forked")
def test_a_contender_that_cannot_be_built_says_why():
    with pytest.raises(ValueError, match="-1 MB"):
        common.memory_of(job_of(-1))


def test_the_peak_is_that_of_the_best_product():
    rate = peak.matmul_peak("cpu", torch.float32, 8, 8, 8, quick=True)
    a = torch.rand(8, 8)
    assert rate > 2 * 8**3 / common.timed(lambda: a @ a, 100, "cpu")  # the larger squares are faster


# ---- ranks ----


def test_the_bytes_of_gradients_are_those_of_the_published_sizes():
    assert communication.gradient_bytes("ViT-B_16", "O0") == 4 * 86_567_656
    half = communication.gradient_bytes("ViT-B_16", "O2")
    assert 2 * 86_567_656 < half < 2.02 * 86_567_656  # norms and embeddings stay float32
    assert communication.gradient_bytes("ViT-B_16", "O3") == 2 * 86_567_656
    assert communication.sent_bytes(1000, 1) == 0
    assert communication.sent_bytes(1000, 2) == 1000  # half of it there, and half of the sums back
    assert communication.milliseconds(25e9 / 8, 25) == 1000


def test_the_table_of_the_page_is_the_commands(capsys):
    communication.main([])
    page = (REPOSITORY / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert f"<!-- benchmarks.once.communication -->\n{capsys.readouterr().out}<!-- end -->" in page


def test_time_that_is_hidden_is_time_inside_the_backward_pass():
    backward = [(1.0, 2.0), (2.5, 4.0)]
    assert scaling.communication([(0.5, 1.5), (1.2, 3.0), (3.5, 5.0)], backward) == pytest.approx((4.0, 1.5))
    assert scaling.communication([(4.0, 5.0)], backward) == (1.0, 1.0)
    assert scaling.communication([(2.0, 3.0)], backward) == (1.0, 0.0)


@pytest.mark.usefixtures("forked")
def test_scaling_compares_one_rank_with_two_and_looks_at_the_reductions(capsys):
    scaling.main(["--model_type", "testing", "--img_size", "32", "--quick", "--threads", "1", "--steps", "1"])
    text, (table,) = tables_of(capsys)
    assert [row[""] for row in table] == ["1 rank x 1 thread", "2 ranks x 1 thread"]
    assert min(float(row["images/s"].replace(",", "")) for row in table) > 0
    share = re.search(r"reductions are under way for (\d+) ms of it, (\d+)% of that inside the backward pass", text)
    assert 0 <= int(share[2]) <= 100
