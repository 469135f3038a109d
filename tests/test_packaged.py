"""The model that comes with the package: small, described, and drawing what it is asked for."""

import json
import pathlib
import struct

import numpy as np
import pytest

import p2ldm
from p2ldm import sample
from p2ldm.data.face_traits import sample_traits
from p2ldm.data.labels import CELEBAMASK_HQ
from p2ldm.data.synthetic import render_traits
from p2ldm.interop.packaged import model_path
from p2ldm.provenance import redrawing

MODEL = pathlib.Path(p2ldm.__file__).parent / 'assets' / 'embedded_faces'
FACES = 4


def test_it_is_there_and_small():
  assert model_path() == MODEL
  weights = [MODEL / f'{part}.safetensors' for part in ('autoencoder', 'denoiser')]
  assert sum(path.stat().st_size for path in weights) <= 12e6
  for path in weights:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack('<Q', data[:8])[0]])
    kinds = {entry['dtype'] for name, entry in header.items() if name != '__metadata__'}
    assert kinds == {'F16'}


def test_its_files_are_installed_with_the_package():
  import configparser

  root = MODEL.parents[2]
  config = configparser.ConfigParser()
  config.read(root / 'setup.cfg')
  patterns = config['options.package_data']['p2ldm'].split()
  installed = {path for pattern in patterns for path in (root / 'p2ldm').glob(pattern)}
  assert {*MODEL.iterdir()} <= installed


def test_its_card_says_how_it_was_trained_and_how_good_it_is():
  card = (MODEL / 'README.md').read_text()
  assert '`python -m p2ldm.main --config=configs/multi.py:packaged`' in card
  assert 'Synthetic faces that the project draws itself' in card
  for line in ('## Intended use', 'Autoencoder, PSNR', 'Mask, mIoU', 'Attributes, accuracy'):
    assert line in card


@pytest.fixture(scope='module')
def faces():
  """(2, FACES, 64, 64, 3) float32 in [0, 255]: with blond hair, then with black hair, and where it is."""
  mask = next(
    mask
    for index in range(100)
    for traits in [sample_traits(1, index)]
    if traits.hat == 'none'
    for mask in [render_traits(traits, 64)[1]]
    if (mask == CELEBAMASK_HQ.classes.index('hair')).mean() > 0.15
  )
  names = CELEBAMASK_HQ.attributes
  attributes = np.zeros((2, FACES, len(names)), np.int8)
  attributes[0, :, names.index('Blond_Hair')] = attributes[1, :, names.index('Black_Hair')] = 1
  pipeline = p2ldm.Pipeline.from_pretrained()
  drawn = pipeline(
    attributes.reshape(2 * FACES, -1), np.repeat(mask[None], 2 * FACES, 0), 2 * FACES, steps=20
  )
  pixels = np.stack([np.asarray(face, np.float32) for face in drawn])
  return pixels.reshape(2, FACES, 64, 64, 3), mask


def test_it_follows_attributes_where_the_mask_says(faces):
  pixels, mask = faces
  hair, skin = (mask == CELEBAMASK_HQ.classes.index(name) for name in ('hair', 'skin'))
  blond, black = pixels[..., hair, :].mean((-1, -2))
  assert (blond.min() - black.max()) > 40
  differences = np.abs(pixels[0] - pixels[1]).mean((0, -1))
  assert differences[hair].mean() > 2 * differences[skin].mean()


def test_the_command_draws_with_it_and_verifies(tmp_path):
  sample.draw(None, tmp_path / 'faces', 'Smiling,Eyeglasses', num_images=1, steps=2)
  drawn = tmp_path / 'faces' / '000.png'
  good, text = redrawing.verify(drawn, lambda dtype: p2ldm.Pipeline.from_pretrained(None, dtype))
  assert good and 'bit for bit' in text and 'embedded_faces' in text
