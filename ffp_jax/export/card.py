"""README.md of an exported model: what it is, what it keeps, how good."""

import dataclasses
import json

from ffp_jax.checkpoints.model import Model
from ffp_jax.models import families

_LOADING = {
  'hf': """\
Load it with transformers 5.14.1 or newer:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(DIR)
```

The code is `modeling_pruned.py` in this directory. transformers warns that
common widths are read: it is harmless, the layers are narrowed thereafter.

vLLM (untested): `vllm serve DIR --model-impl transformers
--trust-remote-code` should load it where every layer keeps all of its
attention. Its transformers backend gives every layer the same number of
heads, so where those differ, use the model with transformers or llama.cpp.
""",
  'hf_dense': """\
Load it as the model that it was made from; it needs no code of its own. The
removed units are there as zeros, so it is **not smaller and not faster**: this
form is to compare, or for runtimes that can't load layers of different
widths.
""",
}
_ROWS = (
  ('dense', 'dense'),
  ('uniform', 'uniform'),
  ('uniform_calibrated', 'uniform + calibration'),
  ('searched', 'searched'),
  ('calibrated', 'searched + calibration'),
)


def text(model: Model, format: str) -> str:
  """The card, in Markdown.

  Args:
    model: pruned.
    format: 'hf' or 'hf_dense'.
  """
  kept, total = families.param_count(model.config), _dense_count(model)
  return '\n'.join(
    [
      '---',
      'library_name: transformers',
      'pipeline_tag: text-generation',
      'tags: [ffp_jax, pruned]',
      '---',
      f'# Pruned {model.family} model',
      '',
      'Made by ffp_jax (FastForward Pruning, arXiv 2511.18977) from a dense '
      f'model of {total:,} parameters, of which {kept:,} are left '
      f'({kept / total - 1:+.1%}).',
      '',
      _LOADING[format],
      *_measured(model),
      '## What each layer keeps',
      '',
      '| layer | attention groups | FFN channels |',
      '|--:|--:|--:|',
      *(_row(model.config, i) for i in range(model.config.layers)),
      '',
    ]
  )


def _dense_count(model: Model) -> int:
  return families.param_count(
    dataclasses.replace(model.config, kept_groups=None, kept_ffn=None)
  )


def _row(config, layer) -> str:
  groups, channels = config.widths(layer)
  return (
    f'| {layer} | {groups} of {config.groups} | {channels} of {config.ffn} |'
  )


def _measured(model: Model) -> list[str]:
  """Perplexities of the run that made the model, if they are beside it."""
  try:
    path = model.directory.resolve().parent / 'results.json'
    results = json.loads(path.read_text())
    if results['params_pruned'] != families.param_count(model.config):
      return []  # of another model
    protocol = results['protocol']
    rows = [
      f'| {label} | {results[key]["ppl"]:.2f} |'
      for key, label in _ROWS
      if key in results
    ]
    return [
      '## Perplexity',
      '',
      f'Of {protocol["text"]}, {protocol["split"]}: {protocol["windows"]} '
      f'windows of {protocol["context"]} tokens, {protocol["tokens"]:,} tokens '
      'scored. This model is the last of these:',
      '',
      '| model | perplexity |',
      '|---|--:|',
      *rows,
      '',
    ]
  except (OSError, ValueError, KeyError, TypeError):
    return []  # none, or of another program
