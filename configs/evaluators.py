"""The parser and the classifier alone; other runs take them with --config.evaluators.pretrained=WORKDIR."""

from configs import base, variants


def get_config(variant: str = ''):
  """`evaluators.py`, `evaluators.py:tiny`, `evaluators.py:packaged` or `evaluators.py:faces64`."""
  config = variants.apply(base.get_config(), variant)
  config.stages = ('parser', 'classifier')
  return config
