"""Translate a backbone into an ONNX file, from uint8 images to tokens, and run the file in onnxruntime."""

import contextlib
import importlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import Refusal
from common.models import Backbone, Features
from common.models.plan import TokenPlan
from evaluate.exporting.timm_files import scores

OPSET = 18
ONNX = ("onnx", "onnxscript", "onnxruntime")


def need_onnx() -> None:
    """Raises Refusal unless the packages that ONNX needs are installed: poslabel does not depend on them."""
    missing = []
    for name in ONNX:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise Refusal(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


class Pixels(nn.Module):
    """Network from uint8 images to tokens, prefix and logits, in the position mode of the training."""

    def __init__(
        self, backbone: Backbone, plan: TokenPlan, pooling: str | None, head: dict[str, Tensor] | None
    ) -> None:
        super().__init__()
        self.backbone, self.plan, self.pooling, self.head = backbone, plan, pooling, head

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Convert (B, C, H, W) uint8 to (B, N, D), (B, P, D) if there is a prefix, and (B, K) if there is a head."""
        backbone = self.backbone
        features = backbone((images.float() / 255 - backbone.mean) / backbone.std, self.plan)
        prefix = (features.prefix,) if features.prefix.shape[1] else ()
        logits = (scores(backbone, features, str(self.pooling), self.head),) if self.head is not None else ()
        return (features.tokens, *prefix, *logits)


def write_onnx(network: Pixels, images: Tensor, file: Path) -> None:
    """Write `file`: input `images` uint8 (batch, C, H, W), outputs `tokens`, `prefix` and `logits`; any batch size.

    Raises Refusal if torch cannot translate this architecture.
    """
    backbone = network.backbone
    example = images.repeat(2, 1, 1, 1)[:2]  # of one image alone the batch size would be a constant
    explicit = [module for module in backbone.modules() if getattr(module, "fused_attn", None) is True]
    for module in explicit:  # autograd functions of ours cannot be translated
        module.fused_attn = False  # type: ignore[assignment]
    names = ["tokens", *(["prefix"] if backbone.num_prefix_tokens else []), *(["logits"] if network.head else [])]
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network.eval(), (example,), file, input_names=["images"], output_names=names,
                opset_version=OPSET, dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, dynamo=True,
                external_data=False,
            )  # fmt: skip
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise Refusal(
            f"--to onnx: torch {torch.__version__} cannot translate {backbone.config.name}: {reason}"
        ) from error
    finally:
        for module in explicit:
            module.fused_attn = True  # type: ignore[assignment]


def run_onnx(file: Path, images: Tensor, like: Features, with_logits: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run `file` in onnxruntime: (tokens, prefix, logits or None). Raises Refusal if its batch size is fixed."""
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    if isinstance(session.get_inputs()[0].shape[0], int):
        raise Refusal(f"--to onnx: torch {torch.__version__} made a constant of the batch size; use another torch")
    values = session.run(None, {"images": images.numpy()})
    outputs = {out.name: torch.from_numpy(value) for out, value in zip(session.get_outputs(), values, strict=True)}
    return outputs["tokens"], outputs.get("prefix", like.prefix[:, :0]), outputs["logits"] if with_logits else None


@contextlib.contextmanager
def quiet() -> Any:
    """Silence the progress and notes of torch's exporter."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
