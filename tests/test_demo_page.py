"""The page as a person uses it, in a real browser without a window."""

import io
import json
import shutil
import time

import numpy as np
import pytest
import tiny_model
from PIL import Image

BROWSER = next(
  filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), ''
)
DRIVER = shutil.which('chromedriver')
pytest.importorskip('gradio', reason="the page needs Gradio: pip install 'p2ldm[demo]'")
webdriver = pytest.importorskip('selenium.webdriver', reason='driving a browser needs selenium')
pytestmark = pytest.mark.skipif(
  not (BROWSER and DRIVER),
  reason='there is no chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)',
)

import tiny_page  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from p2ldm.data.labels import UNSPECIFIED  # noqa: E402
from p2ldm.provenance import records, redrawing  # noqa: E402

WATCH_PROGRESS = """
window.seen = [];
const track = document.querySelector('[role=progressbar]');
const frame = track.parentElement;
new MutationObserver(() => window.seen.push([frame.dataset.state, track.getAttribute('aria-valuenow')]))
  .observe(frame, {attributes: true, subtree: true});
"""
EXAMPLE = np.full((16, 16), 2, np.uint8)
EXAMPLE[4:12, 4:12] = 1


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('p2ldm.web.studio.example_masks', lambda *_: [EXAMPLE])
    pairs = [('skin', 'hair')]
    with tiny_page.served(tmp_path_factory.mktemp('page'), pairs, max_images=3) as client:
      yield client


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  options = webdriver.ChromeOptions()
  options.binary_location = BROWSER
  downloads = tmp_path_factory.mktemp('downloads')
  for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu'):
    options.add_argument(argument)
  options.add_argument('--window-size=1440,1200')
  preferences = {
    'download.default_directory': str(downloads),
    'profile.default_content_setting_values.automatic_downloads': 1,
  }
  options.add_experimental_option('prefs', preferences)
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
  service = webdriver.ChromeService(executable_path=DRIVER)
  driver = webdriver.Chrome(options=options, service=service)
  driver.downloads = downloads
  yield driver
  driver.quit()


class Page:
  """What a person does on the page."""

  def __init__(self, driver, address):
    self.driver = driver
    driver.get(address)
    self.wait(lambda: self.find('#p2-mask canvas') and self.find('#p2-draw'))
    driver.execute_script(WATCH_PROGRESS)

  def wait(self, what, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      if found := what():
        return found
      time.sleep(0.05)
    raise TimeoutError(self.driver.find_element(By.TAG_NAME, 'body').text)

  def all(self, selector):
    return self.driver.find_elements(By.CSS_SELECTOR, selector)

  def find(self, selector):
    return next(iter(self.all(selector)), None)

  def part(self, name):
    return self.find(f'[data-part="{name}"]')

  def click(self, selector):
    self.driver.execute_script('arguments[0].click()', self.find(selector))

  def set(self, attribute, state):
    self.click(f'fieldset[data-name={attribute}] [data-state={state}] input')

  def number(self, label, value):
    box = self.find(f'input[aria-label="number input for {label}"]')
    box.send_keys(Keys.CONTROL, 'a')
    box.send_keys(str(value), Keys.TAB)

  def paint(self, name, *points, tool='brush'):
    """Drags from point to point, of a class; points are pixels of the mask."""
    self.click(f'#p2-mask [data-part=tools] input[value={tool}]')
    if name is not None:
      self.click(f'[data-part=palette] [data-id="{tiny_model.SCHEMA.classes.index(name)}"] input')
    canvas = self.find('#p2-mask canvas')
    scale = canvas.size['width'] / 16
    actions = ActionChains(self.driver, duration=20)
    for i, (x, y) in enumerate(points):
      actions.move_to_element_with_offset(
        canvas, round((x + 0.5 - 8) * scale), round((y + 0.5 - 8) * scale)
      )
      if not i:
        actions.click_and_hold()
    actions.release().perform()

  def brush(self, size):
    slider = self.part('brush')
    while (now := int(slider.get_attribute('value'))) != size:
      slider.send_keys(Keys.ARROW_LEFT if now > size else Keys.ARROW_RIGHT)

  def mask(self):
    """The class ids that "Save mask" saves."""
    folder = self.driver.downloads
    self.click('[data-part=save]')
    path = self.wait(lambda: next(folder.glob('mask*.png'), None))
    self.wait(lambda: path.stat().st_size)
    image = Image.open(io.BytesIO(path.read_bytes()))
    path.unlink()
    assert image.mode == 'P'
    return np.asarray(image), image

  def draw(self, selector='#p2-draw'):
    """Presses a button that draws; returns the newest faces."""
    sets = len(self.all('.p2-set-of-faces'))
    self.click(selector)
    self.wait(lambda: len(self.all('.p2-set-of-faces')) > sets)
    return self.find('.p2-set-of-faces').find_elements(By.CSS_SELECTOR, '.p2-face')

  def download(self, face):
    name = face.find_element(By.CSS_SELECTOR, 'a').get_attribute('download')
    self.driver.execute_script('arguments[0].click()', face.find_element(By.CSS_SELECTOR, 'a'))
    return self.wait(lambda: next(self.driver.downloads.glob(name), None))

  def status(self):
    return self.find('#p2-mask [data-part=status]').text


@pytest.fixture(scope='module')
def page(browser, client):
  return Page(browser, client.address)


def test_paint_set_draw_vary_download_and_read_back(page, client):
  page.brush(2)
  page.paint('hair', (3, 2), (12, 2))
  page.paint('skin', (8, 9), tool='fill')
  page.paint(None, (2, 13), (13, 13), tool='erase')
  mask, image = page.mask()
  assert set(np.unique(mask)) == {1, 2, UNSPECIFIED}
  assert (mask[2, 4:12] == 2).all()
  assert (mask[13, 3:13] == UNSPECIFIED).all()
  assert mask[8, 8] == 1
  np.testing.assert_array_equal(np.asarray(image.convert('RGB')), tiny_model.SCHEMA.colorize(mask))
  page.set('Smiling', 'yes')
  page.set('Eyeglasses', 'no')
  assert [chip.text for chip in page.all('.p2-chip')] == ['Smiling', 'no Eyeglasses']
  page.number('Images', 2)
  faces = page.draw()
  assert len(faces) == 2
  seen = page.driver.execute_script('return window.seen')
  assert {'starting', 'drawing', 'done'} <= {state for state, _ in seen}
  assert {int(share) for state, share in seen if share and state == 'drawing'} - {0, 100}
  width = 'return arguments[0].naturalWidth'
  assert page.driver.execute_script(width, faces[0].find_element(By.TAG_NAME, 'img')) == 16
  found = records.read(page.download(faces[1]))
  assert found['request']['attributes'] == {'Smiling': 1, 'Eyeglasses': -1}
  np.testing.assert_array_equal(records.mask_of(found['request']), mask)
  varied = page.draw('.p2-actions button')
  file = page.download(varied[0])
  good, text = redrawing.verify(file, lambda _: client.drawer.pipeline)
  assert good, text
  assert 'a variation of another' in text
  assert len(page.all('.p2-set-of-faces')) == 2  # the first ones are still there


def test_undo_redo_clear_and_the_mirror(page):
  page.click('#p2-mask [data-part=clear]')
  assert page.part('hint').is_displayed()
  page.brush(1)
  page.click('[data-part=mirror]')
  page.paint('skin', (2, 5))
  page.click('[data-part=mirror]')
  mask, _ = page.mask()
  assert np.argwhere(mask == 1).tolist() == [[5, 2]]
  assert np.argwhere(mask == 2).tolist() == [[5, 13]]  # the class it is paired with
  page.paint('hair', (2, 5), tool='fill')
  page.click('[data-part=undo]')
  np.testing.assert_array_equal(page.mask()[0], mask)
  page.click('[data-part=redo]')
  assert np.argwhere(page.mask()[0] == 2).tolist() == [[5, 2], [5, 13]]


def test_painting_with_the_keys_alone(page):
  page.click('.p2-example')
  canvas = page.find('#p2-mask canvas')
  page.driver.execute_script('arguments[0].focus()', canvas)
  page.brush(1)
  page.click('[data-part=palette] [data-id="0"] input')
  keys = ActionChains(page.driver, duration=20)
  keys.send_keys('b').key_down(Keys.SHIFT)
  for _ in range(8):
    keys.send_keys(Keys.ARROW_LEFT).send_keys(Keys.ARROW_UP)
  keys.key_up(Keys.SHIFT).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN).perform()
  assert page.status() == 'x 1, y 1: hair'
  canvas.send_keys(Keys.SPACE)
  wanted = EXAMPLE.copy()
  wanted[1, 1] = 0
  np.testing.assert_array_equal(page.mask()[0], wanted)
  canvas.send_keys('f', ' ')
  canvas.send_keys(Keys.CONTROL, 'z')
  canvas.send_keys(Keys.CONTROL, 'z')
  np.testing.assert_array_equal(page.mask()[0], EXAMPLE)
  assert 'background' not in canvas.get_attribute('aria-label')
  assert 'skin, hair' in canvas.get_attribute('aria-label')


def test_a_mask_from_a_file_and_one_that_is_none(page, tmp_path):
  Image.fromarray(EXAMPLE.T.copy()).rotate(90).save(tmp_path / 'good.png')
  (tmp_path / 'bad.png').write_bytes(b'nothing')
  error = page.find('#p2-mask [data-part=error]')
  chosen = page.part('mask-file')
  page.driver.execute_script('arguments[0].hidden = false', chosen)
  chosen.send_keys(str(tmp_path / 'bad.png'))
  page.wait(error.is_displayed)
  assert 'no picture that can be read' in error.text
  page.click('#p2-mask [data-part=clear]')
  chosen.send_keys(str(tmp_path / 'good.png'))
  page.wait(lambda: page.status() == 'Mask loaded.')
  assert not error.is_displayed()
  np.testing.assert_array_equal(page.mask()[0], np.asarray(Image.open(tmp_path / 'good.png')))
  page.driver.execute_script('arguments[0].hidden = true', chosen)


def test_what_is_refused_is_said_on_the_page(page):
  page.find('#p2-seed input').send_keys(Keys.CONTROL, 'a')
  page.find('#p2-seed input').send_keys('-5', Keys.TAB)
  page.click('#p2-draw')
  text = page.wait(lambda: page.driver.execute_script(
    "const f = document.querySelector('.p2-progress');"
    "return f.dataset.state === 'refused' && f.innerText"
  ))  # fmt: skip
  assert 'seed: a whole number from 0 to 4294967295, not -5' in text
  page.click('#p2-another-seed')
  assert page.draw()


def test_everything_has_a_name_for_those_who_do_not_see_it(page):
  nodes = page.driver.execute_cdp_cmd('Accessibility.getFullAXTree', {})['nodes']
  roles = {'button', 'radio', 'checkbox', 'slider', 'spinbutton', 'textbox', 'searchbox', 'link',
           'image', 'radiogroup', 'application', 'progressbar', 'toolbar'}  # fmt: skip
  found = [
    (node['role']['value'], node.get('name', {}).get('value', ''))
    for node in nodes
    if not node.get('ignored') and node.get('role', {}).get('value') in roles
  ]
  assert {role for role, _ in found} >= {'button', 'radio', 'application', 'progressbar', 'image'}
  assert not [role for role, name in found if not name.strip()]
  names = {name for _, name in found}
  assert {'Smiling: yes', 'Smiling: unspecified', 'Smiling: no', 'hair', 'Draw', 'Undo'} <= {
    name.strip() for name in names
  } | {name.split(' ')[0] for name in names}


def test_nothing_is_fetched_from_elsewhere_and_nothing_goes_wrong(page, client):
  asked = []
  for entry in page.driver.get_log('performance'):
    message = json.loads(entry['message'])['message']
    if message['method'] == 'Network.requestWillBeSent':
      asked.append(message['params']['request']['url'])
  elsewhere = [url for url in asked if not url.startswith((client.address, 'data:', 'blob:'))]
  assert asked
  assert not elsewhere
  errors = [entry for entry in page.driver.get_log('browser') if entry['level'] == 'SEVERE']
  assert not errors
