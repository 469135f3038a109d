"""Weights in CompVis' layout: what the reference code computes with them, and what ours does."""

import os

import compvis_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from p2ldm.errors import UserError
from p2ldm.interop import compvis, tensor_layout, weights
from p2ldm.models.autoencoder import Autoencoder
from p2ldm.models.unet import UNet

paper_size = pytest.mark.skipif(
  not os.environ.get('P2LDM_PAPER_SIZE'), reason='415 M parameters; set P2LDM_PAPER_SIZE=1'
)


def nested(params):
  return traverse_util.unflatten_dict(params, sep='.')


def same(ours, theirs):
  """Ours is (B, h, w, C), theirs (B, C, h, w): within 1e-4 of the standard deviation."""
  error = np.abs(np.asarray(ours).transpose(0, 3, 1, 2) - theirs).max() / theirs.std()
  assert error < 1e-4, error


def converted(entries, shapes, tensors):
  params, problems = tensor_layout.convert(tensors, entries, shapes)
  assert not any(problems), problems
  assert {name for entry in entries for name in entry.theirs} == tensors.keys()
  for entry in entries:  # and back
    for name, value in zip(
      entry.theirs, tensor_layout.to_theirs(entry, params[entry.ours]), strict=True
    ):
      np.testing.assert_array_equal(value, tensors[name])
  return nested(params)


@pytest.mark.parametrize('name', reference.AUTOENCODERS)
def test_an_autoencoder_computes_what_the_reference_does(name):
  shapes, outputs = reference.read(name)
  fields = compvis.autoencoder_fields(shapes, name)
  ours = weights.autoencoder_shapes(fields, name)
  params = converted(compvis.autoencoder_entries(ours), ours, reference.random_weights(shapes))
  model = weights.make_module(Autoencoder, fields)
  resolution = reference.AUTOENCODERS[name]['ddconfig']['resolution']
  image = jnp.asarray(reference.image(resolution).transpose(0, 2, 3, 1))

  @jax.jit
  def run(params):
    latent = model.apply({'params': params}, image, method='encode')
    return latent, model.apply({'params': params}, latent, method='decode')

  latent, decoded = run(params)
  same(latent, outputs['latent'])
  same(decoded, outputs['image'])


@pytest.mark.parametrize(
  'name',
  [n if 'paper' not in n else pytest.param(n, marks=paper_size) for n in reference.UNETS],
)
def test_a_unet_computes_what_the_reference_does(name):
  shapes, outputs = reference.read(name)
  fields = reference.UNETS[name]
  found = compvis.unet_fields(shapes, name)
  assert found.pop('context_width') == fields.get('context_dim', 0)
  assert (found.pop('in_channels'), found['out_channels']) == (3, 3)
  heads = {'head_channels': 32, 'num_heads': fields['num_heads']} if 'num_heads' in fields else {}
  heads = heads or {'head_channels': fields['num_head_channels']}
  model = weights.make_module(UNet, found | heads)
  latents, timesteps, context = reference.unet_inputs(fields)
  inputs = latents.transpose(0, 2, 3, 1), timesteps, context

  def run(module, latents, timesteps, context):
    projected = None if context is None else module.project_context(context)
    return module(latents, timesteps, projected)

  shaped = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, method=run))['params']
  ours = {k: v.shape for k, v in traverse_util.flatten_dict(shaped, sep='.').items()}
  params = converted(compvis.unet_entries(ours), ours, reference.random_weights(shapes))
  same(
    jax.jit(lambda p: model.apply({'params': p}, *inputs, method=run))(params),
    outputs['prediction'],
  )


def test_paper_sizes_are_recognised():
  shapes, _ = reference.read('vq_f4')
  assert sum(np.prod(s) for n, s in shapes.items() if n.startswith(('enc', 'dec'))) == 55_298_182
  shapes, _ = reference.read('unet_paper')
  assert sum(np.prod(shape) for shape in shapes.values()) == 274_056_163
  fields = compvis.unet_fields(shapes, 'paper')
  assert fields['channel_multipliers'] == [1, 2, 3, 4]
  assert fields['attention_factors'] == [2, 4, 8]


def test_the_moving_average_has_names_without_dots():
  entries = compvis.unet_entries(['input_blocks_4.layers_1.blocks_0.attn1.to_out.kernel'], ema=True)
  assert entries[0].theirs == ('input_blocks41transformer_blocks0attn1to_out0weight',)


@pytest.mark.parametrize('read', [compvis.autoencoder_fields, compvis.unet_fields])
def test_other_tensors_are_refused(read):
  with pytest.raises(UserError, match=r'my\.ckpt holds no .* is missing'):
    read({'conv1.weight': (64, 3, 7, 7)}, 'my.ckpt')
