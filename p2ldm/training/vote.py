"""How several processes agree that one of them was sent SIGTERM: they vote at every training step."""

import jax
import jax.numpy as jnp
import numpy as np

from p2ldm import processes, sharding


class Vote:
  """Whether any process wants something, asked at every step without waiting for the answer."""

  def __init__(self, mesh: jax.sharding.Mesh):
    """Takes the mesh over whose devices the votes are counted."""
    self._mesh, self._last = mesh, None
    self._any = jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))

  def __call__(self, mine: bool) -> bool:
    """Hands in the vote of this process. All must do so, equally often.

    Returns:
      Whether any process voted yes at the call before, the same in all of them; of one process, its vote.
    """
    if not processes.several():
      return mine
    last, votes = self._last, np.full(len(self._mesh.local_devices), mine)
    self._last = self._any(sharding.put_rows(votes, self._mesh))
    return last is not None and bool(last)
