"""Held-out evaluation as a run configures it: the source, the judge, how replies are read."""

from collections.abc import Callable
from dataclasses import replace

import torch

from moss_train.data.corpus import Corpus, load_source
from moss_train.evaluate.judges import load_judge
from moss_train.evaluate.runner import EvaluationResult, evaluate_streams
from moss_train.parallel import groups
from moss_train.streams.config import CompilerConfig
from moss_train.streams.tokenizer import StreamTokenizer
from moss_train.train.config import RunConfig


class Evaluator:
    """Evaluates models of one run on `evaluate.source`, which must be set."""

    def __init__(self, run: RunConfig, tokenizer: StreamTokenizer):
        self._config = run.evaluate
        self._tokenizer = tokenizer
        self._image_size = run.model.vision.image_size
        self.judge = load_judge(run.evaluate.judge)

    def corpus(self, compiler: CompilerConfig) -> Corpus:
        """The held-out source, opened."""
        assert self._config.source is not None
        return load_source(self._config.source, self._tokenizer, compiler, self._image_size)

    def evaluate(
        self,
        model: torch.nn.Module,
        compiler: CompilerConfig,
        limit: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> EvaluationResult:
        """Free-running and teacher-forced figures of `model`, on at most `limit` streams when it is given."""
        settings = self._config.settings if limit is None else replace(self._config.settings, limit=limit)
        return evaluate_streams(
            model,
            self.corpus(compiler),
            self._tokenizer,
            compiler,
            self.judge,
            settings,
            self._config.decode,
            on_progress,
        )

    def figures(self, model: torch.nn.Module, compiler: CompilerConfig) -> dict[str, float]:
        """Free-running figures during training. The main process evaluates, the others wait in their next step."""
        if not groups.state().is_main:
            return {}
        return self.evaluate(model, compiler, self._config.during_training).figures
