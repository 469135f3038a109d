"""How well what was to stay stayed, and how well the change took, of edits of uint8 images.

Outside of the region: PSNR and the largest difference over its pixels, and LPIPS of the source and the edit
with the source's pixels in the region, so that what changed there is not counted. Inside: how far the edit
is from the source at all, since an edit that changes nothing keeps everything.
"""

import jax.numpy as jnp
import numpy as np

from p2ldm.data.labels import UNSPECIFIED, LabelSchema
from p2ldm.evaluation.reconstruction import lpips
from p2ldm.models.perceptual import Distance

LPIPS_SIZE = 16  # pixels a side that LPIPS needs


def psnr_where(images: np.ndarray, others: np.ndarray, where: np.ndarray) -> np.ndarray:
  """PSNR over some of the pixels.

  Args:
    images, others: (N, H, W, 3) uint8.
    where: (N, H, W) bool.

  Returns:
    (N,) float64 in dB; inf where all are equal, nan where there are none.
  """
  squares = np.square(images.astype(np.float64) - others).mean(-1)
  with np.errstate(divide='ignore', invalid='ignore'):
    mse = (squares * where).sum((1, 2)) / where.sum((1, 2))
    return 20 * np.log10(255.0) - 10 * np.log10(mse)


def lpips_outside(
  distance: Distance, images: np.ndarray, others: np.ndarray, region: np.ndarray
) -> np.ndarray:
  """LPIPS (N,) float32 of (N, H, W, 3) uint8 pairs, made equal in the region (N, H, W) bool first."""
  others = np.where(region[..., None], images, others)
  return np.asarray(lpips(distance, jnp.asarray(images), jnp.asarray(others)))


def closeness(
  images: np.ndarray, others: np.ndarray, where: np.ndarray, distance: Distance | None = None
) -> dict:
  """Figures of one pair over some of its pixels, JSON values.

  Args:
    images, others: (H, W, 3) uint8.
    where: (H, W) bool.
    distance: LPIPS; None leaves it out.

  Returns:
    psnr: None where there is no difference, or no pixel.
    max_difference: 0 to 255, None where there is no pixel.
    lpips: with `distance`.
  """
  if not where.any():
    return {'psnr': None, 'max_difference': None}
  psnr = float(psnr_where(images[None], others[None], where[None])[0])
  difference = np.abs(images.astype(np.int16) - others)[where]
  found = {
    'psnr': psnr if np.isfinite(psnr) else None,
    'max_difference': int(difference.max()),
  }
  if distance is not None:
    found['lpips'] = float(lpips_outside(distance, images[None], others[None], ~where[None])[0])
  return found


def attribute_changes(
  schema: LabelSchema,
  source: np.ndarray,
  target: np.ndarray,
  before: np.ndarray,
  after: np.ndarray,
  reconstructed: np.ndarray,
) -> dict:
  """What a classifier says of an edit.

  Args:
    schema: names the attributes.
    source, target: (A,) in {-1, 0, 1}, what the source was taken to show and what the edit was to show.
    before, after: (A,) in {-1, 1}, what the classifier sees in the source and in the edit.
    reconstructed: (A,), what it sees in the source after the autoencoder alone.

  Returns:
    changed: {name: {'asked', 'seen_in_source', 'seen_in_edit', 'took'}} of what was to change.
    others_flipped: names of the rest that the classifier sees otherwise than in the source.
    others_flipped_by_autoencoder: names of these that it sees otherwise in the reconstruction, too.
    others: how many these could be.
  """
  changed = (source != target) & (target != 0)
  flipped = ~changed & (before != after)
  by_autoencoder = flipped & (before != reconstructed)
  return {
    'changed': {
      schema.attributes[i]: {
        'asked': int(target[i]),
        'seen_in_source': int(before[i]),
        'seen_in_edit': int(after[i]),
        'took': bool(after[i] == target[i]),
      }
      for i in np.flatnonzero(changed)
    },
    'others_flipped': [schema.attributes[i] for i in np.flatnonzero(flipped)],
    'others_flipped_by_autoencoder': [schema.attributes[i] for i in np.flatnonzero(by_autoencoder)],
    'others': int((~changed).sum()),
  }


def mask_agreement(
  target: np.ndarray, before: np.ndarray, after: np.ndarray, where: np.ndarray
) -> dict:
  """Shares of pixels that show their class, as a parser sees them.

  Args:
    target: (H, W) uint8, what the edit was to show; 255 asks for nothing.
    before, after: (H, W) uint8, what the parser sees in the source and in the edit.
    where: (H, W) bool.

  Returns:
    pixels: how many ask for something; source, edit: shares of them, None where there are none.
  """
  asked = where & (target != UNSPECIFIED)
  count = int(asked.sum())
  shares = {
    name: float((parsed == target)[asked].mean()) if count else None
    for name, parsed in (('source', before), ('edit', after))
  }
  return {'pixels': count, **shares}
