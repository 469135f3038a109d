"""Two processes of four devices: the losses of one process, one checkpoint, nothing lost by a kill."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import workdirs
from p2ldm import interruptions

TESTS = pathlib.Path(__file__).parent
# Of what they start. They are killed, and their disks are full: not with the cache that all tests share.
ENVIRONMENT = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
ENVIRONMENT.pop('JAX_COMPILATION_CACHE_DIR', None)
STEPS = 8


def start(workdir, process_id, count, devices, port, pause=0.0, steps=STEPS, limit_kib=None):
  flags = f'--xla_force_host_platform_device_count={devices}'
  path = os.pathsep.join([str(TESTS.parent), os.environ.get('PYTHONPATH', '')])
  command = [sys.executable, TESTS / 'toy_task.py', workdir, steps, process_id, count, port, pause]
  if limit_kib:  # no file may grow beyond it, as if the disk were full
    command = ['bash', '-c', f'ulimit -f {limit_kib}; exec "$@"', 'limited', *command]
  return subprocess.Popen(
    list(map(str, command)),
    env={**ENVIRONMENT, 'XLA_FLAGS': flags, 'PYTHONPATH': path},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def start_two(workdir, pause=0.0, steps=STEPS):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  return [start(workdir, i, 2, 4, port, pause, steps) for i in (0, 1)]


def end(processes):
  """Their exit statuses; what they printed is shown where the test fails."""
  for i, process in enumerate(processes):
    print(f'process {i}:', process.communicate(timeout=120)[0][-3000:])
  return [process.returncode for process in processes]


def losses(workdir):
  rows = map(json.loads, (workdir / 'toy' / 'metrics.jsonl').read_text().splitlines())
  found = [(row['step'], row['train/loss']) for row in rows if 'train/loss' in row]
  assert [step for step, _ in found] == list(range(1, STEPS + 1))
  return [loss for _, loss in found]


def parameters(workdir):
  """The arrays of the last checkpoint, as they are on disk."""
  arrays = workdirs.newest(workdir / 'toy' / 'checkpoints')
  return {name: value for name, value in arrays.items() if name.endswith("['w']")}


def wait_for_checkpoint(workdir, step, process):
  for _ in range(1200):
    if (workdir / 'toy' / 'checkpoints' / str(step)).is_dir():
      return
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.05)
  raise AssertionError('no checkpoint')


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('two')
  assert end(start_two(workdir)) == [0, 0]
  return workdir


@pytest.mark.parametrize('devices', [1, 8])
def test_two_processes_give_the_losses_of_one(uninterrupted, tmp_path, devices):
  assert end([start(tmp_path, 0, 1, devices, 0)]) == [0]
  np.testing.assert_allclose(losses(uninterrupted), losses(tmp_path), rtol=1e-5)
  for name, value in parameters(uninterrupted).items():
    np.testing.assert_allclose(value, parameters(tmp_path)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('killed', [(0, 1), (1,)])
def test_killed_and_started_again_they_end_with_the_same_parameters(
  uninterrupted, tmp_path, killed
):
  both = start_two(tmp_path, pause=0.4)
  wait_for_checkpoint(tmp_path, 4, both[0])
  for i in killed:
    both[i].kill()
  if len(killed) < 2:
    both[0].kill()  # as a scheduler does when one of its tasks has died; it cannot go on alone
  end(both)
  assert end(start_two(tmp_path)) == [0, 0]
  assert losses(tmp_path) == losses(uninterrupted)
  for name, value in parameters(uninterrupted).items():
    np.testing.assert_array_equal(value, parameters(tmp_path)[name])


def test_sigterm_to_one_of_them_saves_one_checkpoint_and_ends_both(uninterrupted, tmp_path):
  both = start_two(tmp_path, pause=0.4)
  wait_for_checkpoint(tmp_path, 2, both[0])
  both[1].send_signal(signal.SIGTERM)
  assert end(both) == [interruptions.EXIT_STATUS] * 2
  assert end(start_two(tmp_path)) == [0, 0]
  assert losses(tmp_path) == losses(uninterrupted)
  for name, value in parameters(uninterrupted).items():
    np.testing.assert_array_equal(value, parameters(tmp_path)[name])


def test_sigterm_before_the_first_step_of_a_resumed_run_ends_both(uninterrupted, tmp_path):
  assert end(start_two(tmp_path, steps=4)) == [0, 0]
  both = start_two(tmp_path)
  while 'SIGTERM is caught' not in (line := both[1].stdout.readline()):
    assert line, 'process 1 has ended'
  both[1].send_signal(signal.SIGTERM)
  assert end(both) == [interruptions.EXIT_STATUS] * 2
  assert max(map(int, os.listdir(tmp_path / 'toy' / 'checkpoints'))) in (5, 6)
  assert end(start_two(tmp_path)) == [0, 0]
  assert losses(tmp_path) == losses(uninterrupted)


def test_damage_that_one_of_them_finds_is_passed_over_by_both(uninterrupted, tmp_path):
  assert end(start_two(tmp_path, steps=4)) == [0, 0]
  shards = tmp_path / 'toy' / 'checkpoints' / '4' / 'state' / 'ocdbt.process_1' / 'd'
  largest = max(shards.iterdir(), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:100])
  both = start_two(tmp_path)
  said = [' '.join(process.communicate(timeout=120)[0].split()) for process in both]
  assert [process.returncode for process in both] == [0, 0], said
  assert 'is damaged: process 1: ' in said[0]
  assert 'Going on from the checkpoint of step 2' in said[0]
  assert (tmp_path / 'toy' / 'checkpoints.damaged' / '4.0').is_dir()
  assert losses(tmp_path) == losses(uninterrupted)
  for name, value in parameters(uninterrupted).items():
    np.testing.assert_array_equal(value, parameters(tmp_path)[name])


def test_a_full_disk_stops_with_a_message_and_the_last_checkpoint_stays_whole(
  uninterrupted, tmp_path
):
  assert end([start(tmp_path, 0, 1, 8, 0, steps=2)]) == [0]
  full = start(tmp_path, 0, 1, 8, 0, limit_kib=16)
  said = ' '.join(full.communicate(timeout=120)[0].split())
  assert full.returncode == 2, said
  assert 'error: The disk is full' in said
  assert 'the newest whole one is of step 2, and it is intact' in said
  assert end([start(tmp_path, 0, 1, 8, 0)]) == [0]
  np.testing.assert_allclose(losses(tmp_path), losses(uninterrupted), rtol=1e-5)


def test_all_devices_meet_before_the_first_program(tmp_path):
  # Gloo says of each group of devices when it has met.
  code = """if True:
    import sys
    import jax
    import numpy as np
    from p2ldm import processes, sharding
    processes.initialize(coordinator_address=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    mesh = sharding.make_mesh(2, 2)
    sharding.connect(mesh)
    print('all have met', flush=True)
    rows = sharding.put_batch(np.ones((4, 8), np.float32), mesh)
    weights = jax.device_put(
      np.ones((8, 4), np.float32), jax.NamedSharding(mesh, jax.P(None, 'fsdp'))
    )
    gradient = jax.jit(
      jax.grad(lambda w, x: ((x @ w) ** 2).mean()), out_shardings=weights.sharding
    )
    print(np.asarray(sharding.replicate(gradient(weights, rows), mesh)).sum(), flush=True)
  """
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  flags = '--xla_force_host_platform_device_count=2'
  environment = {**ENVIRONMENT, 'XLA_FLAGS': flags}
  both = [
    subprocess.Popen(
      [sys.executable, '-c', code, address, str(i)], stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True, env=environment, cwd=TESTS.parent,
    )
    for i in (0, 1)
  ]  # fmt: skip
  printed = [process.communicate(timeout=120)[0] for process in both]
  assert [process.returncode for process in both] == [0, 0], printed
  before, met, after = printed[0].partition('all have met')
  assert met and '[Gloo] Rank' in before and '[Gloo] Rank' not in after
  assert '128.0' in after
