"""What a command sets up before it computes: a cache of compiled programs, and memory that stays."""

import concurrent.futures
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import pathlib

_HUGE_PAGE = 2**21  # bytes
_LARGE = 2**27  # bytes: more than an arena of glibc's holds
# Of mallopt and madvise, in Linux' malloc.h and mman.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX, _MADV_HUGEPAGE = -1, -4, -8, 14
_ARENAS = max(16, 2 * (os.cpu_count() or 1))  # glibc's would be eight for each core

_kept = range(0)  # addresses of the heap that `keep_memory` reserved


def prepare():
  """Sets up what follows; before JAX is used."""
  use_compilation_cache()
  if not has_accelerators() and keep_memory():
    compute_where_asked()


def compute_where_asked():
  """Makes JAX run a program for the CPU on the thread that asks for it, not on one of its own.

  So it takes its temporaries from that thread's memory, which may be kept. Before JAX is used.
  """
  import jax

  jax.config.update('jax_cpu_enable_async_dispatch', False)


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
  """Makes malloc keep large blocks that are freed, in huge pages.

  On CPUs XLA allocates the temporaries of a program anew at every call. malloc takes so large a piece from
  the system and gives it back each time, and the system clears it page by page: a quarter of a training step
  (docs/performance.md). Instead, it comes from the main thread's heap, for which half of the machine's memory
  is reserved; it is taken as it is used, and kept until the process ends.

  Other threads have arenas of their own, and go on taking large blocks from the system, but for those of
  `start_thread`. One heap for all would do, too, but they would wait for one another at every block.

  Returns:
    Whether that could be done: not outside Linux with glibc, or where a limit forbids it.
  """
  global _kept
  if _kept:
    return True
  try:
    libc = _libc()
    options = {_ARENA_MAX: _ARENAS, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
    if not all(libc.mallopt(option, value) for option, value in options.items()):
      return False
    size = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2
  except (OSError, AttributeError, ValueError):
    return False
  heap = libc.malloc(size)
  if not heap:
    return False
  # Kept behind it, so that malloc_trim, which TensorFlow calls, cannot give the end of the heap back.
  libc.malloc(_HUGE_PAGE)
  start = -(-heap // _HUGE_PAGE) * _HUGE_PAGE
  whole = (heap + size - start) // _HUGE_PAGE * _HUGE_PAGE
  advised = libc.madvise(start, whole, _MADV_HUGEPAGE) == 0
  libc.free(heap)
  if advised:
    _kept = range(heap, heap + size)
  return advised


def start_thread(name: str) -> concurrent.futures.ThreadPoolExecutor:
  """A thread to submit calls to; if memory is kept, one that takes large blocks from there.

  glibc gives a thread its arena at the first block and for good: one of its own at first, and from the
  sixteenth on, or two for each core, one of those that there are, in turn, the main thread's heap among them.
  So threads are started until one is given that; where no more can be, it is one like any other.
  """
  others = []
  try:
    for _ in range(3 * _ARENAS if _kept else 0):
      thread = concurrent.futures.ThreadPoolExecutor(1, name)
      others.append(thread)
      if thread.submit(keeps_memory).result():
        return others.pop()
  except RuntimeError:  # a limit of threads
    pass
  finally:
    for other in others:
      other.shutdown()
  return concurrent.futures.ThreadPoolExecutor(1, name)


def keeps_memory() -> bool:
  """Whether this thread takes large blocks from memory that is kept (`keep_memory`)."""
  block = _libc().malloc(_LARGE)
  _libc().free(block)
  # Its beginning may be what was free before the heap.
  return block is not None and block + _LARGE - 1 in _kept


@functools.cache
def _libc() -> ctypes.CDLL:
  """glibc, its functions with types.

  Raises:
    OSError, AttributeError: there is none.
  """
  libc = ctypes.CDLL('libc.so.6')
  libc.malloc.restype = ctypes.c_void_p
  libc.malloc.argtypes = [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  return libc
