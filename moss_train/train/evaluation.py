"""Held-out evaluation as a run configures it: the source, the judge, how replies are read."""

from collections.abc import Callable
from dataclasses import replace

import torch

from moss_train.data.corpus import Corpus, load_source
from moss_train.engines.protocol import Engine
from moss_train.engines.weights import NAMESPACE
from moss_train.evaluate.judges import load_judge
from moss_train.evaluate.runner import EvaluationResult, evaluate_streams
from moss_train.model.build import whole_model
from moss_train.model.precision import Precision
from moss_train.model.video_model import VideoModel
from moss_train.parallel import groups
from moss_train.streams.config import CompilerConfig
from moss_train.streams.tokenizer import StreamTokenizer
from moss_train.train.config import RunConfig


class Evaluator:
    """Evaluates models of one run on `evaluate.source`, which must be set."""

    def __init__(self, run: RunConfig, tokenizer: StreamTokenizer):
        self._run = run
        self._config = run.evaluate
        self._tokenizer = tokenizer
        self.judge = load_judge(run.evaluate.judge)

    def corpus(self, compiler: CompilerConfig) -> Corpus:
        """The held-out source, opened."""
        assert self._config.source is not None
        return load_source(self._config.source, self._tokenizer, compiler, self._run.model.vision.image_size)

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

    def figures(self, engine: Engine, model: VideoModel, compiler: CompilerConfig) -> dict[str, float]:
        """Free-running figures during training of what `engine` trains; `model` is this process's part of it. Every
        process must call it: the main one evaluates and returns them, the others give it their parts and wait in their
        next step."""
        whole = self._assembled(engine) if self._is_split() else model
        if whole is None or not groups.state().is_main:
            return {}
        return self.evaluate(whole, compiler, self._config.during_training).figures

    def _is_split(self) -> bool:
        """Whether a forward pass of the model in training needs other processes, so that one alone cannot run it."""
        layout = self._run.layout
        return layout.tp * layout.pp * layout.cp > 1 or layout.zero == 3 or self._run.engine.overlap_param_gather

    def _assembled(self, engine: Engine) -> VideoModel | None:
        """A copy of the whole model on the main process."""
        state = groups.state()
        if not state.is_main:
            for _ in engine.each_weight():
                pass
            return None
        model = whole_model(self._run.model, state, Precision.named(self._run.precision).dtype)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in engine.each_weight():
                parameters[name.removeprefix(f"{NAMESPACE}/")].copy_(weight)
        return model.to(state.device)
