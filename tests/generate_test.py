import contextlib
import functools
import io
import json
import pathlib
import shutil
import tempfile
from unittest import mock

import jax
import numpy as np
import transformers
from absl.testing import absltest, parameterized

from ffp_jax import export, generate
from ffp_jax.checkpoints import model_config, weights
from ffp_jax.errors import RequestError
from ffp_jax.models import decoding, functional
from ffp_jax.text import prompts, tokenization
from tests import testing, tiny_run

_FOLDER = tempfile.TemporaryDirectory()  # gone at exit


def setUpModule():
  tiny_run.compile_quickly(True)


def tearDownModule():
  tiny_run.compile_quickly(False)


@functools.cache
def _models() -> tuple[str, str]:
  """Directories of a dense model and a pruned one."""
  folder = pathlib.Path(_FOLDER.name)
  dense, pruned = folder / 'dense', folder / 'pruned'
  tiny_run.write_model(dense)
  config = model_config.read_model_config(dense)
  params = weights.load_params(dense, config, np.float32)
  small = export.slice_params(params, config, testing.random_masks(config))
  export.save(*small, dense, pruned)
  return str(dense), str(pruned)


def _generated(models, prompt='the way of', **changes) -> str:
  settings = {'new': 12, 'temperature': 0.0, 'seed': 0, 'dtype': 'float32'}
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    generate.generate(models, prompt, **settings | changes)
  return out.getvalue()


class GenerateTest(parameterized.TestCase):
  def naive(self, model, prompt, count):
    """The likeliest tokens, by forwards without a cache."""
    directory = pathlib.Path(model)
    config = model_config.read_model_config(directory)
    params = weights.load_params(directory, config, np.float32)
    apply = jax.jit(functional.make_apply(config))
    tokenizer = tokenization.load_tokenizer(directory)
    ids = tokenizer(prompt)['input_ids']
    for _ in range(count):
      # What follows a token doesn't reach it, and one length compiles once.
      padded = np.zeros((1, 64), np.int32)
      padded[0, : len(ids)] = ids
      logits = apply(params, padded, None)
      ids.append(int(logits[0, len(ids) - 1].argmax()))
    return tokenizer.decode(ids)

  def test_dense_beside_pruned(self):
    said = [self.naive(model, 'the way of', 12) for model in _models()]
    self.assertNotEqual(*said)
    expected = ''.join(
      f'--- {model}\n{text}\n\n'
      for model, text in zip(_models(), said, strict=True)
    )
    # The tokenizer is of bytes, and random models speak halves of characters,
    # of which the last ones may stay unsaid.
    got = _generated(_models())
    for ours, theirs in zip(
      got.split('\n\n'), expected.split('\n\n'), strict=True
    ):
      self.assertStartsWith(theirs, ours)
    self.assertGreater(len(got), len(expected) - 12)

  def test_seed_and_temperature(self):
    first, again, other = (
      _generated(_models()[:1], temperature=3.0, seed=seed)
      for seed in (0, 0, 1)
    )
    self.assertEqual(first, again)
    self.assertNotEqual(first, other)

  def test_end_of_sequence(self):
    tokenizer = tokenization.load_tokenizer(pathlib.Path(_models()[0]))
    ids = np.array(tokenizer('the way')['input_ids'])
    spoken = tokenizer('ab!cd')['input_ids']
    for ends in {spoken[2]}, {spoken[2], spoken[4]}, {spoken[4], spoken[2], 0}:
      steps = iter([np.array([[token]]) for token in spoken])
      with mock.patch.object(decoding, 'generate_tokens', return_value=steps):
        prompt = prompts.Prompt(tokenizer, ids, ends, 9)
        said = prompts.stream_text(None, None, prompt)
        self.assertEqual(list(said), ['a', 'b'])

  @parameterized.parameters('generation_config.json', 'config.json')
  def test_stops_where_transformers_does(self, name):
    folder = tempfile.TemporaryDirectory()
    path = pathlib.Path(self.enterContext(folder)) / 'model'
    shutil.copytree(_models()[0], path)
    tokenizer = tokenization.load_tokenizer(path)
    prompt = tokenizer('the way of', return_tensors='pt')
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    free = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    said = free[0, prompt['input_ids'].shape[1] :].tolist()
    # The second of them is never said.
    other = next(i for i in range(tiny_run.VOCAB) if i not in said)
    file = path / name
    content = json.loads(file.read_text()) if file.exists() else {}
    ends = {'eos_token_id': [said[6], other]}
    file.write_text(json.dumps(content | ends))
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    theirs = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    self.assertLess(len(theirs), free.shape[1])
    self.assertIn(theirs[-1], [said[6], other])
    expected = tokenizer.decode(theirs[:-1])
    got = _generated([str(path)]).partition('\n')[2].removesuffix('\n\n')
    # Half a character at the end may stay unsaid.
    self.assertStartsWith(expected, got)
    self.assertGreater(len(got), len(expected) - 3)

  def test_characters_of_several_tokens(self):
    tokenizer = tokenization.load_tokenizer(pathlib.Path(_models()[0]))
    ids = np.array(tokenizer('the way')['input_ids'])
    spoken = tokenizer('a\N{SNOWMAN}b')['input_ids']
    self.assertGreater(len(spoken), 3)
    steps = iter([np.array([[token]]) for token in spoken])
    with mock.patch.object(decoding, 'generate_tokens', return_value=steps):
      prompt = prompts.Prompt(tokenizer, ids, frozenset(), 9)
      said = prompts.stream_text(None, None, prompt)
      self.assertEqual(list(said), ['a', '\N{SNOWMAN}', 'b'])

  def test_no_prompt(self):
    models = _models()  # may have to be made, before nothing can be loaded
    with (
      mock.patch.object(weights, 'load_params', side_effect=AssertionError),
      self.assertRaisesRegex(RequestError, '--prompt'),
    ):
      _generated(models, prompt='')


if __name__ == '__main__':
  absltest.main()
