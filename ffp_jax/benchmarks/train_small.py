"""Trains a small OPT or Mistral, for families without weights at hand.

    python -m ffp_jax.benchmarks.train_small --family=mistral --data=TEXT \
      --tokens=1000000 --out=DIR

Makes a tokenizer of 4,096 tokens from the text and trains about five million
parameters on it from scratch, with the trainer of recovery and cross-entropy
alone. DIR is then a model as any other, for ffp_jax.main, ffp_jax.compare and
ffp_jax.benchmarks.recovered_allocations. It has learnt little, but what it has
learnt can be lost.
"""

import functools
import json
import pathlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from absl import app, flags, logging

from ffp_jax import stages
from ffp_jax.checkpoints import model_config, weights
from ffp_jax.errors import RequestError, refuse
from ffp_jax.evaluation.loss import make_nll
from ffp_jax.evaluation.scoring import Scorer
from ffp_jax.models.decoder import Decoder, ModelConfig
from ffp_jax.pruning import recovery
from ffp_jax.runtime import cli, storage
from ffp_jax.text import corpora, recovery_text, tokenization
from ffp_jax.text.windows import windows

_VOCAB = 4096
_CONTEXT = 256  # tokens per window
_ROWS = 8  # windows per step
_VALIDATION = 16  # windows that no step sees
_RATE = 2e-3
# At the other rate it learns no more than how often each token is.
_POST_NORM_RATE = 5e-4
_SIZES = {
  'vocab_size': _VOCAB,
  'hidden_size': 256,
  'num_hidden_layers': 4,
  'num_attention_heads': 8,
  'max_position_embeddings': _CONTEXT,
}
_OPT = _SIZES | {'model_type': 'opt', 'ffn_dim': 1024}
FAMILIES = {
  'mistral': _SIZES
  | {
    'model_type': 'mistral',
    'num_key_value_heads': 4,
    'intermediate_size': 1024,
    'sliding_window': 128,
    'tie_word_embeddings': True,
  },
  'opt': _OPT,
  'opt_post_norm': _OPT | {'do_layer_norm_before': False},
}


def train_tokenizer(
  texts: Iterable[str], vocab: int, directory: pathlib.Path
) -> None:
  """Writes a byte-level BPE tokenizer of some texts.

  Args:
    texts: to train on.
    vocab: number of its tokens.
    directory: to write to.
  """
  level = tokenizers.pre_tokenizers.ByteLevel
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = level(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab, initial_alphabet=level.alphabet(), show_progress=False
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.save(str(directory / 'tokenizer.json'))
  (directory / 'tokenizer_config.json').write_text(
    json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast'})
  )


def train(
  model: ModelConfig, windows_WxT: np.ndarray, *, tokens: int, seed: int
) -> tuple[dict, float]:
  """Trains a model from scratch.

  Args:
    model: its sizes.
    windows_WxT: tokens; the last windows validate.
    tokens: to train on.
    seed: of weights and order.

  Returns:
    (the parameters with the lowest validation loss, that loss in nats).
  """
  total = tokens // (_ROWS * _CONTEXT)
  check = windows_WxT[-_VALIDATION:]
  source = recovery_text.Source('text', 1.0, windows_WxT[:-_VALIDATION])
  text = recovery_text.arrange(
    [source], [check], seed=seed, windows=total * _ROWS
  )
  nll, optim = make_nll(model), recovery.optimizer()
  peak = _RATE if model.pre_norm else _POST_NORM_RATE

  def loss_fn(params, tokens_BxT):
    return jnp.mean(nll(params, tokens_BxT)), {}

  step_fn = recovery.make_step(
    loss_fn,
    optim,
    recovery.schedule(peak=peak, warmup=total // 10, steps=total),
  )
  scorer = Scorer(model)
  init = jax.jit(Decoder(model).init)
  first = init(jax.random.key(seed), jnp.asarray(check[:1, :8]))['params']

  def steps_from(state):
    return recovery.steps(
      state,
      step_fn,
      lambda step: recovery_text.batch(text, step, micro_batches=1, rows=_ROWS),
      lambda params: scorer(params, check, label='validation'),
      optim,
      total=total,
      every=max(1, total // 10),
    )

  follow = stages.collect([], _log_validation)
  state = follow(recovery.start(first, optim), steps_from)
  return state.best, float(state.best_loss)


def _log_validation(metrics: dict) -> None:
  if 'validation' in metrics:
    logging.info('%s', metrics)


def make_model(
  family: str, data: str, out: pathlib.Path, *, tokens: int, seed: int
) -> float:
  """Trains a model and writes it as Hugging Face stores it.

  Args:
    family: one of `FAMILIES`.
    data: text, as `config.data`.
    out: directory to make.
    tokens: to train on.
    seed: of weights and order.

  Returns:
    The perplexity on windows that were not trained on.

  Raises:
    RequestError: the directory exists, or the text is too short or can't be
      read.
  """
  if out.exists():
    raise RequestError(f'--out: {out} exists; remove it or name another')
  text = corpora.read_text(data)
  with storage.staged(out) as stage:
    stage.mkdir()
    lines = text.content.splitlines(keepends=True)
    train_tokenizer(lines, _VOCAB, stage)
    (stage / 'config.json').write_text(json.dumps(FAMILIES[family], indent=2))
    model = model_config.read_model_config(stage)
    ids = tokenization.tokenize(stage, text.content).ids
    cut = windows(ids, _CONTEXT)
    if len(cut) < 2 * _VALIDATION:
      raise RequestError(
        f'--data: {text.name} has {len(ids)} tokens; give a longer text'
      )
    logging.info('%s tokens of text', f'{len(ids):,}')
    params, loss = train(model, cut, tokens=tokens, seed=seed)
    weights.save_params(params, stage, model, family.split('_')[0])
  return float(np.exp(loss))


def main(argv: list[str]) -> None:
  """Trains what the flags name and prints its perplexity."""
  del argv
  args = flags.FLAGS
  logging.set_verbosity(logging.INFO)
  try:
    ppl = make_model(
      *(args.family, args.data, pathlib.Path(args.out)),
      tokens=args.tokens,
      seed=args.seed,
    )
  except RequestError as error:
    refuse(error)
  print(f'{args.out}: perplexity {ppl:.2f} on {_VALIDATION} windows')


if __name__ == '__main__':
  flags.DEFINE_enum('family', None, list(FAMILIES), 'What to train.')
  flags.DEFINE_string('data', 'general', 'Text to train on.')
  flags.DEFINE_string('out', None, 'Directory to make.')
  flags.DEFINE_integer(
    'tokens', 1_000_000, 'To train on.', lower_bound=10 * _ROWS * _CONTEXT
  )
  flags.DEFINE_integer('seed', 0, 'Of weights and order.')
  app.run(
    main,
    flags_parser=functools.partial(
      cli.parse_flags,
      family=f'one of {", ".join(FAMILIES)}',
      out='the directory to make',
    ),
  )
