"""The rooms of the project, read from its sources: who may import whom, and how long files and functions are."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGES = ("models", "utils", "tools", "benchmarks")
OURS = {*PACKAGES, "train", "tests"}
FILES = sorted(
    [
        REPOSITORY / "train.py",
        *(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")),
    ]
)

#: What a user installs; Pillow comes with torchvision.  NVIDIA's apex and pillow_heif are optional.
RUNTIME = {"torch", "torchvision", "numpy", "tqdm", "tensorboard", "safetensors", "huggingface_hub", "PIL", "apex",
           "pillow_heif"}  # fmt: skip


def module_name(path: Path) -> str:
    """``models.npz`` of models/npz.py, ``models`` of its ``__init__.py``."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, package: str = "") -> set[str]:
    """Every module that a module's source imports, wherever in it.

    ``from a import b`` counts as ``a.b``: whether b is a module or a name, it starts with the module.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = [package] if node.level else []
            found |= {".".join([*start, *([node.module] if node.module else []), alias.name]) for alias in node.names}
    return found


def rooms(path: Path) -> set[str]:
    """The project's modules and packages that a file imports, the names within them cut off."""
    own = module_name(path)
    modules = {module_name(file) for file in FILES} | OURS
    found = set()
    for name in imports(path.read_text(encoding="utf-8"), package=own.split(".")[0]):
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        found |= {next((prefix for prefix in prefixes if prefix in modules), "")}
    return found - {"", own}


#: What a module of ``models`` and ``utils`` may import of the project; who is not named, nothing.
ROOMS = {
    "models.cpu_ops": set(),
    "models.modeling": {
        "models.configs",
        "models.cpu_ops",
        "models.modeling_resnet",
        "models.npz",
        "models.recompute",
    },
    "models.modeling_resnet": {"models.recompute"},
    "models.npz": {"models.configs"},
    "models.layouts": {"models.configs", "models.npz"},
    "models.published": {"models.commands", "models.configs"},
    "models.shapes": {"models.configs", "models.modeling", "models.modeling_resnet"},
    "models.pretrained": {"models.configs", "models.layouts", "models.modeling", "models.npz"},
    "utils.advice": {"utils.batch"},
    "utils.apex": {"utils.precision"},
    "utils.args": {
        "models.configs",
        "utils.batch",
        "utils.dist_util",
        "utils.hardware",
        "utils.precision",
        "utils.scheduler",
    },
    "utils.augment": {"utils.hardware"},
    "utils.checkpoint": {"utils.files"},
    "utils.cifar": {"utils.console", "utils.dist_util", "utils.files"},
    "utils.data_utils": {
        "utils.datasets",
        "utils.dist_errors",
        "utils.hardware",
        "utils.images",
        "utils.photos",
        "utils.workers",
    },
    "utils.datasets": {
        "utils.cifar",
        "utils.dist_util",
        "utils.folders",
        "utils.images",
        "utils.inspection",
        "utils.manifest",
    },
    "utils.dist_errors": {"utils.dist_util"},
    "utils.dist_util": {"utils.console", "utils.hardware", "utils.rendezvous"},
    "utils.evaluation": {"utils.dist_util"},
    "utils.input_wait": {"utils.advice", "utils.hardware"},
    "utils.log_files": {"utils.files"},
    "utils.log_folder": {"utils.files", "utils.run_state"},
    "utils.fitting": {
        "utils.batch",
        "utils.datasets",
        "utils.dist_util",
        "utils.memory",
        "utils.precision",
        "utils.reckoning",
    },
    "utils.folders": {"utils.listing", "utils.parts", "utils.split"},
    "utils.images": {"utils.image_ends"},
    "utils.inspection": {"utils.dist_util", "utils.images"},
    "utils.listing": {"utils.images"},
    "utils.manifest": {"utils.images", "utils.inspection", "utils.listing"},
    "utils.memory": {"utils.hardware"},
    "utils.metrics": {
        "utils.console",
        "utils.dist_util",
        "utils.evaluation",
        "utils.input_wait",
        "utils.log_files",
        "utils.outlook",
    },
    "utils.number_format": {"utils.dist_util", "utils.precision"},
    "utils.photos": {"utils.image_ends", "utils.images"},
    "utils.parts": {"utils.listing"},
    "utils.precision": {"utils.dist_util"},
    "utils.process": {"utils.apex"},
    "utils.reckoning": {"utils.batch", "utils.precision"},
    "utils.signals": {"utils.console", "utils.dist_util"},
    "utils.metadata": {"utils.checkpoint", "utils.weights"},
    "utils.weights": {"utils.checkpoint"},
    "utils.workers": {"utils.hardware", "utils.signals"},
    "utils.exits": {"utils.dist_errors", "utils.dist_util", "utils.memory", "utils.signals", "utils.workers"},
    "utils.run": {
        "utils.batch",
        "utils.checkpoint",
        "utils.dist_errors",
        "utils.dist_util",
        "utils.evaluation",
        "utils.files",
        "utils.images",
        "utils.log_folder",
        "utils.manifest",
        "utils.metrics",
        "utils.precision",
        "utils.run_state",
    },
    "utils.figures": {
        "utils.data_utils",
        "utils.datasets",
        "utils.evaluation",
        "utils.fonts",
        "utils.images",
        "utils.metrics",
        "utils.outlook",
    },
    "utils.report": {
        "utils.datasets",
        "utils.evaluation",
        "utils.figures",
        "utils.files",
        "utils.hardware",
        "utils.log_files",
        "utils.metrics",
        "utils.precision",
        "utils.run",
    },
}


def allowed(path: Path) -> set[str]:
    """The project's modules that a file may import."""
    name = module_name(path)
    package = name.split(".")[0]
    may = ROOMS.get(name, set()) if package in ("models", "utils") else {"models", "utils", package}
    if package == "benchmarks":
        may = may | {"tools", "train"}
    packages = may & set(PACKAGES)
    may = may | {"utils.errors"}  # which imports nothing
    return may | {module_name(file) for file in FILES if module_name(file).split(".")[0] in packages}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_modules_import_only_what_their_room_may(path):
    assert rooms(path) <= allowed(path)


@pytest.mark.parametrize(
    "path",
    [f for f in FILES if module_name(f).split(".")[0] in ("train", "models", "utils")],
    ids=module_name,
)
def test_training_needs_only_the_runtime_packages(path):
    third_party = {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"))} - OURS
    assert third_party - set(sys.stdlib_module_names) <= RUNTIME


def calls(source: str) -> list[tuple[str, dict[str, object]]]:
    """Every call of a module's source: what is called as it stands there, and the constants it is given by name."""
    return [
        (ast.unparse(x.func), {k.arg: k.value.value for k in x.keywords if k.arg and isinstance(k.value, ast.Constant)})
        for x in ast.walk(ast.parse(source))
        if isinstance(x, ast.Call)
    ]


SAFE = {"torch.load": {"weights_only": True}, "np.load": {"allow_pickle": False}, "read_array": {"allow_pickle": False}}
#: Modules that run what they read; of pickle its error's name is harmless.
UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
HARMLESS = {"pickle.UnpicklingError"}


def unsafe(source: str) -> list[str]:
    """The calls that could run what a file holds, and the imports that hide such calls from being found here."""
    found = []
    for name, given in calls(source):
        needed = next((x for known, x in SAFE.items() if f".{name}".endswith(f".{known}")), {})
        if not needed.items() <= given.items():
            found.append(name)
    hidden = {*SAFE, "numpy.load"}
    return found + sorted(
        name for name in imports(source) - HARMLESS if name.split(".")[0] in UNPICKLERS or name in hidden
    )


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_that_a_file_holds_is_run(path):
    assert not unsafe(path.read_text(encoding="utf-8"))


def test_what_could_run_is_found():
    careless = "torch.load(p)\nx = np.load(p, allow_pickle=True)\nnp.lib.format.read_array(f)"
    assert unsafe(careless) == ["torch.load", "np.load", "np.lib.format.read_array"]
    careless = "from dill import load\nfrom pickle import UnpicklingError, loads\nfrom torch import load as f"
    assert unsafe(careless) == ["dill.load", "pickle.loads", "torch.load"]
    assert unsafe("import pickle as p\np.load(f)") == ["pickle"]
    assert not unsafe("torch.load(p, weights_only=True)\nnp.load(p, allow_pickle=False)\ntorch.export.load(p)")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_one_module_asks_of_disks_what_some_refuse(path):
    refused = {"os.chmod", "os.fsync", "os.replace"} & {name for name, _ in calls(path.read_text(encoding="utf-8"))}
    assert not refused or module_name(path) == "utils.files"


def test_configs_describe_without_torch_or_numpy():
    source = (REPOSITORY / "models" / "configs.py").read_text(encoding="utf-8")
    assert {name.split(".")[0] for name in imports(source)} <= {"__future__", "dataclasses", "utils"}


def test_imports_are_found_wherever_they_stand():
    source = """
import a.b as c
from d import e
from . import f
from .g import h
def late():
    import i
"""
    assert imports(source, package="p") == {"a.b", "d.e", "p.f", "p.g.h", "i"}


# ---- lengths ----

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 350, 50
#: What is longer, and why.
LONG = {
    "train.py": "the loop, the evaluation and their wiring are read in one file",
    "models/npz.py": "one format, read and written, whose arrays follow from one table",
    "utils/args.py": "a third of it is the table of flags, from which the rest follows",
    "utils/run.py": "one object owns a run's files, its state and the order of resuming",
    "tests/helpers/error_faults.py": "a table of errors and what provokes them",
    "tests/helpers/error_inputs.py": "a table of errors and what provokes them",
    "tests/helpers/error_tools.py": "a table of errors and what provokes them",
    "tests/data/google_npz.py param_shapes": "a table of arrays' names and shapes",
    "tests/helpers/fake_npz.py shapes": "a table of arrays' names and shapes",
    "tests/test_dist_util.py watch": "all that two ranks see, in one start of them",
}


def too_long(source: str, most: int = MOST_LINES, most_of_a_function: int = MOST_LINES_OF_A_FUNCTION) -> list[str]:
    """Returns "" if a module is too long, and the names of its functions that are."""
    functions = [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef)]
    names = [x.name for x in functions if (x.end_lineno or x.lineno) - x.lineno >= most_of_a_function]
    return [""] * (len(source.splitlines()) > most) + names


def test_files_and_functions_are_short_or_have_a_reason():
    paths = [*FILES, *(REPOSITORY / "tests").rglob("*.py")]
    assert LONG.keys() == {
        f"{path.relative_to(REPOSITORY).as_posix()} {name}".rstrip()
        for path in paths
        for name in too_long(path.read_text(encoding="utf-8"))
    }


def test_what_is_too_long_is_found():
    source = "def f():\n    def g():\n        pass\n\n\ndef h():\n    pass\n"
    assert too_long(source, most=7, most_of_a_function=2) == ["f"]
    assert too_long(source, most=6, most_of_a_function=3) == [""]
