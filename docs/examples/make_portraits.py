"""Writes a folder of made-up photographs with a label schema of its own, to try the tutorial on.

  python docs/examples/make_portraits.py data/portraits --num_faces=1500

It stands in for your photographs: the embedded faces, labelled with other attributes and other classes. As
in most folders not everything is labelled: jewellery and glasses have no class, every tenth photograph has
no mask, every tenth has no row in the table, and nobody can tell the colour of hair that a hat hides.
"""

import argparse
import csv
import pathlib

import numpy as np
from PIL import Image
from tqdm import tqdm

from p2ldm.data.labels import CELEBAMASK_HQ, UNSPECIFIED, LabelSchema
from p2ldm.data.synthetic import render_face

SCHEMA = LabelSchema(
  attributes=('Smiling', 'Glasses', 'Hat', 'Beard', 'Fair_Hair'),
  classes=('background', 'skin', 'left_eye', 'right_eye', 'hair', 'headwear', 'clothing'),
  colors=(
    (0, 0, 0),
    (230, 170, 130),
    (60, 60, 255),
    (200, 0, 200),
    (120, 70, 20),
    (220, 40, 40),
    (0, 150, 90),
  ),
  flip_pairs=(('left_eye', 'right_eye'),),
)
# Which classes and attributes of the embedded faces are which of these; - is the opposite.
CLASSES = {
  'background': 'background',
  'skin': 'skin nose l_brow r_brow l_ear r_ear mouth u_lip l_lip neck',
  'left_eye': 'l_eye',
  'right_eye': 'r_eye',
  'hair': 'hair',
  'headwear': 'hat',
  'clothing': 'cloth',
}
ATTRIBUTES = {
  'Smiling': 'Smiling',
  'Glasses': 'Eyeglasses',
  'Hat': 'Wearing_Hat',
  'Beard': '-No_Beard',
  'Fair_Hair': 'Blond_Hair',
}


def render_portrait(index: int, size: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
  """Image (size, size, 3) uint8, mask (size, size) uint8 and attribute values, as SCHEMA has them."""
  image, mask, attributes = render_face(seed=1, index=index, size=size)
  ids = np.full(256, UNSPECIFIED, np.uint8)
  for i, name in enumerate(SCHEMA.classes):
    ids[[CELEBAMASK_HQ.classes.index(part) for part in CLASSES[name].split()]] = i
  values = []
  for name in SCHEMA.attributes:
    there = ATTRIBUTES[name]
    value = int(attributes[CELEBAMASK_HQ.attributes.index(there.lstrip('-'))])
    values.append(-value if there.startswith('-') else value)
  return image, ids[mask], values


def write_folder(folder: pathlib.Path, num_faces: int, size: int):
  """Writes schema.json, images/, masks/ and attributes.csv into a folder that does not exist yet."""
  for name in ('images', 'masks'):
    (folder / name).mkdir(parents=True)
  SCHEMA.save(folder / 'schema.json')
  with open(folder / 'attributes.csv', 'w', newline='') as file:
    table = csv.writer(file)
    table.writerow(['name', *SCHEMA.attributes])
    for index in tqdm(range(num_faces), unit='face'):
      image, mask, values = render_portrait(index, size)
      Image.fromarray(image).save(folder / 'images' / f'{index:04}.jpg', quality=95)
      if index % 10 != 3:
        Image.fromarray(mask).save(folder / 'masks' / f'{index:04}.png')
      if index % 10 != 7:
        table.writerow([f'{index:04}', *(value or '' for value in values)])


def main():
  """Runs the command."""
  parser = argparse.ArgumentParser(description='Writes made-up photographs with labels.')
  parser.add_argument('folder', type=pathlib.Path, help='to write; must not exist')
  parser.add_argument('--num_faces', type=int, default=1_500)
  parser.add_argument('--size', type=int, default=128, help='pixels a side')
  arguments = parser.parse_args()
  if arguments.folder.exists():
    parser.error(f'{arguments.folder} exists; name a new folder')
  write_folder(arguments.folder, arguments.num_faces, arguments.size)


if __name__ == '__main__':
  main()
