"""Pre-tokenizers of byte-level BPE, by llama.cpp's names for them.

`tokenizer.ggml.pre` of a GGUF file is one of those names. Their definitions
are in llama.cpp's src/llama-vocab.cpp.
"""

import json
from collections.abc import Sequence

from tokenizers import Regex, pre_tokenizers

_GPT2 = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_DIGIT = pre_tokenizers.Digits(individual_digits=True)


def _split(pattern: str):
  return pre_tokenizers.Split(Regex(pattern), 'isolated')


def _by(pattern: str):
  """Returns a split by a pattern, and the mapping of bytes to characters."""
  return _split(pattern), _BYTES


_LLAMA3 = _by(
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def _tekken(upper: str, lower: str):
  start, rest = r'[^\r\n\p{L}\p{N}]?', r'| ?[^\s\p{L}\p{N}]+[\r\n/]*'
  return _by(
    f'{start}{upper}*{lower}+|{start}{upper}+{lower}*'
    rf'|\p{{N}}{rest}|\s*[\r\n]+|\s+(?!\S)|\s+'
  )


# For llama.cpp only a-z and A-Z have a case, and marks are not letters.
_TEKKEN = _tekken(r'((?=[\p{L}])([^a-z]))', r'((?=[\p{L}])([^A-Z]))')
_QWEN2 = _by(
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN35 = _by(
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
  r'| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_DIGITS = (_DIGIT, *_GPT2)
_NEWLINE = _split('[\r\n]')
_CJK = _split('[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+')
# Letters that have upper and lower case. They are escaped, because editors
# that normalise text would turn the Kelvin sign into a K.
_CASED = (
  'A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf'
  '\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f'
  '\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481'
  '\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd'
  '\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a'
  '\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59'
  '\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4'
  '\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4'
  '\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126'
  '\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e'
  '\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3'
  '\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e'
  '\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a'
  '\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb'
  '\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df'
  '\U0001e900-\U0001e943'
)


def _deepseek_llm(punctuation: str, numbers):
  return (
    _NEWLINE,
    _split(rf'\s?[{_CASED}]+'),
    _split(rf'\s?[{punctuation}]+'),
    _split(r'\s+$'),
    _CJK,
    numbers,
    _BYTES,
  )


_MARKS = '!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f'
# For llama.cpp U+3000, the wide space, is a space and not punctuation.
_DEEPSEEK_LLM = _deepseek_llm(f'{_MARKS}\u3001-\u3002', _split(r'\p{N}+'))
_DEEPSEEK_CODER = (
  _NEWLINE,
  _split(r'\s?\p{L}+'),
  _split(r'\s?\p{P}+'),
  _CJK,
  _DIGIT,
  _BYTES,
)
# Of several names for one pre-tokenizer, the first is the usual one.
NAMES = {
  'gpt-2': _GPT2,
  'mpt': _GPT2,
  'olmo': _GPT2,
  'phi-2': _GPT2,
  'smollm': _DIGITS,
  'starcoder': _DIGITS,
  'refact': _DIGITS,
  'command-r': _DIGITS,
  'llama-bpe': _LLAMA3,
  'llama3': _LLAMA3,
  'llama-v3': _LLAMA3,
  'falcon3': _LLAMA3,
  'pixtral': _LLAMA3,
  'smaug-bpe': _LLAMA3,
  'tekken': _TEKKEN,
  'qwen2': _QWEN2,
  'deepseek-r1-qwen': _QWEN2,
  'megrez': _QWEN2,
  'stablelm2': _QWEN2,
  'qwen35': _QWEN35,
  'deepseek-llm': _DEEPSEEK_LLM,
  'deepseek-coder': _DEEPSEEK_CODER,
}
# With these, a word that is itself a token is taken without merges, and a text
# starts with BOS unless the file says otherwise.
WHOLE = ('llama3', 'llama-v3', 'llama-bpe', 'falcon3', 'pixtral', 'tekken')
# The pre-tokenizers of the original tokenizer.json, where llama.cpp's differ,
# which matters in rare text only. (DeepSeek LLM's numbers get the same ids, as
# no merge of its vocabulary joins digits.)
_ALSO = {
  'tekken': _tekken(
    r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
  ),
  'deepseek-llm': _deepseek_llm(f'{_MARKS}\u3000-\u3002', _DIGIT),
}


def sequence(
  parts: Sequence[pre_tokenizers.PreTokenizer],
) -> pre_tokenizers.PreTokenizer:
  """Returns the pre-tokenizer that applies the parts one after another."""
  return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(list(parts))


def name_of(pre_tokenizer: dict, whole: bool) -> str | None:
  """Returns the `tokenizer.ggml.pre` of a tokenizer.json.

  Args:
    pre_tokenizer: the section of that name.
    whole: whether a word that is itself a token is taken without merges.

  Returns:
    The name, None if there is none.
  """
  for name, parts in (*NAMES.items(), *_ALSO.items()):
    section = json.loads(sequence(parts).__getstate__())
    if (name in WHOLE) == whole and _same(section, pre_tokenizer):
      return name
  return None


def _same(one, other) -> bool:
  """Returns whether two sections are equal but for `trim_offsets`."""
  if isinstance(one, dict) and isinstance(other, dict):
    keys = (one.keys() | other.keys()) - {'trim_offsets'}
    return all(_same(one.get(k), other.get(k)) for k in keys)
  if isinstance(one, list) and isinstance(other, list):
    return len(one) == len(other) and all(map(_same, one, other))
  return one == other
