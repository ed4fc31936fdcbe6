"""Exports in vLLM, where `launch/vllm.sh` has made its environment.

VLLM_PYTHON names the Python of another one.
"""

import itertools
import json
import os
import pathlib
import subprocess
import tempfile
import unittest

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from ffp_jax.checkpoints import model_config, weights
from ffp_jax.export import formats
from ffp_jax.models.decoder import Decoder
from tests import testing, tiny_run

_ROOT = pathlib.Path(__file__).parent.parent
_PYTHON = os.environ.get('VLLM_PYTHON', _ROOT / '.vllm/bin/python')
# Groups and channels of each layer; 'fewer' has layers without attention, the
# first among them, and without FFN.
_KEPT = {'all': ((3, 2, 1), (47, 33, 18)), 'fewer': ((0, 2, 0), (47, 0, 0))}
# vLLM's kernels for CPU have heads of 32 at least.
_GROUPED = {
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 32,
  'max_position_embeddings': 256,
}
_OPT = {
  'hidden_size': 128,
  'ffn_dim': 48,
  'max_position_embeddings': 256,
}
_CASES = tiny_run.every_family(_GROUPED, _OPT, window=40)
_DTYPES = {'float32': 2e-5, 'bfloat16': 0.15}  # mean difference
_PROMPTS = (5, 40, 120)  # tokens
_NEW_TOKENS = 40


def _write(folder: pathlib.Path, name: str, kept: str):
  """Writes a model whose layers all differ, as ours and as the export."""
  tiny_run.write_model(folder / 'dense', **_CASES[name])
  pruned = testing.write_pruned(folder / 'dense', *_KEPT[kept])
  formats.export(str(pruned), 'hf', folder / 'hf', dtype=None, pre=None)


@unittest.skipUnless(pathlib.Path(_PYTHON).exists(), f'no vLLM at {_PYTHON}')
class VllmTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    models = [*itertools.product(_CASES, _KEPT)]
    for name, kept in models:
      _write(cls.root / name / kept, name, kept)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 290, count).tolist() for count in _PROMPTS]
    cls.jobs = [(*model, dtype) for model in models for dtype in _DTYPES]
    lines = [
      json.dumps(
        {
          'model': str(cls.root / name / kept / 'hf'),
          'dtype': dtype,
          'prompts': prompts,
          'new_tokens': _NEW_TOKENS,
        }
      )
      for name, kept, dtype in cls.jobs
    ]
    done = subprocess.run(
      [_PYTHON, _ROOT / 'tests/vllm_log_probs.py'],
      input='\n'.join(lines),
      capture_output=True,
      text=True,
      check=True,
      timeout=1200,
    )
    answers = map(json.loads, done.stdout.splitlines())
    cls.answers = dict(zip(cls.jobs, answers, strict=True))

  @parameterized.product(name=[*_CASES], kept=[*_KEPT], dtype=[*_DTYPES])
  def test_log_probs(self, name, kept, dtype):
    """Of prompts in one batch, then token by token from the paged cache."""
    answers = self.answers[name, kept, dtype]
    self.assertNotIn('error', answers)
    pruned = self.root / name / kept / 'pruned'
    config = model_config.read_model_config(pruned)
    params = weights.load_params(pruned, config, np.float32)
    apply = jax.jit(Decoder(config).apply)
    self.assertLen(answers, len(_PROMPTS))
    for answer, prompt in zip(answers, _PROMPTS, strict=True):
      tokens = jnp.asarray([answer['tokens']])
      self.assertEqual(tokens.shape, (1, prompt + _NEW_TOKENS))
      logits = apply({'params': params}, tokens)[0, :-1]
      want = jnp.take_along_axis(
        jax.nn.log_softmax(logits), tokens[0, 1:, None], axis=1
      )[:, 0]
      self.assertGreater(want.std(), 0.3)
      off = np.abs(np.array(answer['log_probs']) - want).mean()
      self.assertLess(off, _DTYPES[dtype])
      if dtype == 'float32':
        new = slice(prompt - 1, None)
        self.assertEqual(
          logits.argmax(-1)[new].tolist(), answer['tokens'][prompt:]
        )


if __name__ == '__main__':
  absltest.main()
