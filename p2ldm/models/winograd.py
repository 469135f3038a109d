"""Winograd's 3x3 convolution, F(4x4, 3x3): 36 products for 16 outputs, where the plain one takes 144.

Lavin and Gray, arXiv 1509.09308. A map is cut into tiles of 4 x 4 outputs, each of which depends on 6 x 6
inputs. Along one axis, with polynomials evaluated at 0, +-sqrt(1/2), +-sqrt(2) and infinity,

    output = A^T ((G kernel) * (B^T input))

and over both axes it becomes 36 matrix products, (tiles, C) times (C, D). With these points, rounding in
float32 is six times that of the plain sum in the root mean square, 1.3e-6 of the output's standard deviation
(0, +-1, +-2, as usual, are twice as bad). The transforms are matrix products, too. The gradients are taken
in the transformed domain: they are the transposes of the same four steps.

Transformed arrays are (P, P, T, channels): the products of rows and of columns, 6 each, then all tiles of a
batch.

Of a map that is doubled by nearest neighbour first, 4 x 4 outputs depend on 4 x 4 inputs, and five products
an axis will do: 25 in all. The doubled map is never made, and as all coefficients are 0, +-1 and +-1/2,
rounding is nearly that of the plain sum (1.6e-7 in the root mean square, for 1.3e-7).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TILE = 4  # outputs along an axis


class Form(NamedTuple):
  """The matrices of one axis, float64, with P products.

  Attributes:
    output: A^T, (4, P).
    kernel: G, (P, 3).
    data: B^T, (P, inputs that a tile depends on); neighbouring tiles share two.
  """

  output: np.ndarray
  kernel: np.ndarray
  data: np.ndarray

  @property
  def inputs(self) -> int:
    """Inputs along an axis that a tile depends on: its own, and one on either side."""
    return self.data.shape[1]

  @property
  def own(self) -> int:
    """Inputs along an axis from a tile to the next."""
    return self.inputs - 2


def _plain() -> Form:
  """Of the plain convolution, by Lagrange's interpolation (Toom and Cook)."""
  root = 2.0**0.5
  points = np.array([0.0, 1 / root, -1 / root, root, -root])
  output, kernel, data = np.zeros((TILE, 6)), np.zeros((6, 3)), np.zeros((6, 6))
  for i, point in enumerate(points):
    others = np.delete(points, i)
    output[:, i] = point ** np.arange(TILE)
    kernel[i] = point ** np.arange(3) / np.prod(point - others)
    data[i, :-1] = np.poly(others)[::-1]
  output[-1, -1] = kernel[-1, -1] = 1.0  # infinity
  data[-1] = np.poly(points)[::-1]
  data[np.abs(data) < 1e-12] = 0.0  # every other coefficient of a product over +-p
  return Form(output, kernel, data)


def _doubled() -> Form:
  """Of a convolution behind doubling, whose outputs of the inputs x0 to x3 are

      x0 k0 + x1 (k1 + k2), x1 (k0 + k1) + x2 k2, x1 k0 + x2 (k1 + k2) and x2 (k0 + k1) + x3 k2.

  With m and h, half of the sum and of the difference of x1 and x2, all are m (k0 + k1 + k2) and sums of
  h k1, h (k0 - k2), (x0 - x2) k0 and (x1 - x3) k2.
  """
  data = np.array(
    [[0, 0.5, 0.5, 0], [0, 0.5, -0.5, 0], [0, 0.5, -0.5, 0], [1, 0, -1, 0], [0, 1, 0, -1]]
  )
  kernel = np.array([[1, 1, 1], [0, 1, 0], [1, 0, -1], [1, 0, 0], [0, 0, 1]])
  output = np.array([[1, 1, -1, 1, 0], [1, 1, 1, 0, 0], [1, -1, 1, 0, 0], [1, -1, -1, 0, -1]])
  return Form(output, kernel, data)


PLAIN, DOUBLED = _plain(), _doubled()


def _both(matrix: np.ndarray) -> np.ndarray:
  """The matrix (M, N) for two axes at once, (M, M, N, N) float32."""
  return np.einsum('pi,qj->pqij', matrix, matrix).astype(np.float32)


def conv(x, kernel, form: Form = PLAIN):
  """The 3x3 convolution, stride 1, padded with zeros to the same size.

  Args:
    x: (B, h, w, C) float32, h and w multiples of 4; of `DOUBLED`, of 2.
    kernel: (3, 3, C, D) float32.
    form: `PLAIN`, or `DOUBLED` to have x doubled by nearest neighbour first.

  Returns:
    (B, h, w, D) float32; of `DOUBLED`, (B, 2h, 2w, D).
  """
  return forward(x, kernel, form)[0]


def forward(x, kernel, form: Form = PLAIN):
  """`conv`, and what its gradients need, data (P, P, T, C) and kernel: `fwd` of `jax.custom_vjp`."""
  data = _transform_data(x, form)
  products = jnp.einsum('pqtc,pqcd->pqtd', data, _transform_kernel(kernel, form))
  tiles = x.shape[0], x.shape[1] // form.own, x.shape[2] // form.own
  return _transform_output(products, tiles, form), (data, kernel)


def backward(saved, gradient, form: Form = PLAIN):
  """The gradients of x and of the kernel, by that of the result: `bwd` of `jax.custom_vjp`."""
  data, kernel = saved
  products = _transpose_output(gradient, form)
  weights = jnp.einsum('pqtc,pqtd->pqcd', data, products)
  kernel = _transform_kernel(kernel, form)
  # A product turns one of its factors around: the smaller one.
  few = products.shape[2] < kernel.shape[2]
  if few:
    data = jnp.einsum('pqcd,pqtd->pqct', kernel, products)
  else:
    data = jnp.einsum('pqtd,pqcd->pqtc', products, kernel)
  inputs = jnp.tensordot(_both(form.data.T), data, 2)
  tiles = gradient.shape[0], gradient.shape[1] // TILE, gradient.shape[2] // TILE
  x = _transpose_inputs(inputs.swapaxes(2, 3) if few else inputs, tiles)
  return x, jnp.tensordot(_both(form.kernel.T), weights, 2)


def _transform_kernel(kernel, form: Form):
  """(3, 3, C, D) to (P, P, C, D)."""
  return jnp.tensordot(_both(form.kernel), kernel, 2)


def _transform_data(x, form: Form):
  """(B, h, w, C) to (P, P, T, C)."""
  _, height, width, channels = x.shape
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  last = height - form.own + 1, width - form.own + 1
  inputs = jnp.stack(
    [
      jnp.stack(
        [x[:, i : i + last[0] : form.own, j : j + last[1] : form.own] for j in range(form.inputs)]
      )
      for i in range(form.inputs)
    ]
  )
  inputs = inputs.reshape(form.inputs, form.inputs, -1, channels)
  return jnp.tensordot(_both(form.data), inputs, 2)


def _transpose_inputs(inputs, tiles):
  """The inputs of all tiles, (I, I, T, C), to (B, h, w, C), where shared ones are summed."""
  inputs = inputs.reshape(*inputs.shape[:2], *tiles, -1)
  return _scatter(_scatter(inputs, 3, 1), 1, 0)


def _scatter(inputs, axis: int, stacked: int):
  """The inputs of all tiles, `stacked`, back to places along an axis; shared ones are summed."""
  before, *own, after = (jnp.take(inputs, i, stacked) for i in range(inputs.shape[stacked]))
  own[0] += _shift(after, axis, 1)
  own[-1] += _shift(before, axis, -1)
  x = jnp.stack(own, axis + 1)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _shift(x, axis: int, by: int):
  """x moved by one place along an axis, zeros behind it."""
  padding = [(0, 0, 0)] * x.ndim
  padding[axis] = (by, -by, 0)
  return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


def _transform_output(products, tiles, form: Form):
  """(P, P, T, D) to (B, 4 rows, 4 columns, D), of (B, rows, columns) tiles."""
  batch, rows, columns = tiles
  outputs = jnp.tensordot(_both(form.output), products, 2)  # (4, 4, T, D)
  outputs = outputs.reshape(TILE, TILE, batch, rows, columns, -1)
  return outputs.transpose(2, 3, 0, 4, 1, 5).reshape(batch, rows * TILE, columns * TILE, -1)


def _transpose_output(gradient, form: Form):
  """(B, h, w, D) to (P, P, T, D)."""
  batch, height, width, channels = gradient.shape
  tiles = gradient.reshape(batch, height // TILE, TILE, width // TILE, TILE, channels)
  tiles = tiles.transpose(2, 4, 0, 1, 3, 5).reshape(TILE, TILE, -1, channels)
  return jnp.tensordot(_both(form.output.T), tiles, 2)
