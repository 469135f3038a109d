"""Weights, images and features for the tests of Inception-v3.

The published weights (91 MiB) are not downloaded. Weights are drawn instead, each tensor from its own
name, so that torch-fidelity's network can be given the very same ones. fixtures/inception.npz holds what
that network makes of the images below. To make it again, run with torch-fidelity 0.4 and PyTorch:

  extractor = FeatureExtractorInceptionV3('inception-v3-compat', ['2048'])
  shapes = {name: t.shape for name, t in extractor.state_dict().items() if 'num_batches' not in name}
  state = {name: torch.from_numpy(t) for name, t in random_weights(shapes).items()}
  extractor.load_state_dict(state, strict=False)
  features = {
    f'{height}x{width}': extractor(
      torch.from_numpy(random_images(count, height, width)).permute(0, 3, 1, 2)
    )[0].numpy()
    for count, height, width in SIZES
  }
  numpy.savez('inception.npz', **features)
"""

import pathlib
import zlib

import numpy as np
import safetensors.numpy

from p2ldm.interop.inception_weights import inception_shapes

FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'inception.npz'
SIZES = ((3, 64, 64), (2, 130, 97))  # count, height, width


def random_weights(shapes: dict) -> dict[str, np.ndarray]:
  """Weights that neither fade nor grow over the depth of the network; RandomState never changes."""
  weights = {}
  for name, shape in shapes.items():
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith(('running_var', 'bn.weight')):
      value = random.uniform(0.5, 1.5, shape)
    elif len(shape) > 1:
      value = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    else:
      value = random.standard_normal(shape) * 0.2
    weights[name] = value.astype(np.float32)
  return weights


def random_images(count: int, height: int, width: int) -> np.ndarray:
  """Coloured blocks under noise, (count, height, width, 3) uint8."""
  random = np.random.RandomState(height * 1000 + width)
  coarse = random.randint(0, 256, (count, 8, 8, 3))
  rows, columns = np.arange(height) * 8 // height, np.arange(width) * 8 // width
  noise = random.randint(-40, 41, (count, height, width, 3))
  return np.clip(coarse[:, rows][:, :, columns] + noise, 0, 255).astype(np.uint8)


def write_weights(path: pathlib.Path) -> pathlib.Path:
  safetensors.numpy.save_file(random_weights(inception_shapes()), path)
  return path
