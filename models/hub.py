"""Repositories of the Hugging Face hub with the weights of Google's files, in the layouts of timm and transformers.

Sources, and what confirms each row:

* ``augreg_in21k``: timm's own configuration names Google's file (``timm.get_pretrained_cfg(...).url``).
* ``orig_in21k``: timm's tag.  The model cards say "Pretrained on ImageNet-21k in JAX by paper authors, ported to
  PyTorch by Ross Wightman" and "does not have a classification head" (read for B_16, B_32, L_16 and L_32).
* ``orig_in21k_ft_in1k``: timm's tag, and the sizes: 346, 347 and 396 MB and 1.23 GB on the hub, and 330.29, 331.4 and
  377.57 MiB and 1.14 GiB in Google's listing (``vit_jax.ipynb`` of github.com/google-research/vision_transformer).
* ``google/vit-...``: the cards (the weights are timm's, which Ross Wightman converted from JAX), and the sizes in the
  same way: 353 MB and twice 1.22 GB; 336.89 MiB, 1.13 and 1.14 GiB.  The two large ones have a ``pytorch_model.bin``
  only.

No row has been compared array by array with Google's file: that takes the bucket, which answered 403 in 2026.

This module is data: it must not import anything that reads files or the network.
"""

from __future__ import annotations

#: The repository that stands for one of Google's files; the files are named as in ``models.published``.
REPOSITORIES: dict[str, str] = {
    "imagenet21k/ViT-B_16": "timm/vit_base_patch16_224.orig_in21k",
    "imagenet21k/ViT-B_32": "timm/vit_base_patch32_224.orig_in21k",
    "imagenet21k/ViT-L_16": "timm/vit_large_patch16_224.orig_in21k",
    "imagenet21k/ViT-L_32": "timm/vit_large_patch32_224.orig_in21k",
    "imagenet21k/ViT-H_14": "timm/vit_huge_patch14_224.orig_in21k",
    "imagenet21k/R50+ViT-B_16": "timm/vit_base_r50_s16_224.orig_in21k",
    "imagenet21k+imagenet2012/ViT-B_16-224": "timm/vit_base_patch16_224.orig_in21k_ft_in1k",
    "imagenet21k+imagenet2012/ViT-B_16": "timm/vit_base_patch16_384.orig_in21k_ft_in1k",
    "imagenet21k+imagenet2012/ViT-L_32": "timm/vit_large_patch32_384.orig_in21k_ft_in1k",
    "imagenet21k+imagenet2012/R50+ViT-B_16": "timm/vit_base_r50_s16_384.orig_in21k_ft_in1k",
    "imagenet21k+imagenet2012/ViT-B_32": "google/vit-base-patch32-384",
    "imagenet21k+imagenet2012/ViT-L_16-224": "google/vit-large-patch16-224",
    "imagenet21k+imagenet2012/ViT-L_16": "google/vit-large-patch16-384",
    "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0": "timm/vit_tiny_patch16_224.augreg_in21k",
    "augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0": "timm/vit_small_patch16_224.augreg_in21k",
    "augreg/S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0": "timm/vit_small_patch32_224.augreg_in21k",
    "augreg/B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0": "timm/vit_base_patch8_224.augreg_in21k",
    "augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0": "timm/vit_base_patch16_224.augreg_in21k",
    "augreg/B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0": "timm/vit_base_patch32_224.augreg_in21k",
    "augreg/L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0": "timm/vit_large_patch16_224.augreg_in21k",
    "augreg/R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0": "timm/vit_tiny_r_s16_p8_224.augreg_in21k",
    "augreg/R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0": "timm/vit_small_r26_s32_224.augreg_in21k",
    "augreg/R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1": "timm/vit_large_r50_s32_224.augreg_in21k",
}

#: Where a repository above has the weights of another AugReg run than the one Google recommends: which it has.
OTHER_RUNS: dict[str, str] = {
    "augreg/S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0":
        "augreg/S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",
    "augreg/B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0":
        "augreg/B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0",
    "augreg/B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0":
        "augreg/B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0",
    "augreg/L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0":
        "augreg/L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1",
    "augreg/R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0":
        "augreg/R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0",
    "augreg/R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1":
        "augreg/R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0",
}  # fmt: skip


def repository(path: str) -> str | None:
    """The repository that stands for one of Google's files, or None.

    Args:
        path: as the values of ``models.published.UPSTREAMS``.
    """
    return REPOSITORIES.get(path)


def other_run(path: str) -> str | None:
    """The file name here of the other AugReg run that the hub has in place of one of Google's files, or None.

    Args:
        path: as the values of ``models.published.UPSTREAMS``.
    """
    return f"{OTHER_RUNS[path].rpartition('/')[2]}.npz" if path in OTHER_RUNS else None
