"""Networks of CompVis/latent-diffusion: names, shapes, weights and what the reference code computes.

fixtures/compvis.npz holds, for each network below, the names and shapes of its tensors and its outputs for
the inputs below. Weights are not stored: each tensor is drawn from its own name, here and there alike. To
make the fixture again, in an environment with PyTorch, einops and NumPy, with checkouts of
CompVis/latent-diffusion (commit a506df5) and CompVis/taming-transformers (commit 3ba01b2):

  PYTHONPATH=LATENT_DIFFUSION:TAMING_TRANSFORMERS python tests/compvis_reference.py
"""

import json
import pathlib
import zlib

import numpy as np

FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'compvis.npz'


def _first_stage(ch, ch_mult, z_channels, resolution, n_embed=0, **more):
  shape = {'ch': ch, 'ch_mult': ch_mult, 'z_channels': z_channels, 'resolution': resolution}
  shape |= {'num_res_blocks': 2, 'attn_resolutions': [], 'in_channels': 3, 'out_ch': 3}
  return {'ddconfig': shape | {'double_z': not n_embed} | more, 'n_embed': n_embed}


AUTOENCODERS = {
  'vq_f4': _first_stage(128, (1, 2, 4), 3, 64, 8192),
  'vq_small': _first_stage(32, (1, 2), 3, 32, 64),
  'vq_attention_small': _first_stage(32, (1, 1, 2), 4, 32, 64, attn_resolutions=[8]),
  'vq_noattn_small': _first_stage(32, (1, 2), 3, 32, 64, attn_type='none'),
  'kl_small': _first_stage(32, (1, 2, 2), 4, 32),
}
_CELEBA = {
  'in_channels': 3,
  'out_channels': 3,
  'model_channels': 224,
  'attention_resolutions': (8, 4, 2),
  'num_res_blocks': 2,
  'channel_mult': (1, 2, 3, 4),
  'num_head_channels': 32,
}
_SMALL = {**_CELEBA, 'model_channels': 32, 'channel_mult': (1, 2), 'attention_resolutions': (2,)}
_SMALL |= {'num_head_channels': 16}
_CONTEXT = {'use_spatial_transformer': True, 'transformer_depth': 1}
UNETS = {
  'unet_small': _SMALL,
  'unet_context_small': {**_SMALL, **_CONTEXT, 'context_dim': 24},
  'unet_num_heads_small': {
    **_SMALL,
    **_CONTEXT,
    'context_dim': 24,
    'num_head_channels': -1,
    'num_heads': 4,
    'num_res_blocks': 1,
  },
  'unet_paper': _CELEBA,
  'unet_context_paper': {**_CELEBA, **_CONTEXT, 'context_dim': 512},
}


def random_weights(shapes: dict) -> dict[str, np.ndarray]:
  """Weights that neither fade nor grow over the depth of the network; RandomState never changes."""
  weights = {}
  for name, shape in shapes.items():
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name == 'quantize.embedding.weight':
      value = random.uniform(-1, 1, shape)
    elif len(shape) > 1:
      value = random.standard_normal(shape) * np.prod(shape[1:]) ** -0.5
    else:
      value = random.standard_normal(shape) * 0.1 + ('norm' in name and name.endswith('weight'))
    weights[name] = value.astype(np.float32)
  return weights


def image(resolution: int) -> np.ndarray:
  """(1, 3, resolution, resolution) float32 in [-1, 1]."""
  return np.random.RandomState(0).uniform(-1, 1, (1, 3, resolution, resolution)).astype(np.float32)


def unet_inputs(fields: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """Latents (2, C, 16, 16), timesteps (2,) and, where the U-Net takes one, a context (2, 7, D)."""
  random = np.random.RandomState(1)
  latents = random.standard_normal((2, fields['in_channels'], 16, 16)).astype(np.float32)
  width = fields.get('context_dim')
  context = random.standard_normal((2, 7, width)).astype(np.float32) if width else None
  return latents, np.array([3, 901]), context


def read(name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
  """{tensor name: shape} of a network, and its outputs."""
  with np.load(FIXTURE, allow_pickle=False) as fixture:
    shapes = json.loads(str(fixture[f'{name}/shapes']))
    prefix = f'{name}/outputs/'
    outputs = {k.removeprefix(prefix): fixture[k] for k in fixture.files if k.startswith(prefix)}
  return {key: tuple(shape) for key, shape in shapes.items()}, outputs


def _load(modules, torch) -> dict[str, tuple[int, ...]]:
  shapes = {name: tuple(value.shape) for name, value in modules.state_dict().items()}
  weights = {name: torch.from_numpy(value) for name, value in random_weights(shapes).items()}
  modules.load_state_dict(weights)
  modules.eval()
  return shapes


def _run_autoencoder(fields: dict):
  import torch
  from ldm.modules.diffusionmodules.model import Decoder, Encoder
  from taming.modules.vqvae.quantize import VectorQuantizer2

  shape, z = fields['ddconfig'], fields['ddconfig']['z_channels']
  parts = {'encoder': Encoder(**shape), 'decoder': Decoder(**shape)}
  encoded = 2 * z if shape['double_z'] else z
  parts |= {
    'quant_conv': torch.nn.Conv2d(encoded, encoded, 1),
    'post_quant_conv': torch.nn.Conv2d(z, z, 1),
  }
  if fields['n_embed']:
    parts['quantize'] = VectorQuantizer2(fields['n_embed'], z, beta=0.25)
  model = torch.nn.ModuleDict(parts)
  shapes = _load(model, torch)
  latent = model['quant_conv'](model['encoder'](torch.from_numpy(image(shape['resolution']))))
  latent = latent[:, :z]  # of a KL posterior, the mean
  codes = model['quantize'](latent)[0] if fields['n_embed'] else latent
  decoded = model['decoder'](model['post_quant_conv'](codes))
  return shapes, {'latent': latent.numpy(), 'image': decoded.numpy()}


def _run_unet(fields: dict):
  import torch
  from ldm.modules.diffusionmodules.openaimodel import UNetModel

  model = UNetModel(image_size=16, use_checkpoint=False, **fields)
  shapes = _load(model, torch)
  latents, timesteps, context = unet_inputs(fields)
  context = None if context is None else torch.from_numpy(context)
  prediction = model(torch.from_numpy(latents), torch.from_numpy(timesteps), context=context)
  return shapes, {'prediction': prediction.numpy()}


def main():
  """Makes the fixture."""
  import torch

  content = {}
  with torch.no_grad():
    for networks, run in ((AUTOENCODERS, _run_autoencoder), (UNETS, _run_unet)):
      for name, fields in networks.items():
        shapes, outputs = run(fields)
        content[f'{name}/shapes'] = np.array(json.dumps(shapes))
        content |= {f'{name}/outputs/{key}': value for key, value in outputs.items()}
        print(name, {key: (value.shape, float(value.std())) for key, value in outputs.items()})
  np.savez_compressed(FIXTURE, **content)


if __name__ == '__main__':
  main()
