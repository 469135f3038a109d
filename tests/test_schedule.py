import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm.diffusion import schedule as schedules
from p2ldm.errors import UserError


@pytest.fixture(scope='module')
def schedule():
  return schedules.make_schedule()


def test_tables_follow_the_definition(schedule):
  """A plain loop over the definition, and the ends of the paper's range."""
  abar = 1.0
  for t in range(1000):
    root = 0.0015**0.5 + (0.0195**0.5 - 0.0015**0.5) * t / 999
    abar *= 1 - root**2
    assert schedule.betas[t] == pytest.approx(root**2, rel=1e-12)
    assert schedule.alphas_cumprod[t] == pytest.approx(abar, rel=1e-10)
    assert schedule.snr[t] == pytest.approx(abar / (1 - abar), rel=1e-10)
  assert schedule.betas[0] == pytest.approx(0.0015, rel=1e-12)
  assert schedule.betas[-1] == pytest.approx(0.0195, rel=1e-12)
  assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == schedule.snr.dtype == np.float64


def test_schedule_is_read_only_and_a_constant_of_jit(schedule):
  with pytest.raises(ValueError, match='read-only'):
    schedule.betas[0] = 0.5
  q_sample = jax.jit(schedules.q_sample, static_argnums=0)
  x = q_sample(schedule, jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.array([0, 999]))
  assert x.dtype == jnp.float32
  np.testing.assert_allclose(x[:, 0], np.sqrt(schedule.alphas_cumprod[[0, 999]]), rtol=1e-6)


def test_q_sample_has_the_mean_and_variance_of_the_forward_process(schedule):
  """Against adding the noise of one step at a time (arXiv 2006.11239, eq. 2), x_0 = 2."""
  timesteps = np.array([0, 100, 500, 999])
  n = 40_000
  noise = jax.random.normal(jax.random.key(0), (4, n))
  x = np.asarray(schedules.q_sample(schedule, jnp.full((4, n), 2.0), noise, timesteps))
  mean, variance = 2.0, 0.0
  for t in range(1000):
    mean *= np.sqrt(1 - schedule.betas[t])
    variance = (1 - schedule.betas[t]) * variance + schedule.betas[t]
    if t in timesteps:
      row = x[list(timesteps).index(t)]
      assert row.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / n))
      assert row.var() == pytest.approx(variance, rel=4 * np.sqrt(2 / n))


@pytest.mark.parametrize('prediction', schedules.PREDICTIONS)
def test_a_perfect_prediction_gives_back_x0_and_epsilon(schedule, prediction):
  key = jax.random.key(1)
  x0, noise = jax.random.normal(key, (2, 5, 2, 2, 3))
  timesteps = jnp.array([0, 10, 300, 700, 999])
  x = schedules.q_sample(schedule, x0, noise, timesteps)
  output = schedules.target(schedule, x0, noise, timesteps, prediction)
  # epsilon divides by sqrt(abar), 0.012 at the end, so float32 leaves 1e-5.
  found = schedules.to_x0(schedule, output, x, timesteps, prediction)
  np.testing.assert_allclose(found, x0, atol=5e-5)
  found = schedules.to_epsilon(schedule, output, x, timesteps, prediction)
  np.testing.assert_allclose(found, noise, atol=1e-5)


def test_v_is_the_velocity_of_the_angle(schedule):
  """v = d x / d phi at x = cos(phi) x_0 + sin(phi) noise (arXiv 2202.00512, appendix D)."""
  x0, noise, timesteps = jnp.array([[1.3]]), jnp.array([[-0.4]]), jnp.array([400])
  phi = float(np.arccos(np.sqrt(schedule.alphas_cumprod[400])))
  velocity = jax.grad(lambda phi: jnp.cos(phi) * 1.3 + jnp.sin(phi) * -0.4)(phi)
  v = schedules.target(schedule, x0, noise, timesteps, 'v')
  assert float(v[0, 0]) == pytest.approx(float(velocity), abs=1e-6)


def test_leading_timesteps_are_those_of_compvis():
  """CompVis' make_ddim_timesteps('uniform', 50, 1000): 1, 21, ..., 981."""
  assert schedules.spaced_timesteps(1000, 50, 'leading').tolist() == list(range(981, 0, -20))


def test_other_spacings_have_the_named_ends():
  linspace = schedules.spaced_timesteps(1000, 4, 'linspace')
  assert linspace.tolist() == [999, 666, 333, 0]
  trailing = schedules.spaced_timesteps(1000, 4, 'trailing')
  assert trailing.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize('spacing', schedules.SPACINGS)
def test_every_number_of_steps_gives_that_many_timesteps(spacing):
  for steps in range(1, 1001):
    timesteps = schedules.spaced_timesteps(1000, steps, spacing)
    assert len(timesteps) == steps and timesteps.dtype == np.int32
    assert np.all(np.diff(timesteps) < 0)
    assert timesteps[-1] >= 0 and timesteps[0] < 1000
    if steps >= 200:  # none of them starts far from the end
      assert timesteps[0] >= 990
  assert timesteps.tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize(
  ('call', 'says'),
  [
    (lambda s: schedules.make_schedule(0), 'num_timesteps'),
    (lambda s: schedules.make_schedule(10, 0.02, 0.01), 'beta_start'),
    (lambda s: schedules.make_schedule(10, 0.0, 0.01), 'beta_start'),
    (lambda s: schedules.target(s, None, None, None, 'x0'), 'epsilon, v'),
    (lambda s: schedules.spaced_timesteps(1000, 0), '1 to 1000'),
    (lambda s: schedules.spaced_timesteps(1000, 1001), '1 to 1000'),
    (lambda s: schedules.spaced_timesteps(1000, 10, 'even'), 'leading, linspace, trailing'),
  ],
)
def test_bad_input_is_a_user_error(schedule, call, says):
  with pytest.raises(UserError, match=says):
    call(schedule)
