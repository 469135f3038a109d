"""What the site has beyond the pages of docs/: see `hooks` in mkdocs.yml.

A link to a file outside of docs/, which GitHub follows, leads on the site to a page that shows that file.
NAME.ipynb becomes the page NAME_notebook.md. In commands.md stands what every command's --help prints.
"""

import concurrent.futures
import html
import json
import pathlib
import posixpath
import re
import subprocess
import sys

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMANDS_MARK = '<!-- commands -->'
_LINK = re.compile(r'(?<=\]\()(?P<target>[^)\s#:]+)(?=[)#])')
_FENCE = re.compile(r'^(```.*?^```[^\n]*$)', re.MULTILINE | re.DOTALL)
_LANGUAGES = {'.py': 'python', '.sh': 'bash', '.yml': 'yaml', '.cfg': 'ini', '.json': 'json'}


def on_files(files, config):
  """Adds the pages of notebooks and of files outside of docs/."""
  for file in list(files):
    if file.src_uri.endswith('.ipynb'):
      text = notebook_markdown(json.loads(pathlib.Path(file.abs_src_path).read_text()))
      files.append(File.generated(config, notebook_page(file.src_uri), content=text))
  waiting = [(f.src_uri, f.content_string) for f in files.documentation_pages()]
  while waiting:
    page, text = waiting.pop()
    for _, target in _links(page, text):
      added = site_page(target)
      if target.startswith('docs/') or files.get_file_from_path(added):
        continue
      path = ROOT / target
      if not path.is_file():
        continue  # stays as it is, so that mkdocs complains about it
      text = path.read_text()
      content = text if path.suffix == '.md' else source_markdown(target, text)
      files.append(File.generated(config, added, content=content))
      if path.suffix == '.md':
        waiting.append((added, text))
  return files


def on_page_markdown(markdown, page, config, files):
  """Fills in the commands, and leads links to the pages that `on_files` added."""
  here = page.file.src_uri
  if COMMANDS_MARK in markdown:
    markdown = markdown.replace(COMMANDS_MARK, commands_markdown())
  for target, path in _links(here, markdown):
    there = path.removeprefix('docs/') if path.startswith('docs/') else site_page(path)
    if there.endswith('.ipynb'):
      there = notebook_page(there)
    if there == here or files.get_file_from_path(there):
      relative = posixpath.relpath(there, posixpath.dirname(here) or '.')
      markdown = re.sub(rf'(?<=\]\(){re.escape(target)}(?=[)#])', relative, markdown)
  return markdown


def site_page(path: str) -> str:
  """The page that shows a file of the repository that lies outside of docs/."""
  return f'files/{path}' if path.endswith('.md') else f'files/{path}.md'


def notebook_page(path: str) -> str:
  """The page of a notebook in docs/."""
  return f'{path.removesuffix(".ipynb")}_notebook.md'


def _links(page: str, text: str) -> set[tuple[str, str]]:
  """Relative links of a page: as they are written, and the path in the repository that they lead to."""
  folder = posixpath.dirname(page)
  folder = (
    folder.removeprefix('files').lstrip('/') if page.startswith('files/') else f'docs/{folder}'
  )
  text = _FENCE.sub('', text)
  targets = {match['target'] for match in _LINK.finditer(text)}
  return {(target, posixpath.normpath(posixpath.join(folder, target))) for target in targets}


def source_markdown(path: str, text: str) -> str:
  """A page that shows a file."""
  return f'# {path}\n\n````{_LANGUAGES.get(pathlib.Path(path).suffix, "text")}\n{text}\n````\n'


def commands() -> list[str]:
  """The names of the commands, `python -m p2ldm.NAME`."""
  scripts = sorted((ROOT / 'p2ldm').glob('*.py'))
  return [path.stem for path in scripts if "if __name__ == '__main__':" in path.read_text()]


def command_help(name: str) -> str:
  """What `python -m p2ldm.NAME --help` prints."""
  arguments = [sys.executable, '-m', f'p2ldm.{name}', '--help']
  return subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def commands_markdown() -> str:
  """A section for every command: its introduction, then its flags."""
  names = commands()
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    texts = pool.map(command_help, names)
  return '\n\n'.join(
    f'## {name}\n\n{_help_markdown(text)}' for name, text in zip(names, texts, strict=True)
  )


def _help_markdown(text: str) -> str:
  introduction, _, described = text.partition('\nFlags:\n')
  lines = []
  for block in introduction.strip().split('\n\n'):
    indented = [line.startswith('  ') for line in block.splitlines()]
    first = indented.index(True) if any(indented) else len(indented)
    block = block.splitlines()
    lines += ['\n'.join(html.escape(line, quote=False) for line in block[:first]), '']
    if block[first:]:
      lines += ['```', *(line.removeprefix('  ') for line in block[first:]), '```', '']
  flags = re.findall(r'^  (--\S+)\n((?: {6}.*\n?)+)', described + '\n', re.MULTILINE)
  for flag, meaning in flags:
    words = html.escape(' '.join(meaning.split()), quote=False)
    lines += [f'`{flag}`', f':   {words}', '']
  return '\n'.join(lines)


def notebook_markdown(notebook: dict) -> str:
  """A notebook as a page: its text, its code, and what that printed and drew."""
  blocks = []
  for cell in notebook['cells']:
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
      blocks.append(source)
    elif cell['cell_type'] == 'code':
      blocks.append(f'```python\n{source}\n```')
      blocks += [block for output in cell['outputs'] if (block := _output_markdown(output))]
  return '\n\n'.join(blocks) + '\n'


def _output_markdown(output: dict) -> str:
  if output['output_type'] == 'stream':
    return f'````text\n{"".join(output["text"])}\n````'
  data = output.get('data', {})
  if 'image/png' in data:
    png = ''.join(data['image/png']).replace('\n', '')
    return f'<p><img alt="What the cell above shows" src="data:image/png;base64,{png}"></p>'
  if 'text/markdown' in data:
    return ''.join(data['text/markdown'])
  return f'````text\n{"".join(data.get("text/plain", ""))}\n````'
