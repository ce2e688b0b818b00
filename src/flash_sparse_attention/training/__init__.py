"""Training of language models on text: data, checkpoints, the training loop, sampling."""

from .checkpoint import CheckpointState, find_checkpoint, load_model
from .config import TrainConfig, resolve_device
from .data import END_OF_TEXT, VOCAB_SIZE, read_corpus
from .evaluation import Evaluation, evaluate
from .trainer import Progress, Trainer, TrainResult, train

__all__ = [
    "END_OF_TEXT",
    "VOCAB_SIZE",
    "CheckpointState",
    "Evaluation",
    "Progress",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "evaluate",
    "find_checkpoint",
    "load_model",
    "read_corpus",
    "resolve_device",
    "train",
]
