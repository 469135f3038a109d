"""The cores of a CPU share a batch: what comes out is the whole batch's, and parts run side by side."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from p2ldm import cores, sharding


@pytest.fixture
def four(monkeypatch):
  monkeypatch.setattr(cores, 'count', lambda: 4)


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize(
  ('rows', 'parts'),
  [(1, 1), (4, 1), (7, 1), (8, 2), (10, 2), (12, 3), (16, 4), (18, 3), (23, 1), (48, 4)],
)
def test_parts_are_equal_and_of_four_rows_or_more(four, rows, parts):
  assert cores.parts(rows) == parts
  with cores.undivided():
    assert cores.parts(rows) == 1
  assert cores.parts(rows) == parts
  assert cores.parts(rows, most=2) <= 2 and cores.parts(16, most=9) == 4


def test_there_are_as_many_as_the_process_may_use():
  import os

  allowed = os.sched_getaffinity(0)
  os.sched_setaffinity(0, {min(allowed)})
  try:
    assert cores.count() == 1
  finally:
    os.sched_setaffinity(0, allowed)
  assert cores.count() == len(allowed)


def test_another_thread_is_not_undivided(four):
  found = []
  with cores.undivided():
    thread = threading.Thread(target=lambda: found.append(cores.parts(16)))
    thread.start()
    thread.join()
  assert found == [4]


def test_calls_run_side_by_side_and_answer_in_order():
  meeting = threading.Barrier(3)

  def call(number):
    meeting.wait(timeout=30)  # breaks unless all three are there
    return number

  assert cores.side_by_side([functools.partial(call, i) for i in range(3)]) == [0, 1, 2]


def test_what_a_call_raises_is_raised():
  with pytest.raises(ZeroDivisionError):
    cores.side_by_side([lambda: 1, lambda: 1 // 0])


@pytest.mark.parametrize(
  ('rows', 'seen'), [(16, [4]), (12, [4]), (10, [5]), (6, [6])], ids=lambda x: str(x)
)
def test_a_function_over_the_batch_is_that_of_the_whole(four, rows, seen):
  traced = []

  def function(weights, keys, x):
    traced.append(len(x))
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
    return {'sum': x @ weights + noise, 'none': None}, jnp.arange(len(x)) * 0 + 1

  over = sharding.OverBatch(function, one_device(), 2)
  rng = np.random.default_rng(0)
  weights, x = rng.normal(size=(3, 3)).astype(np.float32), rng.normal(size=(rows, 3))
  arguments = weights, jax.random.split(jax.random.key(0), rows), x.astype(np.float32)
  for _ in range(2):  # the second time nothing is traced
    found, ones = over(*arguments)
  assert traced == seen
  assert over.parts(rows) == rows // seen[0]
  with cores.undivided():
    expected, _ = over(*arguments)
  assert found['none'] is None and ones.shape == (rows,) and found['sum'].shape == (rows, 3)
  np.testing.assert_allclose(found['sum'], expected['sum'], rtol=1e-6, atol=1e-6)


def test_devices_share_it_before_cores_do(four):
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  over = sharding.OverBatch(lambda x: x + 1, mesh, 1)
  assert (over.parts(16), over.parts(5)) == (2, 1)
  np.testing.assert_array_equal(over(np.arange(16)), np.arange(1, 17))


def test_another_form_is_another_program(four):
  traced = []

  def function(number, x):
    traced.append((number.dtype.name, x.dtype.name, len(x)))
    return x + number.astype(x.dtype)

  over = sharding.OverBatch(function, one_device(), 1)
  one = np.float32(1)
  for rows in (16, 24, 16):
    np.testing.assert_array_equal(over(one, np.arange(rows)), np.arange(1, rows + 1))
  over(one, np.arange(16, dtype=np.float32))
  over(jnp.bfloat16(1), np.arange(16))
  forms = [('float32', 'int32', 4), ('float32', 'int32', 6), ('float32', 'float32', 4)]
  assert traced == [*forms, ('bfloat16', 'int32', 4)]


def test_inside_of_a_transformation_it_is_whole(four):
  over = sharding.OverBatch(lambda weights, x: x @ weights, one_device(), 1)
  weights, x = np.eye(3, dtype=np.float32), np.ones((16, 3), np.float32)
  np.testing.assert_array_equal(jax.jit(over)(weights, x), x)
  gradient = jax.grad(lambda weights: over(weights, x).sum())(weights)
  np.testing.assert_array_equal(gradient, np.full((3, 3), 16.0))


def test_what_is_checked_is_a_part(four):
  traced = []
  over = sharding.OverBatch(lambda x: traced.append(len(x)) or x + 1, one_device(), 1)
  over.check(np.arange(16))
  over(np.arange(16))
  assert traced == [4]  # traced once for both
  with pytest.raises(TypeError):
    sharding.OverBatch(lambda x: x + 'a', one_device(), 1).check(np.arange(16))
