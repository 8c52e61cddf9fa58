"""Size of the effect of each known deviation from Google's code or the reference script.

    python -m benchmarks.once.deviations [--only WORD ...] [--seeds 5]

Prints, in the order of docs/deviations.md where the numbers stand:

* for a random checkpoint in Google's layout, the largest difference of the logits, relative to the
  largest logit;
* differences by arithmetic alone: learning rates, crops, grey levels;
* for short fine-tunings of the demo model on the digits (benchmarks/once/recipes.py), accuracy and loss on
  the test images less those of this project's way with the same seed: mean over the seeds, and the
  standard error of that mean.

``--only`` takes words of the lines' names.  Everything takes about a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import hardware, version
from benchmarks.once import recipes
from benchmarks.once.agreement import NUM_CLASSES, random_checkpoint
from models import modeling_resnet, npz
from models.configs import CONFIGS, ViTConfig
from models.modeling import VisionTransformer
from utils import augment
from utils.scheduler import make_schedule


def checkpoint(config: ViTConfig) -> dict[str, np.ndarray]:
    """Makes a random checkpoint whose convolutions have channels of different means and spreads, as trained ones."""
    arrays = random_checkpoint(config)
    rng = np.random.default_rng(0)
    for name, x in arrays.items():
        if name.endswith("kernel") and name.startswith(("conv", "block")):
            shifted = x + 0.3 * x.std() * rng.standard_normal(x.shape[-1])
            arrays[name] = (shifted * (0.25 + 1.5 * rng.random(x.shape[-1]))).astype(np.float32)
    return arrays


def logits(config: ViTConfig, arrays: dict[str, np.ndarray], img_size: int = 224) -> Tensor:
    """Returns (2, 1000) logits of two random images."""
    model = VisionTransformer(config, img_size, NUM_CLASSES).eval()
    model.load_from(arrays)
    x = torch.rand(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        return model(x)[0]


def symmetric_padding(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pads as the reference: both sides of a convolution alike, none before the pooling (which pads with -inf here)."""
    return x if value else F.pad(x, [(kernel - 1) // 2] * 4)


def sqrt_standardisation(self: modeling_resnet.StdConv2d, x: Tensor) -> Tensor:
    """Standardises as the reference, by sqrt(var + eps) instead of std + eps."""
    var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
    w = (self.weight - mean) / torch.sqrt(var + 1e-5)
    return F.conv2d(modeling_resnet.pad_same(x, self.kernel_size[0], self.stride[0]), w, stride=self.stride)


@contextmanager
def a_group_per_channel() -> Iterator[None]:
    """Gives shortcuts the reference's norm."""
    build = modeling_resnet.ResidualUnit.__init__

    def build_otherwise(self: modeling_resnet.ResidualUnit, *args: int) -> None:
        build(self, *args)
        if self.has_projection:
            self.gn_proj.num_groups, self.gn_proj.eps = self.gn_proj.num_channels, 1e-5

    with mock.patch.object(modeling_resnet.ResidualUnit, "__init__", build_otherwise):
        yield


def scipy_positions(positions: np.ndarray, grid: int) -> np.ndarray:
    """Resizes as Google, by ``scipy.ndimage.zoom``, which leaves the last row and column of some grids at zero."""
    from scipy import ndimage

    old = round((positions.shape[1] - 1) ** 0.5)
    square = ndimage.zoom(positions[0, 1:].reshape(old, old, -1), (grid / old, grid / old, 1), order=1)
    return np.concatenate((positions[:, :1], square.reshape(1, grid * grid, -1)), axis=1)


def change(got: Tensor, expected: Tensor) -> str:
    """Returns the largest difference of two models' logits, relative to the largest logit."""
    return f"logits {((got - expected).abs().max() / expected.abs().max()).item():.1e}"


def gelu(model_type: str) -> str:
    config = replace(CONFIGS[model_type], gelu="tanh")
    arrays = checkpoint(config)
    return change(logits(replace(config, gelu="erf"), arrays), logits(config, arrays))


def stem(patch: Callable[[], AbstractContextManager]) -> str:
    config = replace(CONFIGS["R50-ViT-B_16"], gelu="tanh")
    arrays = checkpoint(config)
    expected = logits(config, arrays)
    with patch():
        return change(logits(config, arrays), expected)


def positions(model_type: str, img_size: int, deviation: float) -> str:
    """Returns the change of a 224 px checkpoint's logits by scipy's rounding error."""
    config = CONFIGS[model_type]
    arrays = random_checkpoint(config)
    arrays[npz.POSITIONS] *= np.float32(deviation / arrays[npz.POSITIONS].std())
    expected = logits(config, arrays, img_size)
    with mock.patch.object(npz, "resize_positions", scipy_positions):
        return change(logits(config, arrays, img_size), expected)


#: The reference's ways of computing the hybrids' stem, each by a context in which models compute so.
STEMS: dict[str, Callable[[], AbstractContextManager]] = {
    "symmetric padding": partial(mock.patch.object, modeling_resnet, "pad_same", symmetric_padding),
    "sqrt(var + eps)": partial(mock.patch.object, modeling_resnet.StdConv2d, "forward", sqrt_standardisation),
    "gn_proj of a group per channel": a_group_per_channel,
}
MODELS: dict[str, Callable[[], str]] = {
    "erf GELU, ViT-B_32": lambda: gelu("ViT-B_32"),
    "erf GELU, R50-ViT-B_16": lambda: gelu("R50-ViT-B_16"),
    **{name: partial(stem, patch) for name, patch in STEMS.items()},
    "scipy's positions 28 -> 48, ViT-B_8, 0.02": lambda: positions("ViT-B_8", 384, 0.02),
    "scipy's positions 28 -> 48, ViT-B_8, 0.5": lambda: positions("ViT-B_8", 384, 0.5),
    "scipy's positions 16 -> 30, ViT-S_14, 0.02": lambda: positions("ViT-S_14", 420, 0.02),
    "scipy's positions 16 -> 30, ViT-S_14, 0.5": lambda: positions("ViT-S_14", 420, 0.5),
}


# ---- arithmetic ----


def affected_grids() -> str:
    """Lists the position embeddings' grids that scipy's rounding error touches."""
    pairs = []
    for old in range(2, 61):
        for new in range(2, 61):
            x = scipy_positions(np.ones((1, 1 + old * old, 1)), new)
            if not x.all():
                pairs.append((old, new))
    shown = [f"{old} -> {new}" for old, new in pairs if old in (7, 14, 16, 24, 28)]
    return f"{len(pairs)} of {59 * 59} pairs from 2 to 60; from 7, 14, 16, 24 and 28: {', '.join(shown)}"


def rates() -> str:
    """Compares learning rates counted from 0 and from 1, at the command line's defaults."""
    text = []
    for decay_type in ("cosine", "linear"):
        f = make_schedule(decay_type, warmup_steps=500, num_steps=10000)
        steps = [0.03 * abs(f(k) - f(k - 1)) for k in range(1, 10001)]
        text.append(f"{decay_type}: at most {max(steps[:500]):.1e} in the warm-up, {max(steps[500:]):.1e} after it")
    return "; ".join(text)


def crop_areas() -> str:
    """Compares the share of a 32 px image that crops keep on average."""
    draws = torch.rand(100_000, augment.NUM_DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = [
        boxes(draws, 32, 32)[:, 2:].prod(dim=1).double().mean().item() / 32**2
        for boxes in (augment.crop_boxes, recipes.tensorflow_boxes)
    ]
    return f"mean share of the area: torchvision's {shares[0]:.3f}, TensorFlow's {shares[1]:.3f}"


def grey_levels() -> str:
    """Compares TensorFlow's resize with ours, in grey levels, of two photographs (scikit-learn's)."""
    from sklearn.datasets import load_sample_images

    text = []
    for what, side in (("enlarged, 32 -> 224", 32), ("reduced, 384 -> 224", 384)):
        errors = []
        for photo in load_sample_images().images:
            x = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None]
            boxes = torch.tensor([[20, 100, side, side]])
            expected = augment.resized_crop(x, boxes, 224)
            errors.append((recipes.tensorflow_crop(x, boxes, 224) - expected).abs() * 127.5)
        error = torch.cat(errors)
        text.append(f"{what}: {error.mean():.2f} on average, {error.max():.1f} at most")
    return "; ".join(text)


ARITHMETIC: dict[str, Callable[[], str]] = {
    "grids that scipy leaves incomplete": affected_grids,
    "crops, TensorFlow's": crop_areas,
    "resize, TensorFlow's": grey_levels,
    "schedule from 0": rates,
}


# ---- trainings ----


def spread(values: list[float], scale: float = 1.0) -> str:
    """Formats the mean and its standard error, to the error's second digit."""
    x = scale * np.array(values)
    error = x.std(ddof=1) / len(x) ** 0.5
    decimals = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 2
    return f"{x.mean():+.{decimals}f} +- {error:.{decimals}f}"


def training(ours: recipes.Recipe, other: recipes.Recipe, seeds: range) -> str:
    results = [(recipes.train(ours, seed), recipes.train(other, seed)) for seed in seeds]
    points = [(theirs[0] - mine[0]).mean().item() for mine, theirs in results]
    loss = [(theirs[1] - mine[1]).mean().item() for mine, theirs in results]
    return f"{spread(points, 100)} points, loss {spread(loss)}"


def baseline(seeds: range) -> str:
    right, loss = zip(*(recipes.train(recipes.OURS, seed) for seed in seeds))
    accuracies = 100 * torch.stack(right).mean(dim=1)
    losses = torch.stack(loss).mean(dim=1)
    return (
        f"accuracy {accuracies.mean():.2f} %, deviation {accuracies.std():.2f}; "
        f"loss {losses.mean():.4f}, deviation {losses.std():.4f}"
    )


def whole_batches(seeds: range) -> str:
    results = [recipes.train(recipes.OURS, seed) for seed in seeds]
    kept = len(results[0][0]) // 64 * 64
    points = [(right[:kept].mean() - right.mean()).item() for right, _ in results]
    return f"{kept} of {len(results[0][0])} images, {spread(points, 100)} points"


def batch_means(seeds: range) -> str:
    losses = [recipes.train(recipes.OURS, seed)[1] for seed in seeds]
    return "loss " + spread([(torch.stack([b.mean() for b in x.split(64)]).mean() - x.mean()).item() for x in losses])


EVALUATIONS: dict[str, Callable[[range], str]] = {
    "this project's way": baseline,
    "evaluation of whole batches of 64": whole_batches,
    "loss as mean of the means of batches of 64": batch_means,
}


def main(argv: list[str] | None = None) -> None:
    """Prints one line a deviation."""
    p = argparse.ArgumentParser(description="The effects of known deviations.")
    p.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="lines whose names have one of these")
    p.add_argument("--seeds", type=int, default=5, help="trainings of each kind")
    args = p.parse_args(argv)
    if args.seeds < 2:
        p.error(f"--seeds is {args.seeds}, expected at least 2: a spread needs two")
    seeds = range(args.seeds)
    lines: dict[str, Callable[[], str]] = {f"model: {name}": run for name, run in MODELS.items()}
    lines |= {f"arithmetic: {name}": run for name, run in ARITHMETIC.items()}
    lines |= {f"training: {name}": partial(run, seeds) for name, run in EVALUATIONS.items()}
    lines |= {f"training: {name}": partial(training, *pair, seeds) for name, pair in recipes.EXPERIMENTS.items()}
    print(f"{hardware(torch.get_num_threads(), 'cpu')}, scipy {version('scipy')}; float32\n", flush=True)
    for name, run in lines.items():
        if any(word in name for word in args.only):
            print(f"{name}: {run()}", flush=True)


if __name__ == "__main__":
    main()
