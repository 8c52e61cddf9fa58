"""The measurement of a step: whom it compares, at which settings, and what it prints."""

import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from benchmarks import common, peer_settings, peers, step
from models.configs import CONFIGS
from tests.helpers import runs
from tests.helpers.tables import TINY, check_ratios, tables_of
from utils import augment, data_utils, datasets, number_format
from utils.scheduler import make_schedule

LEVELS = ("O0", "O1", "O2")
FOUND = {"timm": ["fused_attn", "SGD foreach"], "torchvision": ["MultiheadAttention", "SGD fused"]}


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """The records of peers' settings are a file of the test's own, with one for other hardware."""
    monkeypatch.setattr(peer_settings, "PATH", tmp_path / "settings.json")
    settings = {"timm, float32": ["no fused_attn", "SGD foreach"]}
    record = peer_settings.Record("2001-02-03", "a step", {"torch": "0.1", "timm": "0.2"}, settings)
    peer_settings.PATH.write_text(json.dumps({"An old one": vars(record)}), encoding="utf-8")
    return record


@pytest.mark.parametrize("peer", peers.PACKAGES)
def test_peers_are_their_makers_models(peer):
    pytest.importorskip(peers.PACKAGES[peer])
    setting = peers.Setting("ViT-B_32", 224, 1, 1, 0.1, "cpu")
    with torch.device("meta"):
        if peer == "timm":
            import timm

            expected, model = timm.create_model("vit_base_patch32_224", num_classes=10), peers.timm_model(setting, True)
        elif peer == "torchvision":
            import torchvision

            expected, model = torchvision.models.vit_b_32(num_classes=10), peers.torchvision_model(setting)
        else:
            expected = peers.plain_model(setting.config, 224, 10, 0.0)
            model = peers.hugging_face_model(setting, "sdpa")
    shapes, theirs = (sorted(tuple(p.shape) for p in m.parameters()) for m in (model, expected))
    assert shapes == theirs
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} >= {0.1}


def test_our_contender_has_the_losses_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*runs.RUN, "--num_steps", "3", "--warmup_steps", "2", "--log_every", "1", "--dropout", "0.3", "--fp16",
             "--amp_dtype", "bfloat16"]  # fmt: skip
    assert train.main(flags) == 0
    losses = [line["train/loss"] for line in runs.lines() if "train/loss" in line]

    images, transform = datasets.load_datasets("digits", "", 0).train, augment.TrainTransform(32)
    sampler = data_utils.StepSampler(len(images), 16, transform.num_draws, peers.SEED)
    batches = data_utils.train_batches(images, sampler, range(1, 4), 8, transform, torch.device("cpu"), 0)
    training = peers.OurTraining(*peers.build("testing", 32, 0.3, "cpu", "O2", "bfloat16"))
    lr_factor = make_schedule("cosine", 2, 3)
    found = [training.step(k, 0.1 * lr_factor(k), batches, 2).item() for k in range(1, 4)]
    assert found == pytest.approx(losses, abs=1e-6)


def test_the_formula_counts_the_operations_of_the_plain_formulation():
    for model_type, img_size in (("ViT-B_32", 224), ("ViT-S_14", 70)):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            peers.plain_model(CONFIGS[model_type], img_size, 10, 0.0)(torch.empty(2, 3, img_size, img_size))
        assert step.flops_of_step(CONFIGS[model_type], img_size, 10, 2) == 3 * counter.get_total_flops()


def number(cell):
    return float(cell.replace(",", ""))


def test_step_prints_every_contender(capsys, monkeypatch):
    monkeypatch.setattr(peers, "fastest_stepper", None)  # tried only if asked
    monkeypatch.setattr(number_format, "measure", lambda *_: (100.0, 50.0))
    run, lengths = peers.Stepper.run, itertools.count(1.0, 0.01)

    def steady(self):  # each contender's turns take equally long
        run(self)
        return vars(self).setdefault("secs", next(lengths))

    monkeypatch.setattr(peers.Stepper, "run", steady)
    step.main([*TINY, "--batch_size", "4", "--gradient_accumulation_steps", "2", "--one_process"])
    text, (table,) = tables_of(capsys)
    expected = ["ours, O0", "ours, O1", "ours, O2"]
    for peer, package in peers.PACKAGES.items():
        if common.installed(package):
            expected += [f"{peer}, {x}" for x in peers.formats(peer, "cpu")]
        else:
            assert f"{peer} is left out" in text
    assert [row[""] for row in table] == [*expected, "plain reference, float32"]
    assert [row["precision"] for row in table[:3]] == [str(peers.build("testing", 32, 0, "cpu", x)[1]) for x in LEVELS]
    assert all(row["precision"] == row[""].split(", ")[1] for row in table[3:])
    check_ratios(table, "ours, O0 / it")
    rates = {row[""]: number(row["images/s"]) for row in table}
    best = max((name for name in rates if name not in expected[:3]), key=rates.__getitem__)
    for name in expected[:3]:
        ratio = re.search(rf"^{name} / the fastest peer in any format \({best}\): (.+)$", text, re.M)
        assert float(ratio[1]) == pytest.approx(rates[name] / rates[best], abs=0.02)
    for name in expected[1:3]:
        ratio = re.search(f"^{name} / ours, O0: (.+)$", text, re.M)
        assert float(ratio[1]) == pytest.approx(rates[name] / rates["ours, O0"], abs=0.02)
    for row in table:
        slowest, fastest = map(number, row["slowest - fastest"].split(" - "))
        assert 0 < slowest <= number(row["images/s"]) * 1.01
        assert number(row["images/s"]) <= fastest * 1.01
    assert f"torch {common.version('torch')}, " in text


def test_step_says_who_is_not_installed_and_compiles_ours_too(capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(common, "installed", lambda package: package != "transformers")
    flags = ["--fp16_opt_level", "O0", "O1", "--compile"]
    step.main([*TINY, "--batch_size", "2", "--one_process", "--only", "Hugging", *flags])
    text, (table,) = tables_of(capsys)
    assert "Hugging Face is left out: transformers is not installed" in text
    assert [(row[""], row["setting"]) for row in table] == [
        ("ours, O0", "as train.py"), ("ours, O0, compiled", "as train.py, torch.compile"),
        ("ours, O1", "as train.py"), ("ours, O1, compiled", "as train.py, torch.compile"),
    ]  # fmt: skip
    assert len(compiled) == 2


def test_step_takes_the_recorded_settings_and_says_whose_they_are(capsys, recorded):
    pytest.importorskip("timm")
    flags = [*TINY, "--batch_size", "2", "--one_process", "--fp16_opt_level", "O0"]
    step.main([*flags, "--only", "timm"])
    text, (table,) = tables_of(capsys)
    assert [row["setting"] for row in table[1:]] == ["no fused_attn, SGD foreach", *["fused_attn, SGD"] * 2]
    assert "found on 2001-02-03 for a step, on An old one, with torch 0.1, with timm 0.2. Here others may be" in text

    here = common.processor("cpu")
    peer_settings.write(here, replace(recorded, versions={"torch": common.version("torch")}))
    step.main([*flags, "--only", "timm, float32"])
    text, (table,) = tables_of(capsys)
    assert [row[""] for row in table] == ["ours, O0", "timm, float32"]
    assert "for a step, on this kind of processor, with these versions\n" in text


def test_a_search_tries_the_settings_of_a_peer(monkeypatch):
    pytest.importorskip("timm")
    secs = {"fused_attn, SGD": 3, "fused_attn, SGD foreach": 2, "fused_attn, SGD fused": 2.5,
            "no fused_attn, SGD foreach": 1, "no fused_attn, SGD": 0}  # fmt: skip
    monkeypatch.setattr(peers.Stepper, "run", lambda self: secs[", ".join(self.note[1:])])
    stepper = peers.fastest_stepper("timm", peers.Setting("testing", 32, 1, 1, 0.1, "cpu"), "bfloat16 weights", 1)
    assert stepper.note == ("bfloat16 weights", "no fused_attn", "SGD foreach")


def test_a_search_is_recorded_beside_what_was_found_before(capsys, monkeypatch, recorded):
    monkeypatch.setattr(common, "installed", lambda package: package != "transformers")

    def stepper(peer, setting, number_format, trials):
        return SimpleNamespace(note=(number_format, *FOUND[peer]))

    monkeypatch.setattr(peers, "fastest_stepper", stepper)
    args = step.make_parser().parse_args([*TINY, "--one_process"])
    setting = peers.Setting("testing", 32, 2, 1, 0.1, "cpu")
    step.search(setting, {"timm, float32": ("timm", "float32")}, args)
    assert peer_settings.read() == {"An old one": recorded}  # --quick finds nothing that is worth it
    args.quick = False
    for args.only in (["timm"], ["timm, float32", "torchvision"]):
        step.search(setting, step.pick_peers(args), args)
    record = peer_settings.read()[common.processor("cpu")]
    assert peer_settings.read()["An old one"] == recorded
    assert record.settings == {f"{peer}, {x}": FOUND[peer] for peer in FOUND for x in peers.formats(peer, "cpu")}
    assert record.versions["torch"] == common.version("torch")


def test_the_record_that_comes_along_has_settings_of_all_peers():
    for record in peer_settings.read().values():
        assert set(record.settings) == {f"{peer}, {x}" for peer in peers.PACKAGES for x in peers.formats(peer, "cpu")}
        for name, (attention, optimizer) in record.settings.items():
            assert attention in peers.ATTENTIONS[name.split(",")[0]]
            assert optimizer in peers.OPTIMIZERS
        assert set(record.versions) == {"torch", *peers.PACKAGES.values()}


def test_only_a_peer_that_is_near_the_fastest_takes_all_turns(monkeypatch, capsys):
    turns = []

    def stepper(peer, setting, number_format, *_):
        secs = {"float32": 1.0, "bfloat16 autocast": 1.15, "bfloat16 weights": 1.3}[number_format]
        return SimpleNamespace(note=(number_format, "a setting"), run=lambda: turns.append(number_format) or secs)

    monkeypatch.setattr(peers, "peer_stepper", stepper)
    monkeypatch.setattr(common, "installed", lambda package: package == "timm")
    step.main([*TINY, "--batch_size", "2", "--one_process", "--only", "timm", "--fp16_opt_level", "O0"])
    text, (table,) = tables_of(capsys)
    assert turns == ["float32", "bfloat16 autocast", "bfloat16 weights", *["float32", "bfloat16 autocast"] * 2]
    assert [row["images/s"] for row in table[1:]] == ["2", "1.74", "1.54"]
    assert "in any format (timm, float32)" in text


def test_step_measures_memory(capsys):
    step.main([*TINY, "--batch_size", "2", "--one_process", "--only", "none", "--fp16_opt_level", "O0", "--memory"])
    _, ((row,),) = tables_of(capsys)
    peak, net = (float(x.strip("()").replace(",", "")) for x in row["peak memory MiB (without imports)"].split())
    assert peak > net > 0
