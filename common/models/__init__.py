"""Backbones: anything timm can create, behind one adapter."""

from .backbone import Backbone, Features, ModelConfig, create

__all__ = ["Backbone", "Features", "ModelConfig", "create"]
