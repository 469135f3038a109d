"""A drawing surface that keeps a picture and its label of every pixel, and a head's pose on it.

Points are (x, y) in [0, 1] of the picture. Everything is drawn without anti-aliasing at a multiple of
the final size; the picture is then averaged down, the labels are sampled, so that no label is mixed.
Soft shading comes as fields: small arrays over the whole picture, interpolated where they are painted.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from p2ldm.data.face_traits import Traits
from p2ldm.data.labels import CELEBAMASK_HQ

FIELD = 64  # side of a field
LABELS = {name: i for i, name in enumerate(CELEBAMASK_HQ.classes)}


@dataclasses.dataclass(frozen=True)
class Pose:
  """Where a head is: head coordinates have their origin between ears, y down, 1 = the picture's side.

  Attributes:
    center: (x, y) of the origin in the picture.
    scale: size of the head, 1 = as drawn.
    tilt: rotation in the picture's plane, radians.
    turn, nod: rotation to the side and downwards, radians (small: the projection is orthographic).
  """

  center: tuple[float, float]
  scale: float
  tilt: float = 0.0
  turn: float = 0.0
  nod: float = 0.0

  def place(self, points, depth: float | None = None, lift: float = 0.0) -> np.ndarray:
    """Head coordinates (N, 2) -> picture coordinates (N, 2) float64.

    `depth` is how far the points are in front of the plane through the ears; None means on the face,
    `lift` above it.
    """
    points = np.asarray(points, np.float64)
    z = face_depth(points[:, 0], points[:, 1]) + lift if depth is None else depth
    x = points[:, 0] * np.cos(self.turn) + z * np.sin(self.turn)
    y = points[:, 1] + z * np.sin(self.nod)
    cos, sin = np.cos(self.tilt), np.sin(self.tilt)
    turned = np.stack([cos * x - sin * y, sin * x + cos * y], axis=1)
    return turned * self.scale + self.center

  def grid(self) -> tuple[np.ndarray, np.ndarray]:
    """Head coordinates x, y, (FIELD, FIELD) each, of a field's cells; inverts `place` on the face."""
    cells = (np.arange(FIELD) + 0.5) / FIELD
    x, y = np.meshgrid(cells - self.center[0], cells - self.center[1])
    x, y = x / self.scale, y / self.scale
    cos, sin = np.cos(self.tilt), np.sin(self.tilt)
    x, y = cos * x + sin * y, cos * y - sin * x
    z = face_depth(x, y)
    z = face_depth(x - z * np.sin(self.turn), y - z * np.sin(self.nod))
    return x - z * np.sin(self.turn), y - z * np.sin(self.nod)


def face_depth(x, y):
  """Depth of the face's surface: half an ellipsoid."""
  return 0.2 * np.sqrt(np.clip(1 - (x / 0.27) ** 2 - (y / 0.46) ** 2, 0, 1))


def curve(points, closed: bool = True, samples: int = 6) -> np.ndarray:
  """A Catmull-Rom spline through control points (N, 2), as (M, 2)."""
  points = np.asarray(points, np.float64)
  if closed:
    around = np.concatenate([points[-1:], points, points[:2]])
  else:
    around = np.concatenate([points[:1], points, points[-1:]])
  p0, p1, p2, p3 = (around[i : len(around) - 3 + i, None] for i in range(4))
  t = (np.arange(samples) / samples)[None, :, None]
  spline = 0.5 * (
    2 * p1
    + (p2 - p0) * t
    + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2
    + (3 * p1 - p0 - 3 * p2 + p3) * t**3
  ).reshape(-1, 2)
  return spline if closed else np.concatenate([spline, points[-1:]])


def ellipse(x: float, y: float, rx: float, ry: float, power: float = 2.0) -> np.ndarray:
  """A superellipse around (x, y) as (40, 2); a higher power is more of a rectangle."""
  angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
  cos, sin = np.cos(angle), np.sin(angle)
  return np.stack(
    [
      x + rx * np.sign(cos) * np.abs(cos) ** (2 / power),
      y + ry * np.sign(sin) * np.abs(sin) ** (2 / power),
    ],
    axis=1,
  )


def ribbon(points, widths) -> np.ndarray:
  """The outline (2N, 2) of an open line (N, 2) that is `widths` (a number or N of them) wide."""
  points = np.asarray(points, np.float64)
  direction = np.gradient(points, axis=0)
  normal = np.stack([-direction[:, 1], direction[:, 0]], axis=1)
  normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
  offset = normal * np.broadcast_to(np.asarray(widths) / 2, len(points))[:, None]
  return np.concatenate([points + offset, (points - offset)[::-1]])


def taper(count: int, width: float) -> np.ndarray:
  """(count,) widths from 0 to `width` in the middle and back to 0."""
  return width * np.sin(np.linspace(0.06, np.pi - 0.06, count)) ** 0.7


class Canvas:
  """A picture of size x size pixels and its labels, both drawn larger."""

  def __init__(self, size: int):
    self._factor = 4 if size <= 64 else 3 if size <= 128 else 2
    self.side = size * self._factor
    self._image = Image.new('RGB', (self.side, self.side))
    self._labels = Image.new('L', (self.side, self.side))
    self._draw = ImageDraw.Draw(self._image), ImageDraw.Draw(self._labels)

  def fill(self, points, paint, label=None, opacity=1.0, inside=None):
    """Fills the polygon `points` (N, 2).

    Args:
      points: picture coordinates.
      paint: an RGB colour, 0 to 255, or a field (FIELD, FIELD, 3) of them.
      label: class id the polygon's pixels get; None leaves their labels alone.
      opacity: 0 to 1, or a field (FIELD, FIELD) of it; of the colour only.
      inside: class ids; where given, pixels of other classes are left alone.
    """
    corners = np.asarray(points) * self.side
    solid = np.ndim(paint) == 1
    if solid:
      paint = tuple(np.clip(paint, 0, 255).astype(int).tolist())
      if inside is None and isinstance(opacity, float) and opacity == 1.0:
        flat = corners.ravel().tolist()
        self._draw[0].polygon(flat, fill=paint)
        if label is not None:
          self._draw[1].polygon(flat, fill=label)
        return
    left, top = np.clip(np.floor(corners.min(0)), 0, self.side).astype(int).tolist()
    right, bottom = np.clip(np.ceil(corners.max(0)) + 1, 0, self.side).astype(int).tolist()
    if right <= left or bottom <= top:
      return
    box = (left, top, right, bottom)
    cover = Image.new('L', (right - left, bottom - top))
    ImageDraw.Draw(cover).polygon((corners - (left, top)).ravel().tolist(), fill=255)
    if inside is not None:
      table = [0] * 256
      for i in inside:
        table[i] = 255
      cover = ImageChops.darker(cover, self._labels.crop(box).point(table))
    if label is not None:
      self._labels.paste(label, box, cover)
    if isinstance(opacity, np.ndarray):
      cover = ImageChops.multiply(cover, self._spread(opacity * 255, box))
    elif opacity < 1.0:
      cover = cover.point((np.arange(256) * opacity).astype(int).tolist())
    self._image.paste(paint if solid else self._spread(paint, box), box, cover)

  def everywhere(self, paint, opacity=1.0):
    """Fills the whole picture; no label changes."""
    self.fill([(0, 0), (1, 0), (1, 1), (0, 1)], paint, None, opacity)

  def finish(self) -> tuple[np.ndarray, np.ndarray]:
    """The picture (size, size, 3) uint8 and its class ids (size, size) uint8."""
    middle = self._factor // 2
    labels = np.asarray(self._labels)[middle :: self._factor, middle :: self._factor]
    return np.asarray(self._image.reduce(self._factor)), labels.copy()

  def _spread(self, field, box):
    """The part of a field that `box` (pixels) covers, interpolated."""
    small = Image.fromarray(np.clip(field + 0.5, 0, 255).astype(np.uint8))
    cell = FIELD / self.side
    return small.resize(
      (box[2] - box[0], box[3] - box[1]), Image.BILINEAR, tuple(c * cell for c in box)
    )


class Scene:
  """What the drawing functions share: the canvas, the face's traits, its pose and lit colours.

  Attributes:
    canvas, traits: as given.
    head, body: poses of the face and of neck and shoulders.
    x, y: head coordinates of a field's cells, (FIELD, FIELD) each.
    light: (FIELD, FIELD), brightness of a lit face; 1 is neutral.
  """

  def __init__(self, size: int, traits: Traits):
    self.canvas = Canvas(size)
    self.traits = traits
    self.head = Pose(traits.center, traits.scale, traits.tilt, traits.turn, traits.nod)
    self.body = Pose((traits.center[0], traits.center[1] - 0.025), traits.scale, traits.tilt * 0.2)
    self.x, self.y = self.head.grid()
    across, down = self.x / 0.27, self.y / 0.46
    self.light = 1.03 + 0.1 * (traits.light * across - down) - 0.13 * (across**2 + down**2) ** 2

  def spot(self, x: float, y: float, rx: float, ry: float) -> np.ndarray:
    """A field: a soft spot of height 1 around head coordinates (x, y)."""
    return np.exp(-(((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2))

  def fill(self, points, paint, label=None, opacity=1.0, inside=None, depth=None, lift=0.0):
    """`Canvas.fill` in head coordinates; the label and `inside` are class names."""
    self.canvas.fill(
      self.head.place(points, depth, lift),
      paint,
      None if label is None else LABELS[label],
      opacity,
      None if inside is None else [LABELS[name] for name in inside],
    )

  def fill_body(self, points, paint, label=None, opacity=1.0, inside=None):
    """The same for neck and shoulders, which do not turn with the head."""
    self.canvas.fill(
      self.body.place(points, 0.0),
      paint,
      None if label is None else LABELS[label],
      opacity,
      None if inside is None else [LABELS[name] for name in inside],
    )


def shaded(color, light) -> np.ndarray:
  """A colour under a field of brightness, (FIELD, FIELD, 3); shade is warmer than light."""
  light = np.clip(light, 0.2, 1.5)[..., None]
  return np.asarray(color) * light ** np.array([0.85, 1.1, 1.25])


def mix(color, other, amount) -> np.ndarray:
  """Colours or fields: `color` with `amount` (a number or a (FIELD, FIELD) field) of `other`."""
  amount = np.asarray(amount)[..., None]
  return np.asarray(color) * (1 - amount) + np.asarray(other) * amount
