"""Trainings that others have published figures of: the rows that tools.reproduce trains, and the figures.

None of the figures was measured by this project, but for the demo's.  docs/results.md has the same tables,
with their sources; this module must not know how they are trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from models.configs import DEMO

#: Who published a figure, by the beginning of its row's name.
SOURCES = {
    "demo": "this project, measured on two cores",
    "predecessor": "the script this project replaces, as its users measured it",
    "reference": "github.com/jeonsworld/ViT-pytorch, README (apex O2)",
    "google": "github.com/google-research/vision_transformer, README",
}


@dataclass(frozen=True)
class Row:
    """One training of somebody's, and its result.

    Attributes:
        name: of the row, which begins with a key of ``SOURCES``.
        model_type, dataset, img_size, num_steps, batch_size: as the flags.
        accuracy: the published one, in percent.
        secs: the published time, None where none is.
        flags: of train.py, besides those above.
    """

    name: str
    model_type: str
    dataset: str
    img_size: int
    num_steps: int
    batch_size: int
    accuracy: float
    secs: float | None = None
    flags: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Returns the name of its publisher."""
        return SOURCES[self.name.split("-")[0]]


# ---- the rows ----

#: The flags of `make demo`; the figures are from a machine with two cores.
DEMO_ROW = Row(
    "demo", DEMO, "digits", 32, 1200, 64, 97.78, 66,
    ("--warmup_steps", "60", "--learning_rate", "0.05", "--eval_every", "400"),
)  # fmt: skip

_PREDECESSOR = (  # model, data set, resolution, steps, accuracy, seconds, batch
    ("ViT-B_32", "cifar10", 224, 1000, 98.89, 2107.74, 512),
    ("ViT-B_32", "cifar10", 384, 1000, 98.65, 3346.43, 512),
    ("ViT-B_32", "cifar10", 384, 10000, 99.00, 32593.36, 512),
    ("ViT-L_32", "cifar10", 224, 1000, 98.83, 4039.10, 512),
    ("ViT-L_32", "cifar10", 384, 1000, 98.72, 4487.46, 256),
    ("ViT-B_32", "cifar100", 224, 1000, 90.74, 1270.46, 512),
    ("ViT-B_32", "cifar100", 384, 1000, 90.61, 3340.64, 512),
    ("ViT-L_32", "cifar100", 224, 1000, 91.95, 2970.06, 512),
    ("ViT-L_32", "cifar100", 384, 10000, 93.39, 45135.64, 256),
)
_REFERENCE = (  # model, data set, resolution, steps, steps of warm-up, accuracy, seconds
    ("ViT-B_16", "cifar10", 224, 10000, 500, 99.08, 11580),
    ("ViT-B_16", "cifar100", 224, 10000, 500, 92.30, 11340),
    ("ViT-L_32", "cifar10", 224, 10000, 500, 99.03, 7860),
    ("ViT-L_32", "cifar100", 224, 10000, 500, 92.76, 7740),
    ("R50-ViT-B_16", "cifar10", 224, 10000, 500, 98.92, None),
    ("R50-ViT-B_16", "cifar100", 224, 10000, 500, 92.31, None),
    ("ViT-B_16", "cifar10", 384, 10000, 500, 99.06, None),
    ("ViT-B_16", "cifar100", 384, 10000, 500, 92.28, None),
    ("R50-ViT-B_16", "cifar10", 384, 10000, 500, 99.04, None),
    ("R50-ViT-B_16", "cifar100", 384, 10000, 500, 91.97, None),
    ("ViT-B_16", "cifar10", 224, 500, 100, 98.59, None),
    ("ViT-B_16", "cifar100", 224, 500, 100, 90.72, None),
    ("ViT-B_16", "cifar10", 224, 1000, 100, 98.78, None),
    ("ViT-B_16", "cifar100", 224, 1000, 100, 92.16, None),
)
_GOOGLE = (  # model; accuracy on CIFAR-10 with dropout 0 and 0.1, on CIFAR-100 with dropout 0 and 0.1
    ("ViT-B_16", 99.02, 98.76, 92.06, 91.92),
    ("ViT-B_32", 98.88, 98.75, 92.31, 92.05),
    ("ViT-L_16", 99.13, 99.14, 92.91, 93.22),
    ("ViT-L_32", 99.06, 99.09, 93.29, 93.34),
    ("R50-ViT-B_16", 98.72, 98.94, 90.88, 92.30),
)


def _published() -> Iterator[Row]:
    yield DEMO_ROW
    for model, data, px, steps, accuracy, secs, batch in _PREDECESSOR:
        yield Row(f"predecessor-{data}-{model}-{px}-{steps}", model, data, px, steps, batch, accuracy, secs)
    for model, data, px, steps, warmup_steps, accuracy, time_taken in _REFERENCE:
        name, flags = f"reference-{data}-{model}-{px}-{steps}", ("--warmup_steps", str(warmup_steps))
        yield Row(name, model, data, px, steps, 512, accuracy, time_taken, flags)
    for model, *accuracies in _GOOGLE:
        kinds = [(data, dropout) for data in ("cifar10", "cifar100") for dropout in ("0", "0.1")]
        for (data, dropout), accuracy in zip(kinds, accuracies):
            as_google = ("--dropout", dropout, "--hflip", "--gelu", "tanh")
            yield Row(
                f"google-{data}-{model}-dropout{dropout}", model, data, 384, 10000, 512, accuracy, None, as_google
            )


#: All rows by their names, in the order in which they are trained.
ROWS = {row.name: row for row in _published()}
