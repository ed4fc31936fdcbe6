"""Tokens after tokens: a forward with a cache, and the choice of the next."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ffp_jax.errors import RequestError
from ffp_jax.models.decoder import Cache, Decoder, ModelConfig, Past


def unroll_layers(config: ModelConfig) -> ModelConfig:
  """The same decoder, its layers one by one even if they are alike.

  One token takes little work, and a scan over layers would spend more on
  copying each layer's weights and past out of the stack and back.
  """
  widths = [config.widths(i) for i in range(config.layers)]
  groups, channels = zip(*widths, strict=True)
  return dataclasses.replace(config, kept_groups=groups, kept_ffn=channels)


def empty_cache(config: ModelConfig, rows: int, slots: int, dtype) -> Cache:
  """A cache that holds nothing yet.

  Args:
    config: of the decoder, dense or sliced.
    rows: B.
    slots: S, the most tokens that a row can come to; those beyond are lost.
    dtype: of the parameters.
  """

  def past(groups, *lead):
    shape = (*lead, rows, slots, groups, config.head_size)
    return Past(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  if config.sliced:
    layers = tuple(past(groups) for groups in config.kept_groups)
  else:
    layers = past(config.groups, config.layers)
  return Cache(layers, jnp.zeros(rows, jnp.int32))


@functools.partial(jax.jit, static_argnames='config', donate_argnames='cache')
def forward(params, tokens_BxT, cache: Cache, masks=None, *, config):
  """Logits of tokens that follow those in the cache.

  Positions that stretch with the context ('dynamic') do so for new tokens
  only, as in transformers: keys stay in the cache as they were rotated.

  Args:
    params: of the decoder.
    tokens_BxT: token ids.
    cache: given up; use the one returned.
    masks: `Masks` or None; of a dense decoder.
    config: its `ModelConfig`.

  Returns:
    (float32 [B,T,V], `Cache`).
  """

  def run(decoder):
    x, longer = decoder.extend(tokens_BxT, cache, masks)
    return decoder.unembed(x), longer

  return Decoder(config).apply({'params': params}, method=run)


@functools.partial(
  jax.jit,
  static_argnames=('config', 'temperature'),
  donate_argnames='cache',
)
def next_tokens(
  params, tokens_BxT, real_B, cache: Cache, key, *, config, temperature
):
  """The token after each row.

  Args:
    params: of the decoder.
    tokens_BxT: token ids that follow those in the cache, padded behind.
    real_B: how many tokens of a row are no padding, 1 or more.
    cache: given up; use the one returned.
    key: of all choices; each position has its own of it.
    config: `ModelConfig`.
    temperature: of the choice; 0 for the likeliest token.

  Returns:
    (int32 [B,1], the `Cache` with the real tokens).
  """

  def run(decoder):
    x, longer = decoder.extend(tokens_BxT, cache)
    # The logits of one position, not of all.
    last = jnp.take_along_axis(x, real_B[:, None, None] - 1, axis=1)
    return decoder.unembed(last)[:, 0], longer.layers

  logits, layers = Decoder(config).apply({'params': params}, method=run)
  if temperature:
    key = jax.random.fold_in(key, jnp.max(cache.length + real_B))
    chosen = jax.random.categorical(key, logits / temperature)
  else:
    chosen = jnp.argmax(logits, axis=-1)
  # What padding has left lies behind the length, and is overwritten.
  longer = Cache(layers, cache.length + real_B)
  return chosen.astype(jnp.int32)[:, None], longer


def generate_tokens(
  params, tokens_BxT, real_B, *, config, slots, temperature=0.0, seed=0
):
  """What a model goes on with, token by token, until the slots are full.

  Args:
    params: of the decoder.
    tokens_BxT: prompts, padded behind.
    real_B: tokens of each prompt.
    config: `ModelConfig`.
    slots: most tokens of a row, with the prompt.
    temperature: 0 for the likeliest token each time.
    seed: of the choices.

  Yields:
    int32 [B,1], on the device; not waited for.
  """
  dtype = jax.tree.leaves(params)[0].dtype
  cache = empty_cache(config, len(tokens_BxT), slots, dtype)
  key, left = jax.random.key(seed), slots - int(max(real_B))
  real_B = jnp.asarray(real_B)
  for _ in range(left + 1):  # the last one needs no slot
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


def check_slots(config: ModelConfig, slots: int):
  """Refuses positions that a model has not got.

  Raises:
    RequestError: there are more slots than learned positions.
  """
  if config.positions == 'learned' and slots > config.max_positions:
    raise RequestError(
      f'{slots} tokens, prompt and new ones, are more than the '
      f'{config.max_positions} positions of this model'
    )
