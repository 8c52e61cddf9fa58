"""The documents keep up with the code: commands parse and run, links lead somewhere, files that are named exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.once.agreement import cost
from models.configs import CONFIGS, canonical_name
from models.published import PUBLISHED, UPSTREAMS
from utils.args import check_args, make_parser

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")
DOCUMENTS = [
    *READMES,
    "CONTRIBUTING.md",
    "checkpoint/README.md",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")),
]
MAX_LINES = 200
#: A comment that says why CI does not run the commands below it in their block, in either language.
NOT_RUN = re.compile(r"#.*(GPU|network|联网)")
#: Files and folders in backticks.
NAMED_FILES = re.compile(r"`((?:models|utils|tools|benchmarks|tests|docs)/[\w./-]*|[\w-]+\.(?:py|toml|md))`")
#: A page whose files without a folder are other projects'.
DEVIATIONS = "docs/deviations.md"


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose_of(name: str) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text_of(name), flags=re.DOTALL | re.MULTILINE)


def shell_lines(name: str) -> Iterator[tuple[str, bool]]:
    """Every command of the shell blocks, and whether a comment above it says that it needs a GPU or the network."""
    for block in re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text_of(name), re.DOTALL):
        excused = False
        for line in block.replace("\\\n", " ").splitlines():
            excused = excused or NOT_RUN.search(line) is not None
            if shlex.split(line, comments=True):
                yield line.removeprefix("$ "), excused


def commands_of(name: str) -> Iterator[list[str]]:
    """The words of every command: of the shell blocks, and of a README's tables where no dots leave words out."""
    for line, _ in shell_lines(name):
        yield shlex.split(line, comments=True)
    if name not in READMES:
        return
    for line in re.findall(r"^\|.*?`((?:python|torchrun) [^`]+)`", prose_of(name), re.MULTILINE):
        if "..." not in line:
            yield shlex.split(line)


def tool_of(words: list[str]) -> tuple[str, list[str]]:
    """The module of tools that a command runs, or "", and its arguments."""
    module = next((word for word in words if word.startswith("tools.")), "")
    return module, words[words.index(module) + 1 :] if module else []


def anchors_of(name: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose_of(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(name: str) -> list[tuple[str, str]]:
    """Each link to a file of the repository: the file, from the repository's root, and the anchor."""
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", prose_of(name)) if "://" not in t]
    paths = [(target.partition("#")[0], target.partition("#")[2]) for target in targets]
    here = (ROOT / name).resolve()
    return [(str(((here.parent / path) if path else here).resolve().relative_to(ROOT)), a) for path, a in paths]


# ---- commands ----


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_parses(document):
    for words in commands_of(document):
        module, flags = tool_of(words)
        if module:
            importlib.import_module(module).make_parser().parse_args(flags)
        elif "train.py" in words:
            check_args(make_parser().parse_args(words[words.index("train.py") + 1 :]))


@pytest.mark.parametrize("readme", READMES)
def test_the_commands_of_the_readme_are_run_by_ci_or_say_what_they_need(readme):
    run_by_ci = text_of(".ci/run").splitlines()
    for line, excused in shell_lines(readme):
        command = " ".join(shlex.split(line, comments=True))
        assert excused or any(ci.split("#")[0].strip() == command for ci in run_by_ci), line


def test_the_tools_commands_run_as_written(finetuned_digits, draw, tmp_path, monkeypatch):
    """Each on a checkpoint of a few steps, in a folder with the images that the commands name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    for ending in (".bin", ".json"):
        shutil.copy(Path(finetuned_digits).with_suffix(ending), tmp_path / "output" / f"cifar10_checkpoint{ending}")
    draw("cat.jpg")
    draw("images/deeper/dog.png")
    ran = set()
    for words in [*commands_of("README.md"), *commands_of("docs/tools.md")]:
        module, flags = tool_of(words)
        if not module or (module == "tools.download" and "--list" not in flags):  # these need the network
            continue
        if module == "tools.convert":  # needs somebody's file; tests/test_convert.py
            continue
        if module == "tools.reproduce" and not {"--list", "--dry_run"} & set(flags):  # trains for minutes
            continue
        if "onnx" in flags and not importlib.util.find_spec("onnxscript"):
            continue
        assert importlib.import_module(module).main(flags) == 0, words
        if "--output" in flags:
            assert Path(flags[flags.index("--output") + 1]).stat().st_size
        ran.add(module)
    assert ran == {f"tools.{name}" for name in ("download", "predict", "attention_map", "export", "reproduce")}


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


@pytest.mark.parametrize("target", ["demo", "test", "lint", "test-gpu", "soak"])
def test_the_makefile_has_what_the_documents_name(target):
    assert re.search(rf"^{target}:", text_of("Makefile"), re.MULTILINE)


# ---- pages, links and files ----


@pytest.mark.parametrize("readme", READMES)
def test_the_readmes_are_short(readme):
    assert len(text_of(readme).splitlines()) <= MAX_LINES


def test_both_readmes_name_the_same_pages():
    english, chinese = (
        {path.replace(".zh-CN", "") for path, _ in links_of(readme) if path.endswith(".md")} for readme in READMES
    )
    assert english == chinese


def test_every_page_is_reached_from_the_readmes():
    named = {path for readme in READMES for path, _ in links_of(readme)}
    assert {document for document in DOCUMENTS if document.startswith("docs/")} <= named


@pytest.mark.parametrize("page", [p for p in DOCUMENTS if p.startswith("docs/") and p.endswith(".zh-CN.md")])
def test_the_languages_of_a_page_link_to_each_other(page):
    english = page.replace(".zh-CN", "")
    assert english in [path for path, _ in links_of(page)]
    assert page in [path for path, _ in links_of(english)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for path, anchor in links_of(document):
        assert (ROOT / path).exists(), path
        if anchor:
            assert anchor in anchors_of(path), f"{path}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_files_that_are_named_exist(document):
    for name in NAMED_FILES.findall(prose_of(document)):
        if "/" in name or document != DEVIATIONS:
            assert any((ROOT / folder / name).exists() for folder in ("", "models", "tests", "tools", "utils")), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_nothing_is_left_to_fill_in(document):
    assert not re.search(r"[A-Z]_HERE\b", text_of(document))


# ---- tables ----


@pytest.mark.parametrize("readme", READMES)
def test_the_table_of_models_has_the_upstreams_and_the_cost(readme):
    rows = re.findall(r"^\| (\S+) \| ([\d,]+) \| ([\d.]+) \| (`.+`) \|$", text_of(readme), re.MULTILINE)
    assert [model for model, *_ in rows] == list(PUBLISHED)
    for model, parameters, gflops, upstreams in rows:
        files = [{name.removesuffix("-224") for name in UPSTREAMS[each]} for each in UPSTREAMS]
        expected = {upstream for upstream, models in zip(UPSTREAMS, files, strict=True) if model in models}
        assert set(re.findall("`(.+?)`", upstreams)) == expected, model
        if model in ("ViT-B_32", "R-ViT-Ti_16", "R50-ViT-B_16"):  # all would take ten seconds
            counted = cost(CONFIGS[model])
            assert (f"{counted[0]:,}", f"{counted[1]:.1f}") == (parameters, gflops), model


def test_every_name_of_a_model_is_documented():
    for model_type in CONFIGS:
        if not model_type.startswith("testing"):
            assert re.search(rf"(?<!\w){re.escape(model_type)}(?!\w)", text_of("docs/checkpoints.md")), model_type
            for readme in READMES:
                assert canonical_name(model_type) in text_of(readme), model_type


def test_the_table_of_files_has_those_that_can_be_downloaded():
    table: dict[str, dict[str, set[str]]] = {}
    for model, files, upstreams in re.findall(
        r"^\| (\S+) \| (`.+?) \| (`.+?) \|$", text_of("docs/checkpoints.md"), re.MULTILINE
    ):
        lines = zip(upstreams.split("<br>"), files.split("<br>"), strict=True)
        table[model] = {upstream.strip("`"): set(re.findall("`(.+?)`", names)) for upstream, names in lines}
    expected: dict[str, dict[str, set[str]]] = {model: {} for model in PUBLISHED}
    for upstream, paths in UPSTREAMS.items():
        for name, path in paths.items():
            file = path.removeprefix(f"{upstream}/")
            if upstream == "augreg":
                file = file.split("-")[0] + "-..."
            expected[name.removesuffix("-224")].setdefault(upstream, set()).add(file)
    assert table == expected


def test_every_deviation_has_the_size_of_its_effect():
    lines = [line for line in text_of(DEVIATIONS).splitlines() if line.startswith("|")]
    header, ruler, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert (header[0], header[-1]) == ("deviation", "size of the effect")
    assert set("".join(ruler)) == {"-"}
    for row in rows:
        assert len(row) == len(header), row
        if row[0].startswith("**"):
            assert not any(row[1:]), row
        else:
            assert re.search(r"\d", row[-1]), row  # a number, not a word
