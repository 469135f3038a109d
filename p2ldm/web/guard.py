"""What stands between the net and Gradio: few routes, small bodies, no tracebacks.

The page needs a small part of what Gradio serves. The rest (uploads, files, proxies, calls past the queue)
is not there, a body over the limit is not read, and what Gradio cannot make sense of is answered with 400
and a sentence in place of 500.
"""

import contextlib
import json
import re

from absl import logging

_GET = re.compile(
  r'/|/(?:gradio_api/)?(?:config|theme\.css|startup-events|app_id|info)/?|/(?:assets|static|svelte)/.*'
  r'|/favicon\.ico|/robots\.txt|/manifest\.json|/gradio_api/(?:queue/(?:data|status)|heartbeat/\w{1,64})'
)
_POST = re.compile(r'/gradio_api/(?:queue/join|component_server|cancel|reset)/?')
_SESSION = re.compile(r'\w{1,64}')
_BAD = 'This is no request that the page makes. Open the page in a browser.'


class Guard:
  """ASGI middleware; see the module's docstring."""

  def __init__(self, app, body_bytes: int, events: dict[int, int]):
    """Takes what is behind it.

    Args:
      app: that answers.
      body_bytes: one request may have so many.
      events: {number of an event that Python answers: how many values it takes}.
    """
    self._app, self._body_bytes, self._events = app, body_bytes, events

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
    joins = 'queue/join' in scope['path']
    fault = _fault(body, self._events if joins else None) if scope['method'] == 'POST' else ''
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
      if not isinstance(error, _Failed):
        logging.warning('%s %s: %r', scope['method'], scope['path'], error)
      if begun:
        with contextlib.suppress(Exception):  # it may have ended, and the client may have gone
          await send({'type': 'http.response.body', 'body': b''})
      else:
        await _answer(send, 400, _BAD)


class _Failed(Exception):
  """The app answered 500."""


def _fault(body: bytes, events: dict[int, int] | None) -> str:
  """What is wrong with the form of a request, '' if nothing is; `events` of one that joins the queue."""
  try:
    values = json.loads(body)
  except (ValueError, RecursionError):
    return 'The body is no JSON.'
  if not isinstance(values, dict):
    return 'The body is no JSON object.'
  session, index, data = (values.get(key) for key in ('session_hash', 'fn_index', 'data'))
  if session is not None and not (isinstance(session, str) and _SESSION.fullmatch(session)):
    return 'session_hash: up to 64 letters and digits.'
  if not isinstance(values.get('event_id'), str | None):
    return 'event_id: a text.'
  if events is None:
    return '' if isinstance(data, str | None) else 'data: a text.'
  if type(index) is not int or index not in events:
    return f'fn_index: one of {", ".join(map(str, events))}.'
  if session is None:
    return 'session_hash: is missing.'
  if not isinstance(data, list) or len(data) != events[index]:
    return f'data: a list of {events[index]} values.'
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
