"""The stock modules of a model as one graph: token ids and mask in, final vectors out, any number of rows, any length.

The exporter is torch's newer one (torch.export). The older one, which traces, gave wrong vectors for every architecture
that was tried, without a word (docs/why.md).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedtune.encoder.exported import GRAPH, INPUTS, IR
from embedtune.encoder.load import first_line
from embedtune.errors import UserError

OUTPUT = "sentence_embedding"
OPSET = 20  # the first with Gelu as one operator; onnxruntime reads it since 1.17
INLINE = 1 << 30  # bytes of weights that go into the graph's own file; more go beside it, as protobuf ends at 2 GiB
QUANTISED = ["MatMul", "Gemm", "Gather"]


class Pipeline(torch.nn.Module):
    """The modules of a SentenceTransformer one after the other, then its cut to fewer dimensions."""

    def __init__(self, model: Any, dims: int | None) -> None:
        super().__init__()
        self.stages = torch.nn.ModuleList(model)
        self.cut = dims or model.truncate_dim
        self.again = dims is not None and ends_normalised(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Ids and mask (B, L) int64 in, vectors (B, D) out; token types, where a model has them, are its own zeros."""
        features: dict[str, Tensor] = {"input_ids": input_ids, "attention_mask": attention_mask}
        for stage in self.stages:
            features = stage(features)
        vectors = features[OUTPUT][:, : self.cut]
        return torch.nn.functional.normalize(vectors, dim=-1) if self.again else vectors


def ends_normalised(model: Any) -> bool:
    """Whether the vectors of a SentenceTransformer have length one."""
    from sentence_transformers.sentence_transformer.modules import Normalize

    return isinstance(model[-1], Normalize)


def write_onnx(pipeline: Pipeline, folder: Path) -> None:
    """Write model.onnx, and model.onnx.data beside it where the weights are many. Raises UserError where it fails."""
    ids = torch.arange(5, 23).reshape(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    free = {0: torch.export.Dim("rows"), 1: torch.export.Dim("length")}
    size = sum(p.numel() * p.element_size() for p in pipeline.parameters())
    with _quiet(), _as_user_error("ONNX"), torch.no_grad():
        torch.onnx.export(
            pipeline, (ids, mask), folder / GRAPH, input_names=list(INPUTS), output_names=[OUTPUT],
            dynamic_shapes=dict.fromkeys(INPUTS, free), opset_version=OPSET, dynamo=True,
            external_data=size > INLINE, verbose=False,
        )  # fmt: skip


def quantise(folder: Path) -> None:
    """Turn model.onnx into int8 in place: weights by channel, activations as they come, each product on its own.

    Static ranges from calibration texts were worse and slower (docs/why.md).
    """
    with _quiet(), _as_user_error("int8"):
        from onnxruntime.quantization import QuantType, quantize_dynamic

        whole = folder / f"fp32-{GRAPH}"
        (folder / GRAPH).rename(whole)
        quantize_dynamic(
            whole, folder / GRAPH, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=QUANTISED
        )
    for left in (whole, folder / f"{GRAPH}.data"):
        left.unlink(missing_ok=True)


def write_openvino(folder: Path) -> None:
    """Turn model.onnx into OpenVINO's model.xml and model.bin, weights in float32."""
    with _quiet(), _as_user_error("OpenVINO"):
        import openvino

        openvino.save_model(openvino.convert_model(folder / GRAPH), folder / IR, compress_to_fp16=False)
    for left in (folder / GRAPH, folder / f"{GRAPH}.data"):
        left.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' own notices off; what they raise comes through."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - exporters raise many kinds; to the user all mean the same
        message = f"cannot be exported to {what} ({type(error).__name__}: {first_line(error)})"
        raise UserError(message, fix="another --to, or another model") from error
