"""Names, colours and number formats shared by all tables and plots."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Key in results.json: (label, colour), in the order of every table and plot.
# The colours are of Okabe and Ito's colour-blind-safe palette; models before
# calibration have a paler tone.
MODELS = {
  'dense': ('dense', '#7f7f7f'),
  'uniform': ('uniform', '#f5c396'),
  'uniform_calibrated': ('uniform + calibration', '#d55e00'),
  'searched': ('searched', '#99cbe6'),
  'calibrated': ('searched + calibration', '#0072b2'),
  'recovered': ('recovered', '#009e73'),
}

NAME_WIDTH = 20  # longest name of the other text in a table

# Name of a further budget in allocation.json: its label.
RESOURCES = {
  'flops': 'FLOPs',
  'kv_cache': 'KV cache',
  'latency': 'Latency (from the given table)',
}


def perplexity_columns(results: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the names of the columns of `perplexity_rows` after the first.

  Args:
    results: content of results.json.
  """
  columns = 'perplexity', 'x dense'
  if 'other' not in results:
    return columns
  text = _shorten(results['other']['protocol']['text'], NAME_WIDTH)
  return *columns, text, 'x dense'


def perplexity_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
  """Returns a row (model, perplexity, multiple of the dense one) per model.

  With another text, perplexity and multiple on it follow, or '-' for a model
  that was not measured on it.

  Args:
    results: content of results.json.
  """
  texts = [results, results['other']] if 'other' in results else [results]
  return [
    (label, *itertools.chain(*(_perplexity_cells(text, key) for text in texts)))
    for key, (label, _) in MODELS.items()
    if key in results
  ]


def _perplexity_cells(text, key) -> tuple[str, str]:
  if key not in text:
    return '-', '-'
  value = text[key]['ppl']
  return ppl(value), ratio(value, text['dense']['ppl'], 2)


def final_key(results: Mapping[str, Any]) -> str:
  """Returns the key in results.json of the best model that the run saved."""
  if 'recovered' in results:
    return 'recovered'
  return 'calibrated' if 'calibrated' in results else 'searched'


def final_directory(results: Mapping[str, Any]) -> str:
  """Returns the directory in a workdir of the best model that it saved."""
  return 'recovered' if 'recovered' in results else 'pruned'


def uniform_key(results: Mapping[str, Any]) -> str:
  """Returns the key of the uniform model, calibrated if the saved one is."""
  return 'uniform_calibrated' if 'calibrated' in results else 'uniform'


def protocol(record: Mapping[str, Any], shorten: bool = False) -> list[str]:
  """Returns the lines of a sentence that says how perplexity was measured.

  Args:
    record: `protocol` of results.json.
    shorten: whether a long text name is cut to its end.
  """
  text = _shorten(record['text'], 30) if shorten else record['text']
  bos = 'begins with BOS' if record['bos'] else 'no BOS'
  return [
    f'Text: {text}; split: {record["split"]};',
    f'protocol: {record["name"]}, stride {record["stride"]:,}, {bos};',
    f'{record["windows"]:,} windows of {record["context"]:,} tokens, '
    f'{record["tokens"]:,} tokens scored.',
  ]


def other_protocol(results: Mapping[str, Any]) -> list[str]:
  """Returns the line on the other text, all else being as for the first one.

  Args:
    results: content of results.json; without another text there is no line.
  """
  if 'other' not in results:
    return []
  record = results['other']['protocol']
  return [
    f'{_shorten(record["text"], NAME_WIDTH)}: likewise, {record["windows"]:,} '
    f'windows, {record["tokens"]:,} tokens scored.'
  ]


def _shorten(text: str, longest: int) -> str:
  """Cuts a long text name, a path, to its end, which is distinctive."""
  return text if len(text) <= longest else '...' + text[3 - longest :]


def ppl(value: float | None) -> str:
  """Formats a perplexity; None stands for one that is not finite."""
  if value is None:
    return 'not finite'
  return f'{value:,.2f}' if value < 1e5 else f'{value:.2e}'


def to_ppl(nats: float) -> float | None:
  """Returns the perplexity of a mean loss, None if it is beyond a float."""
  try:
    return math.exp(nats)
  except OverflowError:
    return None


def ratio(
  numerator: float | None, denominator: float | None, digits: int
) -> str:
  """Formats a quotient with this many decimals; '-' if a value is None."""
  if numerator is None or denominator is None:
    return '-'
  ratio = numerator / denominator
  return f'{ratio:,.{digits}f}' if ratio < 1e5 else f'{ratio:.1e}'


def change(before: float, after: float) -> str:
  """Formats a relative change as a percentage with its sign."""
  return f'{after / before - 1:+.1%}'


def size(count: int) -> str:
  """Formats a number of bytes in megabytes."""
  return f'{count / 1e6:,.1f} MB'


def rewards(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  """Returns the keys of the rewards in `metrics`, and their labels.

  Args:
    metrics: lines of metrics.jsonl. Where every step has one candidate, mean
      and best are the same and only one of them is returned.
  """
  if all(line['candidates'] == 1 for line in metrics):
    return {'reward_max': 'reward'}
  return {'reward_mean': 'mean of the step', 'reward_max': 'best of the step'}


def reward(value: float | None) -> str:
  """Formats a reward; None stands for one that is not finite."""
  return 'not finite' if value is None else f'{value:.3f}'


def number(value: float | None) -> str:
  """Formats any measurement with four significant digits."""
  return 'not finite' if value is None else f'{value:,.4g}'
