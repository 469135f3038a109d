"""The stage 'latents' on prepared faces: built, found complete, repaired by itself, refused."""

import functools
import shutil
import types

import flax.linen as nn
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from p2ldm import processes, sharding
from p2ldm.data.latent_chunks import DamagedCache
from p2ldm.data.prepared import open_dataset, ordered_batches
from p2ldm.errors import UserError
from p2ldm.training.latent_stage import Encoder, run_latents


class Pool(nn.Module):
  """In place of an autoencoder: means of 4 x 4 pixels, times a parameter."""

  @nn.compact
  def encode(self, image):
    scale = self.param('scale', lambda key: np.ones(3, np.float32))
    return nn.avg_pool(image, (4, 4), (4, 4)) * scale


def trained(scale=1.0):
  parameters = {'scale': np.full(3, scale, np.float32)}
  return types.SimpleNamespace(autoencoder=parameters, make_autoencoder=lambda dtype: Pool())


def make_config(faces, **latents) -> ConfigDict:
  config = base.get_config()
  config.data.dir = str(faces)
  config.latents.update({'batch_size': 3, 'chunk_size': 4} | latents)
  config.stages = ('latents',)
  return config


def run(config, workdir, scale=1.0):
  open_data = functools.partial(open_dataset, config.data.dir)
  return run_latents(config, workdir, trained(scale), open_data)


def refuse_to_open():
  raise AssertionError('the data set was opened')


def spoil(path):
  content = bytearray(path.read_bytes())
  content[-5] ^= 1
  path.write_bytes(content)


def test_encoding_on_several_devices_pads_what_does_not_divide():
  mesh = sharding.make_mesh(devices=jax.devices()[:4])
  images = np.random.default_rng(0).uniform(-1, 1, (6, 8, 8, 3)).astype(np.float32)
  encode = Encoder(trained(2.0), 6, None, mesh)
  expected = 2 * images.reshape(6, 2, 4, 2, 4, 3).mean((2, 4))
  np.testing.assert_allclose(encode(images), expected, atol=1e-6)
  np.testing.assert_allclose(encode(images[:1]), expected[:1], atol=1e-6)


def test_built_once_then_found_complete_without_the_data_set(prepared_faces, tmp_path, capsys):
  config = make_config(prepared_faces)
  cache = run(config, tmp_path)
  faces = next(ordered_batches(open_dataset(prepared_faces), 'train', 11))
  train = cache.splits['train']
  raw = cache.statistics.unwhiten(train.batch(np.arange(11))['latent'])
  np.testing.assert_allclose(raw, faces['image'].reshape(11, 8, 4, 8, 4, 3).mean((2, 4)), atol=1e-5)
  assert train.names(np.arange(11)) == faces['name'].tolist()
  assert cache.meta['num_chunks'] == {'train': 3, 'validation': 1}
  config.stages = ('diffusion',)
  run_latents(config, tmp_path, trained(), refuse_to_open)
  assert 'latents: complete in' in capsys.readouterr().out


def test_a_damaged_chunk_is_made_again_by_itself(prepared_faces, tmp_path, capsys):
  config = make_config(prepared_faces)
  run(config, tmp_path)
  folder = tmp_path / 'latents' / 'train'
  before = (folder / '00001' / 'masks.npy').read_bytes()
  kept = (folder / '00000' / 'chunk.json').stat().st_ino
  spoil(folder / '00001' / 'masks.npy')
  config.stages = ('diffusion',)
  with pytest.raises(DamagedCache, match=r'00001/masks\.npy .*config\.stages'):
    run(config, tmp_path)
  config.stages = ('latents', 'diffusion')
  capsys.readouterr()
  run(config, tmp_path)
  printed = capsys.readouterr().out
  assert 'made again: train/00001/masks.npy' in printed and '2 of 3 chunks' in printed
  assert (folder / '00001' / 'masks.npy').read_bytes() == before
  assert (folder / '00000' / 'chunk.json').stat().st_ino == kept


def test_other_latents_are_refused_even_if_they_are_damaged(prepared_faces, tmp_path):
  config = make_config(prepared_faces)
  run(config, tmp_path)
  spoil(tmp_path / 'latents' / 'train' / '00001' / 'masks.npy')
  with pytest.raises(UserError, match='another autoencoder'):
    run(config, tmp_path, scale=2.0)


def test_latents_that_are_missing_and_not_asked_for(prepared_faces, tmp_path):
  config = make_config(prepared_faces)
  config.stages = ('diffusion',)
  with pytest.raises(UserError, match='leaves the latents out'):
    run(config, tmp_path)


def test_process_0_decides_whether_there_is_something_to_build(
  prepared_faces, tmp_path, monkeypatch
):
  """Where one alone sees damage, the others would wait for ever for it to build with them."""
  config = make_config(prepared_faces)
  run(config, tmp_path)
  spoil(tmp_path / 'latents' / 'train' / '00001' / 'masks.npy')
  monkeypatch.setattr(processes, 'from_main', lambda value: True)
  with pytest.raises(DamagedCache):
    run(config, tmp_path)


def test_corrupt_records_are_left_out_and_listed_up_to_the_share(prepared_faces, tmp_path):
  shutil.copytree(prepared_faces, tmp_path / 'faces')
  file = next((tmp_path / 'faces').glob('*train*'))
  content = bytearray(file.read_bytes())
  content[3_000:9_000] = bytes(6_000)
  file.write_bytes(content)
  config = make_config(tmp_path / 'faces')
  with pytest.raises(UserError, match='max_corrupt_share'):
    run(config, tmp_path)
  config.data.max_corrupt_share = 0.5
  cache = run(config, tmp_path)
  corrupt = cache.meta['corrupt']['train']
  assert 0 < len(corrupt) < 6 and {'index', 'name', 'reason'} == set(corrupt[0])
  assert len(cache.splits['train']) == cache.meta['splits']['train'] == 11 - len(corrupt)
  left_out = {row['index'] for row in corrupt}
  names = cache.splits['train'].names(np.arange(11 - len(corrupt)))
  assert names == [str(i) for i in range(11) if i not in left_out]
  config.data.max_corrupt_share = 0.0  # a cache that is there is held to the share as well
  with pytest.raises(UserError, match='max_corrupt_share'):
    run(config, tmp_path)
