"""The table of flags and what follows from it: the parser, the checks, the settings, docs/flags.md."""

from __future__ import annotations

import argparse
import logging
import os
import re

import pytest

import train
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.conftest import REPOSITORY
from tests.helpers.runs import TINY, last_state
from tests.test_old_files import CIRCUMSTANCES_KEYS, SETTINGS_KEYS
from utils import args as flags
from utils import checkpoint
from utils.batch import Batch
from utils.errors import UserError

NUMERIC = [f for f in flags.FLAGS if isinstance(f.default, (int, float)) and not isinstance(f.default, bool)]


def parse(*words):
    return flags.make_parser().parse_args(["--name", "a", *words])


def check(*words):
    flags.check_args(parse(*words))


def test_names_and_defaults_are_the_contract():
    assert vars(parse()) == dict(
        name="a", dataset="cifar10", data_dir="./data", model_type="ViT-B_16", pretrained_dir=None, zero_head=False,
        output_dir="output", log_dir="logs", img_size=224, train_batch_size=512, eval_batch_size="auto", eval_every=100,
        log_every=10,
        learning_rate=3e-2, weight_decay=0, num_steps=10000, decay_type="cosine", warmup_steps=500, max_grad_norm=1.0,
        dropout=None, gelu="erf", hflip=False, device="auto", jpeg_decoding=None, num_workers=None, resume="auto",
        save_every=None,
        deterministic=False, local_rank=-1, seed=42, gradient_accumulation_steps="auto", fp16=False,
        fp16_opt_level="O2", amp_dtype="auto", amp_backend="native", compile=False, loss_scale=0,
        eval_only=False, load_model_dir=None, test_fraction=None, gradient_checkpointing=False,
    )  # fmt: skip


def test_the_other_spellings_of_the_reference_script():
    assert parse("--local-rank", "3").local_rank == 3
    assert [parse(*words).eval_only for words in (["-v"], ["-v", "true"], ["-v", "no"], [])] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("flag", NUMERIC, ids=lambda flag: flag.name)
def test_numbers_are_read_as_such(flag):
    value = getattr(parse(f"--{flag.name}", "3"), flag.name)
    assert value == 3
    assert type(value) is (float if flag.name == "loss_scale" else type(flag.default))


OUT_OF_BOUNDS = {
    "img_size": ["0"], "train_batch_size": ["0"], "eval_batch_size": ["0"], "eval_every": ["0"], "log_every": ["0"],
    "num_steps": ["0"], "gradient_accumulation_steps": ["0"], "save_every": ["0"], "warmup_steps": ["-1"],
    "num_workers": ["-1"], "seed": ["-1", str(2**63)], "learning_rate": ["-1", "nan", "inf"],
    "weight_decay": ["-0.1", "nan", "inf"], "loss_scale": ["-1", "nan", "inf"], "max_grad_norm": ["0", "-1", "nan"],
    "dropout": ["-0.1", "1", "nan"], "test_fraction": ["0", "-0.1", "1.1", "nan"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, x) for name, values in OUT_OF_BOUNDS.items() for x in values])
def test_values_out_of_bounds_are_the_users_to_mend(name, value):
    with pytest.raises(UserError, match=f"--{name} is {value}.*, expected "):
        check(f"--{name}", value)


def test_values_at_their_bounds_are_taken():
    for name, values in OUT_OF_BOUNDS.items():
        if values[0] == "0" and name not in ("max_grad_norm", "test_fraction"):
            check(f"--{name}", "1", "--warmup_steps", "0")
    for name in ("learning_rate", "weight_decay", "loss_scale", "warmup_steps", "seed", "dropout", "num_workers"):
        check(f"--{name}", "0")
    check("--max_grad_norm", "inf", "--seed", str(2**63 - 1))
    check("--test_fraction", "1", "-v")


def test_micro_batches_are_a_whole_number_or_the_memorys_choice(capsys):
    assert parse("--gradient_accumulation_steps", "4").gradient_accumulation_steps == 4
    check("--gradient_accumulation_steps", "auto", "--train_batch_size", "509")
    for wrong in ("many", "1.5", "Auto", ""):
        with pytest.raises(SystemExit):
            parse("--gradient_accumulation_steps", wrong)
        assert "is neither auto nor a whole number" in capsys.readouterr().err


def test_every_number_has_a_bound():
    numbers = {f.name for f in flags.FLAGS if f.parse in (int, float, flags.parse_auto)} | {f.name for f in NUMERIC}
    assert numbers - set(OUT_OF_BOUNDS) == {"local_rank"}  # which is compared with the launcher's


@pytest.mark.parametrize(
    "words",
    [
        ["--name", "a/b"], ["--name", ""], ["--name", ".."], ["--name", "a\n"], ["--name", "n" * 201],
        ["--train_batch_size", "8", "--gradient_accumulation_steps", "3"],
        ["--fp16", "--amp_backend", "apex", "--amp_dtype", "bfloat16"],
        ["--load_model_dir", "a.bin"],
        ["--test_fraction", "1"],
    ],
)  # fmt: skip
def test_flags_that_contradict_are_the_users_to_mend(words):
    with pytest.raises(UserError):
        check(*words)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--warmup_steps", "5", "--num_steps", "5"], "--warmup_steps"),
        (["--fp16_opt_level", "O1"], "--fp16"),
        (["--amp_dtype", "float16"], "--fp16"),
        (["--amp_backend", "apex"], "--fp16"),
        (["--loss_scale", "2"], "--fp16"),
        (["--zero_head", "--pretrained_dir", ""], "--zero_head"),
        (["--zero_head", "-v"], "--zero_head"),
        ([], None),
        (["--fp16", "--amp_dtype", "float16"], None),
        (["--warmup_steps", "5", "--num_steps", "5", "-v"], None),
    ],
)
def test_a_flag_without_effect_is_a_warning(words, named, caplog):
    check(*words)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == (named is not None)
    assert all(named in text for text in warnings)


def test_checking_changes_nothing():
    args = parse()
    flags.check_args(args)
    assert args == parse()


def test_the_rank_decodes_with_its_share_of_the_cpus_at_most_eight(monkeypatch):
    for cpus, workers in ((3, 3), (64, 8)):
        monkeypatch.setattr("utils.hardware.num_cpus", lambda cpus=cpus: cpus)
        assert flags.decoding_workers(parse()) == workers
    assert flags.decoding_workers(parse("--num_workers", "0")) == 0
    assert flags.decoding_workers(parse("--num_workers", "20")) == 20


# ---- what the flags decide on ----


def test_a_saved_state_has_the_settings_of_format_1(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--num_steps", "1", "--warmup_steps", "0", "--train_batch_size", "4", "--eval_batch_size", "400"]
    assert train.main(["--name", "a", *TINY, *words, "--pretrained_dir", "", "--learning_rate", "0.1"]) == 0
    state = last_state()
    expected = {
        "--pretrained_dir": "", "--model_type": "testing", "--zero_head": False, "--img_size": 32,
        "--learning_rate": 0.1, "--weight_decay": 0.0, "--num_steps": 1, "--decay_type": "cosine", "--warmup_steps": 0,
        "--max_grad_norm": 1.0, "--gelu": "erf", "--hflip": False, "--seed": 42, "--eval_every": 100,
        "--loss_scale": 0, "--train_batch_size of all processes": 4,
    }  # fmt: skip
    assert expected.items() <= state.settings.items()
    assert set(state.settings) >= SETTINGS_KEYS  # a run resumes only where these are the same
    assert state.settings["--dataset"].startswith("digits ")
    assert set(state.environment) >= CIRCUMSTANCES_KEYS


def test_a_flag_that_decides_is_in_every_saved_state():
    args = flags.make_parser().parse_args(["--name", "a"])
    for on, saved in (
        ("result", flags.settings(args, "", "digits", 0.1, 8, "float32")),
        ("last digits", flags.environment(args, Batch(8, 1, 1, 8), "cpu", "a processor", "float32")),
    ):
        assert {f"--{name}" for name in flags.deciding(on)} <= set(saved)


def test_the_command_that_repeats_an_evaluation_has_the_flags_that_it_reads(tmp_path, monkeypatch):
    read = set()

    class Watched(argparse.Namespace):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flags, "check_args", lambda args: None)  # which reads all
    os.makedirs("output")
    checkpoint.save_weights("output/a_checkpoint.bin", VisionTransformer(CONFIGS["testing"], 32, 10).state_dict())
    args = flags.make_parser().parse_args(["--name", "a", *TINY, "--fp16", "--eval_only"], Watched())
    read.clear()
    assert train.evaluate_only(args) == 0
    read &= {flag.name for flag in flags.FLAGS}
    # The rate of dropout is handed on, without effect; train.main has read --eval_only.
    assert read - {"dropout"} | {"eval_only"} == flags.read_by_evaluation()


def test_the_commands_after_a_training_have_the_flags_that_are_not_their_defaults():
    args = parse("--resume", "none", "--num_steps", "7", "--fp16", "--local_rank", "0", "--gelu", "erf")
    assert flags.to_resume(args) == {"name": "a", "num_steps": 7, "fp16": True}
    assert flags.to_evaluate(args) == {"name": "a", "fp16": True}


def test_the_default_of_a_name():
    assert flags.default_of("seed") == 42
    assert flags.default_of("eval_only") is False
    assert flags.default_of("precision") is None


# ---- what people read ----


def test_the_help_has_every_flag_under_its_heading_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        flags.make_parser().parse_args(["--help"])
    assert ended.value.code == 0
    sections = dict(re.findall(r"^(.+):\n((?:  .*\n)+)", capsys.readouterr().out, re.MULTILINE))
    assert list(sections) == ["options", *flags.GROUPS]
    for title, group in flags.GROUPS.items():
        rows = re.sub(r"\n {4,}", " ", sections[title]).splitlines()  # a flag that is long has its help below
        assert len(rows) == len(group)
        for row, flag in zip(rows, group):
            assert f"--{flag.name} " in row
            assert f"(default: {flag.default})" in row or flag.default is None or flag.default is False
            assert "default: None" not in row
    assert "(default: MODEL's own, 0.1 or 0)\n" in sections["Model"]
    assert " (required)\n" in sections["The run and its files"]


def test_a_name_is_required(capsys):
    with pytest.raises(SystemExit) as ended:
        flags.make_parser().parse_args([])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "train.py: error: the following arguments are required: --name\n"


def test_the_page_of_flags_is_that_of_the_table():
    page = (REPOSITORY / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page == flags.flags_page(), "make flags writes the page anew"


def test_every_row_of_the_page_has_four_cells_and_no_none():
    rows = [line for line in flags.flags_page().splitlines() if line.startswith("| `-")]
    assert len(rows) == len(flags.FLAGS)
    for row, flag in zip(rows, flags.FLAGS):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 4
        assert cells[3] == flag.decides
        assert cells[1] not in ("", "`None`", "`False`")
