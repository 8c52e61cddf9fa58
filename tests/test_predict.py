"""Classifying pictures with a fine-tuned checkpoint, as its users type it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tools import predict
from utils import checkpoint, datasets

ROOT = Path(__file__).resolve().parent.parent
CPU = ["--device", "cpu"]


def run(capsys, *args):
    """Status, standard output and standard error's lines."""
    try:
        status = predict.main([*args, *CPU])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err.splitlines()


@pytest.fixture
def digit_files(tmp_path):
    """The test digits as pictures, in folders by class, and their number."""
    data = datasets.load_datasets("digits", "", 0)
    for i, (image, label) in enumerate(zip(data.test.images, data.test.labels.tolist())):
        folder = tmp_path / "digits" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return str(tmp_path / "digits"), len(data.test)


def test_a_folder_gets_the_accuracy_of_the_trainings_evaluation(finetuned_digits, digit_files, capsys):
    folder, count = digit_files
    status, out, _ = run(capsys, "--load_model_dir", finetuned_digits, "--json", folder)
    assert status == 0
    objects = json.loads(out)
    assert len(objects) == count
    right = sum(o["label"] == os.path.basename(os.path.dirname(o["path"])) for o in objects)
    told = json.loads(Path(finetuned_digits).with_suffix(".json").read_text())
    assert right / count == told["accuracy"]
    assert right / count > 0.2  # it has learnt something: chance is 0.1


def test_json_and_text_say_what_the_model_computes(finetuned_any, draw, capsys):
    a, b = draw("a.png"), draw("b.png", (100, 20), seed=1)
    told = json.loads(Path(finetuned_any).with_suffix(".json").read_text())
    size = told["img_size"]
    model = VisionTransformer(replace(CONFIGS[told["model_type"]], gelu="tanh"), size, 3).eval()
    model.load_state_dict(torch.load(finetuned_any))
    pixels = [np.asarray(Image.open(p).resize((size, size), Image.Resampling.BILINEAR)) / 127.5 - 1 for p in (a, b)]
    with torch.no_grad():
        logits = model(torch.tensor(np.stack(pixels), dtype=torch.float32).permute(0, 3, 1, 2))[0]
    expected = logits.double().softmax(dim=1).tolist()

    status, out, _ = run(capsys, "--load_model_dir", finetuned_any, "--json", a, b)
    assert status == 0
    objects = json.loads(out)
    assert [set(o) for o in objects] == [{"path", "label", "probabilities"}] * 2
    assert [o["path"] for o in objects] == [a, b]
    for found, p in zip(objects, expected):
        assert found["probabilities"] == pytest.approx(dict(zip(("ant", "bee", "cat"), p)), abs=1e-5)
        assert list(found["probabilities"].values()) == sorted(found["probabilities"].values(), reverse=True)
        assert found["label"] == max(found["probabilities"], key=found["probabilities"].get)

    status, out, _ = run(capsys, "--load_model_dir", finetuned_any, "--top_k", "2", a, b)
    assert status == 0
    lines = out.splitlines()
    assert [lines[0], lines[3]] == [a, b]
    best = list(objects[0]["probabilities"].items())[:2]
    assert lines[1:3] == [f"  {100 * p:6.2f} %  {name}" for name, p in best]


def test_batches_do_not_change_the_answer(finetuned_any, draw, capsys):
    paths = [draw(f"{i}.png", (30 + i, 40), seed=i) for i in range(5)]
    answers = []
    for size in ("1", "2", "64"):
        status, out, _ = run(capsys, "--load_model_dir", finetuned_any, "--json", "--batch_size", size, *paths)
        assert status == 0
        answers.append([o["probabilities"] for o in json.loads(out)])
    for one, other in zip(answers[0], answers[1]):
        assert one == pytest.approx(other, abs=1e-5)
    for one, other in zip(answers[0], answers[2]):
        assert one == pytest.approx(other, abs=1e-5)


def test_folders_are_searched_to_the_bottom_in_order(finetuned_any, draw, tmp_path, capsys):
    for name in ("set/b.png", "set/deep/er/a.JPG", "set/.hidden.png", "set/.git/c.png"):
        draw(name)
    (tmp_path / "set" / "notes.txt").write_text("no picture")
    single = draw("z.bmp")
    status, out, _ = run(capsys, "--load_model_dir", finetuned_any, "--json", single, str(tmp_path / "set"))
    assert status == 0
    assert [os.path.relpath(o["path"], tmp_path) for o in json.loads(out)] == [
        "z.bmp", "set/b.png", "set/deep/er/a.JPG",
    ]  # fmt: skip


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_an_unreadable_picture_is_named_and_the_others_are_classified(finetuned_any, draw, tmp_path, capsys, flag):
    good = [draw("a.png"), draw("c.png")]
    bad = tmp_path / "b.png"
    bad.write_bytes(Path(good[0]).read_bytes()[:100])
    args = ["--load_model_dir", finetuned_any, *flag, "--batch_size", "1", good[0], str(bad), good[1]]
    status, out, err = run(capsys, *args)
    assert status == 2
    (error,) = [line for line in err if "error:" in line]
    assert str(bad) in error
    assert str(bad) not in out
    assert all(path in out for path in good)
    status, out, err = run(capsys, "--load_model_dir", finetuned_any, "--json", str(bad))  # nothing but bad ones
    assert (status, json.loads(out)) == (2, [])


def test_too_many_pictures_at_once_are_one_line(finetuned_any, draw, monkeypatch, capsys):
    def forward(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VisionTransformer, "forward", forward)
    status, out, err = run(capsys, "--load_model_dir", finetuned_any, "--batch_size", "77", draw())
    assert (status, out) == (1, "")
    assert err == [
        "tools.predict: error: out of memory classifying 77 images at once; give a smaller --batch_size"
    ]  # fmt: skip


# ---- checkpoints without a description ----


@pytest.fixture
def bare(finetuned_digits, tmp_path):
    """The checkpoint alone, with the names of a wrapped model."""
    path = tmp_path / "bare.bin"
    state = torch.load(finetuned_digits)
    torch.save({f"module.{name}": x for name, x in state.items()}, path)
    return str(path)


def test_flags_describe_what_the_reference_script_wrote(finetuned_digits, bare, draw, tmp_path, capsys):
    picture = draw()
    expected = json.loads(run(capsys, "--load_model_dir", finetuned_digits, "--json", picture)[1])
    names = tmp_path / "names.txt"
    names.write_text("\n".join("0123456789") + "\n")
    for i in range(10):
        (tmp_path / "set" / "train" / str(i)).mkdir(parents=True)
    flags = ["--model_type", "testing", "--img_size", "48"]
    for classes in (["--classes", "0,1,2, 3,4,5,6,7,8,9"], ["--classes", str(names)], ["--dataset", "digits"],
                    ["--dataset", str(tmp_path / "set")]):  # fmt: skip
        status, out, _ = run(capsys, "--load_model_dir", bare, *flags, *classes, "--json", picture)
        assert status == 0
        assert json.loads(out) == expected


@pytest.mark.parametrize(("name", "last"), [("cifar10", "truck"), ("cifar100", "worm")])
def test_cifars_classes_are_known_without_the_data_set(draw, tmp_path, monkeypatch, capsys, caplog, name, last):
    monkeypatch.chdir(tmp_path)
    count = len(datasets.CLASS_NAMES[name])
    model = VisionTransformer(CONFIGS["testing"], 48, count)
    torch.nn.init.constant_(model.head.bias[-1:], 99.0)
    torch.save(model.state_dict(), "bare.bin")
    flags = ["--load_model_dir", "bare.bin", "--model_type", "testing", "--img_size", "48", "--dataset", name]
    status, out, _ = run(capsys, *flags, "--top_k", "1", "--json", draw())
    assert status == 0
    assert json.loads(out)[0]["label"] == last
    assert not os.path.exists("data")
    assert caplog.text == ""
    assert run(capsys, *flags, "--data_dir", "data", draw())[0] == 0
    assert "--data_dir has no effect" in caplog.text


def test_flags_overrule_the_description_with_a_warning(finetuned_digits, draw, capsys, caplog):
    args = ["--load_model_dir", finetuned_digits, "--json", draw()]
    plain = json.loads(run(capsys, *args)[1])
    assert caplog.text == ""
    status, out, _ = run(capsys, *args, "--gelu", "tanh", "--classes", "a,b,c,d,e,f,g,h,i,j")
    assert status == 0
    assert "--gelu tanh is taken, but" in caplog.text
    (found,) = json.loads(out)
    assert found["label"] == "abcdefghij"[int(plain[0]["label"])]
    assert list(found["probabilities"].values()) != list(plain[0]["probabilities"].values())


NINE = "0,1,2,3,4,5,6,7,8"
WRONG = {
    "no picture": (lambda bin, bare: [bin, "nosuch.png"], ["there is no image nosuch.png"]),
    "empty folder": (lambda bin, bare: [bin, "empty"], ["the folder empty holds no image", "jpg"]),
    "no checkpoint": (lambda bin, bare: ["nosuch.bin", "a.png"], ["there is no checkpoint nosuch.bin"]),
    "no description": (lambda bin, bare: [bare, "a.png"], ["bare.json", "--model_type"]),
    "no classes": (
        lambda bin, bare: [bare, "a.png", "--model_type", "testing", "--img_size", "48"],
        ["10 classes", "--classes"],
    ),
    "size by default": (
        lambda bin, bare: [bare, "a.png", "--model_type", "testing", "--classes", NINE],
        ["trained at --img_size 48, not 224"],
    ),
    "another model": (
        lambda bin, bare: [bare, "a.png", "--model_type", "ViT-demo", "--img_size", "48"],
        ["loaded as ViT-demo"],
    ),
    "too few names": (lambda bin, bare: [bin, "a.png", "--classes", NINE], ["has 10 classes", "the flags name 9"]),
    "a name twice": (lambda bin, bare: [bin, "a.png", "--classes", NINE + ",0"], ["0 twice"]),
    "an empty name": (lambda bin, bare: [bin, "a.png", "--classes", NINE + ","], ["an empty name"]),
    "both": (lambda bin, bare: [bin, "a.png", "--classes", "a", "--dataset", "digits"], ["give one"]),
    "no data set": (lambda bin, bare: [bin, "a.png", "--dataset", "mnist"], ["--dataset mnist is neither"]),
    "no class folders": (lambda bin, bare: [bin, "a.png", "--dataset", "empty"], ["empty/train/<class>"]),
    "top none": (lambda bin, bare: [bin, "a.png", "--top_k", "0"], ["--top_k", "less than 1"]),
    "top word": (lambda bin, bare: [bin, "a.png", "--top_k", "many"], ["--top_k", "invalid int value: 'many'"]),
    "cpu only": (lambda bin, bare: [bin, "a.png", "--device", "tpu"], ["--device", "tpu"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_status_2(finetuned_digits, bare, draw, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    draw("a.png")
    os.mkdir("empty")
    make, words = WRONG[case]
    status, out, err = run(capsys, "--load_model_dir", *make(finetuned_digits, bare))
    assert (status, out) == (2, "")
    assert len(err) == 1, err
    assert err[0].startswith("tools.predict: error: ")
    for word in words:
        assert word in err[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda told: "{", ["does not describe a checkpoint", "remove it"]),
        (lambda told: json.dumps({**told, "crc32": 1}), ["describes other weights", "remove it"]),
        (lambda told: json.dumps({**told, "model_type": "ViT-Z"}), ["ViT-Z"]),
        (lambda told: json.dumps({**told, "gelu": "relu"}), ["relu"]),
        (lambda told: json.dumps({**told, "img_size": 40}), ["40"]),
        (lambda told: json.dumps({**told, "img_size": 64}), ["trained at --img_size 48, not 64"]),
        (lambda told: json.dumps({**told, "classes": ["a"]}), ["has 10 classes", "names 1"]),
    ],
)
def test_a_description_that_cannot_be_true_is_one_line(finetuned_digits, draw, tmp_path, capsys, change, words):
    path = shutil.copy(finetuned_digits, tmp_path / "c.bin")
    told = json.loads(Path(checkpoint.metadata_path(finetuned_digits)).read_text())
    (tmp_path / "c.json").write_text(change(told))
    status, out, err = run(capsys, "--load_model_dir", str(path), draw())
    assert (status, out) == (2, "")
    assert len(err) == 1, err
    for word in words:
        assert word in err[0]


def test_classes_of_one_name_are_distinguished_by_their_numbers():
    best = predict.top(torch.tensor([0.2, 0.5, 0.3]), ["crane", "ant", "crane"], 3)
    assert best == pytest.approx({"ant": 0.5, "crane (2)": 0.3, "crane (0)": 0.2})
