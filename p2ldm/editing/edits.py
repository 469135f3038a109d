"""Edits of an image: other attributes, another mask, in a region or everywhere, and the rest stays.

DDIM inversion under the conditions of the source gives the latents x_t that lead to it. Generation starts
from them, under the conditions of the target, and follows them outside of the region (blended latents,
arXiv 2206.02779). Guidance acts in generation alone, and between source and target instead of between
nothing and target (as in arXiv 2305.16807):

    e = e(a, m) + w_a (e(a', m) - e(a, m)) + w_m (e(a', m') - e(a', m))

with a, m of the source and a', m' of the target. So nothing but what was asked for is amplified, and an edit
that asks for nothing gives the source back. Where the source is unspecified this is `diffusion.guidance`.

Of the source's noise a share may be replaced by fresh noise: 0 starts from the inversion, 1 from
q_sample(x_0), which is diffusers' img2img, or inpainting in a region.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageFilter

from p2ldm.conditions import read_interval
from p2ldm.data.labels import UNSPECIFIED
from p2ldm.diffusion import guidance as cfg
from p2ldm.diffusion import inversion, samplers
from p2ldm.diffusion.schedule import spaced_timesteps
from p2ldm.errors import UserError
from p2ldm.pictures import to_uint8
from p2ldm.pipeline import Pipeline


class Conditions(NamedTuple):
  """Attributes (N, A) int8 in {-1, 0, 1} and masks (N, S, S) uint8 class ids, 255 unspecified."""

  attributes: np.ndarray
  mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Settings:
  """How images are edited.

  Attributes:
    steps: of the whole schedule, 1 to T.
    strength: how much of it is gone back and forth, above 0 to 1; less keeps more of the source.
    attributes_scale, mask_scale: of guidance; 1 is none.
    guidance_interval: (low, high) timesteps, both included, outside which guidance is off.
    fresh_noise: share of the noise that the region starts from and that is drawn anew, 0 to 1.
    seed: of that noise; image i is a function of (seed, i).
    refinements: see `inversion.invert`.
    paste: puts the source's pixels back outside of the region.
    feather: pixels inside of the region over which the edit fades into the source when it is pasted.
  """

  steps: int = 50
  strength: float = 1.0
  attributes_scale: float = 2.0
  mask_scale: float = 3.0
  guidance_interval: tuple[int, int] | None = None
  fresh_noise: float = 0.0
  seed: int = 0
  refinements: int = 2
  paste: bool = True
  feather: int = 2

  def check(self, num_timesteps: int | None = None):
    """Raises `UserError` for what no model can do, or with T given, one of so many timesteps."""
    if num_timesteps is not None:
      read_interval(self.guidance_interval, num_timesteps)
    for name, value in (('strength', self.strength), ('fresh_noise', self.fresh_noise)):
      if not 0 <= value <= 1:
        raise UserError(f'{name} must be from 0 to 1, not {value:g}.')
    if not self.strength:
      raise UserError('strength=0 changes nothing; give more than 0, and at most 1.')
    if not 0 <= self.seed < 2**32:
      raise UserError(f'seed must be from 0 to {2**32 - 1}, not {self.seed}.')
    for name, value in (('refinements', self.refinements), ('feather', self.feather)):
      if value < 0:
        raise UserError(f'{name} must be at least 0, not {value}.')


class Edits(NamedTuple):
  """Edited images, (N, S, S, 3) uint8.

  Attributes:
    images: the result.
    drawn: as decoded, before anything was pasted.
    reconstructions: (1 or N, ...) of the sources, by the autoencoder alone: what `drawn` can reach at most
      where nothing changes.
  """

  images: np.ndarray
  drawn: np.ndarray
  reconstructions: np.ndarray


def edit(
  pipeline: Pipeline,
  images: np.ndarray,
  source: Conditions,
  target: Conditions,
  region: np.ndarray,
  settings: Settings,
  *,
  first_image: int = 0,
  progress: bool = False,
) -> Edits:
  """Edits a batch.

  Args:
    pipeline: the model.
    images: (1 or N, S, S, 3) uint8; a single one is edited N times.
    source: conditions that they show, of as many rows.
    target: conditions of the edits, of N rows.
    region: (1 or N, S, S) bool, what may change.
    settings: how.
    first_image: i of the first edit.
    progress: shows progress bars.

  Raises:
    UserError: settings or shapes that do not fit, or a condition that this model does not take.
  """
  latents = np.asarray(pipeline.encode(images.astype(np.float32) / 127.5 - 1.0))
  edited = edit_latents(
    pipeline,
    latents,
    source,
    target,
    region,
    settings,
    first_image=first_image,
    progress=progress,
  )
  drawn = to_uint8(np.asarray(pipeline.decode(edited)))
  pasted = paste(images, drawn, region, settings.feather) if settings.paste else drawn
  return Edits(pasted, drawn, to_uint8(np.asarray(pipeline.decode(latents))))


def edit_latents(
  pipeline: Pipeline,
  latents: np.ndarray,
  source: Conditions,
  target: Conditions,
  region: np.ndarray,
  settings: Settings,
  *,
  first_image: int = 0,
  progress: bool = False,
) -> np.ndarray:
  """As `edit`, from whitened latents (1 or N, h, w, C) of the sources to those of the edits (N, h, w, C)."""
  settings.check(pipeline.schedule.num_timesteps)
  timesteps = timesteps_of(pipeline, settings)
  source = Conditions(*pipeline.read_conditions(*source, num_images=len(latents)))
  target = Conditions(*pipeline.read_conditions(*target, num_images=len(target.mask)))
  trajectory = _invert(pipeline, latents, source, settings, timesteps, progress)
  count = len(target.mask)
  trajectory, region, *source = (
    np.broadcast_to(rows, (count, *rows.shape[1:])) for rows in (trajectory, region, *source)
  )
  return _draw(
    pipeline,
    trajectory,
    Conditions(*source),
    target,
    region,
    settings,
    timesteps,
    first_image,
    progress,
  )


def timesteps_of(pipeline: Pipeline, settings: Settings) -> np.ndarray:
  """(K,) int32: the last round(strength * steps) timesteps of the sampler, at least one.

  Raises:
    UserError: as `spaced_timesteps`.
  """
  timesteps = spaced_timesteps(pipeline.schedule.num_timesteps, settings.steps)
  return timesteps[-max(1, round(settings.strength * settings.steps)) :]


def paste(images, drawn, region, feather: int) -> np.ndarray:
  """Edits inside of the region, the sources outside of it, to the last bit.

  Args:
    images: (1 or N, S, S, 3) uint8, sources.
    drawn: (N, S, S, 3) uint8, edits.
    region: (1 or N, S, S) bool.
    feather: pixels from the region's edge inwards over which the edit fades in.
  """
  inner = sum(grown(region, -k).astype(np.float32) for k in range(feather + 1)) / (feather + 1)
  share = inner[..., None]
  return np.round(share * drawn + (1 - share) * images).astype(np.uint8)


def grown(region: np.ndarray, pixels: int) -> np.ndarray:
  """Regions (N, S, S) bool, larger by so many pixels in each direction, or smaller where negative.

  The picture's own edge is no edge of a region.
  """
  if not pixels:
    return region
  kind = ImageFilter.MaxFilter if pixels > 0 else ImageFilter.MinFilter
  rank = kind(2 * abs(pixels) + 1)
  return np.stack(
    [np.asarray(Image.fromarray(r.astype(np.uint8) * 255).filter(rank)) > 127 for r in region]
  )


def _invert(pipeline, latents, source, settings, timesteps, progress) -> np.ndarray:
  """(N, K + 1, h, w, C): the latents on the way to `latents` (N, h, w, C), of `inversion.invert`."""

  def run(params, latents, attributes, mask):
    passed = inversion.invert(
      pipeline.denoise_fn(params, attributes, mask, (1.0,), ticks=progress),
      latents,
      pipeline.schedule,
      timesteps,
      refinements=settings.refinements,
      prediction=pipeline.config['diffusion']['prediction'],
    )
    return jnp.moveaxis(passed, 0, 1)

  key = ('invert', tuple(timesteps.tolist()), settings.refinements, progress)
  program = pipeline.program(key, run, 3)
  total = len(timesteps) * (1 + settings.refinements) * program.parts(len(latents))
  with pipeline.ticking(total, 'inverting', progress):
    return np.asarray(program(pipeline.params, latents, *source))


def _draw(
  pipeline, trajectory, source, target, region, settings, timesteps, first_image, progress
) -> np.ndarray:
  """Latents (N, h, w, C) of the edits; all arrays have N rows."""
  branches = cfg.guidance_branches(
    settings.attributes_scale,
    settings.mask_scale,
    bool((source.attributes != target.attributes).any()),
    bool((source.mask != target.mask).any()),
  )
  weights = np.array([branch.weight for branch in branches], np.float32)
  kept = 1.0 - _in_latents(region, pipeline.latent_shape[0]).astype(np.float32)[..., None]
  abar = float(pipeline.schedule.alphas_cumprod[timesteps[0]])

  def run(params, weights, keys, trajectory, kept, *conditions):
    start = _renoised(trajectory, keys, abar, settings.fresh_noise)
    start = kept * trajectory[:, 0] + (1.0 - kept) * start
    trajectory = jnp.moveaxis(trajectory.at[:, 0].set(start), 1, 0)
    stacked = _stacked(branches, Conditions(*conditions[:2]), Conditions(*conditions[2:]))
    return inversion.keep(
      pipeline.denoise_fn(params, *stacked, weights, settings.guidance_interval, progress),
      trajectory,
      kept,
      pipeline.schedule,
      timesteps,
      prediction=pipeline.config['diffusion']['prediction'],
    )

  seen = tuple((branch.attributes, branch.mask) for branch in branches)
  static = (seen, settings.guidance_interval, settings.fresh_noise, progress)
  program = pipeline.program(('edit', tuple(timesteps.tolist()), *static), run, 7)
  keys = samplers.image_keys(settings.seed, first_image + np.arange(len(trajectory)))
  arguments = (pipeline.params, weights, keys, trajectory, kept, *source, *target)
  program.check(*arguments)  # bad options are reported before the bar appears
  total = len(timesteps) * program.parts(len(trajectory))
  with pipeline.ticking(total, 'editing', progress):
    return np.asarray(program(*arguments))


def _renoised(trajectory, keys, abar: float, share: float):
  """The first latents of a trajectory (N, K + 1, h, w, C), a share of their noise drawn anew."""
  x, x0 = trajectory[:, 0], trajectory[:, -1]
  if not share:
    return x
  noise = (x - np.sqrt(abar) * x0) / np.sqrt(1.0 - abar)
  fresh = samplers.initial_noise(keys, x0.shape[1:])
  return np.sqrt(abar) * x0 + np.sqrt(1.0 - abar) * (
    np.sqrt(1.0 - share**2) * noise + share * fresh
  )


def _stacked(branches: Sequence[cfg.Branch], source: Conditions, target: Conditions) -> Conditions:
  """As `guidance.branch_conditions`, with the source's condition where a branch does not see the target's."""
  return Conditions(
    jnp.concatenate([(target if b.attributes else source).attributes for b in branches]),
    jnp.concatenate([(target if b.mask else source).mask for b in branches]),
  )


def _in_latents(region: np.ndarray, side: int) -> np.ndarray:
  """(N, side, side) bool: where any pixel of (N, S, S) is in the region."""
  factor = region.shape[1] // side
  return region.reshape(len(region), side, factor, side, factor).any((2, 4))


def target_of(
  source: Conditions, attributes: np.ndarray, mask: np.ndarray, release: np.ndarray
) -> Conditions:
  """The conditions of an edit: what is asked for, elsewhere those of the source.

  Args:
    source: of N rows.
    attributes: (N, A), 0 keeps the source's.
    mask: (N, S, S), 255 keeps the source's class.
    release: (N, S, S) bool: places whose class is left to the model where `mask` is 255.
  """
  kept = np.where(release, np.uint8(UNSPECIFIED), source.mask)
  return Conditions(
    np.where(attributes != 0, attributes, source.attributes).astype(np.int8),
    np.where(mask != UNSPECIFIED, mask, kept).astype(np.uint8),
  )
