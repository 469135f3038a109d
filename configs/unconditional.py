"""No condition at all: the U-Net of CompVis' celebahq-ldm-vq-4, with plain self-attention."""

from configs import base, variants


def get_config(variant: str = ''):
  """`unconditional.py`, or with `:tiny`, `:packaged` or `:faces64` behind it."""
  config = variants.apply(base.get_config(), variant)
  config.denoiser.attributes = 'none'
  config.denoiser.mask = 'none'
  config.stages = ('autoencoder', 'latents', 'diffusion')
  return config
