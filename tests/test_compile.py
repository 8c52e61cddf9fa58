"""--compile: the same training, and weights under the same names."""

import logging
import shutil

import pytest
import torch

import train
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers import runs

RUN = [*runs.RUN, "--num_steps", "4", "--warmup_steps", "1", "--log_every", "1", "--gradient_accumulation_steps", "1"]


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def losses_of(name, *flags):
    assert train.main([*RUN, "--name", name, *flags]) == 0
    return [line["train/loss"] for line in runs.lines(name) if "train/loss" in line]


def check_names(name):
    state = torch.load(f"output/{name}_checkpoint.bin", weights_only=True)
    assert list(state) == list(VisionTransformer(CONFIGS["testing"], 32, 10).state_dict())


@pytest.fixture
def compiled(monkeypatch):
    """torch.compile traces and checks as always, then runs the graph without generating code, which takes a minute.

    Gives the models that were compiled.
    """
    models = []

    def compile_model(self):
        models.append(self)
        torch.nn.Module.compile(self, backend="eager")

    monkeypatch.setattr(VisionTransformer, "compile", compile_model)
    torch._dynamo.reset()
    yield models
    torch._dynamo.reset()


def test_a_compiled_model_trains_and_drops_alike_and_keeps_its_weights_names(compiled, caplog):
    caplog.set_level(logging.INFO)
    without = losses_of("plain", "--dropout", "0")
    assert losses_of("compiled", "--dropout", "0", "--compile") == pytest.approx(without, abs=1e-5)
    assert len(compiled) == 1
    check_names("compiled")
    caplog.clear()
    for more in ([], ["--compile"]):
        assert train.main(["--name", "compiled", *runs.TINY, "-v", *more]) == 0
    assert len(compiled) == 2
    one, other = (m for m in caplog.messages if "Valid Accuracy" in m)
    assert one == other
    dropping = losses_of("dropping", "--dropout", "0.5")
    assert dropping[-1] != pytest.approx(without[-1], abs=1e-5)
    for parts in ("1", "4"):  # the same masks, however a step is divided
        more = ["--dropout", "0.5", "--gradient_accumulation_steps", parts]
        assert losses_of(parts, *more, "--compile") == pytest.approx(dropping, abs=1e-5)


def test_a_compiled_model_trains_alike_in_half_precision(compiled):
    flags = ["--dropout", "0", "--fp16", "--amp_dtype", "bfloat16"]
    assert losses_of("compiled", *flags, "--compile") == pytest.approx(losses_of("plain", *flags), abs=0.02)
    assert len(compiled) == 1


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_code_trains_as_the_plain_model_does():
    flags = ["--dropout", "0"]
    assert losses_of("compiled", *flags, "--compile") == pytest.approx(losses_of("plain", *flags), abs=1e-5)
    check_names("compiled")
