import json
import pathlib
import re
import sys
import tempfile
from unittest import mock

import ml_collections
import numpy as np
from absl import flags
from absl.testing import absltest, parameterized
from ml_collections import config_flags

from ffp_jax import config as config_lib
from ffp_jax.baselines import settings
from ffp_jax.checkpoints import model_config
from ffp_jax.errors import RequestError
from ffp_jax.models import families
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.pruning.sublayers import check_reachable, find_sublayers
from ffp_jax.runtime.workdir import changed_keys, claim

_CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'
_NAMES = tuple(sorted(path.stem for path in _CONFIGS.glob('*.py')))


class _TestCase(parameterized.TestCase):
  def refused(self, start):
    """Asserts a refusal of one line that starts with the key's name."""
    return self.assertRaisesRegex(
      RequestError, rf'\A{re.escape(start)}[^\n]+\Z'
    )


def _with(**overrides):
  config = config_lib.defaults()
  config.update_from_flattened_dict(overrides)
  return config


def _leaves(tree, prefix=''):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


class ValidateTest(_TestCase):
  def test_defaults_are_valid(self):
    config_lib.validate(config_lib.defaults())

  def test_every_key_is_described(self):
    config = config_lib.defaults()
    lines = config_lib.describe_keys(config).splitlines()
    flat = [name for name, _ in _leaves(config.to_dict())]
    named = [line.partition('=')[0].removeprefix('--config.') for line in lines]
    self.assertCountEqual(named, flat)
    for line in lines:
      self.assertRegex(line, r'^--config\.[\w.]+=\S.*  \S')

  def test_describes_the_values_that_are_set(self):
    said = config_lib.describe_keys(_with(**{'search.context': 128}))
    self.assertIn('--config.search.context=128 ', said)
    self.assertIn('tokens per reward row', said)

  def test_defaults_are_made_anew(self):
    config_lib.defaults().budget.sparsity = 0.9
    self.assertNotEqual(config_lib.defaults().budget.sparsity, 0.9)

  @parameterized.parameters(0.0, 0.5, 0.999)
  def test_good_sparsity(self, value):
    config_lib.validate(_with(**{'budget.sparsity': value}))

  @parameterized.parameters(-0.1, 1.0, 1.5, float('nan'), float('inf'))
  def test_sparsity(self, value):
    with self.refused('budget.sparsity: '):
      config_lib.validate(_with(**{'budget.sparsity': value}))

  def test_what_the_published_search_needs(self):
    with self.refused("search.repair: 'cut' meets one budget; leave budget.fl"):
      config_lib.validate(
        _with(**{'search.repair': 'cut', 'budget.flops': 0.1})
      )
    with self.refused('policy.score_weight: learns from differences'):
      config_lib.validate(_with(**{'policy.score_weight': 1.0}))
    for windows in (-1, 17):
      with self.refused('calibration.windows: must be from 1 to '):
        config_lib.validate(_with(**{'calibration.windows': windows}))

  def test_choices(self):
    with self.refused("dtype: 'neither' is not one of "):
      config_lib.validate(_with(dtype='neither'))

  @parameterized.parameters(
    'text.context',
    'text.calibration_windows',
    'text.validation_windows',
    'text.reward_windows',
    'text.heldout_windows',
    'budget.round_ffn',
    'budget.round_heads',
    'search.context',
    'search.candidates',
    'search.finalists',
    'policy.std',
    'policy.learning_rate',
    'policy.epochs',
    'checkpoint.every',
    'checkpoint.keep',
  )
  def test_positive(self, key):
    for value in (0, -2):
      with self.refused(f'{key}: {value}'):
        config_lib.validate(_with(**{key: value}))

  def test_floor(self):
    for value in (0, 1, 3):
      config_lib.validate(_with(**{'budget.floor': value}))
    with self.refused('budget.floor: -1'):
      config_lib.validate(_with(**{'budget.floor': -1}))

  def test_context_of_the_search(self):
    config = _with(**{'text.context': 96, 'search.context': 32})
    config_lib.validate(config)
    for value in (64, 192):
      config.search.context = value
      with self.refused(f'search.context: {value} does not divide'):
        config_lib.validate(config)

  @parameterized.parameters(
    ('search.sparsity_shares', (1.0,)),
    ('search.steps', (5, 5, 5)),
    ('search.rows', (1,)),
    ('search.steps', ()),
  )
  def test_one_entry_a_stage(self, key, value):
    with self.refused('search.sparsity_shares, search.steps and search.rows'):
      config_lib.validate(_with(**{key: value}))

  def test_no_stages(self):
    keys = ('search.sparsity_shares', 'search.steps', 'search.rows')
    with self.refused('search.sparsity_shares, search.steps and search.rows'):
      config_lib.validate(_with(**dict.fromkeys(keys, ())))

  def test_last_stage_is_the_target(self):
    with self.refused('search.sparsity_shares: '):
      config_lib.validate(_with(**{'search.sparsity_shares': (1.0, 0.9)}))

  def test_rows(self):
    config = _with(**{'text.context': 96, 'search.context': 32})
    config.text.reward_windows = 5
    config.search.rows = (1, 15)
    config_lib.validate(config)
    for rows in ((0, 1), (1, 16)):
      config.search.rows = rows
      with self.refused('search.rows: each must be from 1 to 15'):
        config_lib.validate(config)

  @parameterized.parameters(
    ('text.context', 1),  # nothing to predict
    ('search.context', 1),
    ('search.steps', (-1, 5)),
    ('search.sparsity_shares', (6.0, 1.0)),
    ('search.sparsity_shares', (-0.5, 1.0)),
    ('search.min_ratio', -0.1),
    ('search.min_ratio', float('nan')),
    ('calibration.strengths', (0.1, -1.0)),
  )
  def test_values_that_would_fail_later(self, key, value):
    with self.refused(f'{key}: '):
      config_lib.validate(_with(**{key: value}))


_TINY = ModelConfig(
  vocab=300,
  width=32,
  layers=3,
  groups=2,
  heads_per_group=2,
  head_size=8,
  ffn=48,
)


def _sites(config, model=_TINY):
  return find_sublayers(
    model,
    round_heads=config.budget.round_heads,
    round_ffn=config.budget.round_ffn,
    floor=config.budget.floor,
  )


class ReachableTest(_TestCase):
  def test_reachable(self):
    for sparsity in (0.0, 0.2, 0.6):
      config = _with(**{'budget.sparsity': sparsity})
      check_reachable(_sites(config), config)

  def test_floors_leave_too_much(self):
    # One group of two, 8 channels of 48.
    config = _with(**{'budget.sparsity': 0.8, 'search.min_ratio': 0.01})
    largest = (3 * 1536 + 3 * 40 * 96) / (6 * 1536 + 3 * 48 * 96)
    with self.refused('budget.sparsity: 0.8 is out of reach'):
      check_reachable(_sites(config), config)
    with self.assertRaisesRegex(RequestError, f'{largest:.4f}'):
      check_reachable(_sites(config), config)

  def test_no_floors(self):
    config = _with(
      **{
        'budget.sparsity': 0.99,
        'budget.floor': 0,
        'search.min_ratio': 0.0,
      }
    )
    check_reachable(_sites(config), config)

  def test_exactly_within_reach(self):
    config = _with(**{'search.min_ratio': 0.0})
    sublayers = _sites(config)
    # Half of attention, and all channels but 8 of 48.
    removable = sublayers.sparsity(sublayers.floor)
    config.budget.sparsity = removable
    check_reachable(sublayers, config)
    config.budget.sparsity = removable + 1e-3
    with self.refused('budget.sparsity: '):
      check_reachable(sublayers, config)

  def test_coarse_rounding(self):
    config = _with(**{'budget.round_ffn': 48, 'budget.round_heads': 2})
    with self.refused('budget.sparsity: 0.2 is out of reach'):
      check_reachable(_sites(config), config)

  def test_lowest_ratio(self):
    config = _with(**{'budget.sparsity': 0.5, 'search.min_ratio': 0.51})
    with self.refused('search.min_ratio: 0.51'):
      check_reachable(_sites(config), config)
    config.search.min_ratio = 0.49
    check_reachable(_sites(config), config)


def _claim(workdir, config):
  with claim(workdir, config):
    pass


class ClaimTest(_TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder) / 'some' / 'run'

  def test_writes_every_key(self):
    config = _with(seed=3)
    _claim(self.workdir, config)
    text = (self.workdir / 'config.json').read_text()
    self.assertEqual(changed_keys(config, json.loads(text)), [])
    self.assertEqual(json.loads(text), json.loads(config.to_json()))
    self.assertEqual(json.loads(text)['seed'], 3)

  def test_same_settings_again(self):
    for _ in range(2):
      _claim(self.workdir, _with(**{'search.steps': (3, 4)}))
    names = [path.name for path in self.workdir.iterdir()]
    self.assertCountEqual(names, ['config.json', 'lock'])

  def test_other_settings(self):
    _claim(self.workdir, _with())
    before = (self.workdir / 'config.json').read_bytes()
    other = _with(
      **{
        'seed': 1,
        'budget.sparsity': 0.31,
        'search.steps': (5, 99),
        'checkpoint.every': 7,
      }
    )
    with self.refused('workdir: '):
      _claim(self.workdir, other)
    keys = 'other budget.sparsity, search.steps, seed;'
    with self.assertRaisesRegex(RequestError, keys):
      _claim(self.workdir, other)
    self.assertEqual((self.workdir / 'config.json').read_bytes(), before)

  def test_settings_that_may_change(self):
    _claim(self.workdir, _with())
    other = _with(**{'checkpoint.every': 7, 'checkpoint.keep': 9})
    _claim(self.workdir, other)
    written = json.loads((self.workdir / 'config.json').read_text())
    self.assertEqual(written, json.loads(other.to_json()))

  def test_one_at_a_time(self):
    with claim(self.workdir, _with()):
      with self.refused(
        f'workdir: another process is at work in {self.workdir}'
      ):
        _claim(self.workdir, _with())
    _claim(self.workdir, _with())

  @parameterized.parameters('{"seed": 0', '', '[1]', '"text"')
  def test_not_a_config(self, text):
    self.workdir.mkdir(parents=True)
    (self.workdir / 'config.json').write_text(text)
    with self.refused('workdir: '):
      _claim(self.workdir, _with())
    self.assertEqual((self.workdir / 'config.json').read_text(), text)

  def test_not_writable(self):
    # Under a regular file: for root, permissions forbid nothing.
    self.workdir.parent.parent.mkdir(exist_ok=True)
    self.workdir.parent.write_text('a file')
    for path in (self.workdir, self.workdir.parent):
      with self.refused(f'workdir: cannot write to {path}'):
        _claim(path, _with())
    self.assertEqual(self.workdir.parent.read_text(), 'a file')

  def test_changed_keys(self):
    config = _with()
    old = json.loads(config.to_json())
    self.assertEqual(changed_keys(config, old), [])
    old['search']['steps'] = [5, 99]
    old['search']['gone'] = 1
    del old['policy']['std']
    self.assertEqual(
      changed_keys(config, old),
      ['policy.std', 'search.gone', 'search.steps'],
    )


def _load(name, *overrides):
  """A config file as the command line loads it."""
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file('config', flag_values=values)
  argv = ['main', f'--config={_CONFIGS / name}.py', *overrides]
  # Where config_flags looks for the overrides.
  with mock.patch.object(sys, 'argv', argv):
    values(argv)
  return holder.value


def _types(config):
  """Dotted key to type."""
  types = {}
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      types |= {f'{key}.{k}': kind for k, kind in _types(value).items()}
    else:
      types[key] = type(value)
  return types


# What the hub's config.json of each model holds, as far as it matters.
_HUB = {
  'llama2_7b': {
    'model_type': 'llama',
    'hidden_act': 'silu',
    'hidden_size': 4096,
    'intermediate_size': 11008,
    'max_position_embeddings': 4096,
    'num_attention_heads': 32,
    'num_hidden_layers': 32,
    'num_key_value_heads': 32,
    'rms_norm_eps': 1e-05,
    'rope_scaling': None,
    'tie_word_embeddings': False,
    'vocab_size': 32000,
  },
  'mistral_7b': {
    'model_type': 'mistral',
    'hidden_act': 'silu',
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'max_position_embeddings': 32768,
    'num_attention_heads': 32,
    'num_hidden_layers': 32,
    'num_key_value_heads': 8,
    'rms_norm_eps': 1e-05,
    'rope_theta': 10000.0,
    'sliding_window': 4096,
    'tie_word_embeddings': False,
    'vocab_size': 32000,
  },
  'opt_125m': {
    'model_type': 'opt',
    '_remove_final_layer_norm': False,
    'activation_function': 'relu',
    'do_layer_norm_before': True,
    'ffn_dim': 3072,
    'hidden_size': 768,
    'max_position_embeddings': 2048,
    'num_attention_heads': 12,
    'num_hidden_layers': 12,
    'vocab_size': 50272,
    'word_embed_proj_dim': 768,
  },
}
# Hub id; parameters, all and prunable; of one unit of attention and FFN;
# units; window; prunable parameters that are biases of outputs.
_FACTS = {
  'llama2_7b': (
    'meta-llama/Llama-2-7b-hf',
    (6738415616, 6476005376),
    (4 * 4096 * 128, 3 * 4096),
    (32, 11008),
    None,
    0,
  ),
  'mistral_7b': (
    'mistralai/Mistral-7B-v0.1',
    (7241732096, 6979321856),
    (4096 * 128 * (4 + 1 + 1 + 4), 3 * 4096),
    (8, 14336),
    4096,
    0,
  ),
  'opt_125m': (
    'facebook/opt-125m',
    (125239296, 85017600),
    (4 * 768 * 64 + 3 * 64, 2 * 768 + 1),
    (12, 3072),
    None,
    12 * 2 * 768,
  ),
}


def _model(name):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    (path / 'config.json').write_text(json.dumps(_HUB[name]))
    return model_config.read_model_config(path)


class FilesTest(_TestCase):
  @parameterized.parameters(*_NAMES)
  def test_loads_and_validates(self, name):
    config = _load(name)
    config_lib.validate(config)
    compares = 'compare' in config
    whole = settings.comparison() if compares else config_lib.defaults()
    self.assertEqual(_types(config), _types(whole))

  @parameterized.parameters(*_NAMES)
  def test_says_what_it_is(self, name):
    first, *rest = (_CONFIGS / f'{name}.py').read_text().splitlines()
    self.assertStartsWith(first, '"""')
    self.assertIn(f'--config=configs/{name}.py', '\n'.join(rest))

  @parameterized.parameters(*_NAMES)
  def test_flags_change_keys(self, name):
    config = _load(
      name, '--config.budget.sparsity=0.3', '--config.search.steps=(1, 2)'
    )
    self.assertEqual(config.budget.sparsity, 0.3)
    self.assertEqual(config.search.steps, (1, 2))

  def test_llama_is_the_defaults(self):
    other = json.loads(config_lib.defaults().to_json())
    self.assertEqual(changed_keys(_load('llama'), other), [])

  @parameterized.parameters(*_FACTS)
  def test_architectures(self, name):
    hub, (total, prunable), costs, units, window, fixed = _FACTS[name]
    config, model = _load(name), _model(name)
    self.assertEqual(config.model, hub)
    self.assertEqual(families.param_count(model), total)
    self.assertEqual(model.window, window)
    sublayers = _sites(config, model)
    L = model.layers
    self.assertEqual(sublayers.total, prunable)
    self.assertEqual(sublayers.fixed, fixed)
    np.testing.assert_array_equal(sublayers.units, np.repeat(units, L))
    np.testing.assert_array_equal(sublayers.unit_cost, np.repeat(costs, L))
    # Rounding leaves no remainder and half the model may go.
    np.testing.assert_array_equal(sublayers.units % sublayers.step, 0)
    self.assertGreater(sublayers.sparsity(sublayers.floor), 0.5)
    check_reachable(sublayers, config)
    # Every window is within what the model was trained for.
    self.assertLessEqual(config.text.context, model.max_positions)


if __name__ == '__main__':
  absltest.main()
