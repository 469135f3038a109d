import itertools
import threading

import pytest

from p2ldm.data.read_ahead import read_ahead


def threads():
  return [t for t in threading.enumerate() if t.name.startswith('read_ahead')]


def test_results_come_in_order_whichever_is_done_first():
  second_done = threading.Event()

  def read(item):
    if item == 0:
      assert second_done.wait(30)
    elif item == 1:
      second_done.set()
    return 10 * item

  assert list(read_ahead(read, range(20), workers=2)) == list(range(0, 200, 10))
  assert not threads()


def test_items_without_end_are_read_ahead_within_bounds():
  asked = []

  def items():
    for i in itertools.count():
      asked.append(i)
      yield i

  results = read_ahead(lambda i: i, items(), workers=2)
  assert not asked
  for i in range(5):
    assert next(results) == i
    assert len(asked) == i + 4  # it, and three more
  results.close()
  assert not threads()


def test_an_error_comes_where_its_result_would_have_come():
  results = read_ahead(lambda i: 1 // (3 - i), range(10), workers=2)
  assert [next(results) for _ in range(3)] == [0, 0, 1]
  with pytest.raises(ZeroDivisionError):
    next(results)
  assert not threads()


def test_what_has_not_begun_is_dropped_when_it_is_closed():
  begun, second, go_on = [], threading.Event(), threading.Event()

  def read(item):
    begun.append(item)
    if item:
      second.set()
      assert go_on.wait(30)
    return item

  results = read_ahead(read, itertools.count(), workers=1)
  assert next(results) == 0
  assert second.wait(30)
  threading.Timer(0.2, go_on.set).start()
  results.close()
  assert begun == [0, 1]
