"""Draws the hair and the beard of a synthetic face. Coordinates: see face_canvas."""

import numpy as np

from p2ldm.data.face_canvas import LABELS, Scene, curve, mix, ribbon, taper
from p2ldm.data.face_drawing import outline


def hair_field(scene: Scene) -> np.ndarray:
  """The hair's colours: a sheen around the crown, darker towards the ends."""
  traits = scene.traits
  sheen = np.exp(-(((np.hypot(scene.x * 1.2, scene.y + 0.02) - 0.33) / 0.05) ** 2)) * (
    scene.y < 0.1
  )
  light = 0.98 + 0.12 * traits.light * scene.x / 0.3 - 0.25 * np.clip(scene.y, -0.2, 0.5)
  colors = traits.hair_rgb * np.clip(light, 0.5, 1.3)[..., None]
  return mix(colors, (255, 246, 232), 0.13 * sheen)


def _wave(traits, along, amplitude=0.016):
  """Sideways displacement of an edge at `along` (N,): none where the hair is straight."""
  if traits.texture == 'straight':
    return np.zeros_like(along)
  return amplitude * np.sin(along * 48 + 6 * traits.noise[0])


def _start(traits) -> float:
  """How far up hanging hair is drawn; the cap of hair or a hat covers its upper end."""
  return -0.27 if traits.hat == 'none' else -0.2


def _end(traits) -> float:
  """How far down the hair reaches."""
  return {'bob': 0.26, 'long': 0.5}[traits.length] + 0.06 * traits.noise[1]


def draw_back_hair(scene: Scene):
  """What hangs behind neck and shoulders."""
  traits = scene.traits
  if traits.length not in ('bob', 'long'):
    return
  y = np.linspace(_start(traits), _end(traits), 36)
  spread = _silhouette(traits, y) * _rounding(traits, y)
  left = np.stack([-spread + _wave(traits, y), y], axis=1)
  right = np.stack([spread + _wave(traits, y), y], axis=1)[::-1]
  scene.fill(np.concatenate([left, right]), hair_field(scene) * 0.72, 'hair', depth=-0.02)


def _silhouette(traits, y):
  """Half the width of long hair at y: around the crown down to the temples, then hanging free."""
  crown = np.sqrt(1 - np.clip((y + 0.1) / (0.305 + traits.volume), -0.99, 0) ** 2)
  edge = outline(traits.shape)[4, 0]
  width = (edge + traits.volume + 0.008) * crown + 0.04 * np.clip((y + 0.1) / 0.25, 0, 1) ** 0.7
  if traits.hat == 'none':
    return width
  free = np.clip((y + 0.18) / 0.2, 0, 1)  # a hat holds the hair down to its rim
  return (1 - free) * (edge + 0.015) + free * width


def _rounding(traits, y):
  """Factor of the hair's width near its lower end: a bob curls inwards."""
  last = np.clip((y - (y[-1] - 0.1)) / 0.1, 0, 1)
  return 1 - (0.3 if traits.length == 'bob' else 0.16) * last**2.5


def _crown(traits) -> np.ndarray:
  """The hair's outer edge from one temple over the top to the other, (N, 2)."""
  thick = 0.016 if traits.fringe == 'receding' else traits.volume + 0.02
  angle = np.linspace(1.75, -1.75, 60)
  if traits.length == 'short':  # closer to the head towards the ears
    thick = thick * np.sqrt(np.clip((1.85 - np.abs(angle)) / 0.6, 0.05, 1))
  radius = 1.0
  if traits.texture == 'wavy' and traits.fringe != 'receding':
    bumps = np.abs(np.sin(angle * 5 + 3 * traits.noise[2]))
    radius = 1 + 0.05 * bumps * np.clip((1.6 - np.abs(angle)) / 0.5, 0, 1)
  edge = outline(traits.shape)[4, 0] + 0.006
  return np.stack(
    [
      radius * (edge + thick * 0.8) * np.sin(angle),
      -0.1 - radius * (0.305 + thick * 1.2) * np.cos(angle),
    ],
    axis=1,
  )


def _hairline(traits) -> np.ndarray:
  """The hair's inner edge from the right of the picture to the left, (N, 2)."""
  edge = outline(traits.shape)[4, 0] - 0.006
  side = traits.part
  if traits.fringe == 'bangs':
    x = np.linspace(0.96 * edge, -0.96 * edge, 41)
    y = -0.182 - 0.02 * (1 - (x / edge) ** 2) + 0.05 * (np.abs(x) / edge) ** 6
    steps = np.abs(np.sin(x * 42 + 3 * traits.noise[3]))
    y = y + (0.012 if traits.texture == 'straight' else 0.026) * (steps - 0.6)
    return np.concatenate([[(edge, -0.04)], np.stack([x, y], axis=1), [(-edge, -0.04)]])
  if traits.fringe == 'receding':
    half = [
      (edge, -0.06),
      (edge - 0.012, -0.2),
      (0.19, -0.275),
      (0.125, -0.365),
      (0.06, -0.335),
      (0.0, -0.325),
    ]
    inner = curve(half + [(-x, y) for x, y in half[-2::-1]], closed=False)
  elif traits.fringe == 'center':
    half = [(edge, -0.02), (edge - 0.015, -0.13), (0.16, -0.225), (0.07, -0.29), (0.0, -0.345)]
    inner = curve(half + [(-x, y) for x, y in half[-2::-1]], closed=False)
  else:
    points = [(edge, -0.05), (edge - 0.02, -0.17), (0.17, -0.27), (0.1, -0.325), (0.02, -0.285)]
    points += [(-0.09, -0.235), (-0.185, -0.185), (0.01 - edge, -0.12), (-edge, -0.05)]
    inner = curve(points if side > 0 else [(-x, y) for x, y in points[::-1]], closed=False)
  if traits.texture == 'wavy':
    inner[3:-3, 1] += 0.008 * np.sin(np.arange(len(inner) - 6) * 0.9)
  return inner


def draw_front_hair(scene: Scene):
  """The cap of hair around the face, the locks beside it, and a few strands."""
  traits = scene.traits
  if traits.length == 'bald' or (traits.hat != 'none' and traits.length == 'short'):
    return
  field = hair_field(scene)
  if traits.covers_ears:
    draw_locks(scene, field)
  if traits.hat != 'none':
    return
  cap = [scene.head.place(_crown(traits), 0.0), scene.head.place(_hairline(traits)[::-1])]
  scene.canvas.fill(np.concatenate(cap), field, LABELS['hair'])
  if traits.sideburns:
    draw_sideburns(scene, field)
  draw_strands(scene)


def draw_sideburns(scene: Scene, field):
  """Strips of hair in front of the ears."""
  edge = outline(scene.traits.shape)[4, 0]
  for side in (-1, 1):
    outer = scene.head.place([(side * (edge + 0.02), -0.16), (side * (edge + 0.02), 0.07)], 0.0)
    inner = [
      (side * (edge - 0.022), 0.09),
      (side * (edge - 0.036), 0.06),
      (side * (edge - 0.03), -0.16),
    ]
    inner = scene.head.place(inner, 0.07)
    strip = np.concatenate([outer, inner])
    scene.canvas.fill(strip, field, LABELS['hair'], inside=[LABELS['skin']])


def draw_locks(scene: Scene, field):
  """Hair that falls over the ears on both sides of the face."""
  traits = scene.traits
  edge = outline(traits.shape)[4, 0]
  y = np.linspace(_start(traits), _end(traits), 40)
  down = np.clip((y + 0.1) / 0.25, 0, 1)
  outer = _silhouette(traits, y)
  inner = (
    np.minimum(edge - 0.052, outer - 0.03) + 0.03 * down + 0.03 * np.clip((y - 0.3) / 0.2, 0, 1)
  )
  middle, half = (inner + outer) / 2, (outer - inner) / 2
  last = np.clip((y - (y[-1] - 0.07)) / 0.07, 0, 1)
  half = half * np.sqrt(np.maximum(1 - last**2, 0.01))
  if traits.length == 'bob':
    middle = middle - 0.05 * np.clip((y - y[-1] + 0.14) / 0.14, 0, 1) ** 2
  for side in (-1, 1):
    shift = _wave(traits, y, 0.017) * side
    # The inner edge lies on the face and turns with it, so that it never covers an eye.
    inner = scene.head.place(np.stack([side * (middle - half + shift), y], 1), lift=0.01)
    outer = scene.head.place(np.stack([side * (middle + half + shift), y], 1), 0.0)
    scene.canvas.fill(np.concatenate([inner, outer[::-1]]), field * 0.93, LABELS['hair'])


def draw_strands(scene: Scene):
  """Soft strands over the cap, which show how the hair is combed."""
  traits = scene.traits
  noise = traits.noise
  for i in range(10):
    angle = -1.35 + 2.7 * (i + 0.6 * noise[10 + i]) / 10
    along = np.linspace(0, 1, 14)
    reach = 0.62 + 0.3 * along
    bend = angle * (0.55 + 0.45 * (1 - along))
    if traits.texture == 'wavy':
      bend = bend + 0.07 * np.sin(along * 9 + 6 * noise[20 + i])
    x, y = reach * 0.27 * np.sin(bend) * 1.1, -0.1 - reach * 0.36 * np.cos(bend)
    tone = 1.35 if i % 2 else 0.7
    strand = ribbon(np.stack([x, y], axis=1), taper(14, 0.014))
    color = traits.hair_rgb * tone + (14 if i % 2 else 0)
    scene.fill(strand, color, opacity=0.3, inside=('hair',), depth=0.02)


def draw_beard(scene: Scene):
  """Stubble, moustache, goatee or full beard; its pixels stay skin, as in CelebAMask-HQ."""
  traits = scene.traits
  if traits.beard == 'none':
    return
  edge = outline(traits.shape)
  across = np.abs(scene.x)
  start = np.interp(
    across, [0, 0.05, 0.1, 0.15, 0.2, 0.24], [0.245, 0.232, 0.175, 0.135, 0.07, -0.05]
  )
  jaw = 1 / (1 + np.exp(-(scene.y - start) / 0.01))
  lip = scene.spot(0, 0.158, 0.085, 0.02)
  face = curve(np.concatenate([edge, edge[-2:0:-1] * (-1, 1)]))
  lower = ('skin',)
  if traits.beard == 'stubble':
    amount = 0.42 * np.clip(jaw + lip, 0, 1)
    tone = mix((70, 66, 72), traits.hair_rgb, 0.3)
    scene.fill(face, np.broadcast_to(tone, (*amount.shape, 3)), None, amount, lower, depth=0.0)
    return
  color = hair_field(scene) * 0.85
  if traits.beard == 'full':
    amount = np.clip(1.3 * jaw - 0.1, 0, 1) * (1 - scene.spot(0, 0.2, 0.08, 0.025))
    scene.fill(face, color, None, np.clip(amount, 0, 0.96), lower, depth=0.0)
  if traits.beard == 'goatee':
    tuft = curve(
      [(-0.05, 0.275), (0, 0.262), (0.05, 0.275), (0.06, 0.32), (0.03, 0.372), (0, 0.382)]
      + [(-0.03, 0.372), (-0.06, 0.32)]
    )
    scene.fill(tuft, color, 'skin')
  if traits.beard in ('mustache', 'full'):
    drop = 0.035 if traits.beard == 'full' else 0.02
    whiskers = curve(
      [(0, 0.15), (0.04, 0.148), (0.085, 0.17), (0.108, 0.19 + drop), (0.07, 0.186), (0, 0.178)]
      + [(-0.07, 0.186), (-0.108, 0.19 + drop), (-0.085, 0.17), (-0.04, 0.148)]
    )
    scene.fill(whiskers, color, 'skin')
