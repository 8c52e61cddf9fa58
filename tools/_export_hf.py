"""Writes a folder for Hugging Face's transformers: weights, the model's configuration and that of its images.

Source: transformers 4.57 and 5 (``models/vit``); the hub's ``google/vit-base-patch16-224`` has the same files.
"""

from __future__ import annotations

from typing import Any

from models import layouts
from models.modeling import LAYER_NORM_EPS
from tools import _export_folder as folders
from tools import _finetuned
from utils.errors import UserError

#: A number of Pillow's, by which image processors name how to resize.
PIL_BILINEAR = 2


def write(loaded: _finetuned.Finetuned, path: str) -> str:
    """Writes the folder; returns the lines that use it.

    Raises:
        UserError: it is a hybrid, which transformers 5 no longer has.
        OSError: it could not be written.
    """
    if loaded.model.config.resnet_units is not None:
        raise UserError(f"--format hf: transformers has no hybrids such as {loaded.model_type}; timm has")
    with folders.new_folder(path) as folder:
        folders.write_weights(folder, layouts.from_ours(loaded.model.state_dict(), layouts.HF))
        folders.write_json(folder, folders.CONFIG, model_config(loaded))
        folders.write_json(folder, "preprocessor_config.json", image_config(loaded.model.img_size))
    return (
        "from PIL import Image, ImageOps\n"
        "from transformers import AutoImageProcessor, pipeline\n"
        '# backend="pil" resizes as the training did; without it, pixels differ by up to one grey level\n'
        f'processor = AutoImageProcessor.from_pretrained({path!r}, backend="pil")\n'
        f'classify = pipeline("image-classification", model={path!r}, image_processor=processor)\n'
        f"{folders.OPEN_IMAGE}"
        "print(classify(image))"
    )


def model_config(loaded: _finetuned.Finetuned) -> dict[str, Any]:
    """Returns the config.json of a plain model; classes without names are called as transformers calls them."""
    model, config = loaded.model, loaded.model.config
    names = loaded.classes or [f"LABEL_{i}" for i in range(model.num_classes)]
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "image_size": model.img_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "gelu" if config.gelu == "erf" else "gelu_pytorch_tanh",
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": True,
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.attention_dropout_rate,
        "initializer_range": 0.02,
        "problem_type": "single_label_classification",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def image_config(img_size: int) -> dict[str, Any]:
    """Returns the preprocessor_config.json: the whole image, resized to a square, in [-1, 1]."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": img_size, "width": img_size},
        "resample": PIL_BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
