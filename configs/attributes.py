"""Attributes alone; the mask is not looked at."""

from configs import base, variants


def get_config(variant: str = ''):
  """`attributes.py`, `attributes.py:tiny`, `attributes.py:packaged` or `attributes.py:faces64`."""
  config = variants.apply(base.get_config(), variant)
  config.denoiser.mask = 'none'
  config.stages = tuple(stage for stage in config.stages if stage != 'parser')
  return config
