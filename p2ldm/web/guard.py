"""What stands between the net and Gradio: few routes, small bodies, no tracebacks.

The page needs a small part of what Gradio serves. The rest (uploads, files, proxies, calls past the queue)
is not there, a body over the limit is not read, and what Gradio cannot make sense of is answered with 400
and a sentence in place of 500.
"""

import json
import re

from absl import logging

_GET = re.compile(
  r'/|/(?:gradio_api/)?(?:config|theme\.css|startup-events|app_id|info)/?|/(?:assets|static|svelte)/.*'
  r'|/favicon\.ico|/robots\.txt|/manifest\.json|/gradio_api/(?:queue/(?:data|status)|heartbeat/\w{1,64})'
)
_POST = re.compile(r'/gradio_api/(?:queue/join|component_server|cancel|reset)/?')
_BAD = 'This request is none that the page makes. Open the page in a browser, or see the field that is named.'


class Guard:
  """ASGI middleware; see the module's docstring."""

  def __init__(self, app, body_bytes: int):
    """Takes the app behind it and the bytes that one request may have."""
    self._app, self._body_bytes = app, body_bytes

  async def __call__(self, scope, receive, send):
    """Answers one request."""
    if scope['type'] != 'http':
      if scope['type'] == 'lifespan':
        await self._app(scope, receive, send)
      return
    allowed = {'GET': _GET, 'HEAD': _GET, 'POST': _POST}.get(scope['method'])
    if allowed is None or not allowed.fullmatch(scope['path']):
      await _answer(send, 404, f'There is no {scope["method"]} {scope["path"][:100]} here.')
      return
    body = await self._body(receive) if scope['method'] == 'POST' else b''
    if body is None:
      await _answer(send, 413, f'A request may have up to {self._body_bytes} bytes.')
      return
    fault = _fault(body) if scope['method'] == 'POST' else ''
    if fault:
      await _answer(send, 400, fault)
      return
    await self._pass(scope, _replayed(body, receive), send)

  async def _body(self, receive) -> bytes | None:
    """The whole body, None if it is too large or the client has gone."""
    parts, size = [], 0
    while True:
      message = await receive()
      if message['type'] != 'http.request':
        return None
      size += len(message.get('body', b''))
      if size > self._body_bytes:
        return None
      parts.append(message.get('body', b''))
      if not message.get('more_body'):
        return b''.join(parts)

  async def _pass(self, scope, receive, send):
    """Lets the app answer; of an error inside of it, the client is told a sentence."""
    begun = False

    async def watched(message):
      nonlocal begun
      if message['type'] == 'http.response.start' and message['status'] == 500 and not begun:
        raise _Failed
      begun = True
      await send(message)

    try:
      await self._app(scope, receive, watched)
    except Exception as error:
      if begun:
        raise
      if not isinstance(error, _Failed):
        logging.warning('%s %s: %r', scope['method'], scope['path'], error)
      await _answer(send, 400, _BAD)


class _Failed(Exception):
  """The app answered 500."""


def _fault(body: bytes) -> str:
  """What is wrong with the form of a request that is posted, '' if nothing is."""
  try:
    values = json.loads(body)
  except (ValueError, RecursionError):
    return 'The body is no JSON.'
  if not isinstance(values, dict):
    return 'The body is no JSON object.'
  session, index, data = (values.get(key) for key in ('session_hash', 'fn_index', 'data'))
  if session is not None and not (isinstance(session, str) and re.fullmatch(r'\w{1,64}', session)):
    return 'session_hash: up to 64 letters and digits.'
  if index is not None and (type(index) is not int or not 0 <= index < 10000):
    return 'fn_index: the number of an event of the page.'
  if 'event_id' in values and not isinstance(values['event_id'], str | None):
    return 'event_id: a text.'
  if data is not None and not isinstance(data, list | str | dict):
    return 'data: a list of what the event takes.'
  return ''


def _replayed(body: bytes, receive):
  """A `receive` that gives the body once more, then what follows."""
  rest = [{'type': 'http.request', 'body': body, 'more_body': False}]

  async def again():
    return rest.pop() if rest else await receive()

  return again


async def _answer(send, status: int, detail: str):
  content = json.dumps({'detail': detail}).encode()
  headers = [
    (b'content-type', b'application/json'),
    (b'content-length', str(len(content)).encode()),
    (b'connection', b'close'),
  ]
  await send({'type': 'http.response.start', 'status': status, 'headers': headers})
  await send({'type': 'http.response.body', 'body': content})
