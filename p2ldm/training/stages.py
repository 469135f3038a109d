"""The stages of a run, in the order data flows through them.

prepared data set -> parser and classifier, which judge what a model draws
prepared data set -> autoencoder -> latent cache -> diffusion -> model directory
"""

import functools
import json
from typing import NamedTuple

import jax

import p2ldm
from p2ldm import processes, sharding, storage
from p2ldm.data.latents import LatentCache
from p2ldm.diffusion.loss import loss_weights
from p2ldm.diffusion.samplers import SAMPLERS
from p2ldm.diffusion.schedule import Schedule, make_schedule, spaced_timesteps
from p2ldm.errors import UserError
from p2ldm.evaluation.evaluators import Evaluator
from p2ldm.interop import evaluator_directory, model_directory
from p2ldm.interop.model_directory import ModelParts
from p2ldm.models.autoencoder import Autoencoder
from p2ldm.models.denoiser import Denoiser
from p2ldm.models.layers import resolve_dtype
from p2ldm.pipeline import Pipeline
from p2ldm.training import diffusion_task, loop, pretrained, step
from p2ldm.training.checkpoint import disk_is_full
from p2ldm.training.evaluator_stages import check_labels, check_size, run_evaluator
from p2ldm.training.latent_stage import run_latents
from p2ldm.training.pictures import SampleGrid
from p2ldm.training.probe import Probe
from p2ldm.training.workdir import check_origin, open_workdir

EVALUATORS = ('parser', 'classifier')
STAGES = (*EVALUATORS, 'autoencoder', 'latents', 'diffusion')


class Shared(NamedTuple):
  """What the diffusion stage builds on; several of them can share it.

  Attributes:
    trained: the autoencoder.
    cache: the latents.
    evaluators: for the probe, {'parser': ..., 'classifier': ...}, any of them.
  """

  trained: ModelParts | None
  cache: LatentCache | None
  evaluators: dict[str, Evaluator]


def run(config, workdir):
  """Runs the stages of a config in a workdir.

  Args:
    config: as configs/base.py describes it.
    workdir: the folder of the run.

  Raises:
    UserError: the config, the data set or the workdir is at fault.
  """
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  validate(config, mesh)
  sharding.connect(mesh)
  try:
    shared = run_before_diffusion(config, workdir, mesh)
    if 'diffusion' in config.stages:
      run_diffusion(config, storage.as_path(workdir), mesh, *shared)
  except Exception as error:  # whatever library wrote
    if isinstance(error, UserError) or not disk_is_full(error):
      raise
    raise UserError(
      f'The disk of {workdir} is full ({error}). What was saved there before is whole. Free some space, and '
      'give the same command again.'
    ) from error


def run_before_diffusion(config, workdir, mesh) -> Shared:
  """Runs all stages but the last, as far as the config asks for them."""
  has_cache = (storage.as_path(workdir) / 'latents' / 'meta.json').exists()
  if not processes.from_main(has_cache):
    open_data(config)  # a missing or unfit data set is reported before anything is written
  workdir = open_workdir(workdir, config)
  evaluators = run_evaluators(config, workdir, mesh)
  trained = cache = None
  if set(config.stages) - set(EVALUATORS):
    trained = run_autoencoder(config, workdir, mesh)
  if 'latents' in config.stages or 'diffusion' in config.stages:
    cache = run_latents(config, workdir, trained, functools.partial(open_data, config))
  return Shared(trained, cache, evaluators)


def validate(config, mesh):
  """Raises `UserError` for what can be told to be wrong before hours are spent on it."""
  unknown = [stage for stage in config.stages if stage not in STAGES]
  if unknown:
    raise UserError(f'config.stages names {unknown[0]!r}; the stages are {", ".join(STAGES)}.')
  for kind in EVALUATORS:
    if kind in config.stages:
      step.check(config.evaluators[kind].training, mesh, f'evaluators.{kind}')
  step.check(config.autoencoder.training, mesh, 'autoencoder')
  step.check(config.diffusion.training, mesh, 'diffusion')
  schedule = noise_schedule(config)
  loss_weights(schedule, config.diffusion)
  if config.sampling.sampler not in SAMPLERS:
    raise UserError(
      f'sampling.sampler is {config.sampling.sampler!r}; choose from {", ".join(SAMPLERS)}.'
    )
  spaced_timesteps(schedule.num_timesteps, config.sampling.steps)
  path = config.autoencoder.pretrained
  if path:
    model_directory.find(autoencoder_directory(path))
  if config.denoiser.pretrained:
    model_directory.find(config.denoiser.pretrained)
  spaced_timesteps(schedule.num_timesteps, config.probe.steps)
  path = config.evaluators.pretrained
  if path and not any(evaluator_directory.exists(path, kind) for kind in EVALUATORS):
    evaluator_directory.find(path, 'parser')  # says what is missing
  for kind in EVALUATORS:
    if kind in config.stages and not path:
      check_size(kind, config)


def noise_schedule(config) -> Schedule:
  """The schedule of a config's diffusion section."""
  diffusion = config.diffusion
  return make_schedule(diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end)


def autoencoder_directory(path) -> storage.Path:
  """Where the autoencoder lies: in a workdir its folder, else the model directory itself."""
  path = storage.as_path(path)
  return path / 'autoencoder' if (path / 'autoencoder').is_dir() else path


def open_data(config):
  """The prepared data set of a config; renders and prepares the embedded faces where it asks so."""
  from p2ldm.data.prepared import open_dataset  # needs tensorflow-datasets

  path = storage.as_path(config.data.dir)
  if config.data.embedded_faces > 0:
    if processes.is_main() and not (path / 'prepare.json').exists():
      from p2ldm.prepare import prepare_embedded

      prepare_embedded(path, config.data.embedded_faces, config.data.image_size, config.seed)
    processes.barrier('the embedded faces are prepared')
  dataset = open_dataset(path, config.data.image_size)
  if dataset.image_size != config.data.image_size:
    raise UserError(
      f'The data set {path} was prepared at {dataset.image_size} px, but data.image_size is '
      f'{config.data.image_size}. Prepare it at that size, or set --config.data.image_size.'
    )
  return dataset


def run_evaluators(config, workdir, mesh) -> dict[str, Evaluator]:
  """Loads or trains the parser and the classifier that the stages or the probe ask for, by kind."""
  path = config.evaluators.pretrained
  kinds = [kind for kind in EVALUATORS if kind in config.stages]
  if path and config.probe.every:
    kinds = [kind for kind in EVALUATORS if evaluator_directory.exists(path, kind)]
  elif not path:
    for kind in kinds:  # said of all before the first of them is trained
      check_labels(kind, config, workdir, functools.partial(open_data, config))
  return {
    kind: run_evaluator(kind, config, workdir, mesh, functools.partial(open_data, config))
    for kind in kinds
  }


def run_autoencoder(config, workdir, mesh) -> ModelParts:
  """Loads the pretrained autoencoder, or the workdir's, or trains one."""
  if config.autoencoder.pretrained:
    return model_directory.load(autoencoder_directory(config.autoencoder.pretrained))
  directory, num_steps = workdir / 'autoencoder', config.autoencoder.training.num_steps
  if is_complete(directory, directory / 'model', num_steps):
    print(f'autoencoder: complete in {directory}')
    return model_directory.load(directory)
  if 'autoencoder' not in config.stages:
    raise UserError(
      f'config.stages leaves the autoencoder out, but {directory} holds no complete one. Add '
      "'autoencoder' to config.stages, or set config.autoencoder.pretrained."
    )
  fields = config.autoencoder.model.to_dict()
  model = Autoencoder(
    **fields,
    remat=config.autoencoder.training.remat,
    dtype=resolve_dtype(config.compute_dtype),
  )
  from p2ldm.training import autoencoder_task  # needs TensorFlow

  dataset = open_data(config)
  check_origin(directory, {'data set': dataset.fingerprint})
  task = autoencoder_task.make_task(config, model, dataset, mesh)
  state = loop.train(task, workdir, mesh, config.seed)
  parts = ModelParts(
    config={
      'image_size': config.data.image_size,
      'autoencoder': fields,
      'latents': None,
      'denoiser': None,
      'diffusion': None,
      'schema': dataset.schema.to_dict(),
      'provenance': {
        'step': int(state.step),
        'data_set': config.data.dir,
        'embedded': dataset.embedded,
        'seed': config.seed,
        'code_version': p2ldm.__version__,
      },
    },
    autoencoder=jax.device_get(sharding.gather(state.ema_params['autoencoder'])),
    denoiser=None,
  )
  if processes.is_main():
    model_directory.save(directory / 'model', parts)
  return parts


def run_diffusion(config, workdir, mesh, trained, cache, evaluators):
  """Trains the diffusion model, probed by the evaluators, and exports it as WORKDIR/model."""
  training, model_dir = config.diffusion.training, workdir / 'model'
  if is_complete(workdir / 'diffusion', model_dir, training.num_steps):
    print(f'diffusion: complete in {workdir / "diffusion"}; the model is in {model_dir}')
    return
  fields = denoiser_fields(config, cache)
  denoiser = Denoiser(**fields, remat=training.remat, dtype=resolve_dtype(config.compute_dtype))
  schedule, start = noise_schedule(config), None
  check_origin(workdir / 'diffusion', cache.meta['origin'])
  known = pretrained.load(config, trained.autoencoder)
  if known:
    cache, source = pretrained.whiten(cache, known), config.denoiser.pretrained
    start = functools.partial(pretrained.start, pretrained=known.denoiser, source=source)

  def parts(params, step):
    return model_parts(config, trained, cache, fields, params, step)

  def export(state):
    params = jax.device_get(state.ema_params['denoiser'])
    model_directory.save(model_dir, parts(params, int(state.step)))

  pipeline = Pipeline(parts({}, 0), config.compute_dtype)
  draw = SampleGrid(config, cache, pipeline)
  probe = Probe(config, cache, pipeline, evaluators) if evaluators else None
  task = diffusion_task.make_task(config, denoiser, schedule, cache, mesh, draw, probe, start)
  state = loop.train(task, workdir, mesh, config.seed, export)
  state = state.replace(ema_params=sharding.gather(state.ema_params))
  if processes.is_main():
    export(state)
  print(f'The model is in {model_dir}; pictures are in {workdir / "diffusion" / "pictures"}.')


def is_complete(directory, model_dir, num_steps: int) -> bool:
  """Whether a task is trained to its last step and exported: what process 0 finds."""
  if not processes.is_main():
    return processes.from_main(False)
  trained = loop.finished(directory, num_steps)
  return processes.from_main(trained and exported_step(model_dir) == num_steps)


def exported_step(model_dir: storage.Path) -> int | None:
  """The training step of the model in a directory, None if there is no model."""
  record = model_dir / 'config.json'
  return json.loads(record.read_text())['provenance']['step'] if record.exists() else None


def denoiser_fields(config, cache: LatentCache) -> dict:
  """The fields of `Denoiser`, dtype excepted, as plain values for config.json."""
  train = cache.splits['train']
  return {
    'attributes': config.denoiser.attributes,
    'mask': config.denoiser.mask,
    'condition_encoder': config.denoiser.condition_encoder.to_dict(),
    'unet': config.denoiser.unet.to_dict(),
    'num_attributes': cache.schema.num_attributes,
    'num_classes': cache.schema.num_classes,
    'latent_channels': train.latent_shape[-1],
    'latent_factor': config.data.image_size // train.latent_shape[0],
  }


def model_parts(config, trained, cache, fields, denoiser, step: int) -> ModelParts:
  """What a model directory is made of; denoiser is the parameters after `step` steps."""
  diffusion = config.diffusion
  return ModelParts(
    config={
      'image_size': config.data.image_size,
      'autoencoder': trained.config['autoencoder'],
      'latents': {name: cache.meta[name] for name in ('mean', 'std')},
      'denoiser': fields,
      'diffusion': {
        name: diffusion[name] for name in ('num_timesteps', 'beta_start', 'beta_end', 'prediction')
      },
      'schema': cache.schema.to_dict(),
      'provenance': {
        'step': step,
        'num_steps': diffusion.training.num_steps,
        'data_set': config.data.dir,
        'embedded': cache.meta['embedded'],
        'split_scheme': cache.meta['split_scheme'],
        'origin': cache.meta['origin'],
        'faces': cache.meta['splits'],
        'seed': config.seed,
        'weighting': diffusion.weighting,
        'code_version': p2ldm.__version__,
      },
    },
    autoencoder=trained.autoencoder,
    denoiser=denoiser,
  )
