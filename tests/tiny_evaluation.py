"""What the tests of evaluation share: 16 px faces with tiny_model's schema, and small instruments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny_model
from PIL import Image

from p2ldm import sharding
from p2ldm.evaluation.evaluators import make_evaluator
from p2ldm.evaluation.features import FeatureSpace
from p2ldm.evaluation.protocol import Protocol
from p2ldm.interop.evaluator_directory import EvaluatorParts

SIZE = 16
NUM_FACES, NUM_VALIDATION = 50, 5  # the last tenth is held out
WITHOUT_MASK = (3, 46)  # the latter is the second of the validation split
PROTOCOL = Protocol(
  num_samples=11,
  samples_per_condition=2,
  split='validation',
  with_mask_only=False,
  reference_split='train',
  num_reference=0,
  seed=0,
  sampler='ddim',
  steps=2,
  eta=0.0,
  attributes_scale=1.0,
  mask_scale=1.0,
  batch_size=4,
  frechet=True,
  kernel=True,
  kernel_subset_size=8,
  kernel_num_subsets=3,
  neighbours=2,
  force=True,
  metrics={},
)


def protocol(**changes) -> Protocol:
  """PROTOCOL with other values of some fields."""
  return dataclasses.replace(PROTOCOL, **changes)


def write_folder(path):
  """A plain folder of faces: smooth noise, a mask of three classes, three attributes."""
  rng = np.random.default_rng(0)
  for name in ('images', 'masks'):
    (path / name).mkdir(parents=True)
  tiny_model.SCHEMA.save(path / 'schema.json')
  lines = ['file,' + ','.join(tiny_model.SCHEMA.attributes)]
  for i in range(NUM_FACES):
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    small.resize((SIZE, SIZE)).save(path / 'images' / f'{i:02}.png')
    if i not in WITHOUT_MASK:
      mask = np.kron(rng.integers(0, 3, (4, 4)), np.ones((4, 4))).astype(np.uint8)
      Image.fromarray(mask).save(path / 'masks' / f'{i:02}.png')
    lines.append(f'{i:02}.png,' + ','.join(map(str, rng.choice([-1, 0, 1], 3, p=[0.4, 0.1, 0.5]))))
  (path / 'attributes.csv').write_text('\n'.join(lines) + '\n')


def evaluator(kind: str, seed: int = 0, schema=tiny_model.SCHEMA, image_size: int = SIZE):
  """A 'parser' or a 'classifier' with random parameters."""
  return make_evaluator(evaluator_parts(kind, seed, schema, image_size))


def evaluator_parts(
  kind: str, seed: int = 0, schema=tiny_model.SCHEMA, image_size: int = SIZE
) -> EvaluatorParts:
  """What `evaluator` is made of."""
  outputs = {
    'parser': {'num_classes': schema.num_classes},
    'classifier': {'num_attributes': schema.num_attributes},
  }
  fields = {'patch': 2, 'channels': 8, 'channel_multipliers': [1, 2], 'num_res_blocks': 1}
  ceiling = {'pixel_accuracy': 0.5, 'accuracy': 0.8, 'miou_present': None}
  parts = EvaluatorParts(kind, image_size, fields | outputs[kind], schema, ceiling, {}, None, 'abc')
  image = np.zeros((1, image_size, image_size, 3), np.float32)
  shapes = jax.eval_shape(parts.make_module().init, jax.random.key(0), image)['params']
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
  return dataclasses.replace(parts, params=params)


def pool(images: np.ndarray) -> np.ndarray:
  """The features of `thumbnails`, (B, 12): means of four quarters."""
  return np.asarray(images, np.float64).reshape(-1, 2, 8, 2, 8, 3).mean((2, 4)).reshape(-1, 12)


def thumbnails(mesh=None) -> FeatureSpace:
  """A feature space that costs nothing."""

  def compute(weights, images):
    small = images.astype(jnp.float32).reshape(-1, 2, 8, 2, 8, 3)
    return small.mean((2, 4)).reshape(-1, 12)

  return FeatureSpace(
    name='thumbnails',
    title='Thumbnails',
    frechet='FD-T',
    kernel='KD-T',
    dim=12,
    protocol='means of four quarters',
    weights_sha256='123',
    mesh=mesh or sharding.make_mesh(devices=jax.devices()[:1]),
    weights=(),
    compute=jax.jit(compute),
  )
