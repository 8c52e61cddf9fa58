"""Writes a fine-tuned checkpoint in the formats of other programs.

    python -m tools.export --load_model_dir output/cifar10_checkpoint.bin --format onnx --output cifar10.onnx

npz is Google's layout, onnx and pt2 (torch.export) are programs that take any number of pictures
(B, 3, S, S) in [-1, 1] and give logits, timm and hf are state_dicts for those libraries' models.  Prints
how to load what it wrote.  onnx needs the packages onnx and onnxscript; the others need nothing.

Names in the libraries: timm (models/vision_transformer.py, models/resnetv2.py) and transformers 5
(models/vit).  The numbers stay those of Google's code; where a library's model has to be told, the
printed lines do.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from models import commands, layouts, npz
from models.configs import ViTConfig
from models.modeling import LAYER_NORM_EPS, VisionTransformer
from tools import cli, finetuned
from utils import checkpoint

#: Above this many bytes of weights an .onnx keeps them in a file beside it: its own format ends at 2 GiB.
ONNX_LIMIT_BYTES = 2**31 - 2**24
GROUP_NORM_EPS = 1e-6
STANDARDISE_EPS = 1e-5  # added to the deviation, in models/modeling_resnet.py
TIMM_STANDARDISE_EPS = 1e-8  # added to the variance, in timm's hybrids


class Logits(nn.Module):
    """A model without its second output, in evaluation mode: what is traced."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, pictures: Tensor) -> Tensor:
        return self.model(pictures)[0]


def tracing(model: VisionTransformer) -> tuple[Logits, tuple[Tensor], dict[str, Any]]:
    """A module, arguments to trace it with, and the sizes that stay free: the number of pictures.

    Two pictures, because what is traced with one may only take one.
    """
    pictures = torch.zeros(2, 3, model.img_size, model.img_size)
    return Logits(model), (pictures,), {"pictures": {0: torch.export.Dim("batch")}}


# ---- formats: each writes a file and returns the lines that load it as ``model`` ----


def write_npz(loaded: finetuned.Finetuned, path: str) -> str:
    """Google's layout, head included."""
    model = loaded.model
    with checkpoint.atomic_write(path) as f:
        npz.write(f, npz.from_state_dict(model.state_dict(), model.config, model.img_size))
    gelu = f"replace(CONFIGS[{loaded.model_type!r}], gelu={model.config.gelu!r})"
    return commands.import_lines() + (
        "from dataclasses import replace\n"
        "import numpy as np\n"
        "from models.configs import CONFIGS\n"
        "from models.modeling import VisionTransformer\n"
        f"model = VisionTransformer({gelu}, img_size={model.img_size}, num_classes={model.num_classes}).eval()\n"
        f"model.load_from(np.load({path!r}))"
    )


def write_onnx(loaded: finetuned.Finetuned, path: str) -> str:
    """An ONNX program of the opset that this PyTorch writes by default.

    Raises:
        ValueError: a package is missing.
    """
    require("onnx", "onnxscript")
    with torch.no_grad():
        module, pictures, free = tracing(loaded.model)
        program = torch.onnx.export(
            module, pictures, dynamo=True, verbose=False, input_names=["pictures"], output_names=["logits"],
            dynamic_shapes=free,
        )  # fmt: skip
    assert program is not None
    if sum(x.nbytes for x in loaded.model.state_dict().values()) <= ONNX_LIMIT_BYTES:
        with checkpoint.atomic_write(path) as f:
            f.write(program.model_proto.SerializeToString())
    else:
        name = os.path.basename(path)  # by which the program knows the file of its weights
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path) or ".") as folder:
            program.save(os.path.join(folder, name), external_data=True)
            for file in (name + ".data", name):  # the program last: it is of no use without them
                os.replace(os.path.join(folder, file), os.path.join(os.path.dirname(path), file))
    return (
        f"import onnxruntime  # opset {program.model.opset_imports['']}\n"
        f"model = onnxruntime.InferenceSession({path!r})\n"
        "# logits, = model.run(None, {'pictures': pictures})"
    )


def write_pt2(loaded: finetuned.Finetuned, path: str) -> str:
    """A program of torch.export."""
    with torch.no_grad():
        module, pictures, free = tracing(loaded.model)
        program = torch.export.export(module, pictures, dynamic_shapes=free)
    with checkpoint.atomic_write(path) as f:
        torch.export.save(program, f)
    return f"import torch\nmodel = torch.export.load({path!r}).module()"


def write_timm(loaded: finetuned.Finetuned, path: str) -> str:
    """A state_dict of timm's VisionTransformer.

    Raises:
        ValueError: timm has no such model.
    """
    model = loaded.model
    lines = timm_lines(loaded.model_type, model.config, model.img_size, model.num_classes)
    checkpoint.save_weights(path, to_timm(model.state_dict()))
    return f"{lines}\nmodel.load_state_dict(torch.load({path!r}, weights_only=True))"


def write_hf(loaded: finetuned.Finetuned, path: str) -> str:
    """A state_dict of ViTForImageClassification of Hugging Face's transformers, 5 or newer.

    Raises:
        ValueError: it is a hybrid, which transformers no longer has.
    """
    model, config = loaded.model, loaded.model.config
    if config.resnet_units is not None:
        raise ValueError(f"--format hf: transformers has no hybrids such as {loaded.model_type}; timm has")
    checkpoint.save_weights(path, to_hf(model.state_dict()))
    act = "gelu" if config.gelu == "erf" else "gelu_pytorch_tanh"
    return (
        "import torch\n"
        "from transformers import ViTConfig, ViTForImageClassification\n"
        f"config = ViTConfig(image_size={model.img_size}, patch_size={config.patch_size}, "
        f"hidden_size={config.hidden_size}, intermediate_size={config.mlp_dim}, "
        f"num_hidden_layers={config.num_layers}, num_attention_heads={config.num_heads}, hidden_act={act!r}, "
        f"layer_norm_eps={LAYER_NORM_EPS}, num_labels={model.num_classes})\n"
        "model = ViTForImageClassification(config).eval()\n"
        f"model.load_state_dict(torch.load({path!r}, weights_only=True))"
    )


FORMATS: dict[str, Callable[[finetuned.Finetuned, str], str]] = {
    "npz": write_npz,
    "onnx": write_onnx,
    "pt2": write_pt2,
    "timm": write_timm,
    "hf": write_hf,
}


def require(*packages: str) -> None:
    """Raises ValueError unless the packages are installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ValueError(f"--format onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")


# ---- names ----


def to_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain model's state_dict with the names of transformers 5."""
    return layouts.from_ours(state, layouts.HF5)


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict with timm's names; queries, keys and values are one matrix there."""
    kernels = {name: x for name, x in state.items() if "hybrid_model" in name and x.ndim == 4}
    standardised = {name: for_timms_standardisation(x) for name, x in kernels.items()}
    return layouts.from_ours({**state, **standardised}, layouts.TIMM)


def for_timms_standardisation(kernel: Tensor) -> Tensor:
    """A kernel (O, I, H, W) that timm's standardisation makes what Google's makes of the given one.

    Google divides by s + 1e-5, where s is the deviation of an output channel; timm by sqrt(v + 1e-8).
    Scaling a channel to the deviation d gives d / sqrt(d * d + 1e-8) there, and the d for which that is
    s / (s + 1e-5) is computed here.
    """
    s, mean = torch.std_mean(kernel.double(), dim=(1, 2, 3), keepdim=True, correction=0)
    # With r = s / (s + e), d = r * sqrt(eps / (1 - r * r)); 1 - r * r = (2 * s * e + e * e) / (s + e)^2.
    e = STANDARDISE_EPS
    scale = TIMM_STANDARDISE_EPS**0.5 / (2 * s * e + e * e) ** 0.5  # d / s
    return ((kernel - mean) * scale).to(kernel.dtype)


#: timm's names of the hybrids, by the units of their stems and their width.
_TIMM_HYBRIDS = {
    ((3, 4, 9), 768): "vit_base_r50_s16_224",
    ((), 192): "vit_tiny_r_s16_p8_224",
    ((2, 2, 2, 2), 384): "vit_small_r26_s32_224",
    ((2, 2, 2, 2), 768): "vit_base_r26_s32_224",
    ((3, 4, 6, 3), 1024): "vit_large_r50_s32_224",
}


def timm_lines(model_type: str, config: ViTConfig, img_size: int, num_classes: int) -> str:
    """The lines that make timm's model of this shape.

    Raises:
        ValueError: timm has none.
    """
    act = "" if config.gelu == "erf" else ", act_layer='gelu_tanh'"
    lines = "import timm\nimport torch\n"
    if config.resnet_units is None:
        return lines + (
            f"model = timm.models.VisionTransformer(img_size={img_size}, patch_size={config.patch_size}, "
            f"embed_dim={config.hidden_size}, depth={config.num_layers}, num_heads={config.num_heads}, "
            f"mlp_ratio={config.mlp_dim / config.hidden_size:g}, num_classes={num_classes}{act}).eval()"
        )
    name = _TIMM_HYBRIDS.get((config.resnet_units, config.hidden_size))
    if name is None:
        raise ValueError(f"--format timm: timm has no hybrid of the shape of {model_type}")
    return lines + (
        f"model = timm.create_model({name!r}, img_size={img_size}, num_classes={num_classes}{act}).eval()\n"
        "for module in model.modules():\n"
        "    if isinstance(module, torch.nn.GroupNorm):\n"
        f"        module.eps = {GROUP_NORM_EPS}  # Google's; timm has 1e-5"
    )


# ---- the command line ----


def make_parser() -> cli.Parser:
    """Every flag of the command line."""
    p = cli.Parser("export", __doc__)
    p.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    p.add_argument("--output", required=True, metavar="FILE", help="where to write it")
    finetuned.add_flags(p)
    return p


def run(args: argparse.Namespace) -> int:
    """Writes what the flags name; returns the exit status.

    Raises:
        ValueError: the user got something wrong.
        OSError: the file could not be written.
    """
    loaded = finetuned.load(args)
    cli.check_output(args.output, args.load_model_dir, checkpoint.description_path(args.load_model_dir))
    lines = FORMATS[args.format](loaded, args.output)
    print(f"# {args.output}: {os.path.getsize(args.output):,} bytes; to load it:\n{lines}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    return cli.run("export", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
