"""The mask alone; attributes are not looked at."""

from configs import base, variants


def get_config(variant: str = ''):
  """`masks.py`, `masks.py:tiny`, `masks.py:packaged` or `masks.py:faces64`."""
  config = variants.apply(base.get_config(), variant)
  config.denoiser.attributes = 'none'
  config.stages = tuple(stage for stage in config.stages if stage != 'classifier')
  return config
