"""p2ldm: latent diffusion of faces, controlled at once by attributes and a semantic mask."""

__version__ = '0.1.0'


def __getattr__(name: str):
  if name == 'Pipeline':  # loaded on demand: commands should not wait for JAX to print --help
    from p2ldm.pipeline import Pipeline

    return Pipeline
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
