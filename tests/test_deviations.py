"""benchmarks/once/recipes.py and deviations.py: the experiments do as they say, and the default one is train.py."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from benchmarks.common import hardware, version
from benchmarks.once import deviations, recipes
from models.configs import CONFIGS
from models.modeling import Attention, VisionTransformer
from models.modeling_resnet import ResNetV2
from tests.conftest import REPOSITORY
from utils import augment
from utils.scheduler import make_schedule


def draws(n: int) -> torch.Tensor:
    return torch.rand(n, augment.NUM_DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_recipe_they_are_compared_with_is_what_train_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--name", "a", "--dataset", "digits", "--model_type", "ViT-demo", "--img_size", "32", "--device", "cpu"]
    args += ["--pretrained_dir", str(REPOSITORY / "checkpoint" / "ViT-demo.npz"), "--seed", "3", "--num_steps", "5"]
    args += ["--warmup_steps", "2", "--learning_rate", "0.05", "--train_batch_size", "32"]
    assert train.main(args) == 0
    last = json.loads(Path("logs/a/metrics.jsonl").read_text().splitlines()[-1])
    recipe = replace(recipes.OURS, schedule=make_schedule("cosine", 2, 5))
    right, loss = recipes.train(recipe, seed=3, num_steps=5)
    assert right.mean().item() == pytest.approx(last["test/accuracy"])
    assert loss.mean().item() == pytest.approx(last["test/loss"], rel=1e-5)


@pytest.mark.parametrize("name", recipes.EXPERIMENTS)
def test_every_experiment_changes_something(name):
    ours, other = recipes.EXPERIMENTS[name]
    if name == "linear decay to 1e-5":  # which shows after many steps
        assert other.schedule(recipes.NUM_STEPS) * recipes.LEARNING_RATE == pytest.approx(1e-5)
        assert ours.schedule(recipes.NUM_STEPS) == 0
        return
    assert not torch.equal(recipes.train(ours, 0, num_steps=2)[1], recipes.train(other, 0, num_steps=2)[1])


def test_half_momentum_is_rounded_after_it_was_used():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = recipes.HalfMomentumSGD([p], lr=0.5, momentum=0.9)
    gradients = torch.tensor([[1 / 3, 1e-3, 7.0], [1 / 7, 1.0, 1e-4], [0.1, 0.2, 0.3]])
    weights, trace = torch.zeros(3), torch.zeros(3)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        momentum = g + (0.9 * trace).bfloat16().float()
        trace = momentum.bfloat16().float()
        weights = weights - 0.5 * momentum
    torch.testing.assert_close(p.detach(), weights, rtol=1e-6, atol=0)
    assert optimizer.state[p]["trace"].dtype == torch.bfloat16


def test_tensorflows_boxes_keep_its_limits():
    for height, width in ((32, 32), (20, 90), (90, 20)):
        top, left, h, w = recipes.tensorflow_boxes(draws(3000), height, width).T
        assert (top.min(), left.min(), (top + h).max(), (left + w).max()) == (0, 0, height, width)
        assert ((h * w).min() >= 0.05 * height * width) or min(height, width) == 20
        assert ((w >= 0.75 * h - 0.5) & (w <= 1.33 * h + 0.5)).all()


def test_tensorflows_heights_are_uniform_where_torchvisions_areas_are():
    boxes = recipes.tensorflow_boxes(draws(20000), 1000, 1000)
    ratio = boxes[:, 3] / boxes[:, 2]
    square = boxes[(ratio - 1).abs() < 0.02][:, 2].double()
    low = 1000 * 0.05**0.5
    assert square.mean().item() == pytest.approx((1000 + low) / 2, rel=0.03)
    assert square.std().item() == pytest.approx((1000 - low) / 12**0.5, rel=0.05)


def test_tensorflows_resize_interpolates_between_two_pixels():
    images = torch.arange(256, dtype=torch.uint8).repeat(1, 3, 4, 1)  # grey levels rise to the right
    cut = recipes.tensorflow_crop(images, torch.tensor([[0, 10, 4, 4]]), 4)
    torch.testing.assert_close((cut[0, 0, 0] + 1) * 127.5, torch.tensor([10.0, 11.0, 12.0, 13.0]))
    reduced = recipes.tensorflow_crop(images, torch.tensor([[0, 0, 4, 256]]), 2)
    torch.testing.assert_close((reduced[0, 0, 0] + 1) * 127.5, torch.tensor([63.5, 191.5]))
    enlarged = recipes.tensorflow_crop(images, torch.tensor([[0, 0, 4, 4]]), 9)
    ours = augment.resized_crop(images, torch.tensor([[0, 0, 4, 4]]), 9)
    assert 0 < ((enlarged - ours) * 127.5).abs().max() < 1.01  # but for Pillow's roundings


def test_the_references_epochs_end_in_a_smaller_batch():
    batches = list(itertools.islice(recipes.reference_order(100, seed=0), 8))
    assert [len(b) for b in batches] == [32, 32, 32, 4] * 2
    epochs = [torch.cat(batches[:4]), torch.cat(batches[4:])]
    assert all(epoch.sort().values.tolist() == list(range(100)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_googles_buffer_repeats_images_before_all_were_seen():
    batches = list(itertools.islice(recipes.google_order(100, seed=0), 100))
    assert {len(b) for b in batches} == {32}
    seen = torch.cat(batches)
    assert len(seen[:100].unique()) < 90
    counts = seen.bincount(minlength=100)  # each comes with every epoch that is poured in
    assert counts.min() >= 24
    assert counts.max() <= 33


def test_googles_schedule_is_its_formula():
    base, total, warmup = recipes.LEARNING_RATE, recipes.NUM_STEPS, recipes.WARMUP_STEPS
    cosine, linear = (recipes.google_schedule(decay_type) for decay_type in ("cosine", "linear"))
    for count in range(total):  # optax counts from 0
        progress, warm = min(max((count - warmup) / (total - warmup), 0), 1), min(1, count / warmup)
        assert base * cosine(count + 1) == pytest.approx(base * 0.5 * (1 + np.cos(np.pi * progress)) * warm, abs=1e-12)
        assert base * linear(count + 1) == pytest.approx((1e-5 + (base - 1e-5) * (1 - progress)) * warm, abs=1e-12)


def test_dropout_after_attention_drops_its_output_while_it_lasts():
    attention = Attention(CONFIGS["testing"], vis=False)
    x = torch.randn(4, 50, 32)
    torch.manual_seed(0)
    with recipes.dropout_after_attention(0.25):
        dropped = (attention(x)[0] == 0).float().mean().item()
        attention.eval()
        assert (attention(x)[0] != 0).all()
    assert dropped == pytest.approx(0.25, abs=0.03)
    assert (attention.train()(x)[0] != 0).all()


def test_the_references_random_weights():
    torch.manual_seed(0)
    model = VisionTransformer(CONFIGS["ViT-demo"], 32, 10)
    mlp = model.transformer.encoder.layer[0].ffn.fc1.weight.clone()
    recipes.reference_values(model)
    bound = 128**-0.5  # nn.Linear's
    for linear in (model.head, model.transformer.encoder.layer[0].attn.query):
        assert 0.98 * bound < linear.weight.abs().max() <= bound
        assert linear.bias.any()
    assert not model.transformer.embeddings.position_embeddings.any()
    assert torch.equal(model.transformer.encoder.layer[0].ffn.fc1.weight, mlp)


def recomputed_stem(stem, x, by):
    """A hybrid's stem by torch's functions alone: Google's, but the reference's way of what ``by`` names."""

    def conv(module, x, stride):
        w = module.weight
        mean, var = w.mean((1, 2, 3), keepdim=True), w.var((1, 2, 3), keepdim=True, correction=0)
        w = (w - mean) / ((var + 1e-5).sqrt() if by == "sqrt(var + eps)" else var.sqrt() + 1e-5)
        if by == "symmetric padding":
            return F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)
        before = (w.shape[-1] - stride) // 2 if w.shape[-1] > 1 else 0  # sides are even
        after = max(w.shape[-1] - stride, 0) - before
        return F.conv2d(F.pad(x, (before, after, before, after)), w, stride=stride)

    def norm(module, x, groups=32, eps=1e-6):
        return F.group_norm(x, groups, module.weight, module.bias, eps)

    x = norm(stem.root.gn, conv(stem.root.conv, x, 2)).relu()
    if by != "symmetric padding":
        x = F.pad(x, (0, 1, 0, 1))  # zeros do as well as -inf: after relu nothing is below
    x = F.max_pool2d(x, 3, 2)
    for unit in (unit for block in stem.body for unit in block):
        stride = unit.conv2.stride[0]
        shortcut = x
        if unit.has_projection:
            shortcut = conv(unit.downsample, x, stride)
            per_channel = (len(unit.gn_proj.weight), 1e-5) if by == "gn_proj of a group per channel" else ()
            shortcut = norm(unit.gn_proj, shortcut, *per_channel)
        y = norm(unit.gn1, conv(unit.conv1, x, 1)).relu()
        y = norm(unit.gn2, conv(unit.conv2, y, stride)).relu()
        x = (shortcut + norm(unit.gn3, conv(unit.conv3, y, 1))).relu()
    return x


@pytest.mark.parametrize("by", deviations.STEMS)
def test_each_way_of_the_references_stem_is_switched_on_alone_and_off_again(by):
    config, img_size = CONFIGS["testing-hybrid"], 64
    arrays = deviations.checkpoint(config)

    def recomputed(by):
        with mock.patch.object(ResNetV2, "forward", lambda self, x: recomputed_stem(self, x, by)):
            return deviations.logits(config, arrays, img_size)

    def off(got, expected):
        return ((got - expected).abs().max() / expected.abs().max()).item()

    exact = deviations.logits(config, arrays, img_size)
    assert off(exact, recomputed("Google's")) < 1e-4
    with deviations.STEMS[by]():
        otherwise = deviations.logits(config, arrays, img_size)
    assert off(otherwise, recomputed(by)) < 1e-4
    assert off(otherwise, exact) > 5e-3
    assert torch.equal(deviations.logits(config, arrays, img_size), exact)


def test_the_command_prints_the_lines_asked_for(capsys):
    deviations.main(["--only", "arithmetic: schedule"])
    *machine, blank, line = capsys.readouterr().out.splitlines()
    versions = f", scipy {version('scipy')}; float32"
    assert "\n".join(machine) == hardware(torch.get_num_threads(), "cpu") + versions
    assert not blank
    assert line.startswith("arithmetic: schedule from 0: cosine: at most 6.0e-05 in the warm-up")


def test_a_spread_is_a_mean_and_its_standard_error():
    assert deviations.spread([1.0, 3.0], scale=100) == "+200 +- 100"
    assert deviations.spread([-0.01, 0.0, -0.02], scale=100) == "-1.00 +- 0.58"
    assert deviations.spread([0.5, 0.5], scale=100) == "+50.00 +- 0.00"
