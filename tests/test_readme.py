"""The documents keep up with the code: their commands parse, their links lead somewhere, both languages agree."""

import importlib
import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest

import train
from benchmarks.once.agreement import cost
from models.configs import CONFIGS
from models.published import PUBLISHED, UPSTREAMS

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")
DOCUMENTS = [
    *READMES,
    "CONTRIBUTING.md",
    "checkpoint/README.md",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")),
]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def commands_of(name):
    """Every command line of the shell blocks, continued lines joined, comments and prompts dropped."""
    for block in re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text_of(name), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line.removeprefix("$ "), comments=True):
                yield words


def flags_of(words):
    return words[words.index("train.py") + 1 :]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_training_command_parses(document):
    for words in commands_of(document):
        if "train.py" in words:
            train.check_args(train.make_parser().parse_args(flags_of(words)))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_tools_command_parses(document):
    for words in commands_of(document):
        module = next((word for word in words if word.startswith("tools.")), None)
        if module is not None:
            importlib.import_module(module).make_parser().parse_args(words[words.index(module) + 1 :])


def test_the_tools_commands_run_as_written(finetuned_digits, draw, tmp_path, monkeypatch):
    """Each on a checkpoint of a few updates, in a folder with the pictures that the commands name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    for ending in (".bin", ".json"):
        shutil.copy(Path(finetuned_digits).with_suffix(ending), tmp_path / "output" / f"cifar10_checkpoint{ending}")
    draw("cat.jpg")
    draw("pictures/deeper/dog.png")
    ran = set()
    for words in commands_of("README.md"):
        module = next((word for word in words if word.startswith("tools.")), "")
        flags = words[words.index(module) + 1 :] if module else []
        if not module or (module == "tools.download" and "--list" not in flags):  # these need the network
            continue
        if module == "tools.reproduce" and not {"--list", "--dry_run"} & set(flags):  # trains for minutes
            continue
        if "onnx" in flags and not importlib.util.find_spec("onnxscript"):
            continue
        assert importlib.import_module(module).main(flags) == 0, words
        if "--output" in flags:
            assert Path(flags[flags.index("--output") + 1]).stat().st_size
        ran.add(module)
    tools = ("download", "predict", "attention_map", "export", "reproduce")
    assert ran == {f"tools.{name}" for name in tools}


@pytest.mark.parametrize("readme", READMES)
def test_the_two_commands_are_there(readme):
    lines = [" ".join(words) for words in commands_of(readme)]
    assert (
        "python train.py --name cifar10 --dataset cifar10 --model_type ViT-B_32 "
        "--pretrained_dir checkpoint/imagenet21k_ViT-B_32.npz"
    ) in lines
    assert (
        "python train.py --name cifar10 --dataset cifar10 -v true --model_type ViT-B_32 --img_size 384 "
        "--load_model_dir output/cifar10_checkpoint.bin"
    ) in lines
    assert "make demo" in lines


@pytest.mark.parametrize("readme", READMES)
def test_every_flag_and_model_is_explained(readme):
    text = text_of(readme)
    for action in train.make_parser()._actions:
        assert any(f"`{flag}" in text for flag in action.option_strings), action.option_strings
    for model_type in CONFIGS:
        if not model_type.startswith("testing"):
            assert model_type in text


@pytest.mark.parametrize("readme", READMES)
def test_the_table_of_models_names_the_files_that_can_be_downloaded(readme):
    told = {}
    for model, files, upstreams in re.findall(
        r"^\| (\S+) \| [\d,]+ \| (`.+?) \| (`.+?) \| [\d.]+ \|", text_of(readme), re.MULTILINE
    ):
        lines = zip(upstreams.split("<br>"), files.split("<br>"), strict=True)
        told[model] = {upstream.strip("`"): set(re.findall("`(.+?)`", names)) for upstream, names in lines}
    expected = {model: {} for model in PUBLISHED}
    for upstream, files in UPSTREAMS.items():
        for name, path in files.items():
            file = path.removeprefix(f"{upstream}/")
            if upstream == "augreg":
                file = file.split("-")[0] + "-..."
            expected[name.removesuffix("-224")].setdefault(upstream, set()).add(file)
    assert told == expected


def test_the_table_of_models_has_the_cost_that_is_counted():
    rows = re.findall(r"^\| (\S+) \| ([\d,]+) \| `.+?` \| ([\d.]+) \|", text_of("README.md"), re.MULTILINE)
    assert [model for model, *_ in rows] == list(PUBLISHED)
    for model, parameters, gflops in rows:
        if model not in ("ViT-B_32", "R-ViT-Ti_16", "R50-ViT-B_16"):  # all would take ten seconds
            continue
        counted = cost(CONFIGS[model])
        assert (f"{counted[0]:,}", f"{counted[1]:.1f}") == (parameters, gflops), model


def test_both_languages_give_the_same_commands_and_numbers():
    english, chinese = ([" ".join(words) for words in commands_of(readme)] for readme in READMES)
    assert english == chinese
    numbers = [sorted(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", text_of(readme))) for readme in READMES]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_files_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text_of(document)):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target


def test_every_deviation_has_the_size_of_its_effect():
    lines = [line for line in text_of("docs/deviations.md").splitlines() if line.startswith("|")]
    header, ruler, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert (header[0], header[-1]) == ("deviation", "size of the effect")
    assert set("".join(ruler)) == {"-"}
    for row in rows:
        assert len(row) == len(header), row
        if row[0].startswith("**"):
            assert not any(row[1:]), row
        else:
            assert re.search(r"\d", row[-1]), row  # a number, not a word


@pytest.mark.parametrize("document", DOCUMENTS)
def test_nothing_is_left_to_fill_in(document):
    assert not re.search(r"[A-Z]_HERE\b", text_of(document))


@pytest.mark.parametrize("target", ["demo", "test", "lint", "test-gpu", "soak"])
def test_the_makefile_has_what_the_documents_name(target):
    assert re.search(rf"^{target}:", text_of("Makefile"), re.MULTILINE)
