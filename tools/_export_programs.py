"""Writes programs that need no code of this project: ONNX and torch.export.

Both take any number of images (B, 3, S, S) in [-1, 1] and give logits (B, num_classes).
Source: PyTorch (``torch.onnx``), ONNX's list of operators and their versions.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.modeling import VisionTransformer
from tools import _export_folder as folders
from tools import _finetuned
from utils import files
from utils.errors import UserError

#: Above this many bytes of weights an .onnx keeps them in a file beside it: its own format ends at 2 GiB.
ONNX_LIMIT_BYTES = 2**31 - 2**24
#: The oldest opset that can be written, and the oldest that PyTorch itself writes.
OLDEST_OPSET, TORCHS_OLDEST_OPSET = 17, 18


class Logits(nn.Module):
    """The traced module: a model without its second output, in evaluation mode."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, pictures: Tensor) -> Tensor:  # the input's name in users' programs
        return self.model(pictures)[0]


def trace(model: VisionTransformer) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """Traces a model; also returns the sizes that stay free: the number of images.

    It is traced with two images, because what is traced with one may only take one.
    """
    images = torch.zeros(2, 3, model.img_size, model.img_size)
    free = {"pictures": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        return torch.export.export(Logits(model), (images,), dynamic_shapes=free), free


def write_pt2(loaded: _finetuned.Finetuned, path: str) -> str:
    """Writes a program of torch.export; returns the lines that load it."""
    program, _ = trace(loaded.model)
    with files.atomic_write(path) as f:
        torch.export.save(program, f)
    return f"import torch\nmodel = torch.export.load({path!r}).module()"


# ---- ONNX ----


def write_onnx(loaded: _finetuned.Finetuned, path: str, opset: int | None = None) -> str:
    """Writes an ONNX program; returns the lines that use it.

    Args:
        loaded: the model.
        path: of the program; more than 2 GiB of weights go into ``path``.data.
        opset: version of ONNX's operators; None for the one that this PyTorch writes by default.

    Raises:
        UserError: a package is missing, or the opset cannot be written.
        OSError: it could not be written.
    """
    require("onnx", "onnxscript")
    program = to_onnx(loaded.model, opset)
    size = loaded.model.img_size
    program.model.metadata_props.update({"img_size": str(size), "input_range": "[-1, 1]"})
    if loaded.classes is not None:
        program.model.metadata_props["classes"] = json.dumps(loaded.classes)
    is_large = sum(x.nbytes for x in loaded.model.state_dict().values()) > ONNX_LIMIT_BYTES
    _save(program, path, is_large)
    names = "json.loads(model.get_modelmeta().custom_metadata_map['classes'])"
    note = f"# its weights are in {path}.data, which it needs beside it\n" if is_large else ""
    return (
        f"{note}import json\n"
        "import numpy as np\n"
        "import onnxruntime\n"
        "from PIL import Image, ImageOps\n"
        f"model = onnxruntime.InferenceSession({path!r})  # opset {program.model.opset_imports['']}\n"
        f"{folders.OPEN_IMAGE}"
        f"image = image.resize(({size}, {size}), Image.Resampling.BILINEAR)\n"
        "pictures = (np.asarray(image, np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]  "
        f"# (1, 3, {size}, {size})\n"
        "logits, = model.run(None, {'pictures': pictures})\n"
        "index = int(logits[0].argmax())\n"
        f"print({'index' if loaded.classes is None else names + '[index]'})"
    )


def require(*packages: str) -> None:
    """Raises UserError unless the packages are installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def to_onnx(model: VisionTransformer, opset: int | None) -> Any:
    """Traces a model as a ``torch.onnx.ONNXProgram`` of exactly this opset.

    Raises:
        UserError: it cannot be written.
    """
    if opset is not None and opset < OLDEST_OPSET:
        raise UserError(f"--opset {opset}: LayerNormalization begins with opset 17; give 17 or more")
    with torch.no_grad(), _silence():
        traced, free = trace(model)
        program = torch.onnx.export(
            traced, dynamo=True, verbose=False, input_names=["pictures"], output_names=["logits"],
            dynamic_shapes=free, opset_version=None if opset is None else max(opset, TORCHS_OLDEST_OPSET),
        )  # fmt: skip
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, which name this machine's folders
    if opset is not None and opset < TORCHS_OLDEST_OPSET:
        _lower_to_17(program.model)
    written = program.model.opset_imports[""]
    if opset not in (None, written):
        raise UserError(
            f"--opset {opset}: PyTorch {torch.__version__} writes {written}; give 17, 18 or 20, which are tested"
        )
    return program


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps what PyTorch and onnxscript print about conversions off the screen: the program is checked itself."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _lower_to_17(model: Any) -> None:
    """Makes an ONNX program of opset 18 one of 17, in place.

    PyTorch writes 18 at least, and ONNX's own conversion knows no way back for Pad, which hybrids have.  Of the
    operators of these models, 18 changed two: reductions take their axes as an input, Pad may have axes.

    Args:
        model: an ``onnx_ir.Model``.

    Raises:
        UserError: it has an operator that 17 has not in this form.
    """
    import onnx
    from onnxscript import ir

    for node in model.graph:
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":  # has had them as an input since 13
            axes = node.inputs[1] if len(node.inputs) > 1 else None
            constant = None if axes is None else ir.convenience.get_const_tensor(axes)
            if axes is None or constant is None:
                raise UserError(f"--opset 17: {node.op_type} has no such form there; give 18 or more")
            node.resize_inputs(1)
            node.attributes.pop("noop_with_empty_axes", None)
            node.attributes["axes"] = ir.AttrInt64s("axes", constant.numpy().tolist())
            if axes.is_initializer() and not axes.uses():
                del model.graph.initializers[axes.name]
        elif not (node.op_type == "Pad" and len(node.inputs) < 4) and _changed_in_18(onnx.defs, node):
            raise UserError(f"--opset 17: {node.op_type} has no such form there; give 18 or more")
    model.opset_imports[""] = 17
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", 17)])


def _changed_in_18(defs: Any, node: Any) -> bool:
    """Tells whether an operator of opset 18 differs from that of 17, or is new."""
    return node.domain not in ("", "ai.onnx") or defs.get_schema(node.op_type, 18, "").since_version == 18


def _save(program: Any, path: str, is_large: bool) -> None:
    """Writes a program, its weights beside it if they are large: all of it or nothing.

    The program comes last, and an earlier one of the name goes first: none ever stands beside another's weights.
    """
    import onnx

    name, folder = os.path.basename(path), os.path.dirname(path) or "."
    with folders.temporary_folder(path) as temporary:
        program.save(os.path.join(temporary, name), external_data=is_large)  # it knows the file of its weights by name
        onnx.checker.check_model(os.path.join(temporary, name))
        written = sorted(os.listdir(temporary), key=len, reverse=True)  # NAME.data, NAME
        for file in written:
            files.sync(os.path.join(temporary, file))
        if is_large:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for file in written:
            files.replace(os.path.join(temporary, file), os.path.join(folder, file))
        files.sync(folder)
