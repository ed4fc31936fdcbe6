"""Every default, and the checks that need no model."""

import inspect
import re

import ml_collections

from ffp_jax.errors import RequestError


def defaults() -> ml_collections.ConfigDict:
  """Returns every key of a run, at the value that suits the demo on two cores.

  The comment above or beside a key is what `--help_config` prints.
  """
  config = ml_collections.ConfigDict()
  # Model to prune: 'demo', a Hugging Face directory, a .gguf file, a hub id.
  config.model = 'demo'
  # Text: general, pydoc, wikitext2, ptb, c4, a file or a directory; or several
  # of them with weights: 'general:0.7,a.jsonl:0.3'.
  config.data = 'general'
  config.dtype = 'auto'  # of the weights: float32 on CPU, bfloat16 elsewhere
  config.seed = 0  # of the text's split and of the search

  config.text = ml_collections.ConfigDict()
  config.text.field = ''  # that holds a document; '' for the first known name
  config.text.context = 512  # tokens per window
  config.text.calibration_windows = 16  # for importance and calibration
  config.text.validation_windows = 8  # to choose the ridge strength
  config.text.reward_windows = 16  # to score candidates
  config.text.heldout_windows = 24  # for the reported figures; the text's end
  # Text of another kind, for reported figures alone: a text as in data, '' for
  # none, or 'auto' for the built-in text that data does not hold.
  config.text.other = 'auto'

  config.budget = ml_collections.ConfigDict()
  # Share of the parameters of attention and FFN to remove, at least.
  config.budget.sparsity = 0.2
  config.budget.round_ffn = 8  # FFN channels are kept in multiples of this
  config.budget.round_heads = 1  # key/value groups are kept in multiples
  # Such multiples that every sublayer keeps at least. With 0 a search may
  # remove attention or FFN of a layer whole; see search.min_ratio too.
  config.budget.floor = 1
  config.budget.flops = 0.0  # share of the FLOPs to remove too
  config.budget.flops_context = 2048  # tokens at which FLOPs are counted
  config.budget.kv_cache = 0.0  # share of the key/value cache to remove too
  config.budget.latency = 0.0  # share of the measured time to remove too
  config.budget.latency_table = ''  # JSON of ffp_jax.benchmarks.latency

  config.search = ml_collections.ConfigDict()
  # The curriculum's stages: share of the sparsity in each.
  config.search.sparsity_shares = (0.5, 1.0)
  config.search.steps = (4, 20)  # steps of each stage
  config.search.rows = (2, 2)  # reward rows per candidate in each stage
  config.search.context = 256  # tokens per reward row
  config.search.candidates = 1  # proposals per step; 1 is the policy's mean
  config.search.antithetic = True  # sample pairs, and the mean if odd
  config.search.block = 0  # candidates scored at once; 0 for what fits
  # Share of a sublayer's units, next to return, that give its gradient.
  config.search.window = 0.2
  # Ridge strength of refit candidates; 0 scores them as they are cut.
  config.search.refit = 0.1
  config.search.min_ratio = 0.1  # smallest share that a sublayer may keep
  # How proposals meet the budget: 'project', or 'cut' as published.
  config.search.repair = 'project'
  config.search.attention_prior = 2.0  # first priority; that of an FFN is 0
  config.search.finalists = 1  # best candidates re-scored beside the mean
  config.search.remat = False  # recompute activations, for less memory
  config.search.init_from = ''  # workdir of a run whose policy to start from

  config.policy = ml_collections.ConfigDict()
  config.policy.hidden = (64, 64)  # widths of the network
  config.policy.std = 0.25  # first standard deviation of a priority
  config.policy.learning_rate = 0.2  # of the free mean and spread
  config.policy.network_learning_rate = 1e-3  # of the network
  config.policy.adam_decay = 0.95  # Adam's second
  config.policy.max_norm = 1.0  # at which gradients are clipped
  config.policy.epochs = 1  # updates per step
  config.policy.clip = 0.2  # PPO's epsilon
  config.policy.score_weight = 0.0  # of PPO's score function
  config.policy.pathwise_weight = 1.0  # of the gradient through the masks
  config.policy.value_weight = 0.0  # of PPO's value loss
  config.policy.entropy_weight = 0.0  # of the entropy bonus

  config.calibration = ml_collections.ConfigDict()
  config.calibration.enabled = True  # repair the output projections
  config.calibration.windows = 0  # of the calibration windows; 0 for all
  config.calibration.strengths = (0.01, 0.1, 1.0)  # of the ridge, to try

  config.recovery = ml_collections.ConfigDict()
  config.recovery.tokens = 32_768  # to train on; 0 for no recovery
  # Text, as `data` takes it; '' for the part of it that nothing else uses,
  # and the calibration text.
  config.recovery.data = ''
  config.recovery.rank = 0  # of LoRA; 0 to train every kept weight
  # Highest rate; 0 for 1e-4, or for 3e-3 with a rank.
  config.recovery.learning_rate = 0.0
  # Share of the loss that the text has; the dense model has the rest.
  config.recovery.cross_entropy = 0.5
  config.recovery.rows = 1  # windows trained on at once
  config.recovery.accumulate = 1  # times that many in a step
  config.recovery.every = 16_384  # tokens between validations and checkpoints
  config.recovery.remat = False  # recompute activations, for less memory

  # Sizes of the mesh axes; one may be -1, for the devices left.
  config.mesh = ml_collections.ConfigDict()
  config.mesh.candidates = 1  # candidates side by side
  config.mesh.fsdp = 1  # splits weights and rows of tokens
  config.mesh.tensor = -1  # splits heads and channels

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every = 5  # steps
  config.checkpoint.keep = 2  # checkpoints besides those at a stage's end
  return config


def from_dict(values: dict) -> ml_collections.ConfigDict:
  """Returns the settings of a run, given the content of its config.json.

  Keys that it doesn't have, being of an older version, are at their defaults.
  """
  config = defaults()
  with config.ignore_type():
    config.update(_with_tuples(values))
  return config


def _with_tuples(value):
  """Returns what JSON held, with tuples in the place of lists."""
  if isinstance(value, dict):
    return {key: _with_tuples(inner) for key, inner in value.items()}
  if isinstance(value, list):
    return tuple(map(_with_tuples, value))
  return value


get_config = defaults  # so that this file is one that --config can name


def describe_keys(config: ml_collections.ConfigDict) -> str:
  """Returns every key of a config, its value and what it means, as lines.

  The meaning is the comment at the key's default in this file.
  """
  comments, above = {}, []
  for line in inspect.getsource(defaults).splitlines():
    if found := re.match(r'  config\.([\w.]+) = .*?(?:  # (.*))?$', line):
      comments[found[1]] = ' '.join([*above, found[2] or ''])
    comment = re.match(r'  # (.*)', line)
    above = [*above, comment[1]] if comment else []
  found = config.to_dict()
  stack, lines = [('', found)], []
  while stack:
    prefix, value = stack.pop()
    if isinstance(value, dict):
      dot = prefix and f'{prefix}.'
      stack += [(dot + key, value[key]) for key in reversed(value)]
    else:
      row = f'--config.{prefix}={value!r}'
      comment = comments.get(prefix, '').strip()
      lines.append(f'{row:44}  {comment}'.rstrip())
  return '\n'.join(lines)


# What FastForward Pruning published (arXiv 2511.18977), where it differs; the
# curriculum, which depends on the number of steps, is `curriculum.published`.
PUBLISHED = {
  'search.candidates': 15,
  'search.antithetic': False,
  'search.refit': 0.0,
  'search.attention_prior': 0.0,
  'policy.hidden': (256, 256, 128),
  'policy.std': 1.0,
  'policy.learning_rate': 5e-4,
  'policy.network_learning_rate': 5e-4,
  'policy.adam_decay': 0.999,
  'policy.epochs': 10,
  'policy.clip': 0.2,
  'policy.score_weight': 1.0,
  'policy.pathwise_weight': 0.0,
  'policy.value_weight': 0.5,
  'policy.entropy_weight': 0.01,
  'calibration.strengths': (0.9,),  # of the mean diagonal, as all are here
  'recovery.tokens': 0,
}


_CHOICES = {
  'dtype': ('auto', 'float32', 'bfloat16'),
  'search.repair': ('project', 'cut'),
}
_POSITIVE = (
  'text.calibration_windows',
  'text.validation_windows',
  'text.reward_windows',
  'text.heldout_windows',
  'budget.round_ffn',
  'budget.round_heads',
  'budget.flops_context',
  'recovery.rows',
  'recovery.accumulate',
  'recovery.every',
  'search.candidates',
  'search.finalists',
  'policy.std',
  'policy.learning_rate',
  'policy.epochs',
  'checkpoint.every',
  'checkpoint.keep',
)


def _get(config, key):
  for part in key.split('.'):
    config = config[part]
  return config


def validate(config):
  """Checks that need neither model nor text.

  Raises:
    RequestError: naming the key.
  """
  for key in ('sparsity', 'flops', 'kv_cache', 'latency'):
    if not 0.0 <= config.budget[key] < 1.0:
      raise RequestError(
        f'budget.{key}: {config.budget[key]} is outside [0, 1)'
      )
  if not isinstance(config.budget.floor, int) or config.budget.floor < 0:
    raise RequestError(
      f'budget.floor: {config.budget.floor} must be an integer, 0 or more'
    )
  if config.budget.latency and not config.budget.latency_table:
    raise RequestError('budget.latency: needs budget.latency_table')
  for key, allowed in _CHOICES.items():
    if _get(config, key) not in allowed:
      raise RequestError(
        f'{key}: {_get(config, key)!r} is not one of {", ".join(allowed)}'
      )
  for key in _POSITIVE:
    if not _get(config, key) > 0:
      raise RequestError(f'{key}: {_get(config, key)} must be positive')
  for key in ('text.context', 'search.context'):
    if _get(config, key) < 2:
      raise RequestError(f'{key}: {_get(config, key)} predicts no token')
  if not 0 <= config.calibration.windows <= config.text.calibration_windows:
    raise RequestError(
      'calibration.windows: must be from 1 to text.calibration_windows '
      f'{config.text.calibration_windows}, or 0 for all'
    )
  strengths = config.calibration.strengths
  if not strengths or not all(s > 0 for s in strengths):
    raise RequestError('calibration.strengths: each must be positive')
  _validate_search(config)
  _validate_recovery(config)


def _validate_recovery(config):
  recovery = config.recovery
  for key in ('tokens', 'rank', 'learning_rate'):
    if recovery[key] < 0:
      raise RequestError(f'recovery.{key}: must be 0 or more')
  if not 0.0 <= recovery.cross_entropy <= 1.0:
    raise RequestError(
      f'recovery.cross_entropy: {recovery.cross_entropy} is outside [0, 1]'
    )
  if 0 < recovery.tokens < recovery_batch(config):
    raise RequestError(
      f'recovery.tokens: {recovery.tokens} is less than one step of '
      f'{recovery_batch(config)} tokens, text.context x recovery.rows x '
      'recovery.accumulate'
    )


def _validate_search(config):
  search = config.search
  others = [k for k in ('flops', 'kv_cache', 'latency') if config.budget[k]]
  if search.repair == 'cut' and others:
    raise RequestError(
      f"search.repair: 'cut' meets one budget; leave budget.{others[0]} at 0, "
      "or use 'project'"
    )
  if config.policy.score_weight and search.candidates < 2:
    raise RequestError(
      'policy.score_weight: learns from differences between proposals; raise '
      'search.candidates to 2 or more'
    )
  if not 0.0 <= search.min_ratio < 1.0:
    raise RequestError(
      f'search.min_ratio: {search.min_ratio} is outside [0, 1)'
    )
  if search.refit < 0:
    raise RequestError('search.refit: must be a ridge strength, or 0 for none')
  if search.block < 0:
    raise RequestError('search.block: must be positive, or 0 for what fits')
  if config.text.context % search.context:
    raise RequestError(
      f'search.context: {search.context} does not divide text.context '
      f'{config.text.context}'
    )
  _validate_curriculum(config)


def _validate_curriculum(config):
  search = config.search
  if not all(isinstance(n, int) and n >= 0 for n in search.steps):
    raise RequestError('search.steps: each must be an integer, 0 or more')
  if not all(isinstance(n, int) for n in search.rows):
    raise RequestError('search.rows: each must be an integer')
  if not all(0.0 <= share <= 1.0 for share in search.sparsity_shares):
    raise RequestError('search.sparsity_shares: each must be from 0 to 1')
  lengths = {
    len(search.sparsity_shares),
    len(search.steps),
    len(search.rows),
  }
  if len(lengths) > 1 or not search.steps:
    raise RequestError(
      'search.sparsity_shares, search.steps and search.rows need one '
      'entry a stage each'
    )
  if search.sparsity_shares[-1] != 1.0:
    raise RequestError(
      'search.sparsity_shares: the last stage must be 1.0, the target'
    )
  available = config.text.reward_windows * (
    config.text.context // search.context
  )
  if not 1 <= min(search.rows) <= max(search.rows) <= available:
    raise RequestError(
      f'search.rows: each must be from 1 to {available}, the reward text in '
      'rows of search.context'
    )


def recovery_batch(config) -> int:
  """Returns the number of tokens of a step of recovery."""
  recovery = config.recovery
  return config.text.context * recovery.rows * recovery.accumulate


def refits(config) -> bool:
  """Whether candidates are scored as calibration will leave them."""
  return config.calibration.enabled and config.search.refit > 0
