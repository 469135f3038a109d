"""Plots and galleries show what they are given; nobody's taste is tested."""

import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from p2ldm.data.labels import CELEBAMASK_HQ, UNSPECIFIED
from p2ldm.evaluation.faces import Faces
from p2ldm.reports import galleries, plots

SIZE = 32


def mask_set(**iou):
  return {'mask': {'iou': iou}}


def attribute_set(**rows):
  """name=(accuracy, balanced accuracy)."""
  rows = {name: {'accuracy': a, 'balanced_accuracy': b} for name, (a, b) in rows.items()}
  return {'attributes': {'per_attribute': rows}}


def names(figure):
  """The rows from top to bottom."""
  (axes,) = figure.axes
  ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
  return [label.get_text() for _, label in sorted(ticks, key=lambda tick: tick[0])]


def dots(figure, label):
  """{row: x} of the dots of one set."""
  (axes,) = figure.axes
  (line,) = [line for line in axes.lines if line.get_label() == label]
  rows = names(figure)
  return {rows[int(y)]: x for x, y in zip(*line.get_data(), strict=True)}


def labels(figure):
  return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_classes_stand_by_falling_ceiling_with_every_set_in_its_place():
  sets = {
    'real': mask_set(hair=0.5, skin=0.9, l_eye=0.7),
    'reconstructions': mask_set(hair=0.4, skin=0.8, l_eye=0.6),
    'samples': mask_set(hair=0.45, skin=0.2, l_eye=None) | {'other_conditions': mask_set(skin=0.1)},
  }
  figure = plots.class_iou(sets)
  assert names(figure) == ['skin', 'l eye', 'hair']
  assert dots(figure, 'real photographs (ceiling)') == {'skin': 0.9, 'l eye': 0.7, 'hair': 0.5}
  assert dots(figure, 'reconstructions') == {'skin': 0.8, 'l eye': 0.6, 'hair': 0.4}
  assert dots(figure, 'samples') == {'skin': 0.2, 'hair': 0.45}


def test_samples_and_what_others_were_asked_are_told_apart():
  sets = {'real': mask_set(skin=0.9), 'samples': mask_set(skin=0.4)}
  sets['samples']['other_conditions'] = mask_set(skin=0.1)
  (axes,) = plots.class_iou(sets).axes
  by_label = {line.get_label(): line for line in axes.lines}
  assert by_label['samples'].get_xdata() == (0.4,)
  assert by_label['samples, asked of others'].get_xdata() == (0.1,)
  styles = {
    (line.get_marker(), line.get_color()) for line in by_label.values() if line.get_marker()
  }
  assert len({marker for marker, _ in styles}) == len(styles)  # not by colour alone


def test_an_attribute_of_which_one_value_occurs_is_drawn_by_its_accuracy_and_says_so():
  sets = {
    'real': attribute_set(Smiling=(0.9, 0.8), Bald=(0.99, None), Male=(None, None)),
    'samples': attribute_set(Smiling=(0.7, 0.6), Bald=(0.95, None), Male=(None, None)),
  }
  figure = plots.attribute_accuracy(sets)
  assert dots(figure, 'samples') == {'Smiling': 0.6, 'Bald (accuracy)': 0.95}
  assert dots(figure, 'real photographs (ceiling)') == {'Smiling': 0.8, 'Bald (accuracy)': 0.99}
  (axes,) = figure.axes
  (chance,) = [line for line in axes.lines if line.get_label() == 'chance']
  assert set(chance.get_xdata()) == {0.5}
  left, right = axes.get_xlim()
  assert left < 0.5 < right


@pytest.mark.parametrize('plot', [plots.class_iou, plots.attribute_accuracy])
def test_without_figures_of_samples_there_is_no_plot(plot):
  real = mask_set(skin=0.9) | attribute_set(Smiling=(0.9, 0.8))
  nothing = mask_set(skin=None) | attribute_set(Smiling=(None, None))
  assert plot({}) is None
  assert plot({'real': real}) is None
  assert plot({'real': real, 'samples': {'num': 3}}) is None
  assert plot({'real': real, 'samples': nothing}) is None
  assert plot({'samples': real}) is not None


def overlaps(boxes):
  return [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


def drawn(figure):
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return canvas.get_renderer()


def test_forty_names_do_not_overlap_and_stay_in_the_picture():
  rng = np.random.default_rng(0)
  rows = {name: (None, float(rng.random())) for name in CELEBAMASK_HQ.attributes}
  rows |= {'A_name_of_your_own_that_somebody_made_far_too_long_to_be_shown_' * 3: (None, 0.5)}
  figure = plots.attribute_accuracy(
    {'real': attribute_set(**rows), 'samples': attribute_set(**rows)}
  )
  renderer = drawn(figure)
  (axes,) = figure.axes
  boxes = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
  assert len(boxes) == 41
  assert not overlaps(boxes)
  texts = [*axes.get_yticklabels(), axes.xaxis.label, *figure.legends]
  for box in (text.get_window_extent(renderer) for text in texts):
    assert box.x0 >= 0 and box.y0 >= 0
    assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
  assert axes.get_window_extent(renderer).width > 0.3 * figure.bbox.width
  assert not overlaps(
    [figure.legends[0].get_window_extent(renderer), axes.xaxis.label.get_window_extent(renderer)]
  )


@pytest.mark.parametrize('count', [1, 3, 4, 11])
def test_a_legend_of_long_names_stays_in_the_picture(count):
  names_of = [f'strategy number {i} of the ablation' for i in range(count)]
  series = {name: {0.0: (0.5, None), 1.0: (0.6, None)} for name in names_of}
  figure = plots.curves(series, 'Title', 'step', 'figure')
  (legend,) = figure.legends
  assert len(labels(figure)) == count
  box = legend.get_window_extent(drawn(figure))
  assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
  (axes,) = figure.axes
  assert axes.get_window_extent().height > 0.3 * figure.bbox.height


def test_curves():
  series = {
    'a': {0.5: (0.2, 0.1), 0.0: (0.8, 0.01), 0.1: (None, None)},
    r'costs $\frac$': {0.0: (0.7, None), 0.5: (0.6, None)},
  }
  figure = plots.curves(series, 'Title', 'level', 'mIoU', ceiling=0.9)
  assert isinstance(figure, Figure)
  (axes,) = figure.axes
  lines = {line.get_label(): line for line in axes.lines}
  np.testing.assert_array_equal(lines['a'].get_xdata(), [0.0, 0.1, 0.5])
  np.testing.assert_array_equal(lines['a'].get_ydata(), [0.8, math.nan, 0.2])
  assert set(lines['real (ceiling)'].get_ydata()) == {0.9}
  band = axes.collections[0].get_paths()[0].vertices
  assert axes.get_ylim()[0] <= 0.1
  assert np.isclose(band[:, 1].min(), 0.79) or np.isclose(band[:, 1].max(), 0.81)
  assert axes.get_ylabel() == 'mIoU'
  styles = {(line.get_linestyle(), line.get_marker()) for line in axes.lines}
  assert len(styles) == 3
  drawn(figure)  # a name is no formula
  without = plots.curves(series, 'Title', 'level', 'mIoU')
  assert 'real (ceiling)' not in labels(without)


def test_cells():
  rows = [
    ('both', 0.81, 0.012, [0.8, 0.82]),
    ('one seed', 0.5, None, [0.5]),
    ('failed', None, None, []),
  ]
  figure = plots.cells(rows, 'Ablation', 'mIoU', ceiling=0.9, baseline=0.2)
  drawn(figure)
  assert names(figure) == ['both', 'one seed', 'failed']
  (axes,) = figure.axes
  texts = [text.get_text() for text in axes.texts]
  assert texts == ['0.810 ± 0.012', '0.500', '-']
  xs = [x for line in axes.lines for x in np.atleast_1d(line.get_xdata())]
  assert {0.8, 0.82, 0.5, 0.81, 0.9, 0.2} <= set(xs)
  assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is on top
  drawn(plots.cells(rows, 'Ablation', 'mIoU'))
  drawn(plots.cells(rows[2:], 'Ablation', 'mIoU'))


def face(attributes=None, mask=None, color=100, count=1):
  schema = CELEBAMASK_HQ
  vector = np.zeros(40, np.int8) if attributes is None else schema.parse_attributes(attributes)
  mask = np.full((SIZE, SIZE), 255 if mask is None else mask, np.uint8)
  return Faces(
    np.full((count, SIZE, SIZE, 3), color, np.uint8),
    np.repeat(vector[None], count, axis=0),
    np.repeat(mask[None], count, axis=0),
    np.array(['x'] * count, object),
  )


def has(picture, color):
  return bool((np.asarray(picture) == color).all(-1).any())


def test_the_grid_shows_all_there_is():
  grid = [
    (face('Smiling', 13, color=10), face(color=20, count=4)),
    (face('Bald', 1, color=30), face(color=40, count=2)),
  ]
  picture = galleries.samples_grid(grid, CELEBAMASK_HQ)
  assert isinstance(picture, Image.Image)
  for value in (10, 20, 30, 40):
    assert has(picture, (value,) * 3)
  assert has(picture, CELEBAMASK_HQ.colors[13])
  assert galleries.samples_grid([], CELEBAMASK_HQ) is None
  bare = galleries.samples_grid([(face(color=10), face(color=20))], CELEBAMASK_HQ)
  assert bare.width < 3 * 128  # the real face and the sample; no columns for what nobody asked


def texts(figure):
  return ' '.join(text.get_text() for text in figure.texts)


def test_worst_masks_show_what_was_asked_and_what_was_found():
  cases = [
    (0.123, face(mask=13), np.full((SIZE, SIZE), 1, np.uint8)),
    (0.5, face(mask=1), np.full((SIZE, SIZE), 2, np.uint8)),
  ]
  figure = galleries.worst_masks(cases, CELEBAMASK_HQ)
  drawn(figure)
  shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
  colors = CELEBAMASK_HQ.colors
  assert [tuple(image[0, 0]) for image in shown] == [
    colors[13], (100, 100, 100), colors[1], colors[1], (100, 100, 100), colors[2],
  ]  # fmt: skip
  assert '12% right' in texts(figure)
  assert labels(figure) == ['skin', 'nose', 'hair']  # the classes that are in the picture
  assert galleries.worst_masks([], CELEBAMASK_HQ) is None


def test_an_unspecified_mask_has_a_name_in_the_legend():
  mask = np.full((SIZE, SIZE), 1, np.uint8)
  figure = galleries.worst_masks([(0.5, face(mask=UNSPECIFIED), mask)], CELEBAMASK_HQ)
  assert labels(figure) == ['skin', 'unspecified']


def test_worst_attributes_name_what_was_found_otherwise():
  asked = face('Smiling,Bald,-Male,-Young,-Goatee')
  found = np.where(CELEBAMASK_HQ.parse_attributes('Bald,Young,Bangs') > 0, 1, -1).astype(np.int8)
  figure = galleries.worst_attributes([(3 / 5, asked, found)], CELEBAMASK_HQ)
  drawn(figure)
  lines = [text.get_text() for text in figure.texts]
  assert '60% of 5 right' in lines
  assert 'not found: Smiling' in lines
  assert 'wrongly found: Young' in lines  # Bangs were left open
  assert 'asked for: Bald, Smiling, -Goatee, -Male,' in texts(figure)
  assert galleries.worst_attributes([], CELEBAMASK_HQ) is None


def test_the_text_beside_the_worst_stays_in_its_place():
  every = ','.join(CELEBAMASK_HQ.attributes)
  cases = [(0.0, face(every), np.full(40, -1, np.int8)) for _ in range(4)]
  figure = galleries.worst_attributes(cases, CELEBAMASK_HQ)
  renderer = drawn(figure)
  boxes = [text.get_window_extent(renderer) for text in figure.texts]
  boxes += [axes.get_window_extent(renderer) for axes in figure.axes]
  assert min(box.y0 for box in boxes) >= 0
  assert max(box.x1 for box in boxes) <= figure.bbox.x1
  # Lines of text touch each other; what lies on an image does not.
  images = boxes[len(figure.texts) :]
  for text in boxes[: len(figure.texts)]:
    assert not any(text.overlaps(image) for image in images)
