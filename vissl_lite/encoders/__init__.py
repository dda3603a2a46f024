"""Encoders: timm backbones with their normalization, their folders, and small-image backbones."""
