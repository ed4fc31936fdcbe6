import fnmatch
import json
import pathlib
import sys
import tempfile
from unittest import mock

import huggingface_hub
import transformers
from absl.testing import absltest, parameterized
from huggingface_hub import constants, errors

from ffp_jax.checkpoints import hub
from ffp_jax.errors import RequestError
from tests import tiny_run

_PLAIN = ['config.json', 'merges.txt', 'tokenizer.json', 'tokenizer.model']
_SHARDS = [f'model-0000{i}-of-00002.safetensors' for i in (1, 2)]


def _http(kind):
  """Makes an error of the hub's client, with a response."""
  return kind('several\nlines', response=mock.MagicMock())


class _TestCase(parameterized.TestCase):
  def assert_refused(self, call, *words):
    with self.assertRaises(RequestError) as caught:
      call()
    self.assertNotIn('\n', str(caught.exception))
    for word in words:
      self.assertIn(word, str(caught.exception))


class LocateTest(_TestCase):
  def test_directory(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.assertEqual(hub.resolve_model(str(folder)), folder)

  @parameterized.parameters('utf-8-sig', 'utf-16')
  def test_byte_order_marks(self, encoding):
    """Resolves to a directory that transformers can read, unlike the source."""
    folder, home = (
      pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
      for _ in range(2)
    )
    tiny_run.write_model(folder / 'model')
    plain = transformers.AutoTokenizer.from_pretrained(folder / 'model')
    texts = {}
    for path in (folder / 'model').glob('*.json'):
      texts[path.name] = json.loads(path.read_text())
      path.write_bytes(path.read_text().encode(encoding))
    self.assertLen(texts, 3)
    with mock.patch.object(pathlib.Path, 'home', return_value=home):
      found = hub.resolve_model(str(folder / 'model'))
      self.assertEqual(hub.resolve_model(str(folder / 'model')), found)
      (folder / 'model' / 'config.json').write_text('{}')
      self.assertNotEqual(hub.resolve_model(str(folder / 'model')), found)
    for name, content in texts.items():
      self.assertEqual(json.loads((found / name).read_text()), content)
    weights = 'model.safetensors'
    self.assertTrue((found / weights).samefile(folder / 'model' / weights))
    again = transformers.AutoTokenizer.from_pretrained(found)
    self.assertEqual(again('a text').input_ids, plain('a text').input_ids)

  def test_a_byte_order_mark_that_lies(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    (folder / 'config.json').write_bytes(b'\xff\xfe\x00\xd8')
    with mock.patch.object(pathlib.Path, 'home', return_value=folder / 'home'):
      self.assert_refused(
        lambda: hub.resolve_model(str(folder)), str(folder / 'config.json')
      )

  @parameterized.parameters(
    '/no/such/directory', './no_such', '~/no_such_model', 'no_such_model',
    'no_such_model@main', '/a/b@main',
  )  # fmt: skip
  def test_no_such_directory(self, model):
    with mock.patch.object(huggingface_hub, 'list_repo_files') as listing:
      self.assert_refused(lambda: hub.resolve_model(model), repr(model))
    listing.assert_not_called()

  @parameterized.parameters(
    'nobody-ffp/no-such-model', 'a/b/c', 'org/--x--', 'org/', 'org/name@v1'
  )
  def test_hub_id_offline(self, model):
    with mock.patch.object(constants, 'HF_HUB_OFFLINE', True):
      self.assert_refused(
        lambda: hub.resolve_model(model), repr(model.partition('@')[0])
      )


class HubTest(_TestCase):
  """Checks the calls to huggingface_hub, without a connection."""

  def locate(self, model, listed, snapshot='/cache/snapshot'):
    """Returns the path, and the keywords of the download."""
    with (
      mock.patch.object(huggingface_hub, 'list_repo_files') as listing,
      mock.patch.object(huggingface_hub, 'snapshot_download') as download,
    ):
      for call, value in ((listing, listed), (download, snapshot)):
        if isinstance(value, Exception):
          call.side_effect = value
        call.return_value = value
      path = hub.resolve_model(model)
    self.assertEqual(listing.call_args.args, ('org/name',))
    self.assertEqual(download.call_args.args, ('org/name',))
    revision = download.call_args.kwargs['revision']
    self.assertEqual(listing.call_args.kwargs['revision'], revision)
    return path, download.call_args.kwargs

  @parameterized.named_parameters(
    ('safetensors', ['model.safetensors', 'flax_model.msgpack',
                     'pytorch_model.bin', 'consolidated.safetensors',
                     'model.fp16.safetensors'],
     ['model.safetensors']),
    ('shards', [*_SHARDS, 'pytorch_model.bin'], _SHARDS),
    ('whole_and_shards', ['model.safetensors', *_SHARDS],
     ['model.safetensors']),
    ('msgpack', ['flax_model.msgpack', 'tf_model.h5'],
     ['flax_model.msgpack']),
    ('msgpack_and_bin', ['flax_model.msgpack', 'pytorch_model.bin'],
     ['pytorch_model.bin']),
    ('bin', ['pytorch_model.bin', 'model.onnx', 'rust_model.ot'],
     ['pytorch_model.bin']),
  )  # fmt: skip
  def test_one_format_is_fetched(self, weights, expected):
    others = [
      'README.md',
      'onnx/config.json',
      'x.py',
      'original/tokenizer.model',
    ]
    listed = [*_PLAIN, *weights, *others]
    path, asked = self.locate('org/name', listed)
    self.assertEqual(path, pathlib.Path('/cache/snapshot'))
    self.assertFalse(asked['local_files_only'])
    fetched = {
      name
      for name in listed
      for pattern in asked['allow_patterns']
      if fnmatch.fnmatch(name, pattern)
    }
    self.assertEqual(fetched, {*_PLAIN, *expected})

  def test_without_torch_flax_before_bin(self):
    listed = ['flax_model.msgpack', 'pytorch_model.bin']
    with mock.patch.dict(sys.modules, torch=None):
      _, asked = self.locate('org/name', listed)
    self.assertEqual(asked['allow_patterns'], ['flax_model.msgpack'])

  def test_revision(self):
    listed = [*_PLAIN, 'model.safetensors']
    _, asked = self.locate('org/name@v1.0', listed)
    self.assertEqual(asked['revision'], 'v1.0')
    _, asked = self.locate('org/name', listed)
    self.assertIsNone(asked['revision'])

  def test_no_weights(self):
    self.assert_refused(
      lambda: self.locate('org/name', [*_PLAIN, 'a.gguf', 'b.gguf']),
      "'org/name'", 'model.safetensors', '.gguf',
    )  # fmt: skip

  @parameterized.parameters(
    errors.OfflineModeIsEnabled('offline'), errors.HTTPError('no route')
  )
  def test_without_a_connection_the_cache_serves(self, error):
    path, asked = self.locate('org/name@v1', error)
    self.assertEqual(path, pathlib.Path('/cache/snapshot'))
    self.assertTrue(asked['local_files_only'])
    self.assertEqual(asked['revision'], 'v1')

  def test_neither_a_connection_nor_a_cache(self):
    self.assert_refused(
      lambda: self.locate(
        'org/name',
        errors.OfflineModeIsEnabled('offline'),
        errors.LocalEntryNotFoundError('a\nb'),
      ),
      "'org/name'", 'cannot be reached', 'local directory',
    )  # fmt: skip

  @parameterized.parameters(
    (errors.GatedRepoError, 'gated', 'HF_TOKEN'),
    (errors.RevisionNotFoundError, 'v9', 'revision'),
    (errors.RepositoryNotFoundError, 'nor on the hub', 'private'),
    (errors.HfHubHTTPError, 'HfHubHTTPError', 'local directory'),
  )
  def test_the_hub_refuses(self, kind, *words):
    self.assert_refused(
      lambda: self.locate('org/name@v9', _http(kind)), "'org/name'", *words
    )

  def test_a_download_that_breaks_off(self):
    self.assert_refused(
      lambda: self.locate(
        'org/name', ['model.safetensors'], errors.HTTPError('broken')
      ),
      "'org/name'", 'HTTPError',
    )  # fmt: skip


if __name__ == '__main__':
  absltest.main()
