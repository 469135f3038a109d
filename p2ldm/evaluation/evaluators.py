"""The parser and the classifier as evaluation uses them: uint8 images in, labels out."""

import jax
import jax.numpy as jnp
import numpy as np

from p2ldm import sharding, storage
from p2ldm.data.labels import LabelSchema
from p2ldm.errors import UserError
from p2ldm.interop import evaluator_directory
from p2ldm.interop.evaluator_directory import EvaluatorParts
from p2ldm.models.layers import resolve_dtype

MAX_BATCH = 64  # images on the devices at a time


class Evaluator:
  """What parser and classifier have in common; see `load_parser` and `load_classifier`.

  Attributes:
    schema: of the data set that it was trained on.
    image_size: S, pixels along each side of the images it takes.
    sha256: of its weights.
    ceiling: its figures on held-out real faces.
    provenance: where it comes from.
  """

  kind: str

  def __init__(self, parts: EvaluatorParts, mesh=None, compute_dtype: str = 'auto'):
    """Takes an evaluator in memory and the mesh whose devices share the images.

    Args:
      parts: of the evaluator; without params, they are to come by `replace_params`.
      mesh: None takes the first device.
      compute_dtype: as config.compute_dtype.

    Raises:
      UserError: there is no such `compute_dtype`.
    """
    self.schema, self.image_size = parts.schema, parts.image_size
    self.sha256, self.ceiling, self.provenance = parts.sha256, parts.ceiling, parts.provenance
    self._mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    self._model = parts.make_module(resolve_dtype(compute_dtype))
    self._jitted = jax.jit(self._label)
    if parts.params is not None:
      self.replace_params(parts.params)

  def replace_params(self, params):
    """Goes on with other parameters of the same shapes, without compiling again."""
    self._params = jax.device_put(params, sharding.replicated(self._mesh))

  def check_schema(self, schema: LabelSchema, source: str = 'the data set'):
    """Compares the names that this evaluator gives with those of `source`.

    Raises:
      UserError: they differ, or stand in another order; the message says where.
    """
    what = {'parser': 'classes', 'classifier': 'attributes'}[self.kind]
    mine, wanted = getattr(self.schema, what), getattr(schema, what)
    if mine == wanted:
      return
    lacks = [name for name in wanted if name not in mine]
    more = [name for name in mine if name not in wanted]
    if lacks or more:
      parts = [f'it does not know {", ".join(lacks)}'] if lacks else []
      parts += [f'it knows {", ".join(more)} besides'] if more else []
    else:
      i = next(i for i, (a, b) in enumerate(zip(mine, wanted, strict=True)) if a != b)
      parts = [f'they are the same in another order: number {i} is {mine[i]}, not {wanted[i]}']
    raise UserError(
      f'The {self.kind} was trained on other {what} than {source} has: {"; ".join(parts)}. Train the '
      f'evaluators on a data set with the schema of {source}, or evaluate with that schema.'
    )

  def check_image_size(self, image_size: int, source: str = 'the images'):
    """Raises `UserError` unless images of `source` have the size that this evaluator takes."""
    if image_size != self.image_size:
      raise UserError(
        f'The {self.kind} takes images of {self.image_size} x {self.image_size} pixels, and {source} '
        f'have {image_size}. Train the evaluators on a data set prepared at {image_size} px.'
      )

  def predict(self, images: np.ndarray) -> np.ndarray:
    """The labels of images.

    Args:
      images: (B, S, S, 3) uint8, B of any size.

    Returns:
      Of a parser (B, S, S) uint8 class ids, of a classifier (B, A) int8, each -1 or 1.

    Raises:
      UserError: the images are of another size, shape or dtype.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
      raise UserError(
        f'The {self.kind} takes images (B, {self.image_size}, {self.image_size}, 3) uint8, not '
        f'{images.shape} {images.dtype}.'
      )
    for size in images.shape[1:3]:
      self.check_image_size(size)
    limit = sharding_multiple(MAX_BATCH, self._mesh)
    chunks = [images[i : i + limit] for i in range(0, max(1, len(images)), limit)]
    return np.concatenate([self._predict(chunk) for chunk in chunks])

  def _predict(self, images: np.ndarray) -> np.ndarray:
    """Pads to a power of two, so that few batch sizes are ever compiled."""
    rows = len(images)
    size = sharding_multiple(1 << max(0, rows - 1).bit_length(), self._mesh)
    padded = np.pad(images, [(0, size - rows)] + [(0, 0)] * 3)
    batch = sharding.put_batch(padded, self._mesh)
    return np.asarray(self._jitted(self._params, batch))[:rows]

  def _logits(self, params, images):
    return self._model.apply({'params': params}, images.astype(jnp.float32) / 127.5 - 1.0)

  def _label(self, params, images):
    raise NotImplementedError


class Parser(Evaluator):
  """Gives every pixel the class with the largest logit."""

  kind = 'parser'

  def _label(self, params, images):
    return jnp.argmax(self._logits(params, images), axis=-1).astype(jnp.uint8)


class Classifier(Evaluator):
  """Says of every attribute whether it is present (1, a logit above 0) or absent (-1)."""

  kind = 'classifier'

  def _label(self, params, images):
    return jnp.where(self._logits(params, images) > 0, 1, -1).astype(jnp.int8)


def make_evaluator(parts: EvaluatorParts, mesh=None, compute_dtype: str = 'auto') -> Evaluator:
  """The evaluator of parts in memory; arguments and errors as of `Evaluator`."""
  kinds = {'parser': Parser, 'classifier': Classifier}
  return kinds[parts.kind](parts, mesh, compute_dtype)


def load_parser(directory: str | storage.Path, mesh=None, compute_dtype: str = 'auto') -> Parser:
  """The parser of an evaluator directory, or of a workdir that has parser/model.

  Args:
    directory: where it lies.
    mesh: the devices that share the images; None takes the first device.
    compute_dtype: as config.compute_dtype.

  Raises:
    UserError: there is none, or it is incomplete or damaged.
  """
  return make_evaluator(evaluator_directory.load(directory, 'parser'), mesh, compute_dtype)


def load_classifier(
  directory: str | storage.Path, mesh=None, compute_dtype: str = 'auto'
) -> Classifier:
  """As `load_parser`, for the classifier of a directory or of a workdir that has classifier/model."""
  return make_evaluator(evaluator_directory.load(directory, 'classifier'), mesh, compute_dtype)


def sharding_multiple(count: int, mesh) -> int:
  """The smallest multiple of the number of devices that is at least `count`."""
  return -(-count // mesh.size) * mesh.size
