"""Draws nose, eyes, brows and mouth of a synthetic face. Coordinates: see face_canvas."""

import numpy as np

from p2ldm.data.face_canvas import Scene, curve, ellipse, mix, ribbon, shaded, taper
from p2ldm.data.face_drawing import SIDES


def draw_nose(scene: Scene):
  """The nose: lit ridge, shaded flank, wings and nostrils."""
  traits = scene.traits
  skin = traits.skin_rgb
  bridge, wing, tip = {
    'plain': (0.022, 0.054, 0.118),
    'big': (0.032, 0.082, 0.135),
    'pointy': (0.015, 0.036, 0.138),
  }[traits.nose]
  low = tip + (0.012 if traits.nose == 'pointy' else 0.004)
  shape = curve(
    [
      (-bridge, -0.06),
      (bridge, -0.06),
      (bridge + 0.004, 0.02),
      (wing * 0.75, tip - 0.05),
      (wing, tip - 0.018),
    ]
    + [(wing * 0.72, tip + 0.002), (0, low), (-wing * 0.72, tip + 0.002), (-wing, tip - 0.018)]
    + [(-wing * 0.75, tip - 0.05), (-bridge - 0.004, 0.02)]
  )
  ridge = scene.spot(0.004 * traits.light, 0.03, 0.02 + wing * 0.1, 0.09)
  flank = scene.spot(-traits.light * wing * 0.8, tip - 0.04, wing * 0.6, 0.06)
  light = scene.light + 0.07 * ridge - 0.13 * flank - 0.07 * scene.spot(0, low + 0.01, wing, 0.025)
  tint = mix(shaded(skin, light), (214, 92, 80), 0.1 * scene.spot(0, tip - 0.03, wing, 0.03))
  scene.fill(shape, tint, 'nose', lift=0.012)
  shine = ellipse(0.004 * traits.light, tip - 0.035, wing * 0.24, 0.013)
  scene.fill(shine, (255, 250, 244), opacity=0.28, lift=0.04)
  for side in SIDES:
    crease = curve(
      [
        (side * wing * 0.8, tip - 0.048),
        (side * wing * 1.02, tip - 0.02),
        (side * wing * 0.8, tip + 0.002),
      ],
      closed=False,
    )
    scene.fill(
      ribbon(crease, taper(len(crease), 0.009)), skin * (0.62, 0.48, 0.44), opacity=0.6, lift=0.012
    )
    nostril = ellipse(side * wing * 0.42, tip - 0.002, wing * 0.22, 0.0068)
    scene.fill(nostril, skin * (0.36, 0.24, 0.22), opacity=0.85, lift=0.012)
  under = curve([(-wing * 0.6, tip), (0, low + 0.002), (wing * 0.6, tip)], closed=False)
  scene.fill(
    ribbon(under, taper(len(under), 0.008)), skin * (0.6, 0.46, 0.42), opacity=0.55, lift=0.012
  )


def draw_eyes(scene: Scene):
  """Eyelids, whites, irises with a highlight, lashes, eye shadow."""
  traits = scene.traits
  skin = traits.skin_rgb
  tall = (0.013 if traits.narrow_eyes else 0.029) * (0.88 if traits.smiling else 1.0)
  wide = 0.05
  for side, name in SIDES.items():
    x, y = side * traits.eye_spacing, -0.052
    if traits.makeup:
      lid = curve(
        [
          (x - side * wide, y),
          (x, y - tall - 0.034),
          (x + side * (wide + 0.018), y - 0.022),
          (x, y + 0.01),
        ]
      )
      scene.fill(lid, mix(traits.lipstick, (90, 50, 130), 0.6), opacity=0.6)
    inner, outer = (x - side * wide, y + 0.006), (x + side * wide, y - 0.004)
    top = [
      (x - side * 0.024, y - tall * 0.8),
      (x + side * 0.006, y - tall),
      (x + side * 0.032, y - tall * 0.75),
    ]
    bottom = [
      (x + side * 0.03, y + tall * 0.55),
      (x, y + tall * 0.75),
      (x - side * 0.028, y + tall * 0.6),
    ]
    shape = curve([inner, *top, outer, *bottom], samples=8)
    white = shaded((250, 248, 246), 1.0 - 0.25 * scene.spot(x, y - 0.03, 0.06, 0.022))
    scene.fill(shape, white, f'{name}_eye')
    inside = (f'{name}_eye',)
    scene.fill(
      ellipse(x, y - 0.003, 0.0255, 0.0255), np.array(traits.iris_rgb) * 0.6, inside=inside
    )
    scene.fill(ellipse(x, y, 0.021, 0.021), traits.iris_rgb, inside=inside)
    scene.fill(ellipse(x, y - 0.003, 0.0115, 0.0115), (14, 12, 14), inside=inside)
    scene.fill(
      ellipse(x + 0.009 * traits.light, y - 0.011, 0.0065, 0.0065), (255, 255, 255), inside=inside
    )
    lid_line = curve([inner, *top, outer], closed=False)
    lash = 0.015 if traits.makeup else 0.0095
    scene.fill(ribbon(lid_line, lash * np.linspace(0.5, 1, len(lid_line))), (36, 24, 22))
    if traits.makeup:
      wing = [
        (x + side * 0.035, y - 0.01),
        (x + side * 0.066, y - 0.017),
        (x + side * wide, y + 0.003),
      ]
      scene.fill(wing, (30, 20, 22))
    crease = curve([(px, py - 0.015) for px, py in (inner, *top, outer)], closed=False)
    scene.fill(ribbon(crease, taper(len(crease), 0.007)), skin * (0.6, 0.46, 0.42), opacity=0.5)
    under = curve([outer, *bottom, inner], closed=False)
    scene.fill(ribbon(under, 0.005), skin * (0.6, 0.44, 0.42), opacity=0.6)


def draw_brows(scene: Scene):
  """Eyebrows in a shade of the hair's colour."""
  traits = scene.traits
  thick = {'plain': 0.019, 'bushy': 0.038, 'arched': 0.015}[traits.brows]
  rise = {'plain': 0.012, 'bushy': 0.01, 'arched': 0.032}[traits.brows]
  color = mix(
    traits.hair_rgb * 0.72, (64, 44, 34), 0.3 if traits.hair_color != 'Gray_Hair' else 0.1
  )
  for side, name in SIDES.items():
    x, y = side * traits.eye_spacing, -0.118
    line = curve(
      [
        (x - side * 0.058, y + (0.005 if traits.brows != 'arched' else -0.003)),
        (x - side * 0.018, y - rise * 0.75),
        (x + side * 0.022, y - rise),
      ]
      + [(x + side * 0.072, y + 0.008)],
      closed=False,
    )
    widths = thick * np.interp(
      np.linspace(0, 1, len(line)), [0, 0.15, 0.6, 1], [0.7, 1, 0.85, 0.15]
    )
    scene.fill(ribbon(line, widths), color, f'{name}_brow')


def draw_mouth(scene: Scene):
  """Lips, closed or open; an open smile shows the teeth."""
  traits = scene.traits
  skin = traits.skin_rgb
  wide = 0.1 if traits.smiling else 0.078
  lift = 0.034 if traits.smiling else -0.003
  full = 1.75 if traits.big_lips else 1.0
  upper, lower, gap = 0.021 * full, 0.029 * full, 0.0
  if traits.mouth_open:
    gap = 0.04 if traits.smiling else 0.034
  y = 0.2 + (0.005 if traits.smiling else 0.0)
  color = traits.lipstick or mix(skin, (182, 74, 76), 0.42)
  across = np.linspace(-1, 1, 21)
  bow = 1 - across**2
  corners = y - lift * across**2
  line = corners + (0.004 if not traits.smiling else 0.012) * bow  # the upper lip's lower edge
  low = line + gap * bow**0.7
  cupid = 0.3 * np.exp(-((across / 0.16) ** 2))
  top = line - upper * (bow**0.6 - cupid)
  bottom = low + lower * bow**0.6

  def edge(values):
    return np.stack([across * wide, values], axis=1)

  def between(first, second):
    return np.concatenate([edge(first), edge(second)[::-1]])

  if gap:
    scene.fill(between(line, low), (92, 22, 28), 'mouth')
    if traits.smiling:
      scene.fill(between(line, line + 0.72 * (low - line)), (250, 247, 240), inside=('mouth',))
    else:
      scene.fill(between(line, line + 0.3 * (low - line)), (240, 236, 228), inside=('mouth',))
      scene.fill(ellipse(0, y + 0.045, 0.045, 0.016), (186, 84, 88), inside=('mouth',))
  scene.fill(between(top, line), np.asarray(color) * 0.86, 'u_lip')
  scene.fill(between(low, bottom), color, 'l_lip')
  shine = ellipse(0.012 * traits.light, float(low[10]) + lower * 0.45, 0.03, lower * 0.2)
  scene.fill(shine, (255, 240, 236), opacity=0.38 if traits.lipstick else 0.22)
  if not gap:
    closed = ribbon(edge(line), 0.0075)
    scene.fill(closed, np.asarray(color) * 0.45, opacity=0.85)
  for side in SIDES:
    scene.fill(ellipse(side * wide, float(corners[0]), 0.009, 0.007), skin * 0.5, opacity=0.4)
