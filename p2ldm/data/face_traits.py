"""What a synthetic face looks like, drawn from (seed, index), and which attributes that makes true."""

import dataclasses

import numpy as np

from p2ldm.data.labels import CELEBAMASK_HQ

SKINS = {
  'pale': (246, 222, 212),
  'light': (232, 188, 156),
  'tan': (214, 160, 120),
  'olive': (190, 140, 100),
  'brown': (148, 98, 68),
  'dark': (104, 68, 50),
}
HAIRS = {
  'Black_Hair': ((30, 26, 28), (22, 20, 30)),
  'Brown_Hair': ((104, 64, 36), (82, 48, 28), (124, 80, 48)),
  'Blond_Hair': ((232, 196, 116), (218, 178, 100), (240, 212, 150)),
  'Gray_Hair': ((166, 166, 170), (192, 192, 196)),
  'red': ((176, 72, 28),),  # none of the attributes' four colours
}
LIPSTICKS = ((190, 24, 48), (206, 40, 100), (150, 22, 60), (222, 70, 84))
IRISES = ((92, 58, 34), (62, 42, 30), (74, 112, 150), (88, 124, 76), (110, 124, 132))
BACKDROPS = ((150, 178, 205), (196, 176, 150), (120, 140, 128), (205, 205, 210), (90, 96, 118))
BACKDROPS += ((178, 140, 140), (222, 198, 162), (70, 110, 120), (164, 154, 190), (140, 160, 110))
CLOTHS = (
  (44, 62, 104),
  (150, 44, 52),
  (52, 104, 84),
  (230, 228, 222),
  (60, 60, 66),
  (214, 160, 62),
)
CLOTHS += ((120, 92, 150), (92, 146, 180), (200, 112, 96), (128, 120, 104))
HATS = ((176, 46, 52), (40, 70, 130), (54, 110, 80), (222, 176, 66), (70, 66, 74), (226, 224, 216))
HATS += ((140, 84, 150), (224, 120, 60))
TIES = ((160, 30, 44), (34, 54, 120), (40, 110, 84), (214, 150, 40))
FRAMES = ((24, 22, 26), (24, 22, 26), (110, 58, 34), (150, 34, 44), (40, 60, 120))


@dataclasses.dataclass(frozen=True)
class Traits:
  """One face; colours are RGB, 0 to 255, and lengths are in head coordinates (see face_canvas)."""

  skin: str
  skin_rgb: np.ndarray
  iris_rgb: tuple
  backdrop: tuple[np.ndarray, np.ndarray]  # colours of two opposite corners
  light: float  # -1 from the left of the picture, 1 from the right
  # Pose.
  center: tuple[float, float]
  scale: float
  tilt: float
  turn: float
  nod: float
  # Face.
  shape: str  # 'plain', 'oval', 'square' or 'chubby'
  double_chin: bool
  eye_spacing: float
  narrow_eyes: bool
  bags: bool
  rosy: bool
  makeup: bool
  nose: str  # 'plain', 'big' or 'pointy'
  brows: str  # 'plain', 'bushy' or 'arched'
  big_lips: bool
  lipstick: tuple | None
  mouth_open: bool
  smiling: bool
  # Hair.
  hair_color: str
  hair_rgb: np.ndarray
  length: str  # 'bald', 'short', 'bob' or 'long'
  texture: str  # 'straight' or 'wavy'
  fringe: str  # 'swept', 'center', 'bangs' or 'receding'
  part: int  # -1 or 1, the side of the parting
  covers_ears: bool
  volume: float
  beard: str  # 'none', 'stubble', 'mustache', 'goatee' or 'full'
  sideburns: bool
  # What is worn.
  glasses: str  # 'none', 'clear' or 'dark'
  lens: str  # 'round', 'square' or 'wide'
  frame_rgb: tuple
  hat: str  # 'none', 'beanie', 'cap' or 'brim'
  hat_rgb: np.ndarray
  earrings: str  # 'none', 'stud', 'hoop' or 'drop'
  necklace: str  # 'none', 'chain' or 'beads'
  necktie: bool
  tie_rgb: tuple
  collar: str  # 'round', 'vee', 'scoop' or 'shirt'
  cloth_rgb: np.ndarray
  noise: np.ndarray  # (64,) in [0, 1), for detail


def _pick(rng, options, weights=None):
  return options[rng.choice(len(options), p=weights)]


def _near(rng, color, spread):
  """A colour close to `color`: brighter or darker, a little warmer or cooler."""
  return np.clip(
    np.array(color) * rng.uniform(1 - spread, 1 + spread) + rng.normal(0, 3, 3), 8, 250
  )


def sample_traits(seed: int, index: int) -> Traits:
  """The face of (seed, index), a pure function of the two."""
  rng = np.random.default_rng([seed, index])

  def chance(p):
    return bool(rng.random() < p)

  made_up = chance(0.5)  # lipstick and long hair often go together, and so do beards and short hair
  hat = _pick(rng, ('beanie', 'cap', 'brim')) if chance(0.15) else 'none'
  length = _pick(
    rng,
    ('bald', 'short', 'bob', 'long'),
    (0.0, 0.2, 0.3, 0.5) if made_up else (0.14, 0.76, 0.06, 0.04),
  )
  fringe = _pick(
    rng,
    ('swept', 'center', 'bangs', 'receding'),
    {'short': (0.5, 0.0, 0.25, 0.25)}.get(length, (0.4, 0.27, 0.33, 0.0)),
  )
  if made_up and fringe == 'receding':
    fringe = 'swept'
  earrings = _pick(rng, ('stud', 'hoop', 'drop')) if chance(0.34 if made_up else 0.06) else 'none'
  beard = 'none'
  if not made_up:
    beard = _pick(
      rng, ('none', 'stubble', 'mustache', 'goatee', 'full'), (0.4, 0.15, 0.13, 0.15, 0.17)
    )
  covers_ears = length in ('bob', 'long') and earrings == 'none' and chance(0.65)
  skin = _pick(rng, tuple(SKINS), (0.16, 0.24, 0.2, 0.14, 0.14, 0.12))
  colors = (
    (0.26, 0.26, 0.22, 0.18, 0.08)
    if skin in ('pale', 'light', 'tan')
    else (0.56, 0.24, 0.06, 0.14, 0)
  )
  hair_color = _pick(rng, tuple(HAIRS), colors)
  necktie = chance(0.24) and not made_up
  necklace = (
    _pick(rng, ('chain', 'beads')) if chance(0.26 if made_up else 0.05) and not necktie else 'none'
  )
  collar = _pick(rng, ('round', 'vee', 'scoop', 'shirt'), (0.35, 0.25, 0.2, 0.2))
  cloth = _near(rng, _pick(rng, CLOTHS), 0.12)
  if necktie:
    collar, cloth = (
      'shirt',
      _near(rng, _pick(rng, ((232, 232, 236), (60, 64, 78), (150, 176, 210))), 0.04),
    )
  elif necklace != 'none':
    collar = _pick(rng, ('scoop', 'vee'))
  makeup = made_up and chance(0.35)
  shape = _pick(rng, ('plain', 'oval', 'square', 'chubby'), (0.3, 0.3, 0.2, 0.2))
  backdrop = _pick(rng, BACKDROPS)
  return Traits(
    skin=skin,
    skin_rgb=_near(rng, SKINS[skin], 0.03),
    iris_rgb=_pick(rng, IRISES if skin in ('pale', 'light', 'tan') else IRISES[:2]),
    backdrop=(_near(rng, backdrop, 0.25), _near(rng, backdrop, 0.25)),
    light=_pick(rng, (-1, 1)) * rng.uniform(0.4, 1.0),
    center=(0.5 + rng.normal(0, 0.012), rng.uniform(0.468, 0.488)),
    scale=rng.uniform(0.97, 1.05),
    tilt=float(np.clip(rng.normal(0, 0.05), -0.12, 0.12)),
    turn=rng.uniform(-0.3, 0.3),
    nod=rng.uniform(-0.06, 0.06),
    shape=shape,
    double_chin=shape == 'chubby' and chance(0.6),
    eye_spacing=rng.uniform(0.112, 0.126),
    narrow_eyes=chance(0.22),
    bags=chance(0.2),
    rosy=chance(0.4) if made_up else chance(0.12),
    makeup=makeup,
    nose=_pick(rng, ('plain', 'big', 'pointy'), (0.45, 0.3, 0.25)),
    brows=_pick(
      rng, ('plain', 'bushy', 'arched'), (0.45, 0.1, 0.45) if made_up else (0.5, 0.42, 0.08)
    ),
    big_lips=chance(0.3),
    lipstick=_pick(rng, LIPSTICKS) if makeup or (made_up and chance(0.5)) else None,
    mouth_open=chance(0.42),
    smiling=chance(0.5),
    hair_color=hair_color,
    hair_rgb=_near(rng, _pick(rng, HAIRS[hair_color]), 0.06),
    length=length,
    texture='wavy' if chance(0.45) else 'straight',
    fringe=fringe,
    part=_pick(rng, (-1, 1)),
    covers_ears=covers_ears,
    volume=rng.uniform(0.03, 0.07),
    beard=beard,
    sideburns=beard == 'full'
    or (not made_up and length == 'short' and hat == 'none' and chance(0.4)),
    glasses=_pick(rng, ('clear', 'dark'), (0.75, 0.25)) if chance(0.25) else 'none',
    lens=_pick(rng, ('round', 'square', 'wide')),
    frame_rgb=_pick(rng, FRAMES),
    hat=hat,
    hat_rgb=_near(rng, _pick(rng, HATS), 0.08),
    earrings=earrings,
    necklace=necklace,
    necktie=necktie,
    tie_rgb=_pick(rng, TIES),
    collar=collar,
    cloth_rgb=cloth,
    noise=rng.random(64),
  )


def visible_attributes(traits: Traits) -> np.ndarray:
  """(40,) int8 in the order of CELEBAMASK_HQ: 1 seen, -1 seen not to be, 0 cannot be told.

  What a drawing has no way to show (Attractive, Blurry, High_Cheekbones, Male, Young) is always 0; so is
  what something else hides: the eyes behind dark glasses, the top of the head under a hat.
  """
  hat, bald = traits.hat != 'none', traits.length == 'bald'
  eyes_seen, hairless = traits.glasses != 'dark', bald or (hat and traits.length == 'short')
  beard = traits.beard
  facts = {
    '5_o_Clock_Shadow': beard == 'stubble',
    'Arched_Eyebrows': traits.brows == 'arched',
    'Big_Lips': traits.big_lips,
    'Big_Nose': traits.nose == 'big',
    'Bushy_Eyebrows': traits.brows == 'bushy',
    'Chubby': traits.shape == 'chubby',
    'Eyeglasses': traits.glasses != 'none',
    'Goatee': beard == 'goatee' if beard != 'full' else None,
    'Heavy_Makeup': traits.makeup if eyes_seen else None,
    'Bags_Under_Eyes': traits.bags if eyes_seen else None,
    'Mouth_Slightly_Open': traits.mouth_open,
    'Mustache': beard in ('mustache', 'full'),
    'Narrow_Eyes': traits.narrow_eyes if eyes_seen else None,
    'No_Beard': beard == 'none',
    'Oval_Face': traits.shape == 'oval' if beard != 'full' else None,
    'Double_Chin': traits.double_chin if beard != 'full' else None,
    'Pale_Skin': traits.skin == 'pale',
    'Pointy_Nose': traits.nose == 'pointy',
    'Rosy_Cheeks': traits.rosy,
    'Sideburns': traits.sideburns if not traits.covers_ears else None,
    'Smiling': traits.smiling,
    'Wearing_Earrings': traits.earrings != 'none',
    'Wearing_Hat': hat,
    'Wearing_Lipstick': traits.lipstick is not None,
    'Wearing_Necklace': traits.necklace != 'none',
    'Wearing_Necktie': traits.necktie,
    'Bald': bald if not hat else None,
    'Bangs': not bald and traits.fringe == 'bangs' if not hat else None,
    'Receding_Hairline': not bald and traits.fringe == 'receding' if not hat else None,
  }
  for color in HAIRS:
    if color in CELEBAMASK_HQ.attributes:
      facts[color] = traits.hair_color == color if not hairless else None
  for texture in ('straight', 'wavy'):
    facts[f'{texture.capitalize()}_Hair'] = traits.texture == texture if not hairless else None
  values = {name: 1 if fact else -1 for name, fact in facts.items() if fact is not None}
  return CELEBAMASK_HQ.attribute_vector(values)
