"""A decoder as functions: logits, what enters its projections, losses."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ffp_jax.evaluation import protocols
from ffp_jax.evaluation.loss import token_nll
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.models.functional import make_apply


class Scorer:
  """A decoder's losses over windows, compiled once a window shape."""

  def __init__(self, config: ModelConfig):
    apply = make_apply(config)

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
      spans_Wx2 = protocols.full_spans(windows_WxT)
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
      spans_Wx2 = protocols.full_spans(windows_WxT)
    quiet = label is None or not sys.stderr.isatty()
    bar = tqdm(windows_WxT, desc=label, disable=quiet, leave=False)
    losses = [
      self._nll(params, window[None], span, masks).item()
      for window, span in zip(bar, spans_Wx2, strict=True)
    ]
    return np.array(losses)
