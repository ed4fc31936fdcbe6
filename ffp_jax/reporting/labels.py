"""How figures are named and written, the same in every table and plot."""

# The models compared, in the order and colour of every table and plot;
# Okabe and Ito's colour-blind-safe palette, paler before calibration.
MODELS = {
  'dense': ('dense', '#7f7f7f'),
  'uniform': ('uniform', '#f5c396'),
  'uniform_calibrated': ('uniform + calibration', '#d55e00'),
  'searched': ('searched', '#99cbe6'),
  'calibrated': ('searched + calibration', '#0072b2'),
}

RESOURCES = {
  'flops': 'FLOPs',
  'kv_cache': 'KV cache',
  'latency': 'Latency, by the table given,',
}


def perplexity_rows(results):
  """Rows of (model, perplexity, times the dense one)."""
  dense = results['dense']['ppl']
  return [
    (label, ppl(results[key]['ppl']), ratio(results[key]['ppl'], dense, 2))
    for key, (label, _) in MODELS.items()
    if key in results
  ]


def final_key(results) -> str:
  """The model that was saved: searched, and calibrated if the run did."""
  return 'calibrated' if 'calibrated' in results else 'searched'


def uniform_key(results) -> str:
  """The uniform model that compares with the one saved."""
  return 'uniform_calibrated' if 'calibrated' in results else 'uniform'


def protocol(used, shorten=False) -> list[str]:
  """What was scored and how, in one sentence."""
  text = used['text']
  if shorten and len(text) > 30:  # a long path: its end tells it apart
    text = '...' + text[-27:]
  bos = 'begins with BOS' if used['bos'] else 'no BOS'
  return [
    f'Text: {text}; split: {used["split"]};',
    f'protocol: {used["name"]}, stride {used["stride"]:,}, {bos};',
    f'{used["windows"]:,} windows of {used["context"]:,} tokens, '
    f'{used["tokens"]:,} tokens scored.',
  ]


def ppl(value) -> str:
  """A perplexity, None for one that is not finite."""
  if value is None:
    return 'not finite'
  return f'{value:,.2f}' if value < 1e5 else f'{value:.2e}'


def ratio(above, below, digits) -> str:
  """A quotient with so many digits."""
  if above is None or below is None:
    return '-'
  ratio = above / below
  return f'{ratio:,.{digits}f}' if ratio < 1e5 else f'{ratio:.1e}'


def change(before, after) -> str:
  """A relative change in per cent."""
  return f'{after / before - 1:+.1%}'


def size(count) -> str:
  """Bytes in megabytes."""
  return f'{count / 1e6:,.1f} MB'


def rewards(metrics) -> dict[str, str]:
  """The rewards of a step and what they are called.

  Args:
    metrics: the steps; with one candidate each, mean and best are the same.
  """
  if all(line['candidates'] == 1 for line in metrics):
    return {'reward_max': 'reward'}
  return {'reward_mean': 'mean of the step', 'reward_max': 'best of the step'}


def reward(value) -> str:
  """A reward, None for one that is not finite."""
  return 'not finite' if value is None else f'{value:.3f}'


def number(value) -> str:
  """Any measurement, with four significant digits."""
  return 'not finite' if value is None else f'{value:,.4g}'
