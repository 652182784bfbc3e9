"""Backbones: anything timm can create, behind one adapter. Importing this registers iRPE's, LV-ViT's and SP-ViT's
models with timm."""

from .backbone import Backbone, Features, ModelConfig
from .create import create

__all__ = ["Backbone", "Features", "ModelConfig", "create"]
