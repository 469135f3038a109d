"""From a model directory to faces: `Pipeline.from_pretrained(DIR)` gives a callable.

  attributes, mask -> condition (once per image and branch) -> sampler -> whitened latents
  -> raw latents -> decoder -> images

Everything that computes is jitted. Image i depends on (seed, i) and its own condition alone: not on how
many images are drawn, nor on the batch they are drawn in (up to rounding, where XLA compiles another
batch size differently).
"""

import collections
import contextlib
import itertools
import threading
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from p2ldm import conditions, pictures, sharding, storage
from p2ldm.data.labels import UNSPECIFIED, LabelSchema
from p2ldm.data.latents import LatentStatistics
from p2ldm.diffusion import guidance as cfg
from p2ldm.diffusion import samplers
from p2ldm.diffusion.schedule import check_prediction, make_schedule
from p2ldm.errors import UserError
from p2ldm.interop import model_directory
from p2ldm.interop.packaged import model_path
from p2ldm.models.layers import resolve_dtype
from p2ldm.provenance import records

_BATCH_SIZE = 8  # images drawn at a time where none is given
_KEPT = 16  # compiled programs


class Pipeline:
  """A model that draws faces.

  Attributes:
    config: what the model's config.json holds.
    schema: the LabelSchema: names of attributes and classes.
    image_size: S, images are S x S pixels.
    latent_shape: (h, w, C) of a latent.
    schedule: the noise schedule, T = schedule.num_timesteps.
    statistics: LatentStatistics, which whiten the latents.
    name: of the model, for the record that its images carry.
    dtype: of the computation.
  """

  def __init__(
    self, parts: model_directory.ModelParts, dtype: str = 'auto', name: str = '', mesh=None
  ):
    """Takes a model in memory; `from_pretrained` reads one.

    Args:
      parts: config and parameters.
      dtype: of the computation: 'float32', 'bfloat16', or 'auto' (bfloat16 on TPU and GPU).
      name: of the model.
      mesh: whose devices share the images of a batch, if they divide it; None takes the first device. On a
        CPU that is one device, its cores do.

    Raises:
      UserError: there is no denoiser; an unknown dtype, prediction or schedule.
    """
    config = self.config = parts.config
    if parts.denoiser is None:
      raise UserError(
        'This model directory holds an autoencoder alone, which draws nothing. Train a diffusion model '
        'on it: python -m p2ldm.main --config=configs/multi.py --config.autoencoder.pretrained=DIR'
      )
    self.schema = LabelSchema.from_dict(config['schema'])
    self.image_size = config['image_size']
    latents, diffusion = config['latents'], config['diffusion']
    self.statistics = LatentStatistics(
      np.array(latents['mean'], np.float32), np.array(latents['std'], np.float32)
    )
    self.schedule = make_schedule(
      diffusion['num_timesteps'], diffusion['beta_start'], diffusion['beta_end']
    )
    check_prediction(diffusion['prediction'])
    dtype = resolve_dtype(dtype)
    self.name, self.dtype = name, dtype.name
    self._autoencoder = parts.make_autoencoder(dtype)
    self._denoiser = parts.make_denoiser(dtype)
    self._mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    params = {'autoencoder': parts.autoencoder, 'denoiser': parts.denoiser}
    self._params = jax.device_put(params, sharding.replicated(self._mesh))
    side = self.image_size // self._denoiser.latent_factor
    self.latent_shape = (side, side, self._denoiser.latent_channels)
    # Samplers, by everything that is static in them; the one that was used last is the last.
    self._compiled: collections.OrderedDict[tuple, Callable] = collections.OrderedDict()
    self._tick = lambda: None  # called by running samplers, once a step
    self._encode = sharding.OverBatch(self._encode_fn, self._mesh, 1)
    self._decode = sharding.OverBatch(self._decode_fn, self._mesh, 1)
    self._reconstruct = sharding.OverBatch(self._reconstruct_fn, self._mesh, 1)
    self._denoise = sharding.OverBatch(self._denoise_fn, self._mesh, 4)

  @classmethod
  def from_pretrained(cls, directory=None, dtype: str = 'auto', mesh=None) -> 'Pipeline':
    """Reads a model directory, or the one that a training workdir has.

    Args:
      directory: path of either; None takes the small model that comes with the package.
      dtype, mesh: as of the constructor.

    Raises:
      UserError: there is no model, or it is damaged; the message says what to do.
    """
    directory = model_path(directory)
    path = storage.absolute(directory)
    name = path.parent.name if path.name == 'model' else path.name
    return cls(model_directory.load(directory), dtype, name, mesh)

  def replace_denoiser(self, params: dict):
    """Draws with other parameters of the same denoiser from now on; nothing is compiled again."""
    if sharding.by_cores(self._mesh):
      # Sharded over devices, they would make every part a program of all devices, and two of those at once
      # may wait for one another.
      params = jax.device_put(params, sharding.replicated(self._mesh))
    self._params = {**self._params, 'denoiser': params}

  def __call__(
    self, attributes=None, mask=None, num_images: int | None = None, **options
  ) -> list[Image.Image]:
    """Draws faces: takes what `sample_latents` takes, and decodes.

      pipeline('Smiling,-Eyeglasses', mask='mask.png', num_images=8, seed=1, steps=50,
               guidance={'attributes': 3.0, 'mask': 1.5})

    Returns:
      N RGB images of S x S pixels, which carry how they were made (`records.GeneratedImage`).

    Raises:
      UserError: as `sample_latents`.
    """
    latents = self.sample_latents(attributes, mask, num_images, **options)
    attributes, mask = self.read_conditions(attributes, mask, len(latents))
    batches = [*_batches(np.arange(len(latents)), options.get('batch_size'))]
    decoded = _fetched((self.decode(latents[batch]), count) for batch, count in batches)
    faces = []
    for (batch, _), images in zip(batches, decoded, strict=True):
      for row, image in enumerate(pictures.to_pil(images)):
        record = self._record(row, batch, attributes, mask, **options)
        faces.append(records.GeneratedImage.of(image, record))
    return faces

  def _record(self, row: int, batch, attributes, mask, *, seed=0, first_image=0, steps=50,
              guidance=None, sampler='ddim', eta=0.0, guidance_interval=None, variation=None,
              batch_size=None, progress=False) -> dict:  # fmt: skip
    """The record of the image that is in this row of a batch, of options as of `sample_latents`."""
    given = {'attributes': attributes.any(), 'mask': (mask != UNSPECIFIED).any()}
    return records.record(
      self,
      {
        'seed': int(seed),
        'image': int(first_image + batch[row]),
        'sampler': sampler,
        'steps': int(steps),
        'eta': float(eta),
        'guidance': conditions.read_guidance(guidance),
        'guidance_interval': None if guidance_interval is None else [*map(int, guidance_interval)],
        **({} if variation is None else {'variation': conditions.read_variation(variation)}),
      },
      attributes[batch[row]],
      mask[batch[row]],
      {
        'batch_size': len(batch),
        'row': row,
        'conditions': [name for name, is_given in given.items() if is_given],
        'devices': self.parts(len(batch)),
      },
    )

  def sample_latents(
    self,
    attributes=None,
    mask=None,
    num_images: int | None = None,
    *,
    seed: int = 0,
    first_image: int = 0,
    steps: int = 50,
    guidance=None,
    sampler: str = 'ddim',
    eta: float = 0.0,
    guidance_interval: tuple[int, int] | None = None,
    variation: Mapping | None = None,
    batch_size: int | None = None,
    progress: bool | Callable[[int, int], None] = False,
  ) -> np.ndarray:
    """Draws whitened latents (N, h, w, C) float32; what is not asked for is unspecified.

    Args:
      attributes: {'Smiling': 1, 'Eyeglasses': -1}, 'Smiling,-Eyeglasses', or -1, 0, 1 as (A,), or as
        (N, A) with one row per image.
      mask: path of a PNG or a PIL image, of class ids or of the schema's colours; class ids (H, W), or
        (N, H, W) with one mask per image. 255 is unspecified. Resized to the model's S x S.
      num_images: N; by default the number of rows given, else 4.
      seed: 0 to 2**32 - 1. Image i is a function of (seed, i).
      first_image: i of the first image, so that many images can be drawn call by call.
      steps: network evaluations per image, 1 to T.
      guidance: {'attributes': 3.0, 'mask': 1.5} by default; one number means both, a missing key its
        default. 1 is no guidance, more follows the condition more closely.
      sampler: 'ddpm', 'ddim' or 'dpmpp_2m'.
      eta: noise of DDIM, 0 (none) to 1 (as DDPM).
      guidance_interval: (low, high) timesteps, both included, outside which guidance is off.
      variation: {'of': [(seed, image, weight), ...], 'strength': 0.3} draws variations of another image:
        its noise, the sum of these images' with their weights (of one image: weight 1), turned towards
        the noise of (seed, i). Strength 0 is the other image, 1 has nothing of it.
      batch_size: images drawn at a time, 8 by default; more takes more memory.
      progress: shows a progress bar, or is called with the steps that are done and their number, from other
        threads; it must not draw.

    Raises:
      UserError: any of these is out of range, or a condition that this model does not take.
    """
    if batch_size is not None and batch_size < 1:
      raise UserError(f'batch_size must be at least 1, not {batch_size}.')
    if not 0 <= seed < 2**32:
      raise UserError(f'seed must be from 0 to {2**32 - 1}, not {seed}.')
    if first_image < 0:
      raise UserError(f'first_image must be at least 0, not {first_image}.')
    attributes, mask = self.read_conditions(attributes, mask, num_images)
    scales = conditions.read_guidance(guidance)
    branches = cfg.guidance_branches(
      scales['attributes'],
      scales['mask'],
      bool(attributes.any()),
      bool((mask != UNSPECIFIED).any()),
    )
    options = {'sampler': sampler, 'steps': steps, 'eta': eta}
    interval = conditions.read_interval(guidance_interval, self.schedule.num_timesteps)
    start = () if variation is None else self._start(conditions.read_variation(variation))
    run = self._sampler(branches, interval, options, bool(progress), bool(start))
    weights = np.array([branch.weight for branch in branches], np.float32)
    calls = [
      (
        (
          self._params,
          weights,
          *start,
          samplers.image_keys(seed, first_image + rows),
          attributes[rows],
          mask[rows],
        ),
        count,
      )
      for rows, count in _batches(np.arange(len(mask)), batch_size)
    ]
    run.check(*calls[0][0])  # bad options are reported before the bar appears
    ticks = steps * sum(run.parts(len(arguments[-1])) for arguments, _ in calls)
    with self.ticking(ticks, 'sampling', progress):
      latents = [*_fetched((run(*arguments), count) for arguments, count in calls)]
    return np.concatenate(latents)

  def _start(self, variation: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """What noise is turned towards: the other image's (h, w, C), scaled, and the scale of the own."""
    angle = variation['strength'] * np.pi / 2
    noise = np.zeros(self.latent_shape)
    for seed, image, weight in variation['of']:
      keys = samplers.image_keys(seed, np.array([image]))
      noise += weight * np.asarray(samplers.initial_noise(keys, self.latent_shape)[0], np.float64)
    return np.float32(np.cos(angle) * noise), np.float32(np.sin(angle))

  def encode(self, images) -> jax.Array:
    """Images to whitened latents, taken before quantisation.

    Args:
      images: (B, S, S, 3) float in [-1, 1].

    Returns:
      (B, h, w, C) float32, (raw - mean) / std.

    Raises:
      UserError: another shape or an integer dtype.
    """
    return self._encode(self._params, self._check_images(images))

  def _check_images(self, images) -> jax.Array:
    images = jnp.asarray(images)
    wanted = (self.image_size, self.image_size, 3)
    if images.ndim != 4 or images.shape[1:] != wanted:
      raise UserError(f'Images must be (batch, {str(wanted)[1:]}, not {images.shape}.')
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise UserError(f'Images must be float in [-1, 1], not {images.dtype}: x / 127.5 - 1.')
    return images

  def decode(self, latents) -> jax.Array:
    """Whitened latents (B, h, w, C) to images (B, S, S, 3) float32 in [-1, 1].

    Raises:
      UserError: another shape.
    """
    return self._decode(self._params, self._check_latents(latents))

  def reconstruct(self, images) -> tuple[jax.Array, jax.Array | None]:
    """Images through the autoencoder, quantisation included.

    Args:
      images: (B, S, S, 3) float in [-1, 1].

    Returns:
      (B, S, S, 3) float32 in [-1, 1], and the codes used (B, h, w) int32, None without a codebook.

    Raises:
      UserError: as `encode`.
    """
    return self._reconstruct(self._params, self._check_images(images))

  def denoise(self, latents, timesteps, attributes=None, mask=None) -> jax.Array:
    """One evaluation of the network, without guidance.

    Args:
      latents: (B, h, w, C) float, noisy and whitened.
      timesteps: (B,) or () integers in [0, T).
      attributes, mask: as of `sample_latents`; of one row or B.

    Returns:
      (B, h, w, C) float32: the noise, or v, as diffusion.prediction of the config says.

    Raises:
      UserError: another shape, a timestep out of range, or a condition that the model does not take.
    """
    latents = self._check_latents(latents)
    attributes, mask = self.read_conditions(attributes, mask, len(latents))
    timesteps = np.asarray(timesteps)
    if timesteps.shape not in ((), (len(latents),)):
      raise UserError(f'Timesteps must be ({len(latents)},) or one, not {timesteps.shape}.')
    if not ((timesteps >= 0) & (timesteps < self.schedule.num_timesteps)).all():
      raise UserError(f'Timesteps run from 0 to {self.schedule.num_timesteps - 1}.')
    timesteps = np.broadcast_to(timesteps, len(latents)).astype(np.int32)
    return self._denoise(self._params, latents, timesteps, attributes, mask)

  def read_conditions(
    self, attributes=None, mask=None, num_images: int | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Conditions in any form that `sample_latents` takes, as arrays with a row per image.

    Returns:
      attributes (N, A) int8 in {-1, 0, 1} and mask (N, S, S) uint8 class ids, 255 unspecified.

    Raises:
      UserError: they cannot be read, do not fit num_images, or this model does not take them.
    """
    if num_images is not None and num_images < 1:
      raise UserError(f'num_images must be at least 1, not {num_images}.')
    attributes = conditions.read_attributes(attributes, self.schema)
    mask = conditions.read_mask(mask, self.schema, self.image_size)
    for name, given in (('attributes', attributes.any()), ('mask', (mask != UNSPECIFIED).any())):
      if given and self.config['denoiser'][name] == 'none':
        raise UserError(
          f'This model was trained without {name}: leave {name} out, or take another.'
        )
    rows = max(len(attributes), len(mask))
    count = num_images or (rows if rows > 1 else 4)
    for name, array in (('attributes', attributes), ('mask', mask)):
      if len(array) not in (1, count):
        raise UserError(f'{name} has {len(array)} rows, but {count} images are asked for.')
    return tuple(np.broadcast_to(array, (count, *array.shape[1:])) for array in (attributes, mask))

  def _check_latents(self, latents) -> jax.Array:
    latents = jnp.asarray(latents, jnp.float32)
    if latents.ndim != 4 or latents.shape[1:] != self.latent_shape:
      raise UserError(f'Latents must be (batch, {str(self.latent_shape)[1:]}, not {latents.shape}.')
    return latents

  def _encode_fn(self, params, images):
    variables = {'params': params['autoencoder']}
    return self.statistics.whiten(self._autoencoder.apply(variables, images, method='encode'))

  def _decode_fn(self, params, latents):
    variables = {'params': params['autoencoder']}
    raw = self.statistics.unwhiten(latents)
    return jnp.clip(self._autoencoder.apply(variables, raw, method='decode'), -1.0, 1.0)

  def _reconstruct_fn(self, params, images):
    output = self._autoencoder.apply({'params': params['autoencoder']}, images)
    return jnp.clip(output.reconstruction, -1.0, 1.0), output.indices

  def _denoise_fn(self, params, latents, timesteps, attributes, mask):
    return self._denoiser.apply(
      {'params': params['denoiser']}, latents, timesteps, attributes, mask
    )

  def _sampler(self, branches, interval, options: dict, ticks: bool, varied: bool) -> Callable:
    """The jitted sampler with these static options, compiled once for each batch size.

    Its arguments: params, weights (branches,), of variations what `_start` gives, and by rows keys,
    attributes and mask.
    """
    seen = tuple((branch.attributes, branch.mask) for branch in branches)

    def draw(params, weights, noise, keys, attributes, mask):
      conditions = cfg.branch_conditions(branches, attributes, mask)
      return samplers.sample(
        self.denoise_fn(params, *conditions, weights, interval, ticks),
        noise,
        keys,
        self.schedule,
        prediction=self.config['diffusion']['prediction'],
        **options,
      )

    def run(params, weights, keys, attributes, mask):
      noise = samplers.initial_noise(keys, self.latent_shape)
      return draw(params, weights, noise, keys, attributes, mask)

    def vary(params, weights, other, share, keys, attributes, mask):
      noise = other + share * samplers.initial_noise(keys, self.latent_shape)
      return draw(params, weights, noise, keys, attributes, mask)

    key = ('sample', seen, interval, tuple(options.items()), ticks, varied)
    return self.program(key, vary if varied else run, 3)

  def program(self, key: tuple, function: Callable, batched: int) -> Callable:
    """`function` jitted, and kept, so that it is compiled once for each batch size.

    Of many, those are kept that were used last.

    Args:
      key: its name and all that is static in it.
      function: (parameters, ..., of which the last `batched` lead with the batch axis) -> arrays that do.
      batched: how many.
    """
    if key not in self._compiled:
      self._compiled[key] = sharding.OverBatch(function, self._mesh, batched)
      while len(self._compiled) > _KEPT:
        self._compiled.popitem(last=False)
    self._compiled.move_to_end(key)
    return self._compiled[key]

  def parts(self, rows: int) -> int:
    """Into how many parts a batch of so many rows is split, one for each device or core that shares it."""
    return self._decode.parts(rows)

  @property
  def params(self) -> dict:
    """What the functions of `program` take first."""
    return self._params

  def denoise_fn(self, params, attributes, mask, weights, interval=None, ticks: bool = False):
    """The guided denoise function that samplers take, to be called inside of a jitted function.

    Args:
      params: of this model.
      attributes: (K B, A) int8, the conditions of K branches of guidance, branch-major; encoded once.
      mask: (K B, S, S) uint8, likewise.
      weights, interval: see `guidance.guided`.
      ticks: moves the bar of `ticking` at every evaluation.

    Returns:
      denoise(x (B, h, w, C), timesteps (B,) int32) -> (B, h, w, C) float32.
    """
    variables = {'params': params['denoiser']}

    def predict(latents, timesteps, condition):
      return self._denoiser.apply(variables, latents, timesteps, condition, method='denoise')

    condition = self._denoiser.apply(variables, attributes, mask, method='condition')
    denoise = cfg.guided(predict, condition, weights, interval)

    def counted(x, timesteps):
      if ticks:
        jax.debug.callback(lambda: self._tick())
      return denoise(x, timesteps)

    return counted

  @contextlib.contextmanager
  def ticking(self, total: int, what: str, progress: bool | Callable[[int, int], None]):
    """Progress, as of `sample_latents`, of what runs in the block: `total` evaluations by `denoise_fn`."""
    with tqdm(total=total, unit='step', desc=what, disable=progress is not True) as bar:
      tick, lock = _counter(progress, total) if callable(progress) else bar.update, threading.Lock()

      def one_by_one():  # parts of a batch move the same bar
        with lock:
          tick()

      self._tick = one_by_one
      yield
      # Waits for programs that this thread asked for. Those of the cores' threads have ended by now, as the
      # block has fetched what they computed.
      jax.effects_barrier()


def _fetched(results):
  """Yields the first rows of each (array, count) as NumPy, once the next is under way on the device."""
  for (array, count), _ in itertools.pairwise(itertools.chain(results, [None])):
    yield np.asarray(array)[:count]


def _counter(report: Callable[[int, int], None], total: int) -> Callable[[], None]:
  """Calls `report` with 1, 2, ... of `total`, one more each time that it is called."""
  steps = itertools.count(1)
  return lambda: report(next(steps), total)


def _batches(rows: np.ndarray, batch_size: int | None):
  """Yields (indices of one batch, how many of them count); the last batch is filled up."""
  size = min(batch_size or _BATCH_SIZE, len(rows))
  for start in range(0, len(rows), size):
    batch = rows[start : start + size]
    yield np.pad(batch, (0, size - len(batch)), mode='edge'), len(batch)
