"""The main command: the whole path on a handful of faces, run again, without TensorFlow, on bad input."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import p2ldm
from configs import attributes, autoencoder, base, evaluators, masks, multi, unconditional, variants
from p2ldm import interruptions
from p2ldm.errors import UserError
from p2ldm.models.denoiser import Denoiser
from p2ldm.prepare import prepare
from p2ldm.training import stages
from p2ldm.training.workdir import default_workdir

REPOSITORY = pathlib.Path(p2ldm.__file__).parent.parent
CONFIGS = {
  'attributes': attributes,
  'autoencoder': autoencoder,
  'evaluators': evaluators,
  'masks': masks,
  'multi': multi,
  'unconditional': unconditional,
}


def shrink(config, data_dir):
  """Two steps of everything, on the faces of the test fixtures and all eight devices."""
  config.data.update({'dir': str(data_dir), 'image_size': 32, 'embedded_faces': 0})
  config.autoencoder.model.update({'channels': 32, 'channel_multipliers': (1, 1, 1)})
  config.denoiser.condition_encoder.update({'width': 32, 'num_layers': 1})
  config.denoiser.unet.update({'channel_multipliers': (1,), 'attention_factors': ()})
  for kind in ('parser', 'classifier'):
    config.evaluators[kind].model.update({'channels': 16, 'channel_multipliers': (1, 2)})
  for training in variants.trainings(config):
    training.update({'batch_size': 8, 'num_steps': 2, 'evaluation_faces': 4})
  config.latents.batch_size = 8
  if 'diffusion' in config.stages and config.denoiser.attributes != 'none':
    config.stages = stages.STAGES
  config.sampling.update({'steps': 2, 'num_faces': 1})
  config.probe.update({'every': 1, 'num_faces': 1, 'steps': 2})
  return config


@pytest.fixture(scope='module')
def run(prepared_faces, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'multi'
  stages.run(shrink(multi.get_config('tiny'), prepared_faces), workdir)
  return workdir


def test_the_whole_path_ends_in_a_model_that_draws(run):
  pipeline = p2ldm.Pipeline.from_pretrained(run)
  faces = pipeline(attributes={'Smiling': 1}, num_images=2, steps=2)
  assert [face.size for face in faces] == [(32, 32)] * 2
  assert (run / 'diffusion' / 'pictures' / 'samples_0000002.png').exists()
  assert (run / 'autoencoder' / 'pictures' / 'reconstructions_0000002.png').exists()
  config = json.loads((run / 'model' / 'config.json').read_text())
  assert config['provenance']['step'] == 2
  rows = (run / 'diffusion' / 'metrics.jsonl').read_text()
  assert 'validation/conditional_gap' in rows
  probed = [json.loads(row)['step'] for row in rows.splitlines() if 'probe/mask_miou' in row]
  assert probed == [1, 2]


def test_the_model_encodes_real_faces_to_unit_variance_latents(run, prepared_faces):
  from p2ldm.data.prepared import open_dataset, ordered_batches

  pipeline = p2ldm.Pipeline.from_pretrained(run)
  images = next(ordered_batches(open_dataset(prepared_faces), 'train', 11))['image']
  both = np.concatenate([images, images[:, :, ::-1]])
  latents = np.asarray(pipeline.encode(both), np.float64).reshape(-1, 3)
  np.testing.assert_allclose(latents.mean(0), 0.0, atol=1e-3)
  np.testing.assert_allclose(latents.std(0), 1.0, atol=1e-3)


def test_run_again_it_finds_everything_done(run, prepared_faces, capsys):
  model = run / 'model' / 'denoiser.safetensors'
  before = model.stat().st_mtime_ns
  stages.run(shrink(multi.get_config('tiny'), prepared_faces), run)
  printed = capsys.readouterr().out
  for stage in stages.STAGES:
    assert f'{stage}: complete' in printed
  assert model.stat().st_mtime_ns == before


def test_a_model_older_than_the_last_checkpoint_is_written_again(run, prepared_faces):
  record = run / 'model' / 'config.json'
  config = json.loads(record.read_text())
  config['provenance']['step'] = 1
  record.write_text(json.dumps(config))
  stages.run(shrink(multi.get_config('tiny'), prepared_faces), run)
  assert json.loads(record.read_text())['provenance']['step'] == 2


def test_another_architecture_in_the_same_workdir_is_refused(run, prepared_faces):
  config = shrink(multi.get_config('tiny'), prepared_faces)
  config.denoiser.unet.channels = 96
  with pytest.raises(UserError, match=r'denoiser\.unet\.channels = 32.*96'):
    stages.run(config, run)


def test_an_autoencoder_run_serves_other_runs(prepared_faces, tmp_path):
  shared = shrink(autoencoder.get_config('tiny'), prepared_faces)
  stages.run(shared, tmp_path / 'autoencoder')
  config = shrink(unconditional.get_config('tiny'), prepared_faces)
  config.autoencoder.pretrained = str(tmp_path / 'autoencoder')
  stages.run(config, tmp_path / 'unconditional')
  pipeline = p2ldm.Pipeline.from_pretrained(tmp_path / 'unconditional')
  assert len(pipeline(num_images=1, steps=2)) == 1
  with pytest.raises(UserError, match='trained without attributes'):
    pipeline(attributes='Smiling', num_images=1, steps=2)


WITHOUT_TENSORFLOW = """
import sys

sys.modules['tensorflow'] = sys.modules['tensorflow_datasets'] = None  # importing them raises ImportError
import json
from ml_collections import ConfigDict
from p2ldm.training import stages
workdir, config = sys.argv[1:]
config = ConfigDict(json.loads(config))
stages.run(config, workdir)
assert sys.modules['tensorflow'] is None
print('trained without TensorFlow')
"""


def test_training_from_cached_latents_needs_no_tensorflow(run, prepared_faces, tmp_path):
  config = shrink(multi.get_config('tiny'), prepared_faces)
  config.autoencoder.pretrained = config.evaluators.pretrained = str(run)
  workdir = tmp_path / 'run'
  (workdir).mkdir()
  os.symlink(run / 'latents', workdir / 'latents')
  arguments = [sys.executable, '-c', WITHOUT_TENSORFLOW, str(workdir), config.to_json()]
  result = subprocess.run(arguments, capture_output=True, text=True, cwd=REPOSITORY, check=False)
  assert 'trained without TensorFlow' in result.stdout, result.stderr[-3000:]
  assert (workdir / 'model' / 'denoiser.safetensors').exists()


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('variant', ['', 'tiny', 'faces64'])
def test_every_config_overrides_keys_of_base_and_adds_none(name, variant):
  def keys(config, prefix=''):
    for key, value in config.items():
      if hasattr(value, 'items'):
        yield from keys(value, f'{prefix}{key}.')
      else:
        yield prefix + key

  config = CONFIGS[name].get_config(variant)
  assert set(keys(config)) == set(keys(base.get_config()))
  assert config.data.image_size == (64 if variant else 256)


@pytest.mark.parametrize(
  'name, parameters',
  [
    ('multi', 433_717_187),  # U-Net 414,713,603, condition encoder 19,003,584
    ('unconditional', 274_056_163),  # CompVis' celebahq-ldm-vq-4
    ('attributes', None),
    ('masks', None),
  ],
)
def test_the_paper_size_of_every_config(name, parameters):
  config = CONFIGS[name].get_config()
  denoiser = Denoiser(
    attributes=config.denoiser.attributes,
    mask=config.denoiser.mask,
    condition_encoder=config.denoiser.condition_encoder.to_dict(),
    unet=config.denoiser.unet.to_dict(),
    num_attributes=40,
    num_classes=19,
    latent_channels=3,
    dtype=jnp.bfloat16,
  )
  inputs = (
    jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32),
    jax.ShapeDtypeStruct((2,), jnp.int32),
    jax.ShapeDtypeStruct((2, 40), jnp.int8),
    jax.ShapeDtypeStruct((2, 256, 256), jnp.uint8),
  )
  output, variables = jax.eval_shape(denoiser.init_with_output, jax.random.key(0), *inputs)
  assert output.shape == (2, 64, 64, 3) and output.dtype == jnp.float32
  count = sum(leaf.size for leaf in jax.tree.leaves(variables))
  if parameters:
    assert count == parameters
  else:
    assert 414_000_000 < count < 434_000_000
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_conditions_of_the_configs():
  def strategies(module):
    denoiser = module.get_config().denoiser
    return denoiser.attributes, denoiser.mask

  assert strategies(multi) == ('cross_attention', 'cross_attention')
  assert strategies(attributes) == ('cross_attention', 'none')
  assert strategies(masks) == ('none', 'cross_attention')
  assert strategies(unconditional) == ('none', 'none')


def test_the_default_workdir_is_the_configs_name():
  assert default_workdir('configs/multi.py:tiny') == os.path.join('runs', 'multi_tiny')
  assert default_workdir('configs/multi.py') == os.path.join('runs', 'multi')


def test_a_missing_data_set_is_reported_with_what_to_do(tmp_path):
  config = shrink(multi.get_config('tiny'), tmp_path / 'nothing')
  with pytest.raises(UserError) as error:
    stages.run(config, tmp_path / 'run')
  assert 'python -m p2ldm.prepare' in str(error.value)
  assert 'configs/multi.py:tiny' in str(error.value)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'key, value, words',
  [
    ('diffusion.training.batch_size', 12, r'diffusion\.training\.batch_size = 12'),
    ('diffusion.weighting', 'p3', 'p3'),
    ('sampling.sampler', 'euler', 'ddim'),
    ('stages', ('autoencoder', 'difusion'), 'difusion'),
    ('autoencoder.pretrained', '/nowhere', '/nowhere'),
    ('mesh.fsdp', 3, 'do not multiply'),
    ('evaluators.pretrained', '/nowhere', '/nowhere'),
    ('evaluators.parser.model.patch', 5, 'evaluators.parser.model'),
    ('probe.steps', 2_000, '2000'),
  ],
)
def test_a_config_that_cannot_run_is_refused_at_once(prepared_faces, tmp_path, key, value, words):
  config = shrink(multi.get_config('tiny'), prepared_faces)
  with config.unlocked():
    config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=words):
    stages.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_missing_labels_are_reported_before_anything_is_trained(raw_faces, tmp_path):
  """The classifier is the second stage; the parser is not trained first."""
  raw = tmp_path / 'raw'
  shutil.copytree(raw_faces, raw)
  (raw / 'CelebAMask-HQ-attribute-anno.txt').unlink()
  prepare(raw, tmp_path / 'faces', image_size=32)
  config = shrink(multi.get_config('tiny'), tmp_path / 'faces')
  with pytest.raises(UserError, match='classifier needs faces with attributes'):
    stages.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'parser').exists()


def test_a_stage_left_out_must_be_complete(prepared_faces, tmp_path):
  config = shrink(multi.get_config('tiny'), prepared_faces)
  config.stages = ('latents', 'diffusion')
  with pytest.raises(UserError, match='leaves the autoencoder out'):
    stages.run(config, tmp_path / 'run')


def test_a_data_set_of_another_size_is_refused(prepared_faces, tmp_path):
  config = shrink(multi.get_config('tiny'), prepared_faces)
  config.data.image_size = 64
  with pytest.raises(UserError, match='prepared at 32 px'):
    stages.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'arguments, words',
  [
    ([], '--config'),
    (['--config=configs/nope.py'], 'configs/nope.py'),
    (['--config=configs/multi.py:big'], 'there are: tiny, packaged, faces64'),
    (['--config=configs/multi.py', '--config.denoiser.unet.chanels=3'], 'Did you mean "channels"'),
    (['--config=configs/multi.py', '--config.seed=abc'], 'config.seed=abc'),
    (['--config=configs/multi.py', '--wrkdir=x'], 'wrkdir'),
  ],
)
def test_bad_usage_is_one_paragraph(arguments, words):
  command = [sys.executable, '-m', 'p2ldm.main', *arguments]
  result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
  assert result.returncode == 2
  assert 'Traceback' not in result.stderr
  assert words in ' '.join(result.stderr.split())
  assert result.stderr.startswith('error: ') and result.stderr.count('\n\n') == 0
  assert len(result.stderr) < 1000


def test_sigterm_ends_with_the_status_that_says_start_again(tmp_path):
  code = (
    'import os, signal\n'
    'from p2ldm import errors, interruptions, main\n'
    'from p2ldm.training import stages\n'
    'def run(config, workdir):\n'
    '  os.kill(os.getpid(), signal.SIGTERM)\n'
    '  interruptions.check("all of it")\n'
    'stages.run = run\n'
    'errors.run(main.main)\n'
  )
  command = [sys.executable, '-c', code, '--config=configs/multi.py:tiny', f'--workdir={tmp_path}']
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
  assert done.returncode == interruptions.EXIT_STATUS, done.stderr
  assert 'Give the same command again' in done.stderr


def test_help_shows_the_flags():
  command = [sys.executable, '-m', 'p2ldm.main', '--help']
  result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
  assert result.returncode == 0
  assert '--workdir' in result.stdout and '--config' in result.stdout
