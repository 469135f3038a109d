"""The page of a tiny model, served in this process, and a client that speaks to it."""

import contextlib
import itertools
import json

import httpx
import tiny_model

from p2ldm import demo
from p2ldm.interop import model_directory
from p2ldm.provenance import usage
from p2ldm.web.page import launch

GOOD = ('', {}, 3, 2, 3.0, 1.5, 2)  # mask, attributes, seed, steps, guidance of both, images
_sessions = itertools.count()


@contextlib.contextmanager
def served(folder, flip_pairs=(), **options):
  """Yields a `Client` of the page of a model that is saved in `folder`; options as of `demo.load`."""
  parts = tiny_model.make_parts()
  parts.config['schema']['flip_pairs'] = [*flip_pairs]
  model_directory.save(folder / 'tiny' / 'model', parts)
  log = usage.UsageLog(folder / 'usage.jsonl')
  page, drawer = demo.load(folder / 'tiny', log, **options)
  address = launch(page, drawer, '127.0.0.1', None)
  try:
    yield Client(page, drawer, address.rstrip('/'), folder)
  finally:
    page.close(verbose=False)


class Client:
  """Makes the requests that a browser makes.

  Attributes:
    page, drawer, address: of `served`.
    folder: with the model in tiny/, and usage.jsonl.
  """

  def __init__(self, page, drawer, address, folder):
    self.page, self.drawer, self.address, self.folder = page, drawer, address, folder
    self.events = {event['api_name']: event['id'] for event in page.config['dependencies']}
    parts = {part['props'].get('elem_id'): part['id'] for part in page.config['components']}
    self.mask_editor = parts['p2-mask']
    self._http = httpx.Client(base_url=address, timeout=60)

  def request(self, method, path, **options) -> httpx.Response:
    return self._http.request(method, path, **options)

  def join(self, event, data, event_data=None, **more) -> tuple[httpx.Response, str]:
    """Asks for something; returns the answer and the session."""
    session = f'session{next(_sessions)}'
    number = self.events.get(event, event)
    body = {'data': data, 'fn_index': number, 'session_hash': session, 'event_data': event_data}
    return self.request('POST', '/gradio_api/queue/join', json={**body, **more}), session

  def messages(self, session, until=None) -> list[dict]:
    """All that is told of what was asked for in a session, or up to a message of this kind."""
    told = []
    path = f'/gradio_api/queue/data?session_hash={session}'
    with self._http.stream('GET', path) as response:
      for line in response.iter_lines():
        if line.startswith('data:'):
          told.append(json.loads(line[5:]))
        if told and told[-1]['msg'] in ('process_completed', 'unexpected_error', until):
          break
    return told

  def ask(self, event, data, event_data=None) -> dict:
    """The last message about a request: success, and output with data or error."""
    response, session = self.join(event, data, event_data)
    assert response.status_code == 200, response.text
    return self.messages(session)[-1]

  def call(self, function, data) -> httpx.Response:
    """A function of the mask editor."""
    body = {'session_hash': 's', 'component_id': self.mask_editor, 'fn_name': function}
    return self.request('POST', '/gradio_api/component_server', json={**body, 'data': data})
