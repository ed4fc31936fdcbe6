"""Mean losses of a decoder over windows of text."""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ffp_jax.evaluation import protocols
from ffp_jax.evaluation.loss import token_nll
from ffp_jax.models.decoder import Masks, ModelConfig
from ffp_jax.models.functional import make_apply
from ffp_jax.runtime.compiling import BRIEFLY


def make_mean_nll(config: ModelConfig) -> Callable:
  """Returns the jitted mean loss of the tokens that are scored.

  Args:
    config: of the decoder.

  Returns:
    (params, tokens [B,T], first position scored and the one after the last [2],
    `Masks` or None) -> nats, a scalar.
  """
  apply = make_apply(config)

  def mean_nll(params, tokens_BxT, span_2, masks):
    losses = token_nll(apply, params, tokens_BxT, masks)
    position = jnp.arange(1, tokens_BxT.shape[1])
    inside = (position >= span_2[0]) & (position < span_2[1])
    return jnp.mean(losses, where=inside)

  return jax.jit(mean_nll, compiler_options=BRIEFLY)


class Scorer:
  """Computes a decoder's losses over windows; compiled per window shape."""

  def __init__(self, config: ModelConfig):
    """Takes the decoder's config, and no parameters."""
    self._nll = make_mean_nll(config)

  def __call__(
    self,
    params: dict,
    windows_WxT: np.ndarray,
    masks: Masks | None = None,
    *,
    spans_Wx2: np.ndarray | None = None,
    label: str | None = None,
  ) -> float:
    """Returns the mean loss of all scored tokens in nats; see `each`."""
    if spans_Wx2 is None:
      spans_Wx2 = protocols.full_spans(windows_WxT)
    losses = self.each(
      params, windows_WxT, masks, spans_Wx2=spans_Wx2, label=label
    )
    return float(np.average(losses, weights=spans_Wx2 @ (-1, 1)))

  def each(
    self,
    params: dict,
    windows_WxT: np.ndarray,
    masks: Masks | None = None,
    *,
    spans_Wx2: np.ndarray | None = None,
    label: str | None = None,
  ) -> np.ndarray:
    """Returns the mean loss of each window's scored tokens, in nats.

    The windows are scored one at a time.

    Args:
      params: of the decoder.
      windows_WxT: token ids.
      masks: the units to keep, or None for the dense model.
      spans_Wx2: first position scored in each window, 1 or more, and the one
        after the last; None for all T - 1 of them.
      label: of the progress bar; None for no bar.

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
