"""Convert a graph to OpenVINO's own format, with float32 weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line


def require_openvino() -> None:
    """Check that the package for OpenVINO is installed.

    Raises:
        JasperError: it is missing.
    """
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise JasperError(
            f"--openvino: the package {error.name} is missing. Fix: `pip install openvino` (or the extra `openvino`)"
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
        model.set_rt_info(value, ["model_info", name])
    openvino.save_model(model, str(path), compress_to_fp16=False)
