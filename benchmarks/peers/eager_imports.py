"""``--help`` of a program that imports at its head what it may need later, as training scripts do.

python -m benchmarks.peers.eager_imports --help
"""

import argparse

import deepspeed  # noqa: F401
import optuna  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
import wandb  # noqa: F401
from transformers import GemmaForCausalLM, HfArgumentParser, Trainer, TrainingArguments  # noqa: F401

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
