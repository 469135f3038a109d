"""Vector quantisation of latents (van den Oord et al., 2017, arXiv 1711.00937).

  k = argmin_j |z - e_j|^2,   z_q = e_k
  codebook loss   = mean (sg(z) - z_q)^2     moves the codes towards the latents
  commitment loss = mean (z - sg(z_q))^2     moves the latents towards their codes

The gradient of z_q reaches z unchanged (straight-through). Everything is float32.

Reference: taming-transformers' `VectorQuantizer2`. CompVis' VQModel leaves its `legacy` flag on,
which puts beta = 0.25 on the codebook loss and 1 on the commitment loss, the reverse of the paper.
The two losses are returned apart, so either weighting is a matter of configuration.
"""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

_GROUPS = 32  # of codes, at most


@flax.struct.dataclass
class Quantized:
  """What `Quantizer` returns."""

  latent: jax.Array  # (B, h, w, C) float32: the nearest codes; its gradient goes to the input
  codebook_loss: jax.Array  # () float32
  commitment_loss: jax.Array  # () float32
  indices: jax.Array  # (B, h, w) int32


class Quantizer(nn.Module):
  """A codebook of `codebook_size` = K codes; replaces each latent vector by the nearest code.

  Codes start uniform in +-init_range; 0 is the reference's 1 / K. From there a long training spreads
  them over the latents; a short one needs a start that covers them, or few codes are ever used.
  """

  codebook_size: int
  init_range: float = 0.0

  @nn.compact
  def __call__(self, latent):
    """(B, h, w, C) of any float dtype -> Quantized."""
    latent = latent.astype(jnp.float32)
    bound = self.init_range or 1 / self.codebook_size
    codes = self.param(
      'embedding', _uniform(bound), (self.codebook_size, latent.shape[-1]), jnp.float32
    )
    indices = nearest_code(latent, codes)
    nearest = codes[indices]
    fixed_latent, fixed_nearest = jax.lax.stop_gradient((latent, nearest))
    return Quantized(
      # Written so that the value is exactly the code: z + (z_q - z) would round.
      latent=fixed_nearest + (latent - fixed_latent),
      codebook_loss=jnp.mean(jnp.square(nearest - fixed_latent)),
      commitment_loss=jnp.mean(jnp.square(latent - fixed_nearest)),
      indices=indices,
    )


def nearest_code(latent, codes):
  """The nearest code of each vector, the first one on a tie.

  Args:
    latent: (..., C) float32.
    codes: (K, C) float32.

  Returns:
    (...) int32 in [0, K). No gradient flows through it.
  """
  latent, codes = jax.lax.stop_gradient((latent, codes))
  # In two steps: the group that has the nearest code, by a minimum over its members that the compiler
  # vectorizes over the groups, then the code within it; an argmin over all takes five times as long on CPUs.
  groups = codes.reshape(math.gcd(len(codes), _GROUPS), -1, codes.shape[-1])
  group = jnp.argmin(_distance(latent, groups.swapaxes(0, 1)).min(-2), axis=-1)
  within = jnp.argmin(_distance_to_own(latent, groups[group]), axis=-1)
  return (group * groups.shape[1] + within).astype(jnp.int32)


def _distance(latent, codes):
  """Squared distances of every vector (..., C) to every code (M, G, C), (..., M, G).

  Differences are squared and summed channel by channel: exact where codes lie close together, independent of
  the precision of matrix products, and XLA fuses them into what follows, so that they are never stored.
  """
  return sum(jnp.square(latent[..., c, None, None] - codes[..., c]) for c in range(codes.shape[-1]))


def _distance_to_own(latent, codes):
  """The same of every vector (..., C) to codes of its own (..., M, C), (..., M)."""
  return sum(jnp.square(latent[..., c, None] - codes[..., c]) for c in range(codes.shape[-1]))


def _uniform(bound: float):
  def init(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
