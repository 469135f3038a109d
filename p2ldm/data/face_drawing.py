"""Draws the head of a synthetic face, without its features. Coordinates: see face_canvas."""

import numpy as np

from p2ldm.data.face_canvas import Scene, curve, mix, ribbon, shaded, taper

SIDES = {1: 'l', -1: 'r'}  # the official l_ is the person's left, right in the picture


def outline(shape: str) -> np.ndarray:
  """Right half of the head's contour from the crown to the chin, (N, 2)."""
  cheekbone, cheek, jaw, chin, low = {
    'plain': (0.238, 0.224, 0.178, 0.1, 0.356),
    'oval': (0.222, 0.202, 0.15, 0.08, 0.372),
    'square': (0.24, 0.232, 0.206, 0.132, 0.354),
    'chubby': (0.262, 0.264, 0.224, 0.125, 0.35),
  }[shape]
  return np.array(
    [
      (0.0, -0.4),
      (0.11, -0.38),
      (0.195, -0.3),
      (cheekbone - 0.002, -0.17),
      (cheekbone, -0.02),
      (cheek, 0.12),
      (jaw, 0.24),
      (chin, 0.323),
      (chin * 0.5, low - 0.009),
      (0.0, low),
    ]
  )


def draw_backdrop(scene: Scene):
  """A soft gradient between two colours."""
  cells = np.linspace(0, 1, len(scene.x))
  first, second = scene.traits.backdrop
  amount = 0.5 * (cells[:, None] + cells[None, :])
  vignette = 1.05 - 0.35 * ((cells[:, None] - 0.5) ** 2 + (cells[None, :] - 0.5) ** 2)
  scene.canvas.everywhere(mix(first, second, amount) * vignette[..., None])


def skin_field(scene: Scene) -> np.ndarray:
  """The face's colours: light, shade around the eyes and below nose and lips, blush, shadows."""
  traits = scene.traits
  light = scene.light
  for side in SIDES:
    light = light - 0.07 * scene.spot(side * 0.115, -0.075, 0.055, 0.03)
    light = light + 0.05 * scene.spot(side * 0.13, 0.05, 0.06, 0.05)
  light = light + 0.05 * scene.spot(0, -0.2, 0.12, 0.07) - 0.1 * scene.spot(0, 0.132, 0.05, 0.02)
  light = light - 0.08 * scene.spot(0, 0.268, 0.07, 0.018)
  if traits.shape == 'chubby':
    for side in SIDES:
      light = light + 0.06 * scene.spot(side * 0.16, 0.11, 0.06, 0.06)
  colors = shaded(traits.skin_rgb, light)
  rosy = (226, 84, 84) if traits.skin not in ('brown', 'dark') else (190, 62, 54)
  for side in SIDES:
    blush = scene.spot(side * 0.15, 0.085, 0.062, 0.05)
    colors = mix(colors, rosy, blush * (0.55 if traits.rosy else 0.06))
    if traits.bags:
      bag = scene.spot(side * 0.115, -0.006, 0.05, 0.016)
      colors = mix(colors, traits.skin_rgb * (0.6, 0.4, 0.46), 0.62 * bag)
  return colors


def draw_neck(scene: Scene):
  """The neck, in the shadow of the chin."""
  traits = scene.traits
  width = {'oval': 0.115, 'plain': 0.128, 'square': 0.142, 'chubby': 0.155}[traits.shape]
  points = [
    (-width, 0.1), (width, 0.1), (width, 0.33), (width + 0.03, 0.4), (0.3, 0.5), (0.3, 0.7),
    (-0.3, 0.7), (-0.3, 0.5), (-width - 0.03, 0.4), (-width, 0.33),
  ]  # fmt: skip
  light = 0.93 - 0.27 * scene.spot(0, 0.33, 0.2, 0.09) + 0.06 * traits.light * scene.x / 0.15
  scene.fill_body(points, shaded(traits.skin_rgb, light), 'neck')
  if traits.double_chin:
    roll = np.array(
      [(-0.17, 0.24), (-0.15, 0.35), (-0.08, 0.405), (0, 0.418), (0.08, 0.405), (0.15, 0.35)]
    )
    roll = curve([*roll, (0.17, 0.24)])
    scene.fill(
      roll,
      shaded(traits.skin_rgb, 0.98 - 0.25 * scene.spot(0, 0.36, 0.2, 0.025)),
      'skin',
      depth=0.02,
    )


def draw_ears(scene: Scene):
  """Both ears, a little behind the face, so that a turned head shows one of them more."""
  skin = scene.traits.skin_rgb
  edge = outline(scene.traits.shape)[4, 0]
  for side, name in SIDES.items():
    x = side * (edge + 0.018)
    shape = curve(
      [(x - side * 0.03, -0.06), (x + side * 0.022, -0.085), (x + side * 0.042, -0.05)]
      + [(x + side * 0.03, 0.03), (x + side * 0.008, 0.085), (x - side * 0.03, 0.08)]
    )
    scene.fill(
      shape,
      shaded(skin, 0.95 + 0.1 * scene.traits.light * side + 0 * scene.x),
      f'{name}_ear',
      depth=-0.03,
    )
    inner = curve([(x, -0.045), (x + side * 0.022, -0.04), (x + side * 0.014, 0.015), (x, 0.04)])
    scene.fill(inner, skin * (0.72, 0.6, 0.56), opacity=0.6, depth=-0.03)


def draw_skin(scene: Scene):
  """The face itself, without features."""
  half = outline(scene.traits.shape)
  shape = curve(np.concatenate([half, half[-2:0:-1] * (-1, 1)]))
  scene.fill(shape, skin_field(scene), 'skin', depth=0.0)
  if scene.traits.double_chin:
    fold = curve(
      [(-0.11, 0.318), (-0.06, 0.345), (0, 0.352), (0.06, 0.345), (0.11, 0.318)], closed=False
    )
    scene.fill(
      ribbon(fold, taper(len(fold), 0.014)),
      scene.traits.skin_rgb * (0.55, 0.4, 0.4),
      opacity=0.5,
      depth=0.02,
    )
  if scene.traits.smiling:
    for side in SIDES:
      fold = curve(
        [(side * 0.075, 0.115), (side * 0.118, 0.16), (side * 0.13, 0.225)], closed=False
      )
      scene.fill(ribbon(fold, taper(len(fold), 0.012)), scene.traits.skin_rgb * 0.55, opacity=0.32)
