import pathlib
import tempfile
from unittest import mock

import huggingface_hub
from absl.testing import absltest, parameterized

from ffp_jax import hub
from ffp_jax.config import RequestError


class LocateTest(parameterized.TestCase):
  def test_directory(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.assertEqual(hub.locate(str(folder)), folder)

  def assert_refused(self, call, *words):
    with self.assertRaises(RequestError) as caught:
      call()
    for word in words:
      self.assertIn(word, str(caught.exception))

  @parameterized.parameters(
    '/no/such/directory', './no_such', '~/no_such_model', 'no_such_model'
  )
  def test_no_such_directory(self, model):
    self.assert_refused(lambda: hub.locate(model), repr(model))

  @parameterized.parameters(
    'nobody-ffp/no-such-model', 'a/b/c', 'org/--x--', 'org/'
  )
  def test_hub_id_offline(self, model):
    offline = mock.patch.object(
      huggingface_hub.constants, 'HF_HUB_OFFLINE', True
    )
    with offline:
      self.assert_refused(lambda: hub.locate(model), repr(model))


if __name__ == '__main__':
  absltest.main()
