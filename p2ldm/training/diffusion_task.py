"""The denoiser's training: noise a latent, predict the noise from it and the conditions, weigh, step.

For a latent x_0, a timestep t and noise e:  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e,
loss = w(t) * mean((prediction(x_t, t, attributes, mask) - target)^2),  w from `diffusion.loss`.
Before that, conditions are unspecified at random, so that one network learns the conditional, the
partially conditional and the unconditional distribution (arXiv 2207.12598, here with one scale per
condition).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from p2ldm import sharding
from p2ldm.data.labels import UNSPECIFIED
from p2ldm.data.latents import LatentCache, LatentDataset
from p2ldm.data.order import batch_examples
from p2ldm.diffusion.loss import denoising_loss, loss_weights, unspecify
from p2ldm.diffusion.schedule import Schedule, q_sample, target
from p2ldm.models.denoiser import Denoiser
from p2ldm.training.metrics import Means
from p2ldm.training.optimizer import adamw
from p2ldm.training.state import TrainState
from p2ldm.training.task import Task

NUM_BINS = 10  # of the timestep, in the validation losses
VALIDATION_SEED = 1  # the noise of the validation losses is the same at every evaluation


def make_task(
  config,
  denoiser: Denoiser,
  schedule: Schedule,
  cache: LatentCache,
  mesh,
  draw,
  probe=None,
  start=None,
) -> Task:
  """The diffusion task of a config.

  Args:
    config: the whole config of the run.
    denoiser: the network.
    schedule: the noise schedule.
    cache: the latent cache of the run.
    mesh: the device mesh, for the evaluation's batches.
    draw: state -> {name: picture}.
    probe: state -> {name: number}, or None.
    start: the denoiser's parameters -> those to train from, or None for random ones.
  """
  training, train = config.diffusion.training, cache.splits['train']
  weights = loss_weights(schedule, config.diffusion)
  loss = functools.partial(
    noised_loss,
    denoiser=denoiser,
    schedule=schedule,
    weights=weights,
    prediction=config.diffusion.prediction,
  )

  def init(key):
    example = train.batch(np.zeros(1, np.int64))
    variables = denoiser.init(
      key,
      example['latent'],
      jnp.zeros(1, jnp.int32),
      example['attributes'],
      example['mask'],
    )
    return {'denoiser': variables['params']}

  return Task(
    name='diffusion',
    training=training,
    init=init,
    optimizer=adamw(training),
    averaged=('denoiser',),
    frozen=None,
    prepare=functools.partial(
      prepare,
      probabilities=config.diffusion.unspecify.to_dict(),
      num_timesteps=schedule.num_timesteps,
      num_classes=cache.schema.num_classes,
    ),
    gradients=functools.partial(gradients, loss=loss),
    train_batches=lambda first: train.train_batches(
      training.batch_size,
      config.seed,
      config.data.flip,
      first,
      sharding.local_rows(training.batch_size, mesh),
    ),
    face_names=lambda step: train.names(
      batch_examples(config.seed, step, training.batch_size, len(train), False)[0]
    ),
    evaluate=Evaluation(config, loss, schedule.num_timesteps, cache, mesh),
    draw=draw,
    probe=probe,
    probe_every=config.probe.every,
    start=(lambda params: {'denoiser': start(params['denoiser'])}) if start else None,
    divisible=config.denoiser.unet.dropout == 0,
    cpu_optimization_level=1,  # as fast, and compiled in three quarters of the time
  )


def noised_loss(params, x0, noise, timesteps, attributes, mask, *, dropout_key=None, denoiser,
                schedule, weights, prediction):  # fmt: skip
  """Weighted and plain denoising loss per example, each (B,) float32.

  Args:
    params: the denoiser's.
    x0: (B, h, w, C) float32 whitened latents.
    noise: like x0, standard normal.
    timesteps: (B,) int32 in [0, T).
    attributes: (B, A) int8.
    mask: (B, H, W) uint8.
    dropout_key: a key while training, None for none.
    denoiser: the network.
    schedule: the noise schedule.
    weights: (T,) float32, w(t).
    prediction: 'epsilon' or 'v'.
  """
  x_t = q_sample(schedule, x0, noise, timesteps)
  predicted = denoiser.apply(
    {'params': params},
    x_t,
    timesteps,
    attributes,
    mask,
    deterministic=dropout_key is None,
    rngs={} if dropout_key is None else {'dropout': dropout_key},
  )
  wanted = target(schedule, x0, noise, timesteps, prediction)
  return denoising_loss(predicted, wanted, timesteps, weights)


def prepare(batch, key, *, probabilities, num_timesteps, num_classes):
  """Draws noise and timesteps, and unspecifies; batch is {latent, attributes, mask}."""
  time_key, noise_key, condition_key, _ = jax.random.split(key, 4)
  x0 = batch['latent']
  attributes, mask = unspecify(
    condition_key, batch['attributes'], batch['mask'], probabilities, num_classes
  )
  return {
    'x0': x0,
    'noise': jax.random.normal(noise_key, x0.shape, x0.dtype),
    'timesteps': jax.random.randint(time_key, x0.shape[:1], 0, num_timesteps),
    'attributes': attributes,
    'mask': mask,
  }


def gradients(state: TrainState, rows, key, frozen, *, loss):
  """Gradients of the mean weighted loss; rows are those of `prepare`, frozen is None."""
  del frozen
  dropout_key = jax.random.split(key, 4)[3]

  def mean_loss(params):
    weighted, plain = loss(params['denoiser'], **rows, dropout_key=dropout_key)
    return weighted.mean(), plain.mean()

  (weighted, plain), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
  return grads, {'loss': weighted, 'mse': plain}


class Evaluation:
  """Validation losses with both conditions, with one alone, and with none, and what they say.

  `conditional_gap` is 1 - loss / loss_unspecified, both weighted as in training: the share of the
  loss that knowing the conditions removes. The same faces, timesteps and noise serve every variant
  and every evaluation; timesteps are spread evenly over the faces.
  """

  VARIANTS = {
    'loss': (True, True),
    'loss_attributes': (True, False),
    'loss_mask': (False, True),
    'loss_unspecified': (False, False),
  }

  def __init__(self, config, loss, num_timesteps: int, cache: LatentCache, mesh):
    self._data: LatentDataset = cache.splits['validation']
    self._mesh, self._num_timesteps = mesh, num_timesteps
    self._batch_size = config.diffusion.training.batch_size
    self._num_faces = min(config.diffusion.training.evaluation_faces, len(self._data))
    self._loss = jax.jit(
      functools.partial(self._variants, loss), out_shardings=sharding.replicated(mesh)
    )

  def _variants(self, loss, params, batch, index):
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(VALIDATION_SEED)))(index)
    x0 = batch['latent']
    noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(keys)
    timesteps = (index * self._num_timesteps) // self._num_faces
    values = {}
    for name, (with_attributes, with_mask) in self.VARIANTS.items():
      attributes = batch['attributes'] if with_attributes else jnp.zeros_like(batch['attributes'])
      mask = batch['mask'] if with_mask else jnp.full_like(batch['mask'], UNSPECIFIED)
      values[name], values[name.replace('loss', 'mse')] = loss(
        params, x0, noise, timesteps, attributes, mask
      )
    return values, timesteps

  def __call__(self, state: TrainState, frozen=None) -> dict[str, float]:
    """The values of one evaluation of the moving average."""
    means = Means()
    for start in range(0, self._num_faces, self._batch_size):
      index = np.arange(start, start + self._batch_size, dtype=np.int32)
      valid = index < self._num_faces
      index = np.minimum(index, self._num_faces - 1)
      batch = sharding.put_batch(self._data.batch(index), self._mesh)
      values, timesteps = jax.device_get(self._loss(state.ema_params['denoiser'], batch, index))
      means.add(values, valid)
      bins = timesteps * NUM_BINS // self._num_timesteps
      for b in range(NUM_BINS):
        here = valid & (bins == b)
        if here.any():
          means.add(
            {f'{name}/timesteps_{b}': values[name] for name in ('mse', 'mse_unspecified')}, here
          )
    return with_gaps(means.compute())


def with_gaps(values: dict[str, float]) -> dict[str, float]:
  """Adds the conditional gaps to the losses of `Evaluation`."""
  gaps = {
    f'conditional_gap{suffix}': 1.0 - values[f'loss{suffix}'] / values['loss_unspecified']
    for suffix in ('', '_attributes', '_mask')
  }
  gaps['conditional_gap_mse'] = 1.0 - values['mse'] / values['mse_unspecified']
  for b in range(NUM_BINS):
    if f'mse/timesteps_{b}' in values:
      gap = 1.0 - values[f'mse/timesteps_{b}'] / values[f'mse_unspecified/timesteps_{b}']
      gaps[f'conditional_gap/timesteps_{b}'] = gap
  return {**values, **gaps}
