"""What a command sets up before it computes: a cache of compiled programs, and memory that stays."""

import ctypes
import importlib.metadata
import importlib.util
import os
import pathlib

_HUGE_PAGE = 2**21  # bytes
# Of mallopt and madvise, in Linux' malloc.h and mman.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX, _MADV_HUGEPAGE = -1, -4, -8, 14


def prepare():
  """Sets up what follows; before JAX is used."""
  use_compilation_cache()
  if not has_accelerators():
    keep_memory()


def use_compilation_cache():
  """Keeps what XLA compiles in ~/.cache/p2ldm/xla, unless JAX was told to keep it elsewhere."""
  import jax

  if jax.config.jax_compilation_cache_dir is None:
    cache = pathlib.Path.home() / '.cache' / 'p2ldm' / 'xla'
    jax.config.update('jax_compilation_cache_dir', str(cache))


def has_accelerators() -> bool:
  """Whether JAX may find any: it was not told to use the CPU alone, and one of its plugins is installed."""
  if os.environ.get('JAX_PLATFORMS') == 'cpu':
    return False
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return bool(plugins) or importlib.util.find_spec('libtpu') is not None


def keep_memory() -> bool:
  """Makes malloc keep memory that is freed, in huge pages.

  On CPUs XLA allocates the temporaries of a program anew at every call. malloc takes so large a piece from
  the system and gives it back each time, and the system clears it page by page: a quarter of a training step
  (docs/performance.md). Instead, all comes from one heap, for which half of the machine's memory is reserved;
  it is taken as it is used, and kept until the process ends.

  Returns:
    Whether that could be done: not outside Linux with glibc, or where a limit forbids it.
  """
  try:
    libc = ctypes.CDLL('libc.so.6')
    options = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
    if not all(libc.mallopt(option, value) for option, value in options.items()):
      return False
    size = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2
  except (OSError, AttributeError, ValueError):
    return False
  libc.malloc.restype = ctypes.c_void_p
  libc.malloc.argtypes = [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  heap = libc.malloc(size)
  if not heap:
    return False
  # Kept behind it, so that malloc_trim, which TensorFlow calls, cannot give the end of the heap back.
  libc.malloc(_HUGE_PAGE)
  start = -(-heap // _HUGE_PAGE) * _HUGE_PAGE
  whole = (heap + size - start) // _HUGE_PAGE * _HUGE_PAGE
  advised = libc.madvise(start, whole, _MADV_HUGEPAGE) == 0
  libc.free(heap)
  return advised
