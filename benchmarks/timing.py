"""Timing of candidates in turn, and what the machine does at best, for the benchmarks of speed."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

_PAUSE = (
  0.1  # seconds between two candidates, until the threads of the one before have gone to sleep
)


def alternate(
  candidates: Mapping[str, Callable[[int], None]], rounds: int, seconds: float = 2.0
) -> dict[str, list[float]]:
  """Seconds per call of each candidate in each round; the machine's drift is the same for all of a round.

  Args:
    candidates: {name: run}; run(n) makes n calls and waits for the last.
    rounds: how many, after one that is not counted; in every other one the order is turned around.
    seconds: about how long one candidate runs in a round.
  """
  calls = {}
  for name, run in candidates.items():
    run(2)  # compiles
    start = time.perf_counter()
    run(2)
    calls[name] = max(1, round(2 * seconds / (time.perf_counter() - start)))

  def measure(order) -> dict[str, float]:
    times = {}
    for name in order:
      time.sleep(_PAUSE)
      start = time.perf_counter()
      candidates[name](calls[name])
      times[name] = (time.perf_counter() - start) / calls[name]
    return times

  measure(candidates)  # not counted: memory is taken from the system
  found = {name: [] for name in candidates}
  for number in range(rounds):
    times = measure(reversed(candidates) if number % 2 else candidates)
    for name in found:
      found[name].append(times[name])
    shown = ', '.join(f'{name} {times[name]:.4g} s' for name in found)
    print(f'round {number + 1}: {shown}', file=sys.stderr)
  return found


def spread(values) -> dict[str, float]:
  """Median, least and most."""
  return {
    name: float(f'{value:.4g}')
    for name, value in (
      ('median', statistics.median(values)), ('least', min(values)), ('most', max(values))
    )
  }  # fmt: skip


def compared(found: Mapping[str, list[float]], items: int) -> dict:
  """Of `alternate`, whose first candidate is ours: seconds, items per second, ratios pair by pair."""
  ours, *peers = found
  record = {
    name: {'seconds': spread(times), 'per_second': spread([items / t for t in times])}
    for name, times in found.items()
  }
  for peer in peers:
    ratios = [mine / theirs for mine, theirs in zip(found[ours], found[peer], strict=True)]
    record[peer]['our_seconds_by_theirs'] = spread(ratios)
  return record


def floors(lowered, compiled, seconds: float, dtype) -> dict:
  """What the compiler counts of a program, and what the machine would need for that at best.

  Args:
    lowered: the program, whose FLOPs are counted before anything is fused.
    compiled: the same, compiled: bytes that its operations read and write, caches not considered.
    seconds: that a call takes.
    dtype: of its matrix products.
  """
  flops = lowered.cost_analysis()['flops']
  moved = compiled.cost_analysis().get('bytes accessed', float('nan'))
  peak, bandwidth = matrix_peak(dtype), memory_bandwidth()
  return {
    'flops': flops,
    'bytes': moved,
    'peak_flops_per_second': float(f'{peak:.4g}'),
    'peak_bytes_per_second': float(f'{bandwidth:.4g}'),
    'share_of_peak': round(flops / seconds / peak, 4),
    'floor_seconds': {
      'operations': float(f'{flops / peak:.4g}'),
      'bytes': float(f'{moved / bandwidth:.4g}'),
    },
  }


def matrix_peak(dtype) -> float:
  """FLOPs per second of the fastest of a few square matrix products."""
  sizes = (1024, 2048, 3072) if jax.default_backend() == 'cpu' else (4096, 8192, 16_384)
  best = 0.0
  for size in sizes:
    x = jnp.full((size, size), 0.5, dtype)
    best = max(best, 2 * size**3 / _least_seconds(jax.jit(jnp.matmul), x, x))
  return best


def memory_bandwidth() -> float:
  """Bytes per second of adding one to a large array in its place, read and written."""
  size = 2**26 if jax.default_backend() == 'cpu' else 2**29
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x, found = add(jnp.zeros(size, jnp.float32)), []
  for _ in range(7):
    start = time.perf_counter()
    x = jax.block_until_ready(add(x))
    found.append(time.perf_counter() - start)
  return 2 * x.nbytes / min(found)


def _least_seconds(function, *arguments) -> float:
  jax.block_until_ready(function(*arguments))
  found = []
  for _ in range(7):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    found.append(time.perf_counter() - start)
  return min(found)


def report(benchmark: str, **record):
  """Prints the one line."""
  import p2ldm

  device = jax.devices()[0]
  versions = {'jax': jax.__version__, 'p2ldm': p2ldm.__version__}
  for name in ('torch', 'diffusers'):
    if name in sys.modules:
      versions[name] = sys.modules[name].__version__
  machine = {
    'device': device.device_kind if device.platform != 'cpu' else platform.processor() or 'cpu',
    'cores': os.cpu_count(),
    'load': round(os.getloadavg()[0], 1),
  }
  print(
    json.dumps({'benchmark': benchmark, **record, **machine, 'versions': versions}, default=_plain)
  )


def _plain(value):
  if isinstance(value, np.generic):
    return value.item()
  raise TypeError(f'{value!r} is no JSON.')
