import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_model
from PIL import Image

import p2ldm
from p2ldm import conditions, cores, sharding
from p2ldm.errors import UserError
from p2ldm.interop import model_directory
from p2ldm.interop.weights import make_module
from p2ldm.models.autoencoder import Autoencoder
from p2ldm.models.denoiser import Denoiser
from p2ldm.pipeline import Pipeline

MASK = np.array([[0, 1], [2, 255]], np.uint8).repeat(8, 0).repeat(8, 1)
REQUEST = {'attributes': 'Smiling,-Eyeglasses', 'mask': MASK, 'steps': 3}
# Another batch size is another program to XLA: sums in another order.
ROUNDING = {'rtol': 0, 'atol': 2e-3}


@pytest.fixture(scope='module')
def parts():
  return tiny_model.make_parts()


@pytest.fixture(scope='module')
def directory(parts, tmp_path_factory):
  path = tmp_path_factory.mktemp('pipeline') / 'model'
  model_directory.save(path, parts)
  return path


@pytest.fixture(scope='module')
def pipeline(directory):
  return p2ldm.Pipeline.from_pretrained(directory)


@pytest.fixture(scope='module')
def network(parts):
  """The denoiser itself: (latents, timesteps, attributes, mask) -> prediction."""
  denoiser = make_module(Denoiser, parts.config['denoiser'])
  apply = jax.jit(denoiser.apply)
  return lambda *inputs: np.asarray(apply({'params': parts.denoiser}, *inputs), np.float64)


@pytest.fixture(scope='module')
def latents(pipeline):
  """Four latents under both conditions."""
  return pipeline.sample_latents(**REQUEST, num_images=4, seed=5)


def pixels(faces):
  return np.stack([np.asarray(face) for face in faces])


def test_a_reloaded_model_draws_the_same_faces_bit_for_bit(pipeline, parts):
  drawn = pipeline(**REQUEST, num_images=4, seed=5)
  again = Pipeline(parts)(**REQUEST, num_images=4, seed=5)
  assert [face.size for face in drawn] == [(16, 16)] * 4
  np.testing.assert_array_equal(pixels(drawn), pixels(again))


def test_the_seed_decides(pipeline, latents):
  again = pipeline.sample_latents(**REQUEST, num_images=4, seed=5)
  np.testing.assert_array_equal(latents, again)
  other = pipeline.sample_latents(**REQUEST, num_images=4, seed=6)
  assert np.abs(latents - other).max(axis=(1, 2, 3)).min() > 0.1
  assert np.abs(latents[0] - latents[1]).max() > 0.1


def test_an_image_depends_on_its_index_not_on_its_batch(pipeline, latents):
  others = pipeline.sample_latents(**REQUEST, num_images=3, seed=5, batch_size=2)
  np.testing.assert_allclose(others, latents[:3], **ROUNDING)


def test_rows_of_conditions_belong_to_their_images(pipeline, latents):
  """Row 2 of a mixed request is what asking for its condition alone gives."""
  attributes = np.array([[0, 1, 0], [0, 0, 1], [1, -1, 0], [0, 0, 0]], np.int8)
  masks = np.stack([np.zeros_like(MASK), MASK[::-1], MASK, np.full_like(MASK, 255)])
  mixed = pipeline.sample_latents(attributes, masks, steps=3, seed=5)
  assert mixed.shape == (4, 8, 8, 3)
  np.testing.assert_allclose(mixed[2], latents[2], **ROUNDING)
  assert np.abs(mixed - latents).max(axis=(1, 2, 3))[[0, 1, 3]].min() > 0.01


@pytest.mark.parametrize(
  'change',
  [
    {'attributes': 'Smiling,Eyeglasses'},
    {'attributes': 'Smiling,-Eyeglasses,Wearing_Hat'},
    {'mask': np.where(MASK == 1, 2, MASK)},
    {'guidance': {'attributes': 5.0}},
    {'guidance': {'mask': 0.5}},
  ],
)
def test_every_part_of_a_request_counts(pipeline, latents, change):
  changed = pipeline.sample_latents(**{**REQUEST, **change}, num_images=4, seed=5)
  assert np.abs(changed - latents).max() > 0.01


def test_one_scale_means_both(pipeline):
  one = pipeline.sample_latents(**REQUEST, num_images=4, guidance=2.5)
  both = pipeline.sample_latents(**REQUEST, num_images=4, guidance={'attributes': 2.5, 'mask': 2.5})
  np.testing.assert_array_equal(one, both)


def test_sampling_is_ddim_on_the_guided_prediction(pipeline, network):
  """DDIM (arXiv 2010.02502, eq. 12) on e00 + w_a (ea0 - e00) + w_m (eam - ea0), in NumPy."""
  scales = {'attributes': 4.0, 'mask': 0.5}
  drawn = pipeline.sample_latents('Smiling', MASK, 4, steps=3, seed=9, guidance=scales)[2]
  abar = np.cumprod(1 - np.linspace(0.01**0.5, 0.3**0.5, 20) ** 2)
  attributes = np.array([[0, 0, 0], [1, 0, 0], [1, 0, 0]], np.int8)
  mask = np.stack([np.full_like(MASK, 255), np.full_like(MASK, 255), MASK])
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(9), 2), 0)
  x = np.asarray(jax.random.normal(key, (8, 8, 3)), np.float64)
  for t, following in ((14, 7), (7, 1), (1, None)):  # 1 + floor(i T / S)
    inputs = np.stack([x] * 3).astype(np.float32)
    e_00, e_a0, e_am = network(inputs, np.full(3, t, np.int32), attributes, mask)
    e = e_00 + 4.0 * (e_a0 - e_00) + 0.5 * (e_am - e_a0)
    x0 = (x - np.sqrt(1 - abar[t]) * e) / np.sqrt(abar[t])
    after = 1.0 if following is None else abar[following]
    x = np.sqrt(after) * x0 + np.sqrt(1 - after) * e
  np.testing.assert_allclose(drawn, x, rtol=0, atol=1e-3 * np.abs(x).max())


def test_the_unspecified_request_is_the_plain_prediction(pipeline):
  """With nothing asked for, guidance has nothing to say."""
  plain = pipeline.sample_latents(num_images=2, steps=3, guidance=1.0)
  guided = pipeline.sample_latents(
    attributes=[0, 0, 0], mask=np.full((16, 16), 255), num_images=2, steps=3, guidance=9.0
  )
  np.testing.assert_array_equal(plain, guided)


def test_guidance_is_off_outside_its_interval(pipeline):
  without = pipeline.sample_latents(**REQUEST, num_images=2, guidance=1.0)
  nowhere = pipeline.sample_latents(
    **REQUEST, num_images=2, guidance=4.0, guidance_interval=(19, 19)
  )
  np.testing.assert_allclose(nowhere, without, **ROUNDING)


def test_a_progress_bar_changes_nothing(pipeline, latents, capsys):
  shown = pipeline.sample_latents(**REQUEST, num_images=4, seed=5, progress=True)
  np.testing.assert_allclose(shown, latents, **ROUNDING)
  assert '3/3' in capsys.readouterr().err


def test_samplers_are_compiled_once(pipeline, latents):
  before = dict(pipeline._compiled)
  for guidance in ({'attributes': 2.0}, {'attributes': 7.0}):
    pipeline.sample_latents('Wearing_Hat', MASK[::-1], 4, steps=3, seed=1, guidance=guidance)
  assert pipeline._compiled == before
  assert all(run._whole._cache_size() <= 4 for run in pipeline._compiled.values())


def test_encode_whitens_and_decode_undoes_it(pipeline, parts):
  images = np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)
  autoencoder = make_module(Autoencoder, parts.config['autoencoder'])

  def apply(x, method):
    run = jax.jit(functools.partial(autoencoder.apply, method=method))
    return np.asarray(run({'params': parts.autoencoder}, x))

  raw = apply(images, 'encode')
  encoded = np.asarray(pipeline.encode(images))
  assert encoded.shape == (4, 8, 8, 3)
  np.testing.assert_allclose(encoded, (raw - [0.25, -0.5, 1.0]) / [0.5, 2.0, 1.5], atol=1e-4)
  decoded, wanted = np.asarray(pipeline.decode(encoded)), apply(raw, 'decode')
  assert decoded.shape == (4, 16, 16, 3)
  # Quantisation may jump where a latent lies between two codes; elsewhere they agree.
  assert np.mean(np.abs(decoded - np.clip(wanted, -1, 1)) < 1e-3) > 0.98
  assert np.abs(wanted).max() > 1  # there was something to clip


def test_denoise_is_the_network(pipeline, network):
  x = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
  attributes, mask = np.array([[1, -1, 0]] * 3, np.int8), np.stack([MASK] * 3)
  wanted = network(x, np.array([4, 4, 9], np.int32), attributes, mask)
  got = pipeline.denoise(x, [4, 4, 9], 'Smiling,-Eyeglasses', MASK)
  np.testing.assert_allclose(got, wanted, atol=1e-4)
  other = pipeline.denoise(x, 4, 'Smiling,-Eyeglasses', MASK)
  assert np.abs(other - wanted).max(axis=(1, 2, 3))[2] > 1e-3


def test_masks_of_any_size_and_kind_fit(pipeline, tmp_path):
  Image.fromarray(MASK.repeat(3, 0).repeat(3, 1)).save(tmp_path / 'ids.png')
  colors = np.array([(0, 0, 0), (204, 0, 0), (0, 0, 204), (128, 128, 128)], np.uint8)
  Image.fromarray(colors[np.minimum(MASK, 3)]).save(tmp_path / 'colors.png')
  for mask in (tmp_path / 'ids.png', str(tmp_path / 'colors.png'), MASK):
    attributes, read = pipeline.read_conditions('Smiling', mask, 3)
    assert attributes.tolist() == [[1, 0, 0]] * 3
    np.testing.assert_array_equal(read, np.stack([MASK] * 3))


@pytest.mark.parametrize(
  ('request_', 'message'),
  [
    ({'num_images': 0}, 'num_images'),
    ({'batch_size': 0}, 'batch_size'),
    ({'seed': -1}, 'seed'),
    ({'seed': 2**32}, 'seed'),
    ({'steps': 0}, '1 to 20'),
    ({'steps': 21}, '1 to 20'),
    ({'sampler': 'euler'}, 'ddim'),
    ({'eta': 0.5, 'sampler': 'dpmpp_2m'}, 'eta'),
    ({'eta': 2.0}, 'eta'),
    ({'guidance': {'face': 2}}, 'face'),
    ({'guidance_interval': (9, 2), 'attributes': 'Smiling'}, 'interval'),
    ({'guidance_interval': (0, 10**10), 'attributes': 'Smiling'}, 'interval'),
    ({'attributes': 'Smilng'}, 'Smiling'),
    ({'attributes': np.zeros((3, 3)), 'num_images': 2}, 'attributes has 3 rows'),
    ({'mask': np.zeros((3, 16, 16), int), 'attributes': np.zeros((2, 3))}, 'rows'),
  ],
)
def test_bad_requests(pipeline, request_, message, capsys):
  with pytest.raises(UserError, match=message):
    pipeline(**{'steps': 2, 'progress': True, **request_})
  assert capsys.readouterr().err == ''  # no bar of a run that never began


def test_bad_arrays(pipeline):
  with pytest.raises(UserError, match='16, 16, 3'):
    pipeline.encode(np.zeros((1, 8, 16, 3), np.float32))
  with pytest.raises(UserError, match='float'):
    pipeline.encode(np.zeros((1, 16, 16, 3), np.uint8))
  with pytest.raises(UserError, match='8, 8, 3'):
    pipeline.decode(np.zeros((1, 8, 8, 4)))
  with pytest.raises(UserError, match='0 to 19'):
    pipeline.denoise(np.zeros((1, 8, 8, 3)), 20)
  with pytest.raises(UserError, match='Timesteps'):
    pipeline.denoise(np.zeros((2, 8, 8, 3)), [1, 2, 3])


@pytest.mark.parametrize('missing', ['attributes', 'mask'])
def test_a_condition_that_the_model_does_not_take(missing):
  pipeline = Pipeline(tiny_model.make_parts(**{missing: 'none'}))
  pipeline.read_conditions(**{'attributes': 'Smiling', 'mask': MASK, missing: None})
  with pytest.raises(UserError, match=f'trained without {missing}'):
    pipeline(attributes='Smiling', mask=MASK)


def test_an_autoencoder_alone_draws_nothing(parts):
  config = {**parts.config, 'denoiser': None}
  with pytest.raises(UserError, match='autoencoder alone'):
    Pipeline(dataclasses.replace(parts, config=config, denoiser=None))


def test_a_variation_lies_between_the_other_image_and_its_own(pipeline):
  other = pipeline.sample_latents(**REQUEST, num_images=2, seed=5)[1]
  own = pipeline.sample_latents(**REQUEST, num_images=2, seed=9)
  ends = [
    pipeline.sample_latents(
      **REQUEST, num_images=2, seed=9, variation={'of': [(5, 1, 1.0)], 'strength': strength}
    )
    for strength in (0.0, 0.2, 1.0)
  ]
  np.testing.assert_allclose(ends[0], np.stack([other, other]), **ROUNDING)
  np.testing.assert_allclose(ends[2], own, **ROUNDING)
  between = np.abs(ends[1] - other).mean((1, 2, 3))
  assert (between > 0.01).all()
  assert (between < np.abs(own - other).mean((1, 2, 3))).all()


def test_the_noise_of_a_variation_is_standard_normal_however_long_its_history(pipeline):
  request = {'seed': 1, 'image': 0}
  for seed in range(2, 6):
    request = {'seed': seed, 'image': 3, 'variation': conditions.vary(request, 0.3)}
  variation = conditions.vary(request, 0.4)
  assert [noise[:2] for noise in variation['of']] == [[1, 0], [2, 3], [3, 3], [4, 3], [5, 3]]
  assert sum(weight**2 for *_, weight in variation['of']) == pytest.approx(1.0)
  noise, share = pipeline._start(variation)
  assert share == pytest.approx(np.sin(0.2 * np.pi))
  assert noise.shape == (8, 8, 3)
  assert np.square(noise).mean() == pytest.approx(np.cos(0.2 * np.pi) ** 2, rel=0.3)


@pytest.mark.parametrize(
  'variation',
  [
    {},
    {'of': [], 'strength': 0.5},
    {'of': [(1, 0, 1.0)], 'strength': 1.5},
    {'of': [(1, 0)], 'strength': 0.5},
    {'of': [(-1, 0, 1.0)], 'strength': 0.5},
    {'of': [(1, 0, float('nan'))], 'strength': 0.5},
    {'of': [(0, 0, 1.0)] * 65, 'strength': 0.5},
  ],
)
def test_variations_of_nothing(pipeline, variation):
  with pytest.raises(UserError, match='variation'):
    pipeline.sample_latents(variation=variation, steps=3)


def test_progress_is_told_step_by_step(pipeline, capsys):
  told = []
  pipeline.sample_latents(
    num_images=3, steps=4, batch_size=2, progress=lambda done, total: told.append((done, total))
  )
  assert told == [(done, 8) for done in range(1, 9)]
  assert 'sampling' not in capsys.readouterr().err


def test_cores_draw_with_parameters_that_devices_shared(parts, monkeypatch):
  monkeypatch.setattr(cores, 'count', lambda: 2)
  pipeline, mesh = Pipeline(parts), sharding.make_mesh(1, len(jax.devices()))
  expected = pipeline.sample_latents(num_images=8, steps=2)
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'))
  shared = jax.tree.map(
    lambda x: jax.device_put(x, rows if x.shape and x.shape[0] % mesh.size == 0 else None),
    parts.denoiser,
  )
  assert any(len(x.sharding.device_set) == mesh.size > 1 for x in jax.tree.leaves(shared))
  pipeline.replace_denoiser(shared)
  # Programs of all devices, asked for by two threads at once, would wait for one another.
  assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(pipeline.params))
  np.testing.assert_array_equal(pipeline.sample_latents(num_images=8, steps=2), expected)


def test_it_can_be_differentiated_through_whatever_the_batch(parts):
  pipeline = Pipeline(parts)
  latents = np.random.default_rng(0).normal(size=(8, *pipeline.latent_shape)).astype(np.float32)
  gradient = jax.grad(lambda x: pipeline.denoise(x, 5).sum())(latents)
  assert gradient.shape == latents.shape and np.abs(gradient).max() > 0
