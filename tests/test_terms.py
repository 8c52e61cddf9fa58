"""One word a thing: the words that CONTRIBUTING.md's terms have replaced are found nowhere any more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: Which files are searched, as patterns of ``Path.glob``.
SEARCHED = (
    "README*.md", "docs/*.md", "CONTRIBUTING.md", "CHANGELOG.md", "checkpoint/README.md",
    "train.py", "models/*.py", "utils/*.py", "tools/*.py", "benchmarks/**/*.py",
)  # fmt: skip

#: What others fixed and users' scripts read: these are not words.
#: The last is the name of the input of exported programs.
DATA = (
    "train/pictures",
    "'pictures'",
    '"pictures"',
    "pictures: Tensor",
    "model(pictures)",
    "pictures = (np",
    ": pictures}",
)

#: The term, the pattern of what it replaces, what that pattern finds, and what it leaves alone.
ENGLISH = (
    ("image", r"\bpictures?\b", "three pictures", "three images"),
    ("resume", r"\b(?:go(?:es)?|going|went|gone) on\b", "the run goes on", "the training resumes"),
    (
        "step",
        r"\b(?:an|one|each|every|per|of|first|last|next|skipped|optimizer|\d[\d,]*(?:th)?) updates?\b"
        r"|\bupdates (?:between|over|of|in|to|since|that|and|are|were|is)\b|\bnumber of updates\b",
        "updates between two evaluations",
        "update the documents; it updates them",
    ),
    ("micro-batch", r"\b(?:in|into) (?:\w+ )?parts\b", "computed in four parts", "the three parts of a message"),
    ("rank", r"\bper process\b|\bprocess \d+ of \d+\b|\bfirst process of all\b", "64 per process", "64 per rank"),
    ("exit code", r"\bexit status(?:es)?\b|\bstatus (?:0|1|2|1[34]\d)\b", "ends with status 2", "the status 403"),
    ("metadata", r"\b(?:its|the|a|without a) descriptions?\b", "without a description", "metadata"),
    (
        "peak learning rate",
        r"\bat its highest\b|\b(?:maximum|highest) learning rate\b",
        "at its highest",
        "at its best",
    ),
    ("warm-up", r"\bwarmup\b|\bwarming up\b", "after the warmup", "`--warmup_steps`, the warm-up"),
    ("main process", r"\bmaster process\b|\bprocess 0\b", "on process 0", "on rank 0"),
)
CHINESE = (
    ("退出码", r"退出状态|状态码?\s*(?:0|1|2|1[34]\d)\b", "退出状态为 2", "训练状态"),
    ("将被拒绝", r"不被接受", "该参数不被接受", "该参数将被拒绝"),
    ("步", r"[次轮的]更新|更新(?:次数|跳过)|更新会被跳过|批量\s*\d+\s*的", "每 100 次更新评估一次", "请更新 pip"),
    ("批大小", r"批量\s*(?:大小|\d)", "批量 32", "成批裁剪"),
    ("微批", r"分(?:成|为)[几两三四八]份", "把一批分成几份", "分成两类"),
    ("骨干网络", r"主干", "主干在显著性任务上调整过", "骨干网络"),
    ("微调", r"调整过的", "为显著性检测调整过的模型", "微调过的模型"),
    ("学习率调度器", r"学习率计划", "学习率计划不前进", "学习率调度器不前进"),
    ("峰值学习率", r"最高学习率|最大学习率", "SGD 的最高学习率", "峰值学习率"),
    ("误分类", r"认错|错认", "以最高置信度认错的图片", "置信度最高的误分类图片"),
    ("恢复训练", r"从?中断的?(?:地方|处)继续|中断后继续|接着训练", "从中断的地方继续", "恢复训练后接着累计"),
    ("实际值、期望值、解决办法", r"得到了什么|应为什么|如何补救", "得到了什么、应为什么", "实际值、期望值以及解决办法"),
    ("元数据", r"权重的说明|说明文件", "该权重的说明", "元数据"),
    ("位置编码", r"位置嵌入", "位置嵌入的缩放", "位置编码"),
)
TERMS = (*ENGLISH, *CHINESE)


def documents() -> list[str]:
    """Lists the files that are searched, from the repository's root."""
    return sorted(str(path.relative_to(ROOT)) for pattern in SEARCHED for path in ROOT.glob(pattern))


def old_terms(text: str) -> list[str]:
    """Returns each use of an old word with its line, and the term to write instead."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for fixed in DATA:
            line = line.replace(fixed, "")
        for term, pattern, _, _ in TERMS:
            for match in re.finditer(pattern, line, re.IGNORECASE):
                found.append(f"line {number}: {match[0]!r} should be {term!r}")
    return found


@pytest.mark.parametrize("document", documents())
def test_the_old_terms_are_gone(document):
    found = old_terms((ROOT / document).read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("term", "pattern", "wrong", "right"), TERMS)
def test_each_pattern_finds_what_it_replaces_and_nothing_else(term, pattern, wrong, right):
    assert any(line.endswith(f"should be {term!r}") for line in old_terms(wrong))
    assert not old_terms(right)


def test_the_terms_are_those_of_the_list():
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## Terms\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")][2:]
    english = {row[0] for row in rows}
    chinese = {word for row in rows for word in (row[1], *row[1].split("、"))}
    assert {term for term, *_ in ENGLISH} <= english
    assert {term for term, *_ in CHINESE} <= chinese


SOURCES = [name for name in documents() if name.endswith(".py")]


@pytest.mark.parametrize("source", SOURCES)
def test_docstrings_begin_with_a_verb_or_with_the_thing_returned(source):
    docstrings = re.findall(r'"""(\w+)', (ROOT / source).read_text(encoding="utf-8"))
    assert not {"What", "Whether", "Where", "How", "If"} & set(docstrings)
