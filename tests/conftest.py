"""Before jax starts: eight virtual CPU devices; transformers kept quiet.

And one place for what `tiny_run.compile_quickly` compiles, which pytest's
workers share.
"""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
if 'TESTS_COMPILED' not in os.environ:  # workers inherit it
  os.environ['TESTS_COMPILED'] = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, os.environ['TESTS_COMPILED'], True)
