"""Classifying images with a fine-tuned checkpoint, as its users type it."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers import odd_images
from tests.helpers.folders import save
from tests.helpers.tools import run_tool
from tools import predict
from utils import augment, checkpoint, data_utils, datasets
from utils.images import read_image


def run(path, *args):
    """The exit code, standard output and standard error's lines for a checkpoint."""
    return run_tool(predict, "--load_model_dir", path, *args, "--device", "cpu")


def classify(*args):
    """The objects that --json prints."""
    status, out, _ = run(*args, "--json")
    assert status == 0
    return json.loads(out)


def metadata_of(path):
    return json.loads(Path(checkpoint.metadata_path(path)).read_text())


def test_a_folder_gets_the_accuracy_of_the_trainings_evaluation(finetuned_digits, tmp_path):
    data = datasets.load_datasets("digits", "", 0)
    for i, (image, label) in enumerate(zip(data.test.images, data.test.labels.tolist())):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / str(label) / f"{i}.png")
    objects = classify(finetuned_digits, tmp_path)
    assert len(objects) == len(data.test)
    right = sum(o["label"] == os.path.basename(os.path.dirname(o["path"])) for o in objects)
    assert right / len(objects) == metadata_of(finetuned_digits)["accuracy"]
    assert right / len(objects) > 0.2  # it has learnt something: chance is 0.1


def test_json_and_text_say_what_the_model_computes_in_any_batch(finetuned_any, draw):
    paths = [draw("a.png"), draw("b.png", (100, 20), seed=1), draw("c.png", (31, 40), seed=2)]
    metadata = metadata_of(finetuned_any)
    size = metadata["img_size"]
    model = VisionTransformer(replace(CONFIGS[metadata["model_type"]], gelu="tanh"), size, 3).eval()
    model.load_state_dict(torch.load(finetuned_any))
    pixels = [np.asarray(Image.open(p).resize((size, size), Image.Resampling.BILINEAR)) / 127.5 - 1 for p in paths]
    with torch.no_grad():
        logits = model(torch.tensor(np.stack(pixels), dtype=torch.float32).permute(0, 3, 1, 2))[0]
    expected = logits.double().softmax(dim=1).tolist()

    for batch_size in (1, 2, 64):
        objects = classify(finetuned_any, "--batch_size", batch_size, *paths)
        assert [set(o) for o in objects] == [{"path", "label", "probabilities"}] * 3
        assert [o["path"] for o in objects] == paths
        for o, p in zip(objects, expected):
            assert o["probabilities"] == pytest.approx(dict(zip(("ant", "bee", "cat"), p)), abs=1e-5)
            assert list(o["probabilities"].values()) == sorted(o["probabilities"].values(), reverse=True)
            assert o["label"] == max(o["probabilities"], key=o["probabilities"].get)

    status, out, _ = run(finetuned_any, "--top_k", 2, *paths)
    assert status == 0
    lines = out.splitlines()
    assert lines[::3] == paths
    best = list(objects[0]["probabilities"].items())[:2]
    assert lines[1:3] == [f"  {100 * p:6.2f} %  {name}" for name, p in best]


def test_folders_are_searched_to_the_bottom_in_order(finetuned_any, draw, tmp_path):
    for name in ("set/b.png", "set/deep/er/a.JPG", "set/deep/er/b.jfif", "set/.hidden.png", "set/.git/c.png"):
        draw(name)
    (tmp_path / "set" / "notes.txt").write_text("no image")
    objects = classify(finetuned_any, draw("z.bmp"), tmp_path / "set")
    names = [os.path.relpath(o["path"], tmp_path) for o in objects]
    assert names == ["z.bmp", "set/b.png", "set/deep/er/a.JPG", "set/deep/er/b.jfif"]


def test_predict_and_evaluations_see_odd_images_as_people_do(finetuned_digits, tmp_path):
    odd = list(odd_images.write(tmp_path, odd_images.ODD).values())
    plain = [save(read_image(path), tmp_path, f"plain{i:02d}.png") for i, path in enumerate(odd)]
    answers = [[x["probabilities"] for x in classify(finetuned_digits, *paths)] for paths in (odd, plain)]
    assert answers[0] == answers[1]
    assert len({tuple(x.values()) for x in answers[0]}) > 10  # answers that differ
    size, labels = metadata_of(finetuned_digits)["img_size"], torch.zeros(len(odd), dtype=torch.int64)
    evaluated = [
        next(data_utils.eval_batches(datasets.FileImages(paths, labels), 99, augment.EvalTransform(size),
                                     torch.device("cpu"), num_workers=1))[0]
        for paths in (odd, plain)
    ]  # fmt: skip
    assert torch.equal(*evaluated)
    model = VisionTransformer(CONFIGS["testing"], size, 10).eval()
    model.load_state_dict(torch.load(finetuned_digits))
    with torch.no_grad():
        expected = model(evaluated[0])[0].softmax(dim=1).max(dim=1).values.tolist()
    assert [max(x.values()) for x in answers[0]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_an_unreadable_image_is_named_and_the_others_are_classified(finetuned_any, draw, tmp_path, flag):
    good, bad = [draw("a.png"), draw("c.png")], tmp_path / "b.png"
    bad.write_bytes(Path(good[0]).read_bytes()[:100])
    status, out, err = run(finetuned_any, *flag, "--batch_size", "1", good[0], bad, good[1])
    assert status == 2
    (error,) = [line for line in err if "error:" in line]
    assert str(bad) in error
    assert str(bad) not in out
    assert all(path in out for path in good)
    status, out, _ = run(finetuned_any, *flag, bad)  # nothing but bad ones
    assert (status, out) == (2, "[]\n" if flag else "")


def test_classes_of_one_name_are_distinguished_by_their_numbers():
    best = predict.top(torch.tensor([0.2, 0.5, 0.3]), ["crane", "ant", "crane"], 3)
    assert best == pytest.approx({"ant": 0.5, "crane (2)": 0.3, "crane (0)": 0.2})


# ---- checkpoints without metadata, or with other ----


@pytest.fixture
def bare(finetuned_digits, tmp_path):
    """The checkpoint alone, with the names of a wrapped model."""
    state = torch.load(finetuned_digits)
    torch.save({f"module.{name}": x for name, x in state.items()}, tmp_path / "bare.bin")
    return str(tmp_path / "bare.bin")


def test_flags_describe_what_the_reference_script_wrote(finetuned_digits, bare, draw, tmp_path):
    expected = classify(finetuned_digits, draw())
    names = tmp_path / "names.txt"
    names.write_text("\n".join("0123456789") + "\n")
    for i in range(10):
        (tmp_path / "set" / "train" / str(i)).mkdir(parents=True)
    for classes in (["--classes", "0,1,2, 3,4,5,6,7,8,9"], ["--classes", names], ["--dataset", "digits"],
                    ["--dataset", tmp_path / "set"]):  # fmt: skip
        assert classify(bare, "--model_type", "testing", "--img_size", "48", *classes, draw()) == expected


@pytest.mark.parametrize(("name", "last"), [("cifar10", "truck"), ("cifar100", "worm")])
def test_cifars_classes_are_known_without_the_data_set(draw, tmp_path, monkeypatch, caplog, name, last):
    monkeypatch.chdir(tmp_path)
    model = VisionTransformer(CONFIGS["testing"], 48, len(datasets.CLASS_NAMES[name]))
    torch.nn.init.constant_(model.head.bias[-1:], 99.0)
    torch.save(model.state_dict(), "bare.bin")
    args = ["bare.bin", "--model_type", "testing", "--img_size", "48", "--dataset", name, draw()]
    assert classify(*args)[0]["label"] == last
    assert not os.path.exists("data")
    assert caplog.text == ""
    classify(*args, "--data_dir", "data")
    assert "--data_dir has no effect" in caplog.text


def test_flags_overrule_the_metadata_with_a_warning(finetuned_digits, draw, caplog):
    (plain,) = classify(finetuned_digits, draw())
    assert caplog.text == ""
    (changed,) = classify(finetuned_digits, draw(), "--gelu", "tanh", "--classes", "a,b,c,d,e,f,g,h,i,j")
    assert "--gelu tanh is taken, but" in caplog.text
    assert changed["label"] == "abcdefghij"[int(plain["label"])]
    assert list(changed["probabilities"].values()) != list(plain["probabilities"].values())


def test_another_name_of_the_same_model_is_no_contradiction(tmp_path, monkeypatch, draw, caplog):
    monkeypatch.setitem(CONFIGS, "R50+ViT-B_16", CONFIGS["testing"])
    monkeypatch.setitem(CONFIGS, "R50-ViT-B_16", CONFIGS["testing"])
    metadata = checkpoint.CheckpointMetadata("R50-ViT-B_16", 48, ["ant"], "erf", "pets", 8, 0.5)
    path = str(tmp_path / "a.bin")
    checkpoint.save_weights(path, VisionTransformer(CONFIGS["testing"], 48, 1).state_dict(), metadata)
    classify(path, "--model_type", "R50+ViT-B_16", draw())
    assert caplog.text == ""
    classify(path, "--model_type", "testing", draw())
    assert "--model_type testing is taken, but" in caplog.text
