"""The page without a browser: what its endpoints take, refuse and survive."""

import base64
import concurrent.futures
import configparser
import contextlib
import dataclasses
import io
import itertools
import json
import pathlib
import queue
import shutil
import socket
import sys
import threading
import time
import tracemalloc
import types

import numpy as np
import pytest
import tiny_evaluation
import tiny_model
from PIL import Image

pytest.importorskip('gradio', reason="the page needs Gradio: pip install 'p2ldm[demo]'")

import tiny_page
from tiny_page import GOOD

import p2ldm
from p2ldm import demo
from p2ldm.data.labels import CELEBAMASK_HQ
from p2ldm.errors import UserError
from p2ldm.interop import evaluator_directory, model_card
from p2ldm.provenance import records, redrawing, usage
from p2ldm.web import asked, page, studio
from p2ldm.web.asked import Limits
from p2ldm.web.studio import Studio

MASK = np.array([[0, 1], [2, 255]], np.uint8).repeat(8, 0).repeat(8, 1)
TOLD = lambda *step: None  # noqa: E731 (with it, the pipeline runs what the page has compiled)
FIELDS = ('mask', 'attributes', 'seed', 'steps', 'attributes_scale', 'mask_scale', 'num_images')


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  with tiny_page.served(tmp_path_factory.mktemp('demo'), max_images=3, max_queue=12) as client:
    yield client


@pytest.fixture(scope='module')
def drawn(client):
  """Two faces as the page gets them, drawn from a mask and attributes."""
  return client.ask('draw', changed(mask=url(MASK), attributes={'Smiling': 1, 'Wearing_Hat': -1}))


def changed(**fields) -> list:
  return list({**dict(zip(FIELDS, GOOD, strict=True)), **fields}.values())


def url(picture, format='PNG', **options) -> str:
  buffer = io.BytesIO()
  image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
  image.save(buffer, format, **options)
  return data_url(buffer.getvalue())


def data_url(data: bytes) -> str:
  return 'data:image/png;base64,' + base64.b64encode(data).decode()


def faces_of(message) -> list[dict]:
  assert message['success'], message
  return message['output']['data'][1]['faces']


def pixels(face) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(face['url'].partition(',')[2]))))


def test_faces_are_those_of_the_pipeline_and_say_how_they_were_made(client, drawn, tmp_path):
  pipeline = client.drawer.pipeline
  guidance = {'attributes': 3.0, 'mask': 1.5}
  wanted = pipeline(
    'Smiling,-Wearing_Hat', MASK, 2, seed=3, steps=2, guidance=guidance, progress=TOLD
  )
  faces = faces_of(drawn)
  assert [face['caption'] for face in faces] == ['seed 3, image 0', 'seed 3, image 1']
  assert faces[1]['file'] == 'p2ldm_seed3_image1.png'
  assert faces[1]['alt'] == 'Generated face, seed 3, image 1: Smiling, no Wearing Hat, with a mask'
  for face, image in zip(faces, wanted, strict=True):
    np.testing.assert_array_equal(pixels(face), np.asarray(image))
    (tmp_path / 'face.png').write_bytes(base64.b64decode(face['url'].partition(',')[2]))
    assert redrawing.verify(tmp_path / 'face.png', lambda _: pipeline)[0]
  found = records.read(tmp_path / 'face.png')
  assert found['request']['attributes'] == {'Smiling': 1, 'Wearing_Hat': -1}
  np.testing.assert_array_equal(records.mask_of(found['request']), MASK)


def test_progress_is_told_while_it_goes_on(client):
  response, session = client.join('draw', changed(steps=20, seed=4))
  assert response.status_code == 200
  states, whole = [], None
  for message in client.messages(session):
    if message['msg'] == 'process_generating':
      whole = message['output']['data'][0]
      states.append(json.dumps(whole))
  assert 'starting' in states[0]
  assert any('drawing' in state for state in states)


def test_a_face_is_varied_and_so_is_the_variation(client, drawn, tmp_path):
  pipeline = client.drawer.pipeline
  first = faces_of(drawn)[0]
  varied = faces_of(client.ask('vary', [2], {'url': first['url']}))
  again = faces_of(client.ask('vary', [2], {'url': varied[1]['url']}))
  for face in (varied[1], again[0]):
    (tmp_path / 'face.png').write_bytes(base64.b64decode(face['url'].partition(',')[2]))
    assert redrawing.verify(tmp_path / 'face.png', lambda _: pipeline)[0]
    request = records.read(tmp_path / 'face.png')['request']
    assert request['attributes'] == {'Smiling': 1, 'Wearing_Hat': -1}
    assert request['steps'] == 2
    assert (pixels(face) != pixels(first)).any()
  assert [noise[:2] for noise in request['variation']['of']][0] == [3, 0]
  assert len(request['variation']['of']) == 2
  assert (pixels(varied[0]) != pixels(varied[1])).any()


def test_a_variation_keeps_to_the_limits_too(client, drawn):
  drawer = Studio(client.drawer.pipeline, Limits(steps=1), usage.UsageLog(None))
  with pytest.raises(UserError, match='steps: a whole number from 1 to 1, not 2'):
    drawer.vary(faces_of(drawn)[0]['url'], 1)


def forged(drawn, **request) -> str:
  """A face whose record asks for something else."""
  face = Image.open(io.BytesIO(base64.b64decode(faces_of(drawn)[0]['url'].partition(',')[2])))
  record = json.loads(face.text['p2ldm'])
  record['request'].update(request)
  return url(face, pnginfo=records.png_text(record))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'sampler': 'x' * 5_000_000}, "sampler: one of ddpm, ddim, dpmpp_2m, not 'xxx"),
    ({'guidance': {'attributes': 1e6, 'mask': 1}}, 'attributes guidance: a number from 0 to 20'),
    ({'guidance': {'attributes': 1, 'mask': -50}}, 'mask guidance: a number from 0 to 20'),
    ({'guidance': {'attributes': 1, 'mask': 1, 'x': 1}}, 'guidance: of attributes and mask'),
    ({'guidance': {}}, 'guidance: of attributes and mask'),
    ({'eta': 1.5}, 'eta of ddim: a number from 0 to 1, not 1.5'),
    ({'eta': float('nan')}, 'eta of ddim: a number from 0 to 1, not nan'),
    ({'eta': 10**400}, 'damaged'),
    ({'eta': 0.5, 'sampler': 'ddpm'}, 'eta of ddpm: a number from 0 to 0, not 0.5'),
    ({'guidance_interval': [3, 917]}, 'guidance_interval is two timesteps, LOW,HIGH, from 0 to 19'),
    ({'guidance_interval': [5, 4]}, 'guidance_interval'),
    ({'guidance_interval': [-1, 4]}, 'guidance_interval'),
    ({'guidance_interval': [0, float('inf')]}, 'guidance_interval'),
    ({'steps': 21}, 'steps: a whole number from 1 to 20, not 21'),
    ({'attributes': {'x' * 10**6: 1}}, 'Unknown attribute'),
    ({'attributes': {'Smiling': 2}}, 'damaged'),
    (records.packed_mask(np.zeros((17, 17), np.uint8)), '17 x 17 pixels, and those of this model 16 x 16'),
    ({'mask_sha256': 'x', 'mask_png': 'AAAA'}, 'damaged'),
    ({'variation': {'of': [[1, 2, 1e300]], 'strength': 0.3}}, 'weights of images run from 0 to 1'),
    ({'variation': {}}, 'damaged'),
  ],
)  # fmt: skip
def test_a_forged_record_is_refused_and_not_noted(client, drawn, monkeypatch, changes, message):
  noted = (client.folder / 'usage.jsonl').read_bytes()
  monkeypatch.setattr(client.drawer, 'pipeline', Undrawn(client.drawer.pipeline))
  with pytest.raises(UserError, match=message) as error:
    list(client.drawer.vary(forged(drawn, **changes), 1))
  assert len(str(error.value)) < 300
  assert (client.folder / 'usage.jsonl').read_bytes() == noted


def test_what_a_record_may_ask_for_is_drawn(client, drawn):
  asked_for = {'eta': 0.5, 'guidance_interval': [3, 17], 'guidance': {'attributes': 20, 'mask': 0}}
  *_, last = client.drawer.vary(forged(drawn, **asked_for), 1)
  drawn_for = last['faces'][0].record['request']
  assert {key: drawn_for[key] for key in asked_for} == asked_for


def test_of_many_programs_those_are_kept_that_were_used_last():
  pipeline = p2ldm.Pipeline(tiny_model.make_parts())
  first = pipeline.program(('0',), TOLD, 1)
  second = pipeline.program(('1',), TOLD, 1)
  for i in range(2, 17):
    assert pipeline.program(('0',), TOLD, 1) is first
    pipeline.program((str(i),), TOLD, 1)
  assert len(pipeline._compiled) == 16
  assert pipeline.program(('0',), TOLD, 1) is first
  assert pipeline.program(('1',), TOLD, 1) is not second


def bad_numbers(low, high):
  return [
    None, 'seven', True, {}, low - 1, high + 1, low + 0.5, -(10**30), [low],
  ]  # fmt: skip


def bad_pictures():
  good = io.BytesIO()
  Image.fromarray(MASK).save(good, 'PNG')
  whole = good.getvalue()
  return [
    5, True, [], {}, 'mask.png', '/etc/passwd', 'file:///etc/passwd', 'http://127.0.0.1/mask.png',
    'data:', 'data:image/png,abc', 'data:image/png;base64', 'data:image/png;base64,',
    'data:image/png;base64,***', 'data:image/png;base64,AAA', data_url(b'nothing'),
    data_url(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), data_url(whole[:60]), data_url(whole[:-30]),
    data_url(whole.replace(b'IDAT', b'IDAX')), data_url(bytes(13 * 2**20)),
    url(Image.new('L', (5000, 5000))), url(Image.new('1', (30000, 30000))),
  ]  # fmt: skip


def bad_masks():
  return [
    *bad_pictures(), url(MASK[:8]), url(np.full((16, 16), 3, np.uint8)), url(MASK, 'JPEG'),
    url(Image.new('RGB', (16, 16), (1, 2, 3))), url(Image.new('LA', (16, 16))),
  ]  # fmt: skip


def bad_attributes():
  return [
    5, 'Smiling', ['Smiling'], True, {'Nose': 1}, {'smiling': 1}, {'Smiling': 2}, {'Smiling': 0.5},
    {'Smiling': '1'}, {'Smiling': None}, {'Smiling': [1]}, {'Smiling': True}, {'': 1}, {'x' * 10**5: 1},
    {str(i): 1 for i in range(1000)}, {'<script>': 1}, {'Smiling': 10**40},
  ]  # fmt: skip


def bad_draws() -> list[list]:
  fields = {
    'mask': bad_masks()[::3],  # the others are read by the same function, below
    'attributes': bad_attributes(),
    'seed': bad_numbers(0, 2**32 - 1),
    'steps': bad_numbers(1, 20),
    'attributes_scale': ['x', None, [], True, -1, 21],
    'mask_scale': ['x', None, [], True, -1, 21],
    'num_images': bad_numbers(1, 3),
  }
  return [changed(**{name: value}) for name, values in fields.items() for value in values]


def bad_varies(drawn) -> list:
  plain = url(np.zeros((16, 16, 3), np.uint8))
  face = Image.open(io.BytesIO(base64.b64decode(faces_of(drawn)[0]['url'].partition(',')[2])))
  record = json.loads(face.text['p2ldm'])
  urls = [*bad_pictures(), plain]
  for change in (
    {'model': {}}, {'model': {'weights_sha256': 'other'}}, {'request': {}}, {'drawn': {'images': []}},
    {'request': {**record['request'], 'steps': 10**6}}, {'request': {**record['request'], 'image': None}},
    {'request': {**record['request'], 'seed': 'x'}}, {'request': {**record['request'], 'sampler': 'x'}},
    {'request': {**record['request'], 'variation': {'of': [[1, 2]] * 10**4, 'strength': 0}}},
    {'request': {**record['request'], 'guidance': 'x'}}, {'request': {**record['request'], 'eta': 9.0}},
    {'request': {**record['request'], 'attributes': {'Nose': 1}}},
    {'request': {**record['request'], 'mask_sha256': 'x'}},
    {'request': {**record['request'], 'guidance_interval': [5]}}, {'pixels_sha256': None},
  ):  # fmt: skip
    text = records.png_text({**record, **change})
    urls.append(url(face, pnginfo=text))
  return [None, 5, [], {'file': 'x'}, *({'url': each} for each in urls)]


def bad_requests(client) -> list[tuple]:
  """(method, path, options) of requests that are no requests."""
  join, server = '/gradio_api/queue/join', '/gradio_api/component_server'
  draw = {'data': list(GOOD), 'fn_index': client.events['draw'], 'session_hash': 'bad'}
  bodies = [
    b'', b'{', b'null', b'[]', b'5', b'"draw"', b'\xff\xfe', b'[' * 10**5, b'{"data": ' + b'9' * 5000 + b'}',
  ]  # fmt: skip
  changes = [
    {'data': None}, {'data': 'x'}, {'data': []}, {'data': [*GOOD, 1]}, {'data': {}}, {'fn_index': None},
    {'fn_index': -1}, {'fn_index': 10**9}, {'fn_index': 'draw'}, {'fn_index': 0}, {'fn_index': True},
    {'fn_index': 1.5}, {'session_hash': None}, {'session_hash': ''}, {'session_hash': 'x' * 65},
    {'session_hash': '../..'}, {'session_hash': 5}, {'event_id': 5}, {'trigger_id': 'x'},
  ]  # fmt: skip
  functions = [
    {}, {'fn_name': '__init__'}, {'fn_name': 5}, {'component_id': 10**6}, {'component_id': 'x'},
    {'data': 5}, {'data': ['x']}, {'session_hash': []},
  ]  # fmt: skip
  called = {'session_hash': 's', 'component_id': client.mask_editor, 'fn_name': 'none', 'data': 'x'}
  return [
    *(('POST', path, {'content': body}) for path in (join, server) for body in bodies),
    *(('POST', join, {'json': {**draw, **change}}) for change in changes),
    *(('POST', server, {'json': {**called, **change}}) for change in functions),
    *(
      (method, path, {})
      for method, path in (
        ('POST', '/gradio_api/upload'), ('POST', '/gradio_api/run/draw'), ('POST', '/gradio_api/call/draw'),
        ('POST', '/gradio_api/api/draw'), ('POST', '/login'), ('POST', '/'), ('PUT', '/'), ('DELETE', '/'),
        ('PATCH', join), ('OPTIONS', join), ('GET', join), ('GET', '/gradio_api/file=/etc/passwd'),
        ('GET', '/gradio_api/proxy=http://127.0.0.1'), ('GET', '/static/%2e%2e/%2e%2e/routes.py'),
        ('GET', '/assets/%2e%2e/%2e%2e/%2e%2e/routes.py'), ('GET', '/docs'), ('GET', '/openapi.json'),
        ('GET', '/monitoring'), ('GET', '/gradio_api/queue/data'), ('GET', '/' + 'x' * 5000),
        ('GET', '/gradio_api/heartbeat/' + 'x' * 100), ('POST', '/gradio_api/vibe-edit/'),
      )
    ),
  ]  # fmt: skip


def test_hundreds_of_bad_requests_are_refused_and_the_page_still_works(client, drawn, capfd):
  checks = [
    *((refused_by_answer, case) for case in bad_requests(client)),
    *((refused_by_message, ('draw', data)) for data in bad_draws()),
    *((refused_by_message, ('vary', [1], data)) for data in bad_varies(drawn)),
    *((refused_by_message, ('vary', [number], {'url': ''})) for number in bad_numbers(1, 3)),
    *((refused_by_function, ('read_mask', mask)) for mask in bad_masks()),
    *((refused_by_function, ('read_photo', photo)) for photo in [*bad_pictures(), url(MASK)]),
  ]
  assert len(checks) > 200
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    wrong = [*filter(None, pool.map(lambda check: check[0](client, *check[1]), checks))]
  assert not wrong, '\n'.join(wrong)
  told = capfd.readouterr()
  assert 'Traceback' not in told.err + told.out
  assert client.request('GET', '/').status_code == 200
  assert len(faces_of(client.ask('draw', list(GOOD)))) == 2


@pytest.mark.parametrize('chunks', [1, 17])
def test_a_body_over_the_limit_is_not_read(client, chunks):
  draw = {'data': changed(mask='x' * (17 * 2**20)), 'fn_index': client.events['draw']}
  body = json.dumps({**draw, 'session_hash': 'large'}).encode()
  step = -(-len(body) // chunks)
  parts = (body[i : i + step] for i in range(0, len(body), step))  # sent without a length
  response = client.request('POST', '/gradio_api/queue/join', content=parts)
  assert response.status_code == 413
  assert 'up to 16842752 bytes' in response.text


def refused_by_answer(client, method, path, options) -> str:
  response = client.request(method, path, **options)
  plain = 'Traceback' not in response.text and response.text
  if plain and 400 <= response.status_code < 500:
    return ''
  return f'{method} {path[:60]} {str(options)[:80]}: {response.status_code} {response.text[:100]}'


def refused_by_message(client, event, data, event_data=None) -> str:
  response, session = client.join(event, data, event_data)
  if response.status_code != 200:
    return refused_by_answer_of(response)
  last = client.messages(session)[-1]
  error = last.get('output', {}).get('error')
  if not last['success'] and error and 'failed on the server' not in error:
    return ''
  return f'{event} {str(data)[:80]} {str(event_data)[:80]}: {str(last)[:200]}'


def refused_by_answer_of(response) -> str:
  return '' if 400 <= response.status_code < 500 else f'{response.status_code} {response.text}'


def refused_by_function(client, function, data) -> str:
  response = client.call(function, data)
  if response.status_code == 200 and response.json().get('error'):
    return ''
  if isinstance(data, str) and response.status_code != 413:  # a picture: it is told what is wrong
    return f'{function} {data[:80]}: {response.status_code} {response.text}'
  return refused_by_answer_of(response) if response.status_code != 200 else f'{function} {data}'


def test_the_message_names_the_field(client):
  for field, value, words in (
    ('seed', -1, 'seed: a whole number from 0 to 4294967295, not -1'),
    ('steps', 21, 'steps: a whole number from 1 to 20, not 21'),
    ('num_images', 4, 'images: a whole number from 1 to 3, not 4'),
    ('mask_scale', 'x', "mask guidance: a number from 0 to 20 (1 is none), not 'x'"),
    ('attributes', {'Smilling': 1}, 'Did you mean Smiling'),
    ('mask', url(np.full((16, 16), 9, np.uint8)), 'class id 9 at x=0, y=0'),
    ('mask', url(Image.new('L', (2049, 1))), 'up to 2048 on a side'),
  ):
    assert words in client.ask('draw', changed(**{field: value}))['output']['error']


def test_ten_clients_at_once_are_queued_and_none_fails(client):
  seeds = range(20, 30)
  joined = [client.join('draw', changed(seed=seed)) for seed in seeds]
  with concurrent.futures.ThreadPoolExecutor(10) as pool:
    told = [*pool.map(client.messages, [session for _, session in joined])]
  for seed, messages in zip(seeds, told, strict=True):
    wanted = client.drawer.pipeline(num_images=2, seed=seed, steps=2, progress=TOLD)
    for face, image in zip(faces_of(messages[-1]), wanted, strict=True):
      np.testing.assert_array_equal(pixels(face), np.asarray(image))
  ranks = [m['rank'] for messages in told for m in messages if m['msg'] == 'estimation']
  assert max(ranks) > 0  # they waited for one another


def test_a_full_queue_refuses_and_recovers(client, monkeypatch):
  pipeline, gate = client.drawer.pipeline, concurrent.futures.Future()
  monkeypatch.setattr(client.drawer, 'pipeline', Waiting(pipeline, gate))
  answers = [client.join('draw', list(GOOD)) for _ in range(16)]
  gate.set_result(None)
  taken = [session for response, session in answers if response.status_code == 200]
  refused = [response for response, _ in answers if response.status_code != 200]
  assert 10 < len(taken) < 16
  assert {response.status_code for response in refused} == {503}
  assert 'queue' in refused[0].text.lower()
  for session in taken:
    assert client.messages(session)[-1]['success']


def test_a_studio_has_no_more_threads_than_may_wait(client, monkeypatch):
  gate = concurrent.futures.Future()
  pipeline = Waiting(client.drawer.pipeline, gate)
  drawer = Studio(pipeline, Limits(queue=2), usage.UsageLog(None))
  running, left, waiting = requests = [drawer.draw(*GOOD) for _ in range(3)]
  assert [next(request) for request in requests] == [{'state': 'starting'}] * 3
  with pytest.raises(UserError, match='Too many requests wait here'):
    next(drawer.draw(*GOOD))
  left.close()
  deadline = time.monotonic() + 30
  while True:  # its place is free soon, though the first is still drawn
    try:
      last = drawer.draw(*GOOD)
      next(last)
      break
    except UserError:
      assert time.monotonic() < deadline
      time.sleep(0.05)
  gate.set_result(None)
  assert all([*request][-1]['state'] == 'done' for request in (running, waiting, last))
  assert pipeline.calls == 3


def test_what_was_cancelled_is_not_drawn(tmp_path, monkeypatch):
  with tiny_page.served(tmp_path, max_queue=2) as client:
    gate = concurrent.futures.Future()
    pipeline = Waiting(client.drawer.pipeline, gate)
    monkeypatch.setattr(client.drawer, 'pipeline', pipeline)
    for _ in range(6):
      response, session = client.join('draw', list(GOOD))
      assert response.status_code == 200
      client.messages(session, until='process_generating')
      left = {'fn_index': client.events['draw'], 'event_id': response.json()['event_id']}
      client.request('POST', '/gradio_api/cancel', json={'session_hash': session, **left})
    drawing = [thread for thread in threading.enumerate() if thread.name == 'drawing']
    gate.set_result(None)
    assert len(drawing) <= 3
    for thread in drawing:  # whose places are free once they have ended
      thread.join(timeout=60)
    assert len(faces_of(client.ask('draw', list(GOOD)))) == 2
    assert pipeline.calls == 2  # the first, which was under way, and the last


class Undrawn:
  """A pipeline that is not to draw."""

  def __init__(self, pipeline):
    self._pipeline = pipeline

  def __getattr__(self, name):
    return getattr(self._pipeline, name)

  def __call__(self, *arguments, **options):
    raise AssertionError('This was to be refused.')


class Waiting:
  """A pipeline that draws when it is let."""

  def __init__(self, pipeline, gate):
    self._pipeline, self._gate, self.calls = pipeline, gate, 0

  def __getattr__(self, name):
    return getattr(self._pipeline, name)

  def __call__(self, *arguments, **options):
    self.calls += 1
    self._gate.result(60)
    return self._pipeline(*arguments, **options)


def test_what_fails_on_the_server_is_told_without_details(client, monkeypatch):
  class Broken(Waiting):
    def __call__(self, **options):
      raise RuntimeError('secret')

  with monkeypatch.context() as patch:
    patch.setattr(client.drawer, 'pipeline', Broken(client.drawer.pipeline, None))
    message = client.ask('draw', list(GOOD))
  assert not message['success']
  assert 'failed on the server' in message['output']['error']
  assert 'secret' not in str(message)
  assert client.ask('draw', list(GOOD))['success']


def test_the_usage_log_has_one_line_a_request_and_no_mask(client, drawn):
  lines = (client.folder / 'usage.jsonl').read_text().splitlines()
  entries = [json.loads(line) for line in lines]
  first = next(entry for entry in entries if entry['attributes'] and entry['event'] == 'draw')
  assert first['attributes'] == {'Smiling': 1, 'Wearing_Hat': -1}
  assert first['mask'] == records.mask_sha256(MASK)
  assert first['num_images'] == 2
  assert first['model']['weights_sha256'] == client.drawer.pipeline.config['sha256']
  count = len(entries)
  client.ask('draw', list(GOOD))
  client.ask('draw', changed(seed=-1))
  assert len((client.folder / 'usage.jsonl').read_text().splitlines()) == count + 1


def test_a_log_that_cannot_be_written_stops_the_drawing(client, monkeypatch):
  def full(*arguments, **what):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(client.drawer._log, 'add', full)
  assert 'No space left' in client.ask('draw', list(GOOD))['output']['error']


def test_the_page_is_served_to_this_machine_alone(client):
  assert client.address.startswith('http://127.0.0.1:')
  port = int(client.address.rpartition(':')[2])
  with socket.socket() as other:
    other.settimeout(2)
    assert other.connect_ex(('127.0.0.2', port)) != 0
  with pytest.raises(UserError, match=f'--port={port}'):
    page.launch(page.build(client.drawer, []), client.drawer, '127.0.0.1', port)


def test_masks_are_read_for_the_editor(client):
  answer = client.call('read_mask', url(MASK.repeat(2, 0).repeat(2, 1))).json()
  assert base64.b64decode(answer['ids']) == MASK.tobytes()
  colors = tiny_model.SCHEMA.colorize(MASK)
  assert base64.b64decode(client.call('read_mask', url(colors)).json()['ids']) == MASK.tobytes()
  assert 'no parser' in client.call('read_photo', url(MASK)).json()['error']


def test_few_pictures_are_read_at_a_time(client, monkeypatch):
  gate, entered, answers = threading.Event(), [], queue.SimpleQueue()
  read = asked.open_picture

  def slow(*arguments):
    entered.append(arguments)
    assert gate.wait(60)
    return read(*arguments)

  monkeypatch.setattr(asked, 'open_picture', slow)
  monkeypatch.setattr(client.drawer, 'parser', FakeParser())
  functions = ['read_mask', 'read_photo'] * 6
  with concurrent.futures.ThreadPoolExecutor(12) as pool:
    for function in functions:
      pool.submit(lambda name=function: answers.put(client.call(name, url(MASK)).json()))
    try:
      refused = [answers.get(timeout=30) for _ in range(8)]
    finally:
      gate.set()
  assert all('try again' in answer['error'] for answer in refused)
  assert len(entered) == 4
  assert all('ids' in answers.get(timeout=30) for _ in range(4))
  assert 'ids' in client.call('read_mask', url(MASK)).json()


@pytest.mark.parametrize('color', [(0, 0, 0), (1, 2, 3)])
def test_the_largest_mask_takes_little_memory(color):
  mask = url(Image.new('RGB', (2048, 2048), color))
  tracemalloc.start()
  try:
    with contextlib.suppress(UserError):
      asked.read_mask(mask, CELEBAMASK_HQ, 512, Limits())
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
  finally:
    tracemalloc.stop()


class FakeParser:
  """Takes red for class 1 and all else for class 0."""

  def __init__(self):
    self.checked = []

  def check_schema(self, schema, source):
    self.checked.append(schema)

  def check_image_size(self, size, source):
    self.checked.append(size)

  def predict(self, images):
    assert images.shape[1:] == (16, 16, 3)
    return (images[..., 0] > 127).astype(np.uint8)


def test_the_parser_sees_the_middle_square_of_a_photograph(client):
  parser = FakeParser()
  drawer = Studio(client.drawer.pipeline, Limits(), usage.UsageLog(None), parser)
  assert parser.checked == [tiny_model.SCHEMA, 16]
  photo = np.zeros((32, 64, 3), np.uint8)
  photo[:16, 16:48, 0] = 255  # the upper half of the middle
  photo[:, 48:, 0] = 255  # right of it
  mask = drawer.mask_of_photo(url(photo))
  np.testing.assert_array_equal(mask, np.arange(16)[:, None] < np.full(16, 8))
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned to the right
  mask = drawer.mask_of_photo(url(photo, 'JPEG', exif=exif, quality=95))
  assert mask[:, 9:].all()
  assert not mask[:, :7].any()


def test_a_photograph_whose_exif_cannot_be_read_is_taken_as_it_is(client):
  drawer = Studio(client.drawer.pipeline, Limits(), usage.UsageLog(None), FakeParser())
  photo = np.zeros((16, 16, 3), np.uint8)
  photo[:8, :, 0] = 255
  for exif in (b'Exif\0\0garbage-garbage', b'Exif\0\0II*\0'):
    mask = drawer.mask_of_photo(url(photo, exif=exif))
    np.testing.assert_array_equal(mask, photo[..., 0] > 0)


@pytest.mark.parametrize('other', ['classes', 'size', 'none'])
def test_the_parser_of_a_run_is_taken_if_it_fits_the_model(client, tmp_path, other):
  schema = tiny_model.SCHEMA
  if other == 'classes':
    schema = dataclasses.replace(schema, classes=('background', 'skin', 'hat'))
  size = 32 if other == 'size' else 16
  parts = tiny_evaluation.evaluator_parts('parser', schema=schema, image_size=size)
  shutil.copytree(client.folder / 'tiny' / 'model', tmp_path / 'model')
  evaluator_directory.save(tmp_path / 'parser' / 'model', parts)
  _, drawer = demo.load(tmp_path, usage.UsageLog(None))
  assert (drawer.parser is not None) == (other == 'none')
  if other != 'none':  # one that was asked for is to fit
    with pytest.raises(UserError, match='The parser'):
      demo.load(tmp_path, usage.UsageLog(None), parser=str(tmp_path))


def test_a_request_is_read_as_it_was_meant(client):
  pipeline = client.drawer.pipeline
  request = asked.read_request(pipeline, Limits(), None, None, 7.0, 20, 1, 0.5, 8)
  assert request['seed'] == 7
  assert isinstance(request['seed'], int)
  assert request['guidance'] == {'attributes': 1.0, 'mask': 0.5}
  assert (request['mask'] == 255).all()
  assert not request['attributes'].any()
  request = asked.read_request(
    pipeline, Limits(), url(MASK), {'Smiling': 0, 'Eyeglasses': -1}, *GOOD[2:]
  )
  assert request['attributes'].tolist() == [0, -1, 0]
  np.testing.assert_array_equal(request['mask'], MASK)


def test_a_model_without_a_condition_refuses_it(tmp_path):
  parts = tiny_model.make_parts(mask='none')
  pipeline = p2ldm.Pipeline(parts)
  with pytest.raises(UserError, match='without mask'):
    asked.read_request(pipeline, Limits(), url(MASK), *GOOD[1:])
  drawer = Studio(pipeline, Limits(), usage.UsageLog(None))
  shown = page.build(drawer, []).config['components']
  hidden = [part for part in shown if part['props'].get('visible') is False]
  assert len(hidden) == 2  # the editor, and how closely it is followed


def test_examples_are_masks_of_drawn_faces():
  masks = studio.example_masks(CELEBAMASK_HQ, 32, 3)
  assert [mask.shape for mask in masks] == [(32, 32)] * 3
  assert all({0, 1} <= set(np.unique(mask)) for mask in masks)
  assert len({mask.tobytes() for mask in masks}) == 3
  assert studio.example_masks(tiny_model.SCHEMA, 32) == []


def test_classes_have_names_that_people_use():
  assert [page.label(name) for name in ('l_eye', 'eye_g', 'hair', 'face_shield')] == [
    'left eye', 'eyeglasses', 'hair', 'face shield',
  ]  # fmt: skip
  assert len({page.label(name) for name in CELEBAMASK_HQ.classes}) == 19


def test_the_intended_use_is_on_the_page(client):
  texts = [part['props'].get('value') for part in client.page.config['components']]
  assert any('The people in the\npictures do not exist' in str(text) for text in texts)


def test_a_section_of_a_card(tmp_path):
  (tmp_path / 'README.md').write_text(
    '# A\n\n## Intended use\n\none\n\n### x\n\ntwo\n\n## Limits\n\nthree\n'
  )
  assert model_card.section(tmp_path / 'README.md', 'Intended use') == 'one\n\n### x\n\ntwo'
  assert model_card.section(tmp_path / 'README.md', 'Limits') == 'three'
  assert model_card.section(tmp_path / 'README.md', 'Figures') == ''
  assert model_card.section(tmp_path / 'none.md', 'Limits') == ''


def test_the_command_says_where_the_page_and_the_log_are(client, monkeypatch, tmp_path, capsys):
  flags = types.SimpleNamespace(
    usage_log=str(tmp_path / 'log' / 'usage.jsonl'), parser='', max_images=2, max_steps=5,
    max_queue=1, host='127.0.0.1', port=None, c2pa_certificate=None, c2pa_key=None,
    c2pa_timestamp_url=None,
  )  # fmt: skip
  monkeypatch.setattr(demo, 'FLAGS', flags)
  pages = []
  monkeypatch.setattr('gradio.Blocks.block_thread', lambda served: pages.append(served))
  demo.main(str(client.folder / 'tiny'))
  told = capsys.readouterr().out
  assert f'noted in {tmp_path}/log/usage.jsonl' in told
  assert 'The page is http://127.0.0.1:' in told
  pages[0].close(verbose=False)
  flags.usage_log = ''
  demo.main(str(client.folder / 'tiny'))
  assert 'noted' not in capsys.readouterr().out
  pages[1].close(verbose=False)
  with pytest.raises(UserError, match='no model directory'):
    demo.main(str(tmp_path / 'none'))


def test_without_gradio_the_command_says_how_to_get_it(client, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gradio', None)
  monkeypatch.delitem(sys.modules, 'p2ldm.web.page')
  monkeypatch.delattr('p2ldm.web.page')
  with pytest.raises(UserError, match=r"pip install 'p2ldm\[demo\]'"):
    demo.load(client.folder / 'tiny', usage.UsageLog(None))


def test_what_the_page_is_made_of_is_packaged():
  root = pathlib.Path(p2ldm.__file__).parent
  setup = configparser.ConfigParser()
  setup.read(root.parent / 'setup.cfg')
  patterns = setup['options.package_data']['p2ldm.web'].split()
  packaged_files = {p for pattern in patterns for p in (root / 'web').glob(pattern)}
  assert packaged_files == set((root / 'web' / 'static').iterdir())
  for name, ending in itertools.product(
    ('mask_editor', 'attributes', 'progress', 'results'), ('html', 'js')
  ):
    text = (root / 'web' / 'static' / f'{name}.{ending}').read_text()
    if ending == 'html':  # Gradio takes these for code
      assert not [mark for mark in ('${', '`', '{{') if mark in text]
