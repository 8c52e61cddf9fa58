"""Half precision or float32 on a CPU: measured, the same on all ranks, kept by a training, and no other bits."""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

import train
from models.configs import CONFIGS
from models.modeling import PatchEmbedding, VisionTransformer
from models.shapes import layer_shapes
from tests.helpers.launching import TINY, clean_environment, ranks, train_main
from tests.helpers.runs import SHORT, last_state, outcome, run, undisturbed
from utils import apex, checkpoint, dist_util, number_format
from utils.precision import Precision

CPU = torch.device("cpu")
SHAPES = layer_shapes(CONFIGS["testing"], 32)
#: A little faster is not enough, nor is half precision that is faster.
RATES = [((100.0, 119.0), "bfloat16"), ((100.0, 121.0), "float32"), ((400.0, 100.0), "bfloat16")]
FP16 = ["--fp16", "--fp16_opt_level"]
FORCED = ["--amp_dtype", "bfloat16"]


@pytest.fixture
def rates(monkeypatch):
    """``rates(in_half, in_float32)`` is what this machine measures from now on; returns the list of measurements."""

    def fake(in_half, in_float32):
        measured = []

        def measure(shapes, half, training):
            measured.append((shapes, half, training))
            return in_half, in_float32

        monkeypatch.setattr(number_format, "measure", measure)
        return measured

    return fake


# ---- shapes ----


@pytest.mark.parametrize(("model_type", "img_size"), [("testing", 32), ("testing-hybrid", 72), ("R50-ViT-B_16", 64)])
def test_shapes_are_those_that_a_forward_pass_computes(model_type, img_size):
    config = replace(CONFIGS[model_type], num_layers=2)
    model, found = VisionTransformer(config, img_size, 3, vis=True).eval(), Counter()

    def note(layer, _, output):
        weight = layer.weight.flatten(1) if isinstance(layer, PatchEmbedding) else layer.weight
        stride = layer.stride[0] if weight.ndim == 4 else 1
        found[tuple(weight.shape), stride] += output.numel() // len(weight)

    for layer in model.transformer.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(note)
    with torch.inference_mode():
        model(torch.zeros(1, 3, img_size, img_size))
    assert layer_shapes(config, img_size) == found


# ---- measuring ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model_type", ["testing", "testing-hybrid"])
def test_measuring_gives_rates_and_touches_no_random_numbers(model_type, training):
    before = torch.get_rng_state()
    in_half, in_float32 = number_format.measure(layer_shapes(CONFIGS[model_type], 32), torch.bfloat16, training)
    assert torch.equal(torch.get_rng_state(), before)
    assert math.isfinite(in_half)
    assert math.isfinite(in_float32)
    assert min(in_half, in_float32) > 0


@pytest.mark.parametrize("slow_pass", [0, 1], ids=["forward", "backward"])
def test_half_precision_that_is_hopeless_is_found_out_in_less_time_than_one_of_its_products(slow_pass, monkeypatch):
    secs_per_flop, products, lost = 1e-9, list(number_format.PRODUCTS), []

    def slow(layer, x, w, y, product=products[slow_pass]):
        if w.dtype == torch.bfloat16:
            lost.append(2 * w.numel() * len(y) * secs_per_flop)
            time.sleep(lost[-1])
        return product(layer, x, w, y)

    products[slow_pass] = slow
    monkeypatch.setattr(number_format, "PRODUCTS", products)
    monkeypatch.setattr(number_format, "BUDGET_SECS", 3.0)  # also on a busy machine both passes have their turn
    shapes = layer_shapes(CONFIGS["ViT-B_32"], 224)
    in_half, in_float32 = number_format.measure(shapes, torch.bfloat16, True)
    assert sum(lost) < 2 * 3072 * 768 * 256 * secs_per_flop
    assert in_float32 > number_format.WORTH_IT * in_half


# ---- choosing ----


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize(("measured", "chosen"), RATES)
def test_float32_is_chosen_where_it_is_clearly_faster(measured, chosen, level, rates, caplog):
    caplog.set_level(logging.INFO)
    rates(*measured)
    precision = Precision(CPU, level)
    number_format.choose(precision, SHAPES)
    assert precision.number_format == chosen
    assert precision.setting == f"bfloat16 {level}"  # what saved states have
    assert str(precision) == (f"float32 in place of {precision.setting}" if chosen == "float32" else precision.setting)
    (line,) = caplog.messages
    assert f"{measured[0]:.3g} GFLOP/s in bfloat16, {measured[1]:.3g} in float32: {level} computes in {chosen}" in line
    assert ("--amp_dtype bfloat16 forces" in line) == (chosen == "float32")
    model = VisionTransformer(CONFIGS["testing"], 32, 10)
    params = precision.prepare(model)
    if chosen == "float32":
        assert all(p is own for p, own in zip(params, model.parameters(), strict=True))
        assert {p.dtype for p in params} == {torch.float32}
        with precision.autocast():
            assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "precision",
    [
        Precision(CPU),
        Precision(CPU, "O2", "bfloat16"),
        Precision(CPU, "O2", "float16"),
        Precision(torch.device("mps"), "O2"),
        apex.ApexPrecision(None, CPU, "O2"),
    ],
    ids=["float32", "bfloat16", "float16", "mps", "apex"],
)
def test_where_the_flags_decide_or_no_cpu_computes_nothing_is_measured(precision, rates, caplog):
    caplog.set_level(logging.INFO)
    measured, before = rates(1.0, 100.0), str(precision)
    number_format.choose(precision, SHAPES)
    assert (measured, str(precision), caplog.messages) == ([], before, [])


# ---- trainings and evaluations ----


@pytest.mark.usefixtures("pets")
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_training_has_the_bits_of_the_format_that_was_chosen(level, rates):
    for chosen, measured, same in (("float32", (1.0, 9.0), []), ("bfloat16", (9.0, 1.0), [*FP16, level, *FORCED])):
        rates(*measured)
        assert run("--resume", "none", *FP16, level) == 0
        result, expected = outcome(), undisturbed(*same)
        assert result.pop("settings")["precision"] == f"bfloat16 {level}"
        assert [key for key in result if result[key] != expected[key]] == []
        assert last_state().environment["number format"] == chosen


@pytest.mark.usefixtures("pets")
def test_an_evaluation_measures_forward_products_and_has_the_accuracy_of_float32(rates, caplog):
    caplog.set_level(logging.INFO)
    assert run() == 0
    evaluate, found = [*SHORT, "-v"], []
    for flags in ([], [*FP16, "O2"]):
        measured = rates(1.0, 9.0)
        caplog.clear()
        assert train.main([*evaluate, *flags]) == 0
        found.append([line for line in caplog.messages if line.startswith("Valid")])
    assert found[0] == found[1]
    assert [(half, training) for _, half, training in measured] == [(torch.bfloat16, False)]


# ---- resuming ----


def edit_state(change):
    state = torch.load("output/a_last.pt", weights_only=True)
    change(state["environment"])
    torch.save(state, "output/a_last.pt")


def to_another_processor(environment):
    environment["processor"] = "another"


def to_an_older_state(environment):
    del environment["processor"], environment["number format"]


MORE = [*FP16, "O2", "--num_steps", "6"]


@pytest.mark.usefixtures("pets")
@pytest.mark.parametrize(("before", "after"), [((1.0, 9.0), (9.0, 1.0)), ((9.0, 1.0), (1.0, 9.0))])
def test_a_training_keeps_its_format_on_the_same_processor_and_measures_on_another(before, after, rates, caplog):
    first, second = ("float32", "bfloat16") if before < after else ("bfloat16", "float32")
    rates(*before)
    assert run(*FP16, "O2") == 0
    measured = rates(*after)
    caplog.clear()
    assert run(*MORE) == 0
    assert (measured, last_state().environment["number format"]) == ([], first)
    assert "last digits" not in caplog.text
    edit_state(to_another_processor)
    assert run(*MORE, "--num_steps", "8") == 0
    assert (len(measured), last_state().environment["number format"]) == (1, second)
    assert f"number format was {first}, is {second}: the last digits may differ" in caplog.text


@pytest.mark.usefixtures("pets")
@pytest.mark.parametrize("flags", [[], FORCED])
def test_a_state_of_an_earlier_version_resumes_in_the_format_that_is_faster_here_or_forced(flags, rates, caplog):
    rates(9.0, 1.0)
    assert run(*FP16, "O2") == 0
    edit_state(to_an_older_state)
    measured = rates(1.0, 9.0)
    assert run(*MORE, *flags) == 0
    assert len(measured) == (not flags)
    assert last_state().environment["number format"] == ("bfloat16" if flags else "float32")
    assert ("number format was bfloat16, is float32" in caplog.text) == (not flags)


# ---- several ranks ----


def trained(rates_and_flags):
    """Trains on a rank that measures these rates; returns the type of its weights and their checksum."""
    rates, flags = rates_and_flags
    models, wrap = [], dist_util.wrap
    number_format.measure = lambda *_: rates
    dist_util.wrap = lambda model: models.append(model) or wrap(model)
    assert train_main(flags) == 0
    weights = models[0].state_dict()
    return [str(weights["head.weight"].dtype), checkpoint.checksum(weights)]


@pytest.mark.parametrize(
    ("rates_of_ranks", "dtype"),
    [([(100, 130), (100, 50)], "torch.bfloat16"), ([(100, 115), (100, 300)], "torch.float32")],
)
def test_ranks_that_measure_differently_agree_on_what_is_faster_for_all(rates_of_ranks, dtype, tmp_path):
    flags = [*TINY, "--name", "a", "--num_steps", "2", "--warmup_steps", "1", "--train_batch_size", "8", *FP16, "O2"]
    with ranks(tmp_path, [(rates, flags) for rates in rates_of_ranks], trained) as job:
        results = job.results()
        assert results[0] == results[1], job.output()
        assert results[0][0] == dtype
        assert job.output().count("--amp_dtype auto: ") == 1


def test_ranks_of_unequal_flags_are_told_so(tmp_path):
    flags = [*TINY, "--name", "a", "--num_steps", "2", "--warmup_steps", "1", "--train_batch_size", "8"]
    with ranks(tmp_path, [[*flags, "--fp16"], flags]) as job:
        assert job.results() == [2, 2], job.output()
        assert "--fp16" in job.output()


def test_float32_takes_no_loss_scale(caplog):
    precision = Precision(torch.device("cpu"), "O2", "auto", loss_scale=1000)
    with caplog.at_level(logging.WARNING):
        number_format.choose(precision, {((8, 8), 1): 4}, kept="float32")
    assert "--loss_scale has no effect" in caplog.text
    assert precision.static_scale == 0


# ---- the processor of this machine, with and without its instructions ----

PROGRAM = """
import sys, time, torch
import torch.nn.functional as F
import train

def secs(dtype):
    x, w = torch.ones(256, 256, dtype=dtype), torch.ones(1024, 256, dtype=dtype)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        F.linear(x, w)
        times.append(time.perf_counter() - began)
    return min(times)

print("ratio", secs(torch.bfloat16) / secs(torch.float32))
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.usefixtures("pets")
def test_a_processor_without_bfloat16_computes_in_float32():
    env = clean_environment(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
    flags = [*SHORT, "--model_type", "ViT-demo", "--num_steps", "1", "--warmup_steps", "0", *FP16, "O2"]
    command = [sys.executable, "-c", PROGRAM, *flags]
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert child.returncode == 0, child.stderr
    ratio = float(re.search(r"ratio (\S+)", child.stdout)[1])
    if ratio < 2:
        pytest.skip("this processor computes in bfloat16 all the same")
    assert "O2 computes in float32 (--amp_dtype bfloat16 forces the other)" in child.stderr
    assert last_state().environment["number format"] == "float32"
