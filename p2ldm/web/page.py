"""The page: what it shows, and which function answers which button. Gradio is imported here alone."""

import functools
import pathlib
from collections.abc import Iterator

import gradio as gr
from absl import logging
from gradio.exceptions import ServerFailedToStartError
from starlette.middleware import Middleware

from p2ldm import conditions
from p2ldm.data.labels import LabelSchema
from p2ldm.errors import UserError
from p2ldm.web import guard, studio
from p2ldm.web.studio import Studio

_STATIC = pathlib.Path(__file__).parent / 'static'
_KEPT = 12  # sets of faces that stay on the page
_STEPS = 50
_FONT = ('system-ui', '-apple-system', 'Segoe UI', 'Roboto', 'Helvetica Neue', 'sans-serif')
# What CelebAMask-HQ's short names stand for.
_LABELS = {
  'eye_g': 'eyeglasses', 'l_eye': 'left eye', 'r_eye': 'right eye', 'l_brow': 'left brow',
  'r_brow': 'right brow', 'l_ear': 'left ear', 'r_ear': 'right ear', 'u_lip': 'upper lip',
  'l_lip': 'lower lip', 'ear_r': 'earring', 'neck_l': 'necklace', 'cloth': 'clothes',
}  # fmt: skip
_ANOTHER_SEED = '() => Math.floor(Math.random() * 1000000)'
_WAITING = '() => ({state: "waiting"})'


def build(drawer: Studio, examples, about: str = '', log_path=None) -> gr.Blocks:
  """The page of a studio.

  Args:
    drawer: draws what is asked for.
    examples: masks (S, S) uint8 to start from.
    about: Markdown, what the model is meant for; '' if nothing is known.
    log_path: where what is asked for is noted, None for nowhere.
  """
  pipeline = drawer.pipeline
  takes = pipeline.config['denoiser']
  with gr.Blocks(title=f'p2ldm: {pipeline.name}', analytics_enabled=False, fill_width=True) as page:
    gr.HTML(_header(pipeline), apply_default_css=False)
    with gr.Row(elem_classes='p2-columns'):
      with gr.Column(elem_classes='p2-panel', visible=takes['mask'] != 'none'):
        gr.HTML('<h2>Mask</h2>', apply_default_css=False)
        mask = _mask_editor(drawer, examples)
      with gr.Column(elem_classes='p2-panel'):
        attributes = _attributes(pipeline.schema, takes['attributes'] != 'none')
        settings = _settings(drawer, takes)
      with gr.Column(elem_classes='p2-panel p2-output'):
        gr.HTML('<h2>Faces</h2>', apply_default_css=False)
        with gr.Row(elem_classes='p2-go'):
          count = gr.Slider(
            1,
            drawer.limits.images,
            min(4, drawer.limits.images),
            step=1,
            label='Images',
            buttons=[],
          )
          draw = gr.Button('Draw', variant='primary', elem_id='p2-draw')
        progress = _part('progress', value={'state': 'idle'}, elem_id='p2-progress')
        results = _part('results', value={}, kept=_KEPT, elem_id='p2-results')
    gr.HTML(_footer(log_path), apply_default_css=False)
    if about:
      with gr.Accordion('Intended use of this model', open=True, elem_classes='p2-about'):
        gr.Markdown(about)

    def on_draw(*values):
      yield from _shown(lambda: drawer.draw(*values), drawer.signer)

    def on_vary(number, event: gr.EventData):
      yield from _shown(lambda: drawer.vary(_url(event), number), drawer.signer)

    for listen, function, inputs, name in (
      (draw.click, on_draw, [mask, attributes, *settings, count], 'draw'),
      (results.select, on_vary, [count], 'vary'),
    ):
      listen(fn=None, js=_WAITING, outputs=[progress], api_visibility='private')
      listen(
        function,
        inputs=inputs,
        outputs=[progress, results],
        api_name=name,
        show_progress='hidden',
        preprocess=False,  # `asked` checks the values, and names them
        concurrency_id='draw',
        concurrency_limit=1,
      )
  return page.queue(max_size=drawer.limits.queue, api_open=False)


def launch(page: gr.Blocks, drawer: Studio, host: str, port: int | None) -> str:
  """Serves the page, in a thread of its own.

  Args:
    page: of `build`.
    drawer: as of `build`.
    host: name or address to listen at.
    port: to listen at; None takes the first that is free from 7860 on.

  Returns:
    The address of the page.

  Raises:
    UserError: one cannot listen there.
  """
  events = page.config['dependencies']
  middleware = Middleware(
    guard.Guard,
    body_bytes=drawer.limits.body_bytes,
    events={event['id']: len(event['inputs']) for event in events if event['backend_fn']},
  )
  try:
    _, local, _ = page.launch(
      server_name=host,
      server_port=port,
      prevent_thread_lock=True,
      quiet=True,
      share=False,
      ssr_mode=False,
      mcp_server=False,
      run_history=False,
      enable_monitoring=False,
      footer_links=[],
      app_kwargs={'middleware': [middleware], 'docs_url': None, 'redoc_url': None},
      theme=_theme(),
      css_paths=[_STATIC / 'page.css'],
      state_session_capacity=1000,
    )
  except (OSError, ServerFailedToStartError) as error:
    raise UserError(
      f'--host={host}, --port={port or "7860 to 7959"}: the page cannot be served there ({error}). Give '
      'another --port.'
    ) from error
  return local


def _shown(start, signer) -> Iterator[tuple]:
  """What a request yields, for the progress bar and the results, signed; errors in words."""
  try:
    for state in start():
      faces = state.pop('faces', None)
      if faces is None:
        yield state, gr.skip()
      else:
        shown = _set_of_faces(faces, state['seconds'], signer)
        yield {'state': 'done', 'text': f'Done in {state["seconds"]:.1f} s.'}, shown
  except UserError as error:
    yield {'state': 'refused', 'text': str(error)}, gr.skip()
    raise gr.Error(str(error), duration=None, visible=False, print_exception=False) from error
  except Exception as error:
    logging.exception('A request failed.')
    text = 'This failed on the server, whose log says why. Other requests may still work.'
    yield {'state': 'refused', 'text': text}, gr.skip()
    raise gr.Error(text, visible=False, print_exception=False) from error


def _url(event: gr.EventData):
  """The picture that an event of results.js is about, None if it says nothing of the kind."""
  data = event._data
  return data.get('url') if isinstance(data, dict) else None


def _set_of_faces(faces, seconds: float, signer) -> dict:
  """What results.js shows of the faces of one request."""
  first = faces[0].record
  request, asked_for = first['request'], studio.describe(first)
  of = request.get('variation')
  what = 'Variations' if of else 'Faces'
  scales = ' and '.join(f'{value:g}' for value in request['guidance'].values())
  return {
    'title': f'{what}: {asked_for}',
    'note': f'{request["steps"]} steps, guidance {scales}, {seconds:.1f} s',
    'faces': [
      {
        'url': studio.png_url(face, signer),
        'file': f'p2ldm_{studio.caption(face.record).replace(", ", "_").replace(" ", "")}.png',
        'caption': studio.caption(face.record),
        'alt': f'Generated face, {studio.caption(face.record)}: {asked_for}',
      }
      for face in faces
    ],
  }


def _mask_editor(drawer: Studio, examples) -> gr.HTML:
  schema, size = drawer.pipeline.schema, drawer.pipeline.image_size

  def read_mask(url) -> dict:
    return _ids(lambda: drawer.mask_of_file(url))

  def read_photo(url) -> dict:
    return _ids(lambda: drawer.mask_of_photo(url))

  pairs = [[schema.classes.index(a), schema.classes.index(b)] for a, b in schema.flip_pairs]
  return _part(
    'mask_editor',
    value='',
    elem_id='p2-mask',
    server_functions=[read_mask, read_photo],
    size=size,
    classes=[
      {'id': i, 'name': name, 'label': label(name), 'color': list(color)}
      for i, (name, color) in enumerate(zip(schema.classes, schema.colors, strict=True))
    ],
    flips=pairs,
    examples=[studio.base64_of(mask) for mask in examples],
    photos=drawer.parser is not None,
    file_bytes=drawer.limits.file_bytes,
  )


def _attributes(schema: LabelSchema, taken: bool) -> gr.HTML:
  with gr.Column(visible=taken, elem_classes='p2-attributes-column'):
    gr.HTML('<h2>Attributes</h2>', apply_default_css=False)
    return _part('attributes', value={}, names=list(schema.attributes), elem_id='p2-attributes')


def _settings(drawer: Studio, takes) -> list:
  """seed, steps and the guidance of attributes and mask."""
  most = min(drawer.limits.steps, drawer.pipeline.schedule.num_timesteps)
  gr.HTML('<h2>Settings</h2>', apply_default_css=False)
  with gr.Row(elem_classes='p2-seed'):
    seed = gr.Number(
      0, label='Seed', precision=0, minimum=0, maximum=2**32 - 1, min_width=100, elem_id='p2-seed'
    )
    another = gr.Button('Another', size='sm', min_width=90, elem_id='p2-another-seed')
  another.click(fn=None, js=_ANOTHER_SEED, outputs=[seed], api_visibility='private')
  steps = gr.Slider(
    1, most, min(_STEPS, most), step=1, label='Steps', info='More is slower and finer.', buttons=[]
  )
  scales = [
    gr.Slider(
      1,
      8,
      conditions.GUIDANCE[name],
      step=0.25,
      label=f'Follow the {name}',
      info='Guidance scale; 1 is no guidance.',
      buttons=[],
      visible=takes[name] != 'none',
    )
    for name in ('attributes', 'mask')
  ]
  return [seed, steps, *scales]


def _part(name: str, **options) -> gr.HTML:
  """A component of static/NAME.html and static/NAME.js."""
  return gr.HTML(
    html_template=_static(f'{name}.html'),
    js_on_load=_static(f'{name}.js'),
    apply_default_css=False,
    **options,
  )


def _ids(read) -> dict:
  """{'ids': base64 of class ids}, or {'error': what is wrong}."""
  try:
    return {'ids': studio.base64_of(read())}
  except UserError as error:
    return {'error': str(error)}


def label(name: str) -> str:
  """A class in words: 'l_eye' is 'left eye'."""
  return _LABELS.get(name, name.replace('_', ' '))


@functools.cache
def _static(name: str) -> str:
  return (_STATIC / name).read_text()


def _theme() -> gr.themes.Base:
  """Fonts of the visitor's machine: nothing is fetched from elsewhere."""
  mono = ('ui-monospace', 'Consolas', 'monospace')
  theme = gr.themes.Base(
    primary_hue='indigo', neutral_hue='slate', font=_FONT, font_mono=mono, radius_size='md'
  )
  # Enough contrast for small print (WCAG AA).
  return theme.set(
    color_accent='*primary_600',
    slider_color='*primary_600',
    button_primary_background_fill='*primary_600',
    button_primary_background_fill_hover='*primary_700',
    body_text_color_subdued='*neutral_600',
    block_info_text_color='*neutral_600',
    block_title_text_color='*neutral_700',
  )


def _header(pipeline) -> str:
  return (
    '<header class="p2-header"><h1>Draw faces</h1><p>Paint what goes where, say what the faces have and have '
    f'not, and leave the rest to the model: faces of {pipeline.image_size} &times; {pipeline.image_size} '
    'pixels. The people do not exist.</p></header>'
  )


def _footer(log_path) -> str:
  noted = (
    'What is asked for is noted on the machine that serves this page, without pictures.'
    if log_path
    else 'What is asked for is not noted anywhere.'
  )
  return (
    '<footer class="p2-footer"><p>Every picture says that it was generated, and how (text and XMP in the '
    'PNG). To read that back: <code>python -m p2ldm.sample --verify=FILE</code></p>'
    f'<p>{noted}</p></footer>'
  )
