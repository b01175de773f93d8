"""Convert a graph to OpenVINO's own format, with float32 weights, and run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

BYTES = ("i8", "u8")  # names of OpenVINO's types of 8 bits
MODEL_INFO = "model_info"  # section of the runtime information with the facts of a model


def require_openvino(what: str = "--openvino") -> None:
    """Check that the package for OpenVINO is installed.

    Args:
        what: option or file that needs it, for the message.

    Raises:
        JasperError: it is missing.
    """
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise JasperError(
            f"{what}: the package {error.name} is missing. Fix: `pip install openvino` (or the extra `openvino`)"
        ) from None


def write_openvino(graph: Path, path: Path, metadata: Mapping[str, str]) -> None:
    """Convert an ONNX graph with OpenVINO's converter, and save it as ``path`` with its weights in a ``.bin`` file.

    Inputs and outputs keep their names. The weights stay float32: OpenVINO's own default is float16.

    Args:
        graph: ONNX file.
        path: new ``.xml`` file. Its folder is made.
        metadata: facts of the model, saved as ``rt_info`` of the section ``model_info``.

    Raises:
        JasperError: OpenVINO cannot convert the graph.
    """
    import openvino

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        model = openvino.convert_model(str(graph))
    except RuntimeError as error:  # openvino's errors are of this class
        raise JasperError(
            f"OpenVINO {openvino.get_version()} cannot convert {graph.name} ({first_line(error)}). Nothing was "
            "published. Fix: export without --openvino"
        ) from error
    for name, value in metadata.items():
        model.set_rt_info(value, [MODEL_INFO, name])
    openvino.save_model(model, str(path), compress_to_fp16=False)


class OpenvinoGraph:
    """A model of OpenVINO on the CPU. It computes in float32: the default of some CPUs is bfloat16.

    Args:
        name: model, for messages.
        file: ``.xml`` file.
        threads: CPU threads. None: OpenVINO's default.

    Attributes:
        inputs: names of the inputs.
        outputs: number of dimensions of each output, by name.
        metadata: facts of the model, as in ``write_openvino``.
        int8: True if a matrix is stored in 8 bits.

    Raises:
        JasperError: openvino is missing, or cannot open the file.
    """

    kind = "OpenVINO model"

    def __init__(self, name: str, file: Path, threads: int | None = None) -> None:
        require_openvino(name)
        import openvino

        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        try:
            model = core.read_model(str(file))
            self._compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise JasperError(
                f"{name}: OpenVINO cannot open the file ({first_line(error)}). Fix: export the model again"
            ) from error
        self.inputs = [node.get_any_name() for node in model.inputs]
        self.outputs = {node.get_any_name(): node.get_partial_shape().rank.get_length() for node in model.outputs}
        facts = model.get_rt_info([MODEL_INFO]).value if model.has_rt_info([MODEL_INFO]) else {}
        self.metadata = {key: str(value) for key, value in facts.items()}
        constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
        self.int8 = any(op.get_element_type().to_string() in BYTES and len(op.shape) > 1 for op in constants)

    def run(self, inputs: Mapping[str, np.ndarray], output: str) -> np.ndarray:
        """Return one output, float32.

        Args:
            inputs: int64 arrays by name.
            output: name of the output.
        """
        return np.asarray(self._compiled(dict(inputs))[self._compiled.output(output)])
