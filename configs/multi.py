"""Attributes and mask together, both through cross-attention: the paper's model."""

from configs import base, variants


def get_config(variant: str = ''):
  """`multi.py`, `multi.py:tiny`, `multi.py:packaged` or `multi.py:faces64`."""
  return variants.apply(base.get_config(), variant)
