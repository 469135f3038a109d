"""The one exception a command turns into a paragraph, and the wrapper that does so."""

import os
import select
import signal
import sys
import textwrap

from absl import app, flags, logging

from p2ldm import interruptions


class UserError(ValueError):
  """Bad usage or bad input; its message names what is at fault and what to do about it."""


def run(main, flags_parser=None, positional: int = 0):
  """Runs a command: flags parsed by absl, `UserError` printed as one paragraph, exit status 2.

  Args:
    main: called once the flags are parsed, with the positional arguments that were given.
    flags_parser: replaces absl's own parsing of sys.argv where given.
    positional: how many arguments without -- the command takes at most.
  """

  def parse(argv):
    if {'--help', '-help', '-h'} & set(argv[1:]):
      print(describe_command(sys.modules['__main__'].__doc__))
      sys.exit(0)
    try:
      rest = flags_parser(argv) if flags_parser else flags.FLAGS(argv)
    except (flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
      fail(e)
    except ImportError as e:  # a config is Python, and imports its neighbours
      fail(
        UserError(
          f'Cannot load the config {_config_path(argv)} ({e}): run this command in the checkout, where '
          'the folder configs/ is.'
        )
      )
    if len(rest) > 1 + positional and not flags_parser:
      fail(
        UserError(
          f'Unexpected arguments: {" ".join(rest[1 + positional :])}. Options start with --; see --help.'
        )
      )
    return rest

  def guarded(argv):
    logging.set_verbosity(logging.WARNING)  # TFDS and Orbax report every file they touch
    try:
      main(*argv[1:])
      sys.stdout.flush()
    except UserError as error:
      fail(error)
    except FloatingPointError as error:  # training diverged; the message says what to do
      fail(error)
    except interruptions.Interrupted as error:
      print(f'{error} Give the same command again to go on.', file=sys.stderr)
      sys.exit(interruptions.EXIT_STATUS)
    except BrokenPipeError:
      if not nobody_reads():
        raise
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
      sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
      print('interrupted', file=sys.stderr)
      sys.exit(130)

  app.run(guarded, flags_parser=parse)


def nobody_reads() -> bool:
  """Whether stdout is a pipe whose reader has gone, as in `... --list | head -1`."""
  poll = select.poll()
  poll.register(sys.stdout.fileno(), 0)
  return any(event & select.POLLERR for _, event in poll.poll(0))


def _config_path(argv: list[str]) -> str:
  """What --config is set to, '' where it is not."""
  for argument, following in zip(argv, [*argv[1:], ''], strict=True):
    name, equals, value = argument.partition('=')
    if name in ('--config', '-config'):
      return value if equals else following
  return ''


def describe_command(introduction: str | None) -> str:
  """What --help prints: the command's docstring, then the flags it defines, in their order there."""
  lines = [(introduction or '').strip(), '', 'Flags:']
  for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
    default = '' if flag.default in (None, '') else f' (default: {flag.default})'
    name = f'--[no]{flag.name}' if flag.boolean else f'--{flag.name}'
    text = f'{flag.help}{default}'
    lines += [
      f'  {name}',
      textwrap.fill(text, 100, initial_indent=' ' * 6, subsequent_indent=' ' * 6),
    ]
  return '\n'.join(lines)


def fail(error: Exception):
  """Prints `error` as one paragraph on stderr and exits with status 2."""
  message = ' '.join(plain(error).split())
  print(
    textwrap.fill(f'error: {message}', 100, break_long_words=False, break_on_hyphens=False),
    file=sys.stderr,
  )
  sys.exit(2)


def plain(error: Exception) -> str:
  """The message of an exception, without the traceback that ml_collections puts into some."""
  text = str(error.args[0] if error.args and isinstance(error.args[0], str) else error)
  if 'Traceback' in text:
    text = text.strip().splitlines()[-1].partition(': ')[2]
  if isinstance(error, AttributeError):  # of a ConfigDict: 'chanels' Did you mean "channels" ...
    text = 'The config has no such key: ' + text.strip('"\'').replace('\\n', ' ').replace("\\'", '')
  return text
