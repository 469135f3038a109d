"""The embedded data set: procedural faces in the raw layout of CelebAMask-HQ.

A face is a pure function of (seed, index); its size only sets the resolution. Attributes are set where
the drawing shows them and 0 where it cannot.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import pathlib
import shutil
import tempfile

import numpy as np
import tqdm
from PIL import Image

from p2ldm import interruptions
from p2ldm.data import face_drawing, face_features, face_hair, face_wear
from p2ldm.data.face_canvas import Scene
from p2ldm.data.face_traits import Traits, sample_traits, visible_attributes
from p2ldm.data.labels import CELEBAMASK_HQ
from p2ldm.errors import UserError

MINIMUM_SIZE = 16
FACES_PER_WORKER = 128  # fewer are drawn sooner than a process starts

# From back to front.
LAYERS = (
  face_drawing.draw_backdrop,
  face_hair.draw_back_hair,
  face_drawing.draw_neck,
  face_wear.draw_clothes,
  face_wear.draw_necklace,
  face_drawing.draw_ears,
  face_drawing.draw_skin,
  face_features.draw_nose,
  face_features.draw_eyes,
  face_features.draw_brows,
  face_hair.draw_beard,
  face_features.draw_mouth,
  face_wear.draw_glasses,
  face_hair.draw_front_hair,
  face_wear.draw_hat,
  face_wear.draw_earrings,
)


def render_face(seed: int, index: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws the face of (seed, index).

  Args:
    seed, index: at least 0; they alone decide what the face looks like.
    size: height and width in pixels, at least 16 (thin parts may vanish below 64).

  Returns:
    image (size, size, 3) uint8; mask (size, size) uint8 of CELEBAMASK_HQ's class ids; attributes
    (40,) int8 in {-1, 0, 1}, 0 where the drawing does not show them.

  Raises:
    UserError: size is too small.
  """
  return render_traits(sample_traits(seed, index), size)


def render_traits(traits: Traits, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """As `render_face`, of a face with these traits."""
  if size < MINIMUM_SIZE:
    raise UserError(f'Synthetic faces need a size of at least {MINIMUM_SIZE} pixels, not {size}.')
  scene = Scene(size, traits)
  for draw in LAYERS:
    draw(scene)
  image, mask = scene.canvas.finish()
  return image, mask, visible_attributes(traits)


def write_raw(dir: str | os.PathLike, num_faces: int, size: int, seed: int = 0):
  """Writes `num_faces` faces as the official CelebAMask-HQ download is laid out.

  DIR/CelebA-HQ-img/{i}.jpg, DIR/CelebAMask-HQ-mask-anno/{i // 2000}/{i:05d}_{part}.png (0 or 255, the
  visible pixels of each part there is), DIR/CelebAMask-HQ-attribute-anno.txt; masks have the images'
  size. Everything is written beside DIR and renamed at the end.

  Raises:
    UserError: num_faces is not positive, size is too small, or `dir` is not empty.
  """
  target = pathlib.Path(dir)
  if num_faces < 1:
    raise UserError(f'The number of synthetic faces must be positive, not {num_faces}.')
  if size < MINIMUM_SIZE:
    raise UserError(f'Synthetic faces need a size of at least {MINIMUM_SIZE} pixels, not {size}.')
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise UserError(f'{target} exists and is not empty; choose another folder, or remove it first.')
  target.parent.mkdir(parents=True, exist_ok=True)
  partial = pathlib.Path(tempfile.mkdtemp(prefix=f'.{target.name}.', dir=target.parent))
  try:
    partial.chmod(0o755)
    (partial / 'CelebA-HQ-img').mkdir()
    for folder in range((num_faces - 1) // 2000 + 1):
      (partial / 'CelebAMask-HQ-mask-anno' / str(folder)).mkdir(parents=True)
    rows = _write_faces(partial, num_faces, size, seed)
    lines = [str(num_faces), ' '.join(CELEBAMASK_HQ.attributes)]
    lines += [f'{i}.jpg  ' + ' '.join(map(str, row)) for i, row in enumerate(rows)]
    (partial / 'CelebAMask-HQ-attribute-anno.txt').write_text('\n'.join(lines) + '\n')
    partial.replace(target)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _write_faces(folder: pathlib.Path, num_faces: int, size: int, seed: int) -> list[np.ndarray]:
  """Renders on every core; returns the attributes of each face in order."""
  write = functools.partial(_write_face, folder, size, seed)
  progress = functools.partial(tqdm.tqdm, total=num_faces, desc='Drawing faces', unit='face')
  workers = min(os.cpu_count() or 1, num_faces // FACES_PER_WORKER)
  if workers < 2:
    return _collect(progress(map(write, range(num_faces))))
  # spawn, not fork: the caller may have threads of JAX or TensorFlow running.
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
    return _collect(progress(pool.map(write, range(num_faces), chunksize=16)))


def _collect(rows) -> list[np.ndarray]:
  found = []
  for row in rows:
    interruptions.check('none of the faces that were being rendered')
    found.append(row)
  return found


def _write_face(folder: pathlib.Path, size: int, seed: int, index: int) -> np.ndarray:
  image, mask, attributes = render_face(seed, index, size)
  Image.fromarray(image).save(folder / 'CelebA-HQ-img' / f'{index}.jpg', quality=95)
  parts = folder / 'CelebAMask-HQ-mask-anno' / str(index // 2000)
  for label in np.unique(mask[mask > 0]):
    part = Image.fromarray(np.where(mask == label, 255, 0).astype(np.uint8))
    part.save(parts / f'{index:05d}_{CELEBAMASK_HQ.classes[label]}.png')
  return attributes
