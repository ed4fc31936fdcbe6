"""Every default, and the checks that need no model."""

import ml_collections

from ffp_jax.errors import RequestError


def defaults() -> ml_collections.ConfigDict:
  """Every key a run has, at the value that suits the demo on two cores."""
  config = ml_collections.ConfigDict()
  config.model = 'demo'  # 'demo', a Hugging Face directory or a hub id
  # Or general, wikitext2, ptb, c4, a file or a directory; or several of them
  # with weights: 'general:0.7,a.jsonl:0.3'.
  config.data = 'pydoc'
  config.dtype = 'auto'  # float32 on CPU, bfloat16 elsewhere
  config.seed = 0

  config.text = ml_collections.ConfigDict()
  config.text.field = ''  # that holds a document; '': records.FIELDS
  config.text.context = 512
  config.text.calibration_windows = 16  # importance and ridge
  config.text.validation_windows = 8  # choose the ridge strength
  config.text.reward_windows = 16
  config.text.heldout_windows = 24  # from the end of the text
  # Of another kind, for figures alone; '': the other of pydoc and general.
  config.text.other = ''

  config.budget = ml_collections.ConfigDict()
  config.budget.sparsity = 0.2  # removed / prunable parameters
  config.budget.round_ffn = 8
  config.budget.round_heads = 1
  # Of the same sublayers, what else has to go at least, as a share; 0: nothing.
  config.budget.flops = 0.0
  config.budget.flops_context = 2048  # tokens
  config.budget.kv_cache = 0.0
  config.budget.latency = 0.0
  config.budget.latency_table = ''  # JSON of milliseconds, see resources.py

  config.search = ml_collections.ConfigDict()
  # The curriculum: one entry a stage.
  config.search.sparsity_shares = (0.5, 1.0)
  config.search.steps = (4, 20)
  config.search.rows = (2, 2)  # of search.context tokens, a candidate
  config.search.context = 256  # short: attention is cheaper
  config.search.candidates = 1  # proposals a step
  config.search.antithetic = True  # in pairs, and the mean if they are odd
  config.search.block = 0  # candidates scored at once; 0: as many as fit
  config.search.window = 0.2  # removed units next to a cut, a share of all
  # Ridge strength with which candidates are calibrated; 0: as they are cut.
  config.search.refit = 0.1
  config.search.min_ratio = 0.1
  # How proposals meet the budget: 'project', or 'cut' from the first layer on.
  config.search.repair = 'project'
  config.search.attention_prior = 2.0  # first priority; FFN's is 0
  config.search.finalists = 1  # best candidates that are re-scored
  config.search.remat = False  # recompute activations: less memory
  config.search.init_from = ''  # workdir of a run whose policy to start from

  config.policy = ml_collections.ConfigDict()
  config.policy.hidden = (64, 64)
  config.policy.std = 0.25  # of a priority, at first
  config.policy.learning_rate = 0.2  # of the free mean and spread
  config.policy.network_learning_rate = 1e-3
  config.policy.adam_decay = 0.95
  config.policy.max_norm = 1.0
  config.policy.epochs = 1
  config.policy.clip = 0.2
  config.policy.score_weight = 0.0
  config.policy.pathwise_weight = 1.0
  config.policy.value_weight = 0.0  # of use to the score function alone
  config.policy.entropy_weight = 0.0

  config.calibration = ml_collections.ConfigDict()
  config.calibration.enabled = True
  config.calibration.windows = 0  # of text.calibration_windows; 0: all
  config.calibration.strengths = (0.01, 0.1, 1.0)

  config.mesh = ml_collections.ConfigDict()  # sizes; -1: what is left
  config.mesh.candidates = 1  # scored side by side
  config.mesh.fsdp = 1  # splits weights and rows
  config.mesh.tensor = -1  # splits heads and channels

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every = 5
  config.checkpoint.keep = 2
  return config


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
  if config.text.other and config.text.other == config.data:
    raise RequestError(
      f"text.other: {config.data!r} is the run's own text; name one of another "
      "kind, or '' for a built-in one"
    )
  if not 0 <= config.calibration.windows <= config.text.calibration_windows:
    raise RequestError(
      'calibration.windows: must be from 1 to text.calibration_windows '
      f'{config.text.calibration_windows}, or 0 for all'
    )
  strengths = config.calibration.strengths
  if not strengths or not all(s > 0 for s in strengths):
    raise RequestError('calibration.strengths: each must be positive')
  _validate_search(config)


def _validate_search(config):
  search = config.search
  if not all(isinstance(n, int) and n >= 0 for n in search.steps):
    raise RequestError('search.steps: each must be an integer, 0 or more')
  if not all(isinstance(n, int) for n in search.rows):
    raise RequestError('search.rows: each must be an integer')
  if not all(0.0 <= share <= 1.0 for share in search.sparsity_shares):
    raise RequestError('search.sparsity_shares: each must be from 0 to 1')
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
  lengths = {
    len(search.sparsity_shares),
    len(search.steps),
    len(search.rows),
  }
  if lengths != {len(search.steps)} or not search.steps:
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


def refits(config) -> bool:
  """Whether candidates are scored as calibration will leave them."""
  return config.calibration.enabled and config.search.refit > 0
