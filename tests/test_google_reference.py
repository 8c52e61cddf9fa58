"""The model against what Google's own JAX code computed from the same checkpoints and images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from models import npz
from models.configs import CONFIGS, canonical_name
from models.modeling import VisionTransformer
from models.published import PUBLISHED
from tests.conftest import REPOSITORY
from tests.data import google_npz
from tests.helpers import fake_npz
from utils.weights import read_npz

SIZES = [("testing", 32), ("testing", 48), ("testing", 64)]
SIZES += [("testing-hybrid", 64), ("testing-hybrid", 72), ("testing-hybrid", 100)]
OWN_SIZE = {"testing": 32, "testing-hybrid": 64}
TOLERANCE = {"testing": 2e-5, "testing-hybrid": 1e-4}  # absolute, on logits and features
LABELS = torch.tensor([0, 3, 5, 9])


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return read_npz(str(REPOSITORY / "tests" / "data" / "google_reference.npz"))


@pytest.fixture(scope="module")
def build(reference, tmp_path_factory):
    """``build(model_type, img_size)`` gives a model with the reference's weights."""
    weights = {}
    for model_type, own_size in OWN_SIZE.items():
        path = tmp_path_factory.mktemp("google") / f"{model_type}.npz"
        crc = google_npz.make_npz(model_type, path, num_classes=10, seed=0, img_size=own_size)
        assert crc == reference[f"{model_type}/npz_crc32"], "the generated weights are not the reference's"
        weights[model_type] = read_npz(str(path))

    def make(model_type: str, img_size: int, **kwargs: Any) -> VisionTransformer:
        # Flax's gelu is the tanh approximation; the reference was computed without dropout.
        config = replace(CONFIGS[model_type], gelu="tanh", dropout_rate=0.0)
        model = VisionTransformer(config, img_size, num_classes=10, **kwargs)
        model.load_from(weights[model_type])
        return model

    return make


@pytest.fixture(scope="module")
def images():
    """``images(n, img_size)`` gives the reference's first n images."""
    return lambda n, img_size: torch.from_numpy(google_npz.make_images(n, img_size, seed=1, channels_last=False))


def by_google_names(tensors: dict[str, torch.Tensor], model: VisionTransformer) -> dict[str, np.ndarray]:
    """Tensors by our names as copies by Google's."""
    return npz.from_state_dict({k: x.clone() for k, x in tensors.items()}, model.config, model.img_size)


@pytest.mark.parametrize("vis", [False, True], ids=["fused", "vis"])
@pytest.mark.parametrize(("model_type", "img_size"), SIZES)
def test_logits_and_features_are_googles(build, images, reference, model_type, img_size, vis):
    model = build(model_type, img_size, vis=vis).eval()
    x = images(2, img_size)
    with torch.no_grad():
        logits, _ = model(x)
        features = model.transformer(x)[0][:, 0]
    tolerance = {"rtol": 0, "atol": TOLERANCE[model_type]}
    np.testing.assert_allclose(logits, reference[f"{model_type}/{img_size}/logits"], **tolerance)
    np.testing.assert_allclose(features, reference[f"{model_type}/{img_size}/features"], **tolerance)


@pytest.mark.parametrize("model_type", OWN_SIZE)
def test_loss_and_gradient_norms_are_googles(build, images, reference, model_type):
    img_size = OWN_SIZE[model_type]
    key = f"{model_type}/{img_size}"
    model = build(model_type, img_size)
    loss = model(images(4, img_size), LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(reference[f"{key}/loss"].item(), rel=1e-5)

    gradients = by_google_names({name: p.grad for name, p in model.named_parameters()}, model)
    expected = dict(zip(reference[f"{key}/grad/names"].tolist(), reference[f"{key}/grad/norms"].tolist()))
    assert gradients.keys() == expected.keys()
    # Zero in exact arithmetic: softmax does not see what all keys have in common.
    keys = [name for name in expected if not name.endswith("/key/bias")]
    norms = {name: np.linalg.norm(gradients[name].astype(np.float64)) for name in keys}
    assert norms == pytest.approx({name: expected[name] for name in keys}, rel=2e-5)
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert total == pytest.approx(reference[f"{key}/grad/global_norm"].item(), rel=1e-5)


@pytest.mark.parametrize("model_type", OWN_SIZE)
def test_three_clipped_momentum_steps_are_googles(build, images, reference, model_type):
    img_size = OWN_SIZE[model_type]
    key = f"{model_type}/{img_size}/sgd"
    model = build(model_type, img_size)
    x = images(4, img_size)
    before = by_google_names(model.state_dict(), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    losses = []
    for lr in (0.0, 0.015, 0.03):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = model(x, LABELS)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(model(x, LABELS).item())
    assert losses == pytest.approx(reference[f"{key}/losses"].tolist(), rel=1e-4)

    after = by_google_names(model.state_dict(), model)
    names = reference[f"{model_type}/{img_size}/grad/names"].tolist()
    expected = dict(zip(names, reference[f"{key}/param_change_norms_after3"].tolist()))
    changes = {name: np.linalg.norm((after[name] - before[name]).astype(np.float64)) for name in names}
    assert changes == pytest.approx(expected, rel=1e-3, abs=1e-7)
    for name in ("cls", "head/bias"):
        np.testing.assert_allclose(after[name], reference[f"{key}/full_after3/{name}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["testing", "testing-hybrid", "ViT-B_32", "ViT-H_14", "R50-ViT-B_16"])
def test_the_tests_own_checkpoints_have_googles_names_and_shapes(model_type):
    ours = fake_npz.shapes(CONFIGS[model_type], img_size=200, num_classes=7, pre_logits=True)
    theirs = google_npz.param_shapes(model_type, num_classes=7, pre_logits=True, img_size=200)
    assert list(ours.items()) == list(theirs.items())


@pytest.mark.parametrize("pre_logits", [False, True])
def test_layout_of_every_published_model_is_googles(pre_logits):
    assert set(PUBLISHED) <= {canonical_name(model_type) for model_type in google_npz.MODELS}
    for model_type in google_npz.MODELS:
        config = CONFIGS[model_type]
        expected = google_npz.param_shapes(model_type, num_classes=7, pre_logits=pre_logits, img_size=224)
        layout = {entry.google: entry.shape for entry in npz.layout(config, 224, 7)}
        d = config.hidden_size  # the one layer that fine-tuning leaves out
        extra = {"pre_logits/kernel": (d, d), "pre_logits/bias": (d,)} if pre_logits else {}
        assert layout | extra == expected, model_type
