"""Draws faces with an exported sampler; needs jax alone.

python load.py faces.npy Smiling=1 Eyeglasses=-1      four faces, (4, S, S, 3) uint8
"""

import json
import pathlib
import sys

import jax
import jax.export
import numpy as np


def load(folder):
  """Returns draw(attributes={}, mask=None, num_images=4, seed=0, first_image=0, scales=(3.0, 1.5))."""
  folder = pathlib.Path(folder)
  sys.path.append(str(folder.absolute()))  # for flatbuffers, with which jax reads programs
  config = json.loads((folder / 'config.json').read_text())
  program = jax.export.deserialize(bytearray((folder / 'sampler.stablehlo').read_bytes()))
  path, names = folder / 'weights.npz', config['schema']['attributes']
  weights = jax.device_put(dict(np.load(path)) if path.exists() else {})
  call, size = jax.jit(program.call), config['image_size']

  def draw(attributes=(), mask=None, num_images=4, seed=0, first_image=0, scales=(3.0, 1.5)):
    rows = np.zeros((num_images, len(names)), np.int8)
    for name, value in dict(attributes).items():
      rows[:, names.index(name)] = value
    mask = np.full((size, size), 255) if mask is None else np.asarray(mask)
    mask = np.broadcast_to(mask, (num_images, size, size)).astype(np.uint8)
    numbers = np.uint32(seed), np.int32(first_image), rows, mask, np.array(scales, np.float32)
    return np.asarray(call(weights, *numbers))

  return draw


if __name__ == '__main__':
  chosen = {name: int(value) for name, _, value in (a.partition('=') for a in sys.argv[2:])}
  np.save(sys.argv[1], load(pathlib.Path(__file__).parent)(chosen))
