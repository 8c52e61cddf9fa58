"""Deterministic synthetic Vision Transformer checkpoints, in pure numpy.

Writes .npz files that carry the parameter names, shapes, order and container
format of the published Google checkpoints (gs://vit_models/imagenet21k/*.npz,
gs://vit_models/imagenet21k+imagenet2012/*.npz, gs://vit_models/augreg/*.npz),
filled with random but realistic values.  Nothing but numpy and the standard
library is needed.

  make_npz('ViT-B_32', 'b32.npz', num_classes=10, seed=0)
  images = make_images(n=2, size=224, seed=1)

Every array has its own random stream, default_rng([seed, crc32(name)]), so a
parameter's values depend on the seed, its name and its shape, and not on which
other parameters there are: a head of another size, an added pre_logits layer or
another image size leaves all the other arrays as they were.
"""

import argparse
import zipfile
import zlib

import numpy as np

# patch: patch size in pixels (in feature-map cells for the hybrids).
# resnet: None, or the number of residual units in each stage after the stem.
MODELS = {
    "ViT-Ti_16": dict(patch=16, width=192, depth=12, heads=3, mlp=768),
    "ViT-S_16": dict(patch=16, width=384, depth=12, heads=6, mlp=1536),
    "ViT-S_32": dict(patch=32, width=384, depth=12, heads=6, mlp=1536),
    "ViT-B_8": dict(patch=8, width=768, depth=12, heads=12, mlp=3072),
    "ViT-B_16": dict(patch=16, width=768, depth=12, heads=12, mlp=3072),
    "ViT-B_32": dict(patch=32, width=768, depth=12, heads=12, mlp=3072),
    "ViT-L_16": dict(patch=16, width=1024, depth=24, heads=16, mlp=4096),
    "ViT-L_32": dict(patch=32, width=1024, depth=24, heads=16, mlp=4096),
    "ViT-H_14": dict(patch=14, width=1280, depth=32, heads=16, mlp=5120),
    "R+ViT-Ti_16": dict(patch=8, width=192, depth=12, heads=3, mlp=768, resnet=()),
    "R26+ViT-S_32": dict(patch=1, width=384, depth=12, heads=6, mlp=1536, resnet=(2, 2, 2, 2)),
    "R26+ViT-B_32": dict(patch=1, width=768, depth=12, heads=12, mlp=3072, resnet=(2, 2, 2, 2)),
    "R50+ViT-B_16": dict(patch=1, width=768, depth=12, heads=12, mlp=3072, resnet=(3, 4, 9)),
    "R50+ViT-L_32": dict(patch=1, width=1024, depth=24, heads=16, mlp=4096, resnet=(3, 4, 6, 3)),
    # Not a published model: small enough for unit tests.
    "testing": dict(patch=16, width=32, depth=2, heads=4, mlp=64),
    "testing-hybrid": dict(patch=1, width=32, depth=2, heads=4, mlp=64, resnet=(1, 2)),
}
ALIASES = {
    "R50-ViT-B_16": "R50+ViT-B_16",
    "R50-ViT-L_32": "R50+ViT-L_32",
    "R26-ViT-S_32": "R26+ViT-S_32",
    "R26-ViT-B_32": "R26+ViT-B_32",
    "R-Ti_16": "R+ViT-Ti_16",
    "R-ViT-Ti_16": "R+ViT-Ti_16",
}
STEM_WIDTH = 64


def _half_up(size):
    """Output size of a stride-2 layer with SAME padding."""
    return -(-size // 2)


def grid_size(model_type, img_size):
    """Side of the token grid for a square image."""
    cfg = MODELS[ALIASES.get(model_type, model_type)]
    size = img_size
    if cfg.get("resnet") is not None:
        size = _half_up(_half_up(size))  # stem conv, stem max-pool
        for _ in cfg["resnet"][1:]:  # the first stage keeps the size
            size = _half_up(size)
    return size // cfg["patch"]


def param_shapes(model_type, num_classes=21843, pre_logits=False, img_size=224):
    """{name: shape}, in the order in which the published files store them."""
    cfg = MODELS[ALIASES.get(model_type, model_type)]
    d, heads = cfg["width"], cfg["heads"]
    dh = d // heads
    shapes = {}
    channels = 3

    if cfg.get("resnet") is not None:

        def norm(name, c):
            # Group norms keep the broadcast axes of pre-Linen Flax.
            shapes[name + "/scale"] = shapes[name + "/bias"] = (1, 1, 1, c)

        shapes["conv_root/kernel"] = (7, 7, channels, STEM_WIDTH)
        norm("gn_root", STEM_WIDTH)
        channels = STEM_WIDTH
        for b, units in enumerate(cfg["resnet"]):
            mid = STEM_WIDTH * 2**b
            out = 4 * mid
            for u in range(units):
                unit = f"block{b + 1}/unit{u + 1}/"
                if u == 0:  # always a change of width or of stride
                    shapes[unit + "conv_proj/kernel"] = (1, 1, channels, out)
                    norm(unit + "gn_proj", out)
                for i, shape in enumerate([(1, 1, channels, mid), (3, 3, mid, mid), (1, 1, mid, out)], 1):
                    shapes[f"{unit}conv{i}/kernel"] = shape
                    norm(f"{unit}gn{i}", shape[-1])
                channels = out

    p = cfg["patch"]
    shapes["embedding/kernel"] = (p, p, channels, d)
    shapes["embedding/bias"] = (d,)
    shapes["cls"] = (1, 1, d)
    tokens = grid_size(model_type, img_size) ** 2 + 1
    shapes["Transformer/posembed_input/pos_embedding"] = (1, tokens, d)
    for layer in range(cfg["depth"]):
        block = f"Transformer/encoderblock_{layer}/"
        for ln in ("LayerNorm_0", "LayerNorm_2"):
            shapes[f"{block}{ln}/scale"] = shapes[f"{block}{ln}/bias"] = (d,)
        attention = block + "MultiHeadDotProductAttention_1/"
        for name in ("query", "key", "value"):
            shapes[f"{attention}{name}/kernel"] = (d, heads, dh)
            shapes[f"{attention}{name}/bias"] = (heads, dh)
        shapes[attention + "out/kernel"] = (heads, dh, d)
        shapes[attention + "out/bias"] = (d,)
        for i, (fan_in, fan_out) in enumerate([(d, cfg["mlp"]), (cfg["mlp"], d)]):
            shapes[f"{block}MlpBlock_3/Dense_{i}/kernel"] = (fan_in, fan_out)
            shapes[f"{block}MlpBlock_3/Dense_{i}/bias"] = (fan_out,)
    for leaf in ("scale", "bias"):
        shapes["Transformer/encoder_norm/" + leaf] = (d,)
    if pre_logits:
        shapes["pre_logits/kernel"] = (d, d)
        shapes["pre_logits/bias"] = (d,)
    shapes["head/kernel"] = (d, num_classes)
    shapes["head/bias"] = (num_classes,)
    # The files list a nested dictionary with sorted keys at every level.
    return dict(sorted(shapes.items(), key=lambda item: item[0].split("/")))


def make_param(name, shape, seed):
    """The float32 values of one parameter."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    # Drawn in float64: the platform's libm then cannot show in the float32 values.
    x = rng.standard_normal(shape).astype(np.float32)
    leaf, owner = name.split("/")[-1], name.split("/")[-2:-1]
    if leaf == "scale":
        return 1 + np.float32(0.1) * x
    if leaf != "kernel":  # bias, cls, pos_embedding
        return np.float32(0.02) * x
    if owner == ["out"]:
        fan_in = shape[0] * shape[1]
    elif owner[0] in ("query", "key", "value"):
        fan_in = shape[0]
    else:
        fan_in = int(np.prod(shape[:-1]))
    if owner[0].startswith("conv"):
        # These kernels get standardised per output channel; give the channels
        # different means and spreads, so that doing it wrongly shows.
        x += np.float32(0.3) * rng.standard_normal(shape[-1]).astype(np.float32)
        x *= np.float32(0.25) + np.float32(1.5) * rng.random(shape[-1]).astype(np.float32)
    return x * np.float32(fan_in**-0.5)


def iter_params(model_type, num_classes=21843, pre_logits=False, seed=0, img_size=224):
    for name, shape in param_shapes(model_type, num_classes, pre_logits, img_size).items():
        yield name, make_param(name, shape, seed)


def make_params(*args, **kw):
    """All parameters as a dictionary (iter_params needs less memory)."""
    return dict(iter_params(*args, **kw))


def make_npz(model_type, path, num_classes=21843, pre_logits=False, seed=0, img_size=224):
    """Writes the checkpoint; returns the crc32 of all the values in file order."""
    crc = 0
    # The same container as np.savez's, written one array at a time.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as z:
        for name, x in iter_params(model_type, num_classes, pre_logits, seed, img_size):
            crc = zlib.crc32(np.ascontiguousarray(x).data.cast("B"), crc)
            with z.open(name + ".npy", "w", force_zip64=True) as f:
                np.lib.format.write_array(f, x, allow_pickle=False)
    return crc


def make_images(n, size, seed=1, channels_last=True):
    """n images of size x size pixels, float32 in [-1, 1].

    Coarse 8x8 colour patterns plus pixel noise.  Image i depends on the seed, i
    and the size alone, so the first images of a larger batch are those of a
    smaller one, and its coarse pattern does not depend on the size.
    """
    out = np.empty((n, size, size, 3), np.float32)
    cell = np.arange(size) * 8 // size
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        coarse = rng.uniform(-1, 1, (8, 8, 3))
        noise = rng.uniform(-1, 1, (size, size, 3))
        out[i] = 0.6 * coarse[cell][:, cell] + 0.4 * noise
    return out if channels_last else np.ascontiguousarray(out.transpose(0, 3, 1, 2))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("model_type", choices=[*MODELS, *ALIASES])
    p.add_argument("path")
    p.add_argument("--num_classes", type=int, default=21843)
    p.add_argument("--pre_logits", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--img_size", type=int, default=224)
    print(f"crc32 {make_npz(**vars(p.parse_args())):08x}")
