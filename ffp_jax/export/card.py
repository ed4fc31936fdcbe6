"""The model card (README.md) of an exported model."""

import dataclasses
import json

from ffp_jax.checkpoints.model import Model
from ffp_jax.models import families
from ffp_jax.models.decoder import ModelConfig
from ffp_jax.reporting import labels

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

vLLM from 0.32 on: `vllm serve DIR --trust-remote-code`.
""",
  'hf_dense': """\
Load it as the model that it was made from; it needs no code of its own. The
removed units are there as zeros, so it is **not smaller and not faster**: this
form is to compare, or for runtimes that can't load layers of different
widths.
""",
}


def text(model: Model, format: str) -> str:
  """Returns the model card in Markdown.

  Args:
    model: a pruned model.
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
      *_perplexities(model),
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


def _row(config: ModelConfig, layer: int) -> str:
  groups, channels = config.widths(layer)
  return (
    f'| {layer} | {groups} of {config.groups} | {channels} of {config.ffn} |'
  )


def _training(results) -> list[str]:
  """Returns a sentence on the training after calibration, if there was any."""
  if 'recovered' not in results:
    return []
  made = results['recovery']
  share = made.get('cross_entropy', 0.0)
  return [
    f'After calibration it was trained on {made["tokens"]:,} tokens of '
    f'{made["text"]} to predict what the dense model predicts'
    + (f' ({share:.0%} of the loss: what the text says).' if share else '.')
  ]


def _perplexities(model: Model) -> list[str]:
  """Returns a section on the perplexities that the run measured.

  They are in results.json beside the model; without that file, or with one of
  another model or program, there is no section.
  """
  try:
    path = model.directory.resolve().parent / 'results.json'
    results = json.loads(path.read_text())
    if results['params_pruned'] != families.param_count(model.config):
      return []  # those of another model
    if model.directory.name != 'recovered':
      results.pop('recovered', None)
      results.get('other', {}).pop('recovered', None)
    protocol = results['protocol']
    columns = 'model', *labels.perplexity_columns(results)
    rows = [columns, *labels.perplexity_rows(results)]
    head, *lines = (f'| {" | ".join(cells)} |' for cells in rows)
    return [
      '## Perplexity',
      '',
      f'Of {protocol["text"]}, {protocol["split"]}: {protocol["windows"]} '
      f'windows of {protocol["context"]} tokens, {protocol["tokens"]:,} tokens '
      'scored. This model is the last of these:',
      '',
      head,
      '|---' + '|--:' * (len(columns) - 1) + '|',
      *lines,
      '',
      *labels.other_protocol(results),
      *_training(results),
      '',
    ]
  except (OSError, ValueError, KeyError, TypeError):
    return []  # no file, or not one of ours
