"""Autoregressive decoding: a cached forward pass, and sampling of tokens."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ffp_jax.errors import RequestError
from ffp_jax.models.attention import Past
from ffp_jax.models.config import ModelConfig
from ffp_jax.models.decoder import Cache, Decoder, Masks


def unroll_layers(config: ModelConfig) -> ModelConfig:
  """Returns the config of the same decoder, with layers that are not scanned.

  One token takes little work, and a scan over layers would spend more on
  copying each layer's weights and past out of the stack and back.
  """
  widths = [config.widths(i) for i in range(config.layers)]
  groups, channels = zip(*widths, strict=True)
  return dataclasses.replace(config, kept_groups=groups, kept_ffn=channels)


def empty_cache(
  config: ModelConfig, rows: int, slots: int, dtype: jnp.dtype
) -> Cache:
  """Returns an empty cache.

  Args:
    config: of the decoder, dense or sliced.
    rows: B.
    slots: S, the maximal number of tokens of a row; later ones are dropped.
    dtype: of the parameters.
  """

  def past(groups, *leading):
    shape = (*leading, rows, slots, groups, config.head_size)
    return Past(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  if config.kept_groups is None:
    layers = past(config.groups, config.layers)
  else:
    layers = tuple(past(groups) for groups in config.kept_groups)
  return Cache(layers, jnp.zeros(rows, jnp.int32))


@functools.partial(jax.jit, static_argnames='config', donate_argnames='cache')
def forward(
  params: dict,
  tokens_BxT: jax.Array,
  cache: Cache,
  masks: Masks | None = None,
  *,
  config: ModelConfig,
) -> tuple[jax.Array, Cache]:
  """Computes the logits of tokens that follow those in the cache.

  With 'dynamic' scaling, whose angles depend on the length of the context,
  only the new keys are rotated for the new length, as in transformers; those
  in the cache stay as they are.

  Args:
    params: of the decoder.
    tokens_BxT: token ids.
    cache: donated; use the one returned.
    masks: of a dense decoder; None keeps all units.
    config: of the decoder.

  Returns:
    (float32 logits [B,T,V], the extended cache).
  """

  def run(decoder):
    x, extended = decoder.extend(tokens_BxT, cache, masks)
    return decoder.unembed(x), extended

  logits_and_cache: Any = Decoder(config).apply({'params': params}, method=run)
  return logits_and_cache


@functools.partial(
  jax.jit,
  static_argnames=('config', 'temperature'),
  donate_argnames='cache',
)
def next_tokens(
  params: dict,
  tokens_BxT: jax.Array | np.ndarray,
  real_B: jax.Array,
  cache: Cache,
  key: jax.Array,
  *,
  config: ModelConfig,
  temperature: float,
) -> tuple[jax.Array, Cache]:
  """Samples the next token of each row.

  Args:
    params: of the decoder.
    tokens_BxT: token ids that follow those in the cache, padded at the end.
    real_B: tokens of each row without the padding, 1 or more.
    cache: donated; use the one returned.
    key: PRNG key; the position is folded in, so that one key serves all.
    config: of the decoder.
    temperature: of sampling; 0 for the most likely token.

  Returns:
    (int32 [B,1], the cache extended by the real tokens).
  """

  def run(decoder):
    x, extended = decoder.extend(tokens_BxT, cache)
    # Only the last real position needs logits.
    last = jnp.take_along_axis(x, real_B[:, None, None] - 1, axis=1)
    return decoder.unembed(last)[:, 0], extended.layers

  result: Any = Decoder(config).apply({'params': params}, method=run)
  logits, layers = result
  if temperature:
    key = jax.random.fold_in(key, jnp.max(cache.length + real_B))
    sampled = jax.random.categorical(key, logits / temperature)
  else:
    sampled = jnp.argmax(logits, axis=-1)
  # Slots that hold padding lie beyond the length, and are overwritten.
  extended = Cache(layers, cache.length + real_B)
  return sampled.astype(jnp.int32)[:, None], extended


def generate_tokens(
  params: dict,
  tokens_BxT: jax.Array | np.ndarray,
  real_B: jax.Array | np.ndarray,
  *,
  config: ModelConfig,
  slots: int,
  temperature: float = 0.0,
  seed: int = 0,
) -> Iterator[jax.Array]:
  """Continues prompts token by token, until the longest fills its slots.

  Args:
    params: of the decoder.
    tokens_BxT: prompts, padded at the end.
    real_B: tokens of each prompt.
    config: of the decoder.
    slots: maximal tokens of a row, the prompt included.
    temperature: of sampling; 0 for the most likely token each time.
    seed: of sampling.

  Yields:
    The next token of each row, int32 [B,1], on the device; dispatched, not
    waited for.
  """
  dtype = jax.tree.leaves(params)[0].dtype
  cache = empty_cache(config, len(tokens_BxT), slots, dtype)
  key, free = jax.random.key(seed), slots - int(max(real_B))
  real_B = jnp.asarray(real_B)
  for _ in range(free + 1):  # the last token needs no slot
    tokens_BxT, cache = next_tokens(
      params,
      tokens_BxT,
      real_B,
      cache,
      key,
      config=config,
      temperature=temperature,
    )
    yield tokens_BxT
    real_B = jnp.ones_like(real_B)


def check_slots(config: ModelConfig, slots: int) -> None:
  """Checks that a model has a position for every slot.

  Raises:
    RequestError: there are more slots than learned positions.
  """
  if config.positions == 'learned' and slots > config.max_positions:
    raise RequestError(
      f'{slots} tokens, prompt and new ones, are more than the '
      f'{config.max_positions} positions of this model'
    )
