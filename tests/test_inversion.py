"""DDIM backwards comes from where DDIM goes; what is kept is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_samplers import ABAR, SCHEDULE, expected_output, gaussian_x0, noise_and_keys

from p2ldm.diffusion import inversion, samplers
from p2ldm.diffusion.schedule import PREDICTIONS, spaced_timesteps
from p2ldm.errors import UserError


def wavy_x0(x, abar):
  """No data's, but nothing here asks for that: a denoise function that is not linear."""
  return gaussian_x0(x, abar) + 0.1 * jnp.sin(3 * x)


def ddim(denoise, noise, timesteps, prediction):
  draw = jax.jit(
    lambda x: samplers.ddim(denoise, x, None, SCHEDULE, timesteps, prediction=prediction)
  )
  return np.asarray(draw(noise))


def invert(denoise, x0, timesteps, prediction, **options):
  run = jax.jit(
    lambda x: inversion.invert(denoise, x, SCHEDULE, timesteps, prediction=prediction, **options)
  )
  return np.asarray(run(x0))


@pytest.mark.parametrize('prediction', PREDICTIONS)
@pytest.mark.parametrize('x0_of', [gaussian_x0, wavy_x0])
def test_it_goes_back_to_the_noise_that_ddim_came_from(x0_of, prediction):
  denoise, timesteps = expected_output(x0_of, prediction), spaced_timesteps(1000, 20)
  noise, _ = noise_and_keys()
  x0 = ddim(denoise, noise, timesteps, prediction)
  errors = [
    np.abs(invert(denoise, x0, timesteps, prediction, refinements=n)[0] - noise).max()
    for n in (0, 2, 8)
  ]
  assert errors[2] < 2e-3 and errors[2] < errors[1] / 3 < errors[0] / 9


def test_the_latents_on_the_way_are_those_of_ddim():
  denoise, timesteps = expected_output(wavy_x0), spaced_timesteps(1000, 10)
  noise, _ = noise_and_keys()
  x0 = ddim(denoise, noise, timesteps, 'epsilon')
  passed = invert(denoise, x0, timesteps, 'epsilon', refinements=12)
  assert passed.shape == (11, *noise.shape)
  np.testing.assert_array_equal(passed[-1], x0)
  for k in (3, 7):
    rest = ddim(denoise, passed[k], timesteps[k:], 'epsilon')
    np.testing.assert_allclose(rest, x0, atol=2e-3)


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_what_is_kept_ends_as_it_was_and_the_rest_is_drawn_anew(prediction):
  old, new = expected_output(wavy_x0, prediction), expected_output(gaussian_x0, prediction)
  timesteps = spaced_timesteps(1000, 10)
  noise, _ = noise_and_keys()
  x0 = ddim(old, noise, timesteps, prediction)
  passed = invert(old, x0, timesteps, prediction, refinements=8)
  kept = jnp.zeros((1, 8, 8, 1)).at[:, 2:6].set(1.0)

  def run(denoise, kept):
    return np.asarray(
      inversion.keep(denoise, passed, kept, SCHEDULE, timesteps, prediction=prediction)
    )

  np.testing.assert_array_equal(run(new, kept)[:, 2:6], x0[:, 2:6])
  np.testing.assert_allclose(run(old, 0.0), x0, atol=5e-3)
  anew = ddim(new, passed[0], timesteps, prediction)
  np.testing.assert_allclose(run(new, 0.0), anew, atol=1e-4)
  np.testing.assert_allclose(
    run(new, kept)[:, :2], anew[:, :2], atol=1e-4
  )  # no place looks at another


def test_a_part_of_the_way():
  """From the middle of the schedule on: what was drawn before it stays."""
  denoise, timesteps = expected_output(gaussian_x0), spaced_timesteps(1000, 20)[8:]
  x0 = jnp.full((2, 4, 4, 1), 0.3)
  passed = invert(denoise, x0, timesteps, 'epsilon', refinements=8)
  assert passed.shape[0] == 13
  back = ddim(denoise, passed[0], timesteps, 'epsilon')
  np.testing.assert_allclose(back, x0, atol=1e-3)
  assert ABAR[timesteps[0]] > ABAR[spaced_timesteps(1000, 20)[0]]


def test_bad_input():
  x0 = jnp.zeros((1, 4, 4, 1))
  denoise = expected_output(gaussian_x0)
  with pytest.raises(UserError, match='must decrease'):
    inversion.invert(denoise, x0, SCHEDULE, [1, 2])
  with pytest.raises(UserError, match='prediction'):
    inversion.invert(denoise, x0, SCHEDULE, [2, 1], prediction='x')
