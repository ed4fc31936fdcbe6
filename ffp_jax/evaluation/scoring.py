"""A decoder as functions: logits, what enters its projections, losses."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ffp_jax.evaluation import protocols
from ffp_jax.evaluation.loss import token_nll
from ffp_jax.models.decoder import Decoder, ModelConfig


def apply_of(config, *, remat=False):
  """(params, tokens, masks) -> logits of the decoder with this config."""
  decoder = Decoder(config, remat=remat)
  return lambda params, tokens, masks: decoder.apply(
    {'params': params}, tokens, masks
  )


def captured_of(config, statistic):
  """(params, tokens) -> `statistic` of each output projection's inputs.

  Returns:
    Function to (attention [L,...], ffn [L,...]) of a dense decoder.
  """
  decoder = Decoder(config, capture=statistic)

  def captured(params, tokens):
    _, seen = decoder.apply({'params': params}, tokens, mutable='captured')
    stack = seen['captured']['stack']
    return stack['attention']['inputs'], stack['ffn']['inputs']

  return captured


class Scorer:
  """A decoder's losses over windows, compiled once a window shape."""

  def __init__(self, config: ModelConfig):
    apply = apply_of(config)

    def mean_nll(params, tokens_BxT, span_2, masks):
      losses = token_nll(apply, params, tokens_BxT, masks)
      at = jnp.arange(1, tokens_BxT.shape[1])
      inside = (at >= span_2[0]) & (at < span_2[1])
      return jnp.mean(losses, where=inside)

    self._nll = jax.jit(mean_nll)

  def __call__(
    self, params, windows_WxT, masks=None, *, spans_Wx2=None, label=None
  ) -> float:
    """Mean negative log-likelihood of all tokens scored; see `each`."""
    if spans_Wx2 is None:
      spans_Wx2 = protocols.whole(windows_WxT)
    losses = self.each(
      params, windows_WxT, masks, spans_Wx2=spans_Wx2, label=label
    )
    return float(np.average(losses, weights=spans_Wx2 @ (-1, 1)))

  def each(
    self, params, windows_WxT, masks=None, *, spans_Wx2=None, label=None
  ) -> np.ndarray:
    """Mean negative log-likelihood of each window's tokens, one at a time.

    Args:
      params: of the decoder.
      windows_WxT: token ids.
      masks: `Masks` or None.
      spans_Wx2: first position scored in each window, 1 or more, and the one
        past the last; None for T - 1 of each window.
      label: of the progress bar, None for no bar.

    Returns:
      float64 [W].
    """
    if spans_Wx2 is None:
      spans_Wx2 = protocols.whole(windows_WxT)
    quiet = label is None or not sys.stderr.isatty()
    bar = tqdm(windows_WxT, desc=label, disable=quiet, leave=False)
    losses = [
      self._nll(params, window[None], span, masks).item()
      for window, span in zip(bar, spans_Wx2, strict=True)
    ]
    return np.array(losses)


def dtype_of(name: str):
  """'float32', 'bfloat16', or 'auto': bfloat16 on accelerators."""
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)
