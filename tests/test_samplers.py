"""Data whose score is known: a Gaussian N(mu, s^2 I), and a mixture with no closed-form trajectory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm.diffusion import guidance, samplers
from p2ldm.diffusion.schedule import PREDICTIONS, make_schedule, spaced_timesteps
from p2ldm.errors import UserError

MEAN, STD = 0.7, 0.5
SCHEDULE = make_schedule()
ABAR = SCHEDULE.alphas_cumprod


def expected_output(x0_of, prediction='epsilon', trace=None):
  """The optimal denoise function of the data whose E[x_0 | x_t] is x0_of(x, abar)."""

  def denoise(x, timesteps):
    if trace is not None:
      trace.append((timesteps.shape, timesteps.dtype))
    abar = jnp.asarray(ABAR, jnp.float32)[timesteps].reshape((-1,) + (1,) * (x.ndim - 1))
    epsilon = (x - jnp.sqrt(abar) * x0_of(x, abar)) / jnp.sqrt(1 - abar)
    if prediction == 'epsilon':
      return epsilon
    return jnp.sqrt(abar) * epsilon - jnp.sqrt(1 - abar) * x0_of(x, abar)

  return denoise


def gaussian_x0(x, abar):
  return MEAN + jnp.sqrt(abar) * STD**2 / (abar * STD**2 + 1 - abar) * (x - jnp.sqrt(abar) * MEAN)


def mixture_x0(x, abar):
  """Two Gaussians of standard deviation 0.2 at -1 and 1, the second 1.8 times as likely."""
  variance = abar * 0.04 + 1 - abar
  tanh = jnp.tanh(jnp.sqrt(abar) * x / variance + 0.3)
  return (jnp.sqrt(abar) * 0.04 * x + (1 - abar) * tanh) / variance


def noise_and_keys(batch=64, shape=(8, 8, 1), seed=0):
  keys = samplers.image_keys(seed, np.arange(batch))
  return samplers.initial_noise(keys, shape), keys


def run(sampler, denoise, noise, keys, steps, **options):
  draw = jax.jit(
    lambda noise, keys: samplers.sample(
      denoise, noise, keys, SCHEDULE, sampler=sampler, steps=steps, **options
    )
  )
  return np.asarray(draw(noise, keys))


@pytest.mark.parametrize(
  ('sampler', 'options'),
  [('ddpm', {}), ('ddim', {}), ('ddim', {'eta': 0.5}), ('dpmpp_2m', {})],
)
@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_every_sampler_recovers_a_gaussian(sampler, options, prediction):
  """4,096 numbers: the mean is known to 0.008 and the standard deviation to 0.006."""
  noise, keys = noise_and_keys()
  denoise = expected_output(gaussian_x0, prediction)
  x = run(sampler, denoise, noise, keys, 500, prediction=prediction, **options)
  assert x.dtype == np.float32
  assert x.mean() == pytest.approx(MEAN, abs=0.03)
  assert x.std() == pytest.approx(STD, abs=0.03)
  # Neighbours are as independent as the data's, within an image and between images.
  centred = (x - x.mean()).reshape(64, 64)
  assert np.mean(centred[1:] * centred[:-1]) / x.var() == pytest.approx(0.0, abs=0.07)
  assert np.mean(centred[:, 1:] * centred[:, :-1]) / x.var() == pytest.approx(0.0, abs=0.07)


def test_deterministic_samplers_follow_the_probability_flow():
  """Its end is known: x_0 - mu is x_T - sqrt(abar_T) mu, scaled from their deviations at T to s."""
  noise, _ = noise_and_keys(4)
  errors = {}
  for sampler in ('ddim', 'dpmpp_2m'):
    for steps in (20, 40, 80):
      abar = ABAR[spaced_timesteps(1000, steps)[0]]
      scale = STD / np.sqrt(abar * STD**2 + 1 - abar)
      exact = MEAN + scale * (np.asarray(noise) - np.sqrt(abar) * MEAN)
      x = run(sampler, expected_output(gaussian_x0), noise, None, steps)
      errors[sampler, steps] = np.abs(x - exact).max()
    assert errors[sampler, 80] < 0.7 * errors[sampler, 40] < 0.5 * errors[sampler, 20]
  for steps, factor in ((20, 0.8), (40, 0.7), (80, 0.5)):  # of the first order, it would be DDIM
    assert errors['dpmpp_2m', steps] < factor * errors['ddim', steps]


@pytest.mark.parametrize('prediction', PREDICTIONS)
@pytest.mark.parametrize(
  ('sampler', 'steps', 'spacing', 'final', 'reference'),
  [
    # diffusers 0.42.1 from x_T = (-2, -1, 0, 1, 2) and the mixture above, in float64:
    # DDIMScheduler(timestep_spacing='leading', steps_offset=1, set_alpha_to_one=True)
    ('ddim', 50, 'leading', 1.0, (-1.248422, -1.014778, 0.866367, 1.110507, 1.296979)),
    # ... set_alpha_to_one=False, which is what CompVis' DDIMSampler does
    ('ddim', 50, 'leading', ABAR[0], (-1.260692, -1.014802, 0.858613, 1.115549, 1.311794)),
    # DPMSolverMultistepScheduler(timestep_spacing='trailing', final_sigmas_type='zero')
    ('dpmpp_2m', 20, 'trailing', 1.0, (-1.169813, -1.019030, 0.922030, 1.076566, 1.200415)),
    # ... final_sigmas_type='sigma_min'; from 15 steps on, diffusers keeps to the second order
    ('dpmpp_2m', 20, 'trailing', ABAR[0], (-1.315792, -1.038095, 0.875758, 1.142131, 1.372791)),
  ],
)
def test_parity_with_diffusers(sampler, steps, spacing, final, reference, prediction):
  options = {'lower_order_final': False} if sampler == 'dpmpp_2m' else {}
  x = jax.jit(
    lambda noise: samplers.SAMPLERS[sampler](
      expected_output(mixture_x0, prediction),
      noise,
      None,
      SCHEDULE,
      spaced_timesteps(1000, steps, spacing),
      prediction=prediction,
      final_alpha_cumprod=final,
      **options,
    )
  )(jnp.linspace(-2, 2, 5).reshape(1, 1, 1, 5))
  np.testing.assert_allclose(x.ravel(), reference, atol=1e-5)


def test_ddim_of_eta_1_is_ddpm():
  """With the same noise, step by step, on all timesteps (arXiv 2010.02502, section 4.1)."""
  noise, keys = noise_and_keys(2)
  denoise = expected_output(gaussian_x0)
  ancestral = run('ddpm', denoise, noise, keys, 1000)
  eta_1 = run('ddim', denoise, noise, keys, 1000, eta=1.0)
  np.testing.assert_allclose(eta_1, ancestral, atol=1e-4)
  assert np.abs(run('ddim', denoise, noise, keys, 1000) - ancestral).max() > 0.1


def test_ddim_of_any_eta_is_equation_12():
  """arXiv 2010.02502, eq. 12 and 16, step by step in NumPy, with the same noise."""
  noise, keys = noise_and_keys(1, (3,))
  x, timesteps = np.asarray(noise, np.float64), list(range(901, 0, -100))
  for n, (t, after) in enumerate(zip(timesteps, [*timesteps[1:], None], strict=True)):
    abar, before = ABAR[t], 1.0 if after is None else ABAR[after]
    x0 = np.asarray(mixture_x0(jnp.asarray(x), abar), np.float64)
    epsilon = (x - np.sqrt(abar) * x0) / np.sqrt(1 - abar)
    sigma = 0.6 * np.sqrt((1 - before) / (1 - abar)) * np.sqrt(1 - abar / before)
    z = np.asarray(jax.random.normal(jax.random.fold_in(keys[0], n + 1), (3,)))
    x = np.sqrt(before) * x0 + np.sqrt(1 - before - sigma**2) * epsilon + sigma * z
  found = run('ddim', expected_output(mixture_x0), noise, keys, 10, eta=0.6)
  np.testing.assert_allclose(found, x, atol=1e-4)


def test_ddpm_on_all_timesteps_is_the_chain_of_the_betas():
  """arXiv 2006.11239, Algorithm 2 in NumPy: mean from epsilon, variance beta-tilde."""
  noise, keys = noise_and_keys(1, (3,))
  x = np.asarray(noise, np.float64)
  for n, t in enumerate(range(999, -1, -1)):
    abar, before = ABAR[t], ABAR[t - 1] if t else 1.0
    x0 = np.asarray(gaussian_x0(jnp.asarray(x), abar), np.float64)
    epsilon = (x - np.sqrt(abar) * x0) / np.sqrt(1 - abar)
    x = (x - SCHEDULE.betas[t] / np.sqrt(1 - abar) * epsilon) / np.sqrt(1 - SCHEDULE.betas[t])
    z = jax.random.normal(jax.random.fold_in(keys[0], n + 1), (3,))
    x += np.sqrt((1 - before) / (1 - abar) * SCHEDULE.betas[t]) * np.asarray(z)
  found = run('ddpm', expected_output(gaussian_x0), noise, keys, 1000)
  np.testing.assert_allclose(found, x, atol=1e-3)


@pytest.mark.parametrize('options', [{'sampler': 'ddpm'}, {'sampler': 'ddim', 'eta': 0.7}])
def test_an_image_does_not_depend_on_its_batch(options):
  denoise = expected_output(mixture_x0)
  noise, keys = noise_and_keys(8, (4, 4, 3), seed=5)
  batch = run(denoise=denoise, noise=noise, keys=keys, steps=10, **options)
  key = samplers.image_keys(5, [6])
  alone = run(
    denoise=denoise,
    noise=samplers.initial_noise(key, (4, 4, 3)),
    keys=key,
    steps=10,
    **options,
  )
  np.testing.assert_allclose(alone[0], batch[6], atol=1e-6)
  assert np.abs(batch[6] - batch[5]).max() > 0.1
  _, other_keys = noise_and_keys(8, (4, 4, 3), seed=6)
  other = run(denoise=denoise, noise=noise, keys=other_keys, steps=10, **options)
  assert np.abs(other - batch).max() > 0.1  # the noise of the steps follows the keys


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_one_scan_whatever_the_steps(sampler):
  noise, keys = noise_and_keys(2, (4, 4, 3))
  traces = {}
  for steps in (4, 100):
    trace = []
    denoise = expected_output(gaussian_x0, trace=trace)
    jaxpr = jax.make_jaxpr(
      lambda noise, denoise=denoise, steps=steps: samplers.sample(
        denoise, noise, keys, SCHEDULE, sampler=sampler, steps=steps
      )
    )(noise)
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'scan']
    assert [eqn.params['length'] for eqn in scans] == [steps]
    assert not any(eqn.primitive.name == 'while' for eqn in jaxpr.eqns)
    assert set(trace) == {((2,), jnp.dtype('int32'))}
    traces[steps] = len(trace)
  assert traces[4] == traces[100] <= 2


def test_denoise_sees_the_timesteps_in_order():
  seen = []

  def denoise(x, timesteps):
    jax.debug.callback(lambda t: seen.append(t.tolist()), timesteps, ordered=True)
    return x

  run('ddim', denoise, jnp.ones((2, 1)), None, 5)
  jax.effects_barrier()
  assert seen == [[t, t] for t in (801, 601, 401, 201, 1)]


def test_an_interval_of_guidance_inside_a_sampler():
  """Guided by scale 3 within it, x follows a loop over the two predictions."""
  condition = jnp.array([0.0, 0.0, 1.0, 1.0])  # two branches of two images

  def predict(x, timesteps, shift):
    return expected_output(gaussian_x0)(x - shift[:, None], timesteps)

  noise = jnp.array([[0.3], [-1.2]])
  denoise = guidance.guided(predict, condition, [-2.0, 3.0], interval=(200, 700))
  found = run('ddim', denoise, noise, None, 10)
  x, timesteps = noise, list(range(901, 0, -100))
  for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
    batch = jnp.full(2, t)
    e0, e1 = (predict(x, batch, jnp.full(2, shift)) for shift in (0.0, 1.0))
    e = e0 + 3.0 * (e1 - e0) if 200 <= t <= 700 else e1
    abar, before = ABAR[t], 1.0 if after is None else ABAR[after]
    x0 = (x - np.sqrt(1 - abar) * e) / np.sqrt(abar)
    x = np.sqrt(before) * x0 + np.sqrt(1 - before) * e
  np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)


def test_clipping_bounds_the_result():
  noise, keys = noise_and_keys(4)
  denoise = expected_output(gaussian_x0)
  for sampler in samplers.SAMPLERS:
    free = run(sampler, denoise, noise, keys, 20)
    clipped = run(sampler, denoise, noise, keys, 20, clip_x0=1.0)
    assert np.abs(free).max() > 1.1
    assert np.abs(clipped).max() <= 1.0 + 1e-5


@pytest.mark.parametrize(
  ('options', 'says'),
  [
    ({'sampler': 'euler'}, 'ddpm, ddim, dpmpp_2m'),
    ({'steps': 0}, '1 to 1000'),
    ({'steps': 1001}, '1 to 1000'),
    ({'spacing': 'even'}, 'leading, linspace, trailing'),
    ({'prediction': 'x0'}, 'epsilon, v'),
    ({'eta': 1.5}, 'eta must be'),
    ({'eta': 0.5, 'sampler': 'dpmpp_2m'}, 'eta belongs to ddim'),
    ({'eta': 0.5, 'keys': None}, 'one key per image'),
    ({'sampler': 'ddpm', 'keys': samplers.image_keys(0, [0])}, 'one key per image'),
  ],
)
def test_bad_input_is_a_user_error(options, says):
  noise, keys = noise_and_keys(2, (1,))
  options = {'sampler': 'ddim', 'steps': 5, 'keys': keys, **options}
  with pytest.raises(UserError, match=says):
    samplers.sample(lambda x, t: x, noise, options.pop('keys'), SCHEDULE, **options)


@pytest.mark.parametrize('timesteps', [[], [3, 3], [1, 2], [1000, 3], [3, -1]])
def test_bad_timesteps_are_user_errors(timesteps):
  with pytest.raises(UserError, match='timesteps must decrease'):
    samplers.ddim(lambda x, t: x, jnp.ones((1, 1)), None, SCHEDULE, timesteps)
