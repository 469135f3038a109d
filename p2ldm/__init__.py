"""p2ldm: latent diffusion of faces, controlled at once by attributes and a semantic mask."""

import os

__version__ = '0.1.0'

# Buckets are read through fsspec and gcsfs everywhere, whether TensorFlow is installed or not; etils looks at
# this once, when its first path is used. gcsfs need not ask Google what kind of bucket each one is.
os.environ['EPATH_USE_TF'] = 'false'
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')


def __getattr__(name: str):
  if name == 'Pipeline':  # loaded on demand: commands should not wait for JAX to print --help
    from p2ldm.pipeline import Pipeline

    return Pipeline
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
