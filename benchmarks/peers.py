"""The contenders of ``benchmarks.step``: this project, timm, torchvision, Hugging Face, a plain formulation.

All have random weights, the same shape, the same random images, and dropout of one rate wherever they
offer it: timm and torchvision after every projection, Hugging Face not within the MLP, this project and
the plain formulation not after attention.  A peer is imported only when it is built.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, plain
from models.configs import CONFIGS, ViTConfig
from models.modeling import VisionTransformer
from models.shapes import layer_shapes
from train import forward_backward
from utils import data_utils, dist_util
from utils.number_format import choose
from utils.optimizer import SGD
from utils.precision import Precision

NUM_CLASSES = 10
SEED = 42
LEARNING_RATE = 0.01
#: The models that peers and the plain formulation have too.
MODELS = [name for name, config in CONFIGS.items() if config.resnet_units is None]
#: The peers, and the package that each needs.
PACKAGES = {"timm": "timm", "torchvision": "torchvision", "Hugging Face": "transformers"}
#: Attention implementations that a peer's users can choose; the first is its default.
ATTENTIONS: dict[str, tuple[str, ...]] = {
    "timm": ("fused_attn", "no fused_attn"),
    "torchvision": ("MultiheadAttention",),
    "Hugging Face": ("sdpa", "eager"),
}
OPTIMIZERS: dict[str, dict[str, bool]] = {"SGD": {}, "SGD foreach": {"foreach": True}, "SGD fused": {"fused": True}}
COMPILED = "torch.compile"

#: What a contender runs with, beside its number format: attention, optimizer, and COMPILED if it is.
Choice = tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """The same for all contenders."""

    model_type: str
    img_size: int
    batch_size: int
    num_micro_batches: int
    dropout: float
    device: str

    def __str__(self) -> str:
        split = f" in {self.num_micro_batches} micro-batches" if self.num_micro_batches > 1 else ""
        return f"{self.model_type}, {self.img_size} px, batch {self.batch_size}{split}, dropout {self.dropout}"

    @property
    def config(self) -> ViTConfig:
        return CONFIGS[self.model_type]

    def micro_batches(self) -> list[data_utils.MicroBatch]:
        """Returns those of one step: random images in [-1, 1] and labels, on the device."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size // self.num_micro_batches, 3, self.img_size, self.img_size)
        return [
            (
                (torch.rand(shape, generator=generator) * 2 - 1).to(self.device),
                torch.randint(NUM_CLASSES, shape[:1], generator=generator).to(self.device),
            )
            for _ in range(self.num_micro_batches)
        ]


class Stepper:
    """Takes turns of some steps, after one that warms up, or two; ``step`` takes one and returns its loss.

    The note is the number format, as ``dtype_of`` reads it, then the choice.
    """

    def __init__(self, step: Callable[[], Tensor], device: str, number_format: str, choice: Choice) -> None:
        self.note = (number_format, *choice)
        self._step, self._device = step, device
        start = time.perf_counter()
        if not math.isfinite(step().item()):
            raise ValueError(f"the loss is not finite ({', '.join(self.note)})")
        secs = time.perf_counter() - start
        if secs < 1:
            secs = common.timed(step, 1, device)
        self._repeats = max(1, round(0.2 / secs))  # a turn of a few milliseconds would be all noise

    def run(self) -> float:
        return common.timed(self._step, self._repeats, self._device)


def dtype_of(note: Choice) -> torch.dtype:
    """Returns the number format of the matrix products, with whose name a contender's note begins."""
    return getattr(torch, note[0].split()[0])


# ---- this project ----


def build(
    model_type: str, img_size: int, dropout: float | None, device: str, opt_level: str, amp_dtype: str = "auto"
) -> tuple[VisionTransformer, Precision]:
    """Returns this project's model with random weights, and its number formats; it is not prepared yet.

    Args:
        model_type, img_size: as the flags.
        dropout: rate; None is the architecture's own.
        device: cpu or cuda.
        opt_level, amp_dtype: of the precision.
    """
    torch_device = dist_util.setup(device, -1)
    config = CONFIGS[model_type]
    if dropout is not None:
        config = replace(config, dropout_rate=dropout)
    torch.manual_seed(SEED)
    model = VisionTransformer(config, img_size, NUM_CLASSES, zero_head=True)
    precision = Precision(torch_device, opt_level, amp_dtype)
    choose(precision, layer_shapes(config, img_size))
    return model.to(torch_device), precision


class OurTraining:
    """The steps of ``train.train``, on micro-batches that are given, without its logs and files."""

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        self._precision = precision
        self.optimizer = SGD(precision.prepare(model), lr=0.0, momentum=0.9, fused=True)
        precision.attach(model, self.optimizer)
        self._model = dist_util.wrap(model)

    def step(
        self, step: int, learning_rate: float, micro_batches: Iterator[data_utils.MicroBatch], num_micro_batches: int
    ) -> Tensor:
        """Takes one step, counted from 1; returns its mean loss."""
        torch.manual_seed(data_utils.derive_seed(SEED, data_utils.DROPOUT, step, dist_util.rank()))
        loss = forward_backward(self._model, micro_batches, self._precision, [1] * num_micro_batches)
        self._precision.collect_skipped()  # as the loop does for the learning rate
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._precision.step(self.optimizer, max_grad_norm=1.0)
        return loss


def our_stepper(setting: Setting, opt_level: str, compiled: bool = False) -> Stepper:
    """Returns this project, at a level of precision."""
    model, precision = build(setting.model_type, setting.img_size, setting.dropout, setting.device, opt_level)
    if compiled:
        model.compile()
    training, micro_batches, steps = OurTraining(model, precision), setting.micro_batches(), itertools.count(1)

    def step() -> Tensor:
        return training.step(next(steps), LEARNING_RATE, iter(micro_batches), len(micro_batches))

    choice = ("as train.py", COMPILED) if compiled else ("as train.py",)
    return Stepper(step, setting.device, str(precision), choice)


# ---- the others ----


def stock_stepper(
    model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], setting: Setting, number_format: str,
    options: dict[str, bool], choice: Choice,
) -> Stepper:  # fmt: skip
    """Returns a model in the loop that everybody writes.

    Args:
        model: with random weights.
        loss_of: its mean loss, given images and labels.
        setting: of all contenders.
        number_format: one of ``formats``.
        options: of torch.optim.SGD.
        choice: of the settings it runs with.
    """
    dtype, pure = dtype_of((number_format,)), number_format.endswith("weights")
    half = None if dtype == torch.float32 else dtype
    model = model.to(setting.device, half if pure else None).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, **options)
    scaler = torch.amp.GradScaler(setting.device, enabled=half == torch.float16)
    micro_batches = setting.micro_batches()

    def step() -> Tensor:
        total = torch.zeros((), device=setting.device)
        for images, labels in micro_batches:
            images = images.to(half) if pure else images
            with torch.autocast(setting.device, dtype=half, enabled=half is not None and not pure):
                loss = loss_of(images, labels) / len(micro_batches)
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return total

    return Stepper(step, setting.device, number_format, choice)


def formats(peer: str, device: str) -> list[str]:
    """Returns the number formats that a peer trains in, on a kind of device."""
    half = ["bfloat16 autocast"] if device == "cpu" else ["float16 autocast", "bfloat16 autocast"]
    # timm and Hugging Face offer to hold all weights in bfloat16, without float32 masters.
    return ["float32", *half] + ["bfloat16 weights"] * (peer != "torchvision")


def plain_stepper(setting: Setting) -> Stepper:
    """Returns the plain formulation of the reference script, in float32 as it comes."""
    model = plain_model(setting.config, setting.img_size, NUM_CLASSES, setting.dropout)
    return stock_stepper(model, model, setting, "float32", {}, ("SGD",))


def plain_model(config: ViTConfig, img_size: int, num_classes: int, dropout: float) -> plain.PlainViT:
    """Returns the plain formulation of an architecture."""
    return plain.PlainViT(
        img_size, config.patch_size, config.hidden_size, config.mlp_dim, config.num_heads, config.num_layers,
        num_classes, dropout,
    )  # fmt: skip


def timm_model(setting: Setting, fused: bool) -> nn.Module:
    """Returns timm's model: for ViT-B_32 at 224 px, vit_base_patch32_224."""
    import timm.models
    from timm.layers import set_fused_attn

    config = setting.config
    set_fused_attn(fused)
    return timm.models.VisionTransformer(
        img_size=setting.img_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_layers,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_dim / config.hidden_size,
        num_classes=NUM_CLASSES,
        pos_drop_rate=setting.dropout,
        proj_drop_rate=setting.dropout,
    )


def torchvision_model(setting: Setting) -> nn.Module:
    """Returns torchvision's model: for ViT-B_32 at 224 px, vit_b_32."""
    from torchvision.models import VisionTransformer

    config = setting.config
    return VisionTransformer(
        image_size=setting.img_size,
        patch_size=config.patch_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        hidden_dim=config.hidden_size,
        mlp_dim=config.mlp_dim,
        dropout=setting.dropout,
        num_classes=NUM_CLASSES,
    )


def hugging_face_model(setting: Setting, attention: str) -> nn.Module:
    """Returns Hugging Face's ViTForImageClassification."""
    import transformers

    config = setting.config
    make_config: Any = transformers.ViTConfig  # its signature lacks what its parent takes
    theirs = make_config(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim,
        hidden_dropout_prob=setting.dropout,
        image_size=setting.img_size,
        patch_size=config.patch_size,
        num_labels=NUM_CLASSES,
    )
    return transformers.AutoModelForImageClassification.from_config(theirs, attn_implementation=attention)


def peer_stepper(peer: str, setting: Setting, number_format: str, choice: Choice) -> Stepper:
    """Returns a peer at one of its settings."""
    attention, optimizer, *rest = choice
    model: Any
    if peer == "timm":
        model = timm_model(setting, attention == "fused_attn")
    elif peer == "torchvision":
        model = torchvision_model(setting)
    else:
        model = hugging_face_model(setting, attention)
    call = torch.compile(model) if COMPILED in rest else model

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        if peer == "Hugging Face":
            return call(pixel_values=images, labels=labels).loss
        return nn.functional.cross_entropy(call(images), labels)

    return stock_stepper(model, loss_of, setting, number_format, OPTIMIZERS[optimizer], choice)


def default_choice(peer: str) -> Choice:
    """Returns the settings that a peer has of itself, with torch's SGD as it comes."""
    return ATTENTIONS[peer][0], next(iter(OPTIMIZERS))


def fastest_stepper(peer: str, setting: Setting, number_format: str, trials: int) -> Stepper:
    """Returns a peer at its fastest setting: tries each optimizer with its default attention, then the rest."""

    @functools.cache
    def secs(choice: Choice) -> float:
        stepper = peer_stepper(peer, setting, number_format, choice)
        return min(stepper.run() for _ in range(trials))

    first, *others = ATTENTIONS[peer]
    best = min(((first, optimizer) for optimizer in OPTIMIZERS), key=secs)
    best = min([best, *((attention, best[1]) for attention in others)], key=secs)
    return peer_stepper(peer, setting, number_format, best)
