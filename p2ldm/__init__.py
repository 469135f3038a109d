"""p2ldm: latent diffusion of faces, controlled at once by attributes and a semantic mask."""

__version__ = '0.1.0'
