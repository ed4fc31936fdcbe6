"""Before jax starts: eight virtual CPU devices; transformers kept quiet."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
