"""CIFAR-10 and CIFAR-100: their classes' names, known without a copy of the images, and their images.

Source of the names: ``label_names`` of cifar-10-batches-py/batches.meta and ``fine_label_names`` of
cifar-100-python/meta, of cs.toronto.edu/~kriz/cifar.html.  tests/test_cifar.py rebuilds both files from these names and
compares their md5.
"""

from __future__ import annotations

import http.client

import numpy as np

from utils import dist_util

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR100 = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle",
    "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle",
    "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur",
    "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard",
    "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain",
    "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
    "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket",
    "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider",
    "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger",
    "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip


def load(name: str, data_dir: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Reads the images and labels to train and to test on, downloaded if need be.

    Args:
        name: cifar10 or cifar100.
        data_dir: where downloads go.

    Returns:
        For train and test: (N, 3, 32, 32) uint8 and (N,) int64.

    Raises:
        ConnectionError: they are not there, and could not be downloaded.
    """
    import torchvision.datasets  # a second, not spent where no CIFAR is asked for

    cls = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    splits = []
    for train in (True, False):
        try:
            data = cls(root=data_dir, train=train, download=dist_util.is_first_of_machine())
        except (OSError, RuntimeError, http.client.HTTPException) as e:
            raise ConnectionError(
                f"{name} could not be downloaded into {data_dir} ({e}); put {cls.url} there yourself "
                f"(md5 {cls.tgz_md5}), or name another folder with --data_dir"
            ) from e
        splits.append((np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)), np.array(data.targets, dtype=np.int64)))
    return splits
