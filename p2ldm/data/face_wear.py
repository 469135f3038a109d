"""Draws what a synthetic face wears, from necktie to hat. Coordinates: see face_canvas."""

import numpy as np

from p2ldm.data.face_canvas import LABELS, Scene, curve, ellipse, mix, ribbon
from p2ldm.data.face_drawing import SIDES, outline

METAL = (226, 180, 70)
SILVER = (206, 208, 216)
# What clear lenses give their label; eyes and brows keep their own, as in CelebAMask-HQ.
BEHIND_LENSES = ('background', 'skin', 'nose', 'eye_g', 'l_ear', 'r_ear', 'hair')


def draw_clothes(scene: Scene):
  """Shoulders with one of four necklines, and the tie."""
  traits = scene.traits
  color = traits.cloth_rgb
  depth = {'round': 0.455, 'vee': 0.5, 'scoop': 0.5, 'shirt': 0.43}[traits.collar]
  neck = {'round': 0.17, 'vee': 0.17, 'scoop': 0.21, 'shirt': 0.155}[traits.collar]
  rim = [
    (-neck, 0.4),
    (-neck * 0.75, depth - 0.018),
    (0, depth),
    (neck * 0.75, depth - 0.018),
    (neck, 0.4),
  ]
  if traits.collar in ('vee', 'shirt'):
    rim = [(-neck, 0.39), (0, depth + 0.04), (neck, 0.39)]
  else:
    rim = curve(rim, closed=False)
  shoulders = [(0.3, 0.43), (0.44, 0.475), (0.56, 0.56), (0.8, 0.9)]
  shape = np.concatenate([rim, shoulders, [(-x, y) for x, y in shoulders[::-1]]])
  light = (
    1.0
    + 0.1 * traits.light * scene.x / 0.4
    - 0.5 * (np.abs(scene.x) > 0) * np.clip(0.45 - scene.y, 0, 0.2)
  )
  scene.fill_body(shape, color * light[..., None], 'cloth')
  dark, bright = color * 0.72, mix(color, (255, 255, 255), 0.25)
  if traits.collar == 'shirt':
    if traits.necktie:
      tie = np.asarray(traits.tie_rgb)
      scene.fill_body(
        [(-0.05, 0.445), (0.05, 0.445), (0.034, 0.5), (-0.034, 0.5)], tie * 0.8, 'cloth'
      )
      scene.fill_body([(-0.034, 0.5), (0.034, 0.5), (0.07, 0.75), (-0.07, 0.75)], tie, 'cloth')
      for y in (0.515, 0.57, 0.625):
        half = 0.03 + 0.144 * (y - 0.5)
        stripe = [
          (-half, y + 0.02),
          (half, y - 0.01),
          (half + 0.003, y + 0.012),
          (-half - 0.003, y + 0.042),
        ]
        scene.fill_body(stripe, mix(tie, (255, 255, 255), 0.45))
    for side in SIDES:
      flap = [(side * 0.155, 0.375), (side * 0.02, 0.462), (side * 0.1, 0.53), (side * 0.19, 0.415)]
      scene.fill_body(flap, bright, 'cloth')
      scene.fill_body(ribbon(flap[1:], 0.006), dark, 'cloth')
  else:
    scene.fill_body(ribbon(rim, 0.016), dark, 'cloth')


def draw_necklace(scene: Scene):
  """A chain with a pendant, or beads."""
  if scene.traits.necklace == 'none':
    return
  x = np.linspace(-0.158, 0.158, 25)
  y = 0.475 - 0.095 * (x / 0.158) ** 2
  if scene.traits.necklace == 'chain':
    scene.fill_body(ribbon(np.stack([x, y], axis=1), 0.015), METAL, 'neck_l')
    scene.fill_body(ellipse(0, 0.492, 0.024, 0.026), METAL, 'neck_l')
    scene.fill_body(ellipse(-0.005, 0.487, 0.009, 0.01), (255, 240, 190))
    return
  for px, py in zip(x[::2], y[::2], strict=True):
    scene.fill_body(ellipse(px, py, 0.0155, 0.0155), (236, 230, 222), 'neck_l')
    scene.fill_body(ellipse(px - 0.004, py - 0.004, 0.006, 0.006), (255, 255, 255))


def draw_earrings(scene: Scene):
  """Studs, hoops or drops at the lobes."""
  kind = scene.traits.earrings
  if kind == 'none':
    return
  edge = outline(scene.traits.shape)[4, 0]
  metal = METAL if scene.traits.noise[5] < 0.6 else SILVER
  for side in SIDES:
    x, y = side * (edge + 0.026), 0.08
    if kind == 'stud':
      scene.fill(ellipse(x, y, 0.019, 0.019), metal, 'ear_r', depth=-0.03)
      scene.fill(ellipse(x - 0.004, y - 0.005, 0.007, 0.007), (255, 255, 250), depth=-0.03)
    elif kind == 'hoop':
      ring = ellipse(x, y + 0.042, 0.034, 0.044)
      scene.fill(ribbon(np.concatenate([ring, ring[:1]]), 0.016), metal, 'ear_r', depth=-0.03)
    else:
      drop = curve([(x, y - 0.012), (x + 0.02, y + 0.06), (x, y + 0.088), (x - 0.02, y + 0.06)])
      scene.fill(drop, metal, 'ear_r', depth=-0.03)
      scene.fill(ellipse(x, y + 0.056, 0.009, 0.014), (70, 170, 160), depth=-0.03)


def draw_glasses(scene: Scene):
  """Frames with clear or dark lenses; the eyes behind clear lenses keep their labels."""
  traits = scene.traits
  if traits.glasses == 'none':
    return
  dark = traits.glasses == 'dark'
  rx, ry, power = {
    'round': (0.08, 0.066, 2.0),
    'square': (0.085, 0.056, 5.0),
    'wide': (0.09, 0.05, 2.8),
  }[traits.lens]
  edge = outline(traits.shape)[4, 0]
  for side in SIDES:
    x, y = side * (traits.eye_spacing + 0.006), -0.05
    hinge = scene.head.place([(x + side * rx * 0.9, y - 0.02)], lift=0.02)
    ear = scene.head.place([(side * (edge + 0.004), y - 0.012)], 0.0)
    arm = ribbon(np.concatenate([hinge, ear]), 0.015 * traits.scale)
    scene.canvas.fill(arm, traits.frame_rgb, LABELS['eye_g'])
    lens = ellipse(x, y, rx, ry, power)
    if dark:
      tint = mix((30, 28, 34), (96, 84, 84), np.clip((scene.y + 0.1) / 0.1, 0, 1))
      scene.fill(lens, tint, 'eye_g', lift=0.02)
      glare = [
        (x - 0.05, y - 0.03),
        (x - 0.02, y - 0.035),
        (x - 0.045, y + 0.012),
        (x - 0.06, y + 0.005),
      ]
      scene.fill(glare, (255, 255, 255), opacity=0.2, lift=0.02)
    else:
      scene.fill(lens, (226, 238, 246), 'eye_g', 0.16, BEHIND_LENSES, lift=0.02)
      glare = [
        (x - 0.045, y - 0.05),
        (x - 0.018, y - 0.05),
        (x - 0.052, y + 0.035),
        (x - 0.066, y + 0.02),
      ]
      scene.fill(glare, (255, 255, 255), opacity=0.22, lift=0.02)
    rim = ribbon(np.concatenate([lens, lens[:1]]), 0.017)
    scene.fill(rim, traits.frame_rgb, 'eye_g', lift=0.02)
  inner = traits.eye_spacing + 0.006 - rx
  bridge = curve([(-inner - 0.004, -0.055), (0, -0.072), (inner + 0.004, -0.055)], closed=False)
  scene.fill(ribbon(bridge, 0.014), traits.frame_rgb, 'eye_g', lift=0.02)


def draw_hat(scene: Scene):
  """A beanie with a pompom, a cap with a visor, or a hat with a brim."""
  traits = scene.traits
  if traits.hat == 'none':
    return
  color = traits.hat_rgb
  edge = outline(traits.shape)[4, 0] + 0.03
  light = 1.0 + 0.15 * traits.light * scene.x / 0.3 - 0.12 * ((scene.x / 0.3) ** 2)
  field = color * light[..., None]
  dark, bright = color * 0.7, mix(color, (255, 255, 255), 0.3)
  angle = np.linspace(np.pi / 2, -np.pi / 2, 30)
  tall = {'beanie': 0.25, 'cap': 0.225, 'brim': 0.2}[traits.hat]
  dome = np.stack([edge * np.sin(angle), -0.2 - tall * np.cos(angle) ** 0.8], axis=1)
  if traits.hat == 'beanie':
    scene.fill(ellipse(0, -0.445, 0.05, 0.045), bright, 'hat', depth=0.0)
    scene.fill(dome, field, 'hat', depth=0.0)
    x = np.linspace(-1, 1, 15)
    low = np.stack([x * (edge + 0.012), -0.175 - 0.012 * (1 - x**2)], axis=1)
    high = low[::-1] - (0, 0.085)
    scene.fill(np.concatenate([low, high]), field * 0.84, 'hat', depth=0.04)
    return
  if traits.hat == 'cap':
    scene.fill(
      np.concatenate([dome, [(-edge, -0.175), (0, -0.2), (edge, -0.175)]]), field, 'hat', depth=0.0
    )
    for x in (-0.1, 0.1):
      seam = curve([(0, -0.42), (x, -0.36), (x * 1.4, -0.22)], closed=False)
      scene.fill(ribbon(seam, 0.008), dark, opacity=0.6, depth=0.03)
    scene.fill(ellipse(0, -0.425, 0.022, 0.014), dark, 'hat', depth=0.0)
    visor = curve(
      [(-0.235, -0.195), (-0.12, -0.25), (0, -0.262), (0.12, -0.25), (0.235, -0.195), (0.2, -0.165)]
      + [(0.1, -0.172), (0, -0.178), (-0.1, -0.172), (-0.2, -0.165)]
    )
    scene.fill(visor, dark, 'hat', depth=0.16)
    return
  crown = np.stack([edge * 0.92 * np.sin(angle), -0.2 - 0.25 * np.cos(angle) ** 0.35], axis=1)
  scene.fill(crown, field, 'hat', depth=0.0)
  band = [(-edge * 0.92, -0.265), (edge * 0.92, -0.265), (edge * 0.92, -0.2), (-edge * 0.92, -0.2)]
  scene.fill(band, color * 0.45, 'hat', depth=0.02)
  scene.fill(ellipse(0, -0.215, edge + 0.13, 0.05), field * 0.86, 'hat', depth=0.04)
