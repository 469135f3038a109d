"""The autoencoder alone; other runs take it with --config.autoencoder.pretrained=WORKDIR."""

from configs import base, variants


def get_config(variant: str = ''):
  """`autoencoder.py`, `autoencoder.py:tiny`, `autoencoder.py:packaged` or `autoencoder.py:faces64`."""
  config = variants.apply(base.get_config(), variant)
  config.stages = ('autoencoder',)
  return config
