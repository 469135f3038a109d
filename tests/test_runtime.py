"""What commands set up: the cache of compiled programs, and memory that stays."""

import concurrent.futures
import importlib.metadata
import os
import subprocess
import sys

import pytest

from p2ldm import runtime

FAULTS = """
import resource
import numpy as np
from p2ldm import runtime
if {keep} and not runtime.keep_memory():
  raise SystemExit('not here')
for _ in range(3):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(2**25, np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep: bool) -> int:
  """Of allocating 128 MB for the third time, in a process of its own."""
  done = subprocess.run(
    [sys.executable, '-c', FAULTS.format(keep=keep)], capture_output=True, text=True
  )
  if 'not here' in done.stderr:
    pytest.skip('malloc takes no such options here, or memory is limited')
  assert done.returncode == 0, done.stderr
  return int(done.stdout)


def test_memory_that_was_freed_is_not_taken_from_the_system_again():
  assert page_faults(keep=True) < 50


THREADS = """
import concurrent.futures
import resource
import jax
import jax.numpy as jnp
from p2ldm import runtime
runtime.prepare()
if not runtime.keeps_memory():
  raise SystemExit('not here')
plain = concurrent.futures.ThreadPoolExecutor(1)
started = [runtime.start_thread('started') for _ in range(2)]
print(*(thread.submit(runtime.keeps_memory).result() for thread in (plain, *started)))

@jax.jit
def ones():  # 128 MB
  return jnp.ones(2**25, jnp.float32)

def page_faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  ones().block_until_ready()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for thread in started:
  thread.submit(page_faults).result()
print(*(thread.submit(page_faults).result() for thread in started))
"""


@pytest.fixture(scope='module')
def threads():
  """What THREADS prints, in a process that has no accelerator."""
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, '-c', THREADS], capture_output=True, text=True, env=environment
  )
  if 'not here' in done.stderr:
    pytest.skip('malloc takes no such options here, or memory is limited')
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


def test_of_other_threads_those_that_are_started_for_it_keep_memory(threads):
  # With one heap for all threads, as a limit of one arena gives, steps took 1.6 times as long.
  assert threads[0].split() == ['False', 'True', 'True']


def test_a_program_takes_its_memory_from_the_thread_that_asks_for_it(threads):
  # A page of the system's each would be 32,768, a huge one each is 64.
  assert all(int(faults) < 1000 for faults in threads[1].split())


@pytest.mark.parametrize(
  ('platforms', 'plugins', 'found'),
  [('cpu', ['cuda'], False), ('', ['cuda'], True), ('', [], False), ('cuda', ['cuda'], True)],
)
def test_accelerators_are_looked_for(platforms, plugins, found, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  monkeypatch.setattr(importlib.metadata, 'entry_points', lambda group: plugins)
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  assert runtime.has_accelerators() == found


def test_memory_stays_kept_when_the_heap_is_trimmed():
  program = (
    'import ctypes, re\n'
    'from p2ldm import runtime\n'
    'kept = runtime.keep_memory()\n'
    "ctypes.CDLL('libc.so.6').malloc_trim(0)\n"
    "maps = re.split(r'\\n(?=[0-9a-f]+-)', open('/proc/self/smaps').read())\n"
    "sizes = [int(re.search(r'Size:\\s+(\\d+)', m)[1]) for m in maps if '[heap]' in m and ' hg' in m]\n"
    'print(kept, max(sizes, default=0) > 2**20)\n'  # kilobytes
  )
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
  assert done.stdout.split() in (['True', 'True'], ['False', 'False'])


def test_where_no_more_threads_can_be_one_is_like_any_other(monkeypatch):
  started, never_keeps = [], concurrent.futures.Future()
  never_keeps.set_result(False)

  def submit(self, call):
    started.append(self)
    if len(started) > 3:
      raise RuntimeError("can't start new thread")
    return never_keeps

  monkeypatch.setattr(runtime, '_kept', range(1))
  monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, 'submit', submit)
  thread = runtime.start_thread('other')
  monkeypatch.undo()
  assert len(started) == 4 and thread not in started
  assert thread.submit(len, 'abc').result() == 3
