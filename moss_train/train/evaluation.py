"""Held-out evaluation as a run configures it: the sources, the judge, how replies are read, who evaluates what.

During training the samples are shared out among the data ranks (dp × cp). Where the model is split (tp, pp), the
processes that hold its parts run their share in lockstep on these parts, and the first of them reports. The transcripts
are gathered on the main process, which makes the figures of all and tells them to every process. So they are the same
for any number of processes, up to the rounding of batches put together otherwise.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist

from moss_train.data.corpus import Corpus, load_source
from moss_train.engines.protocol import Engine
from moss_train.engines.weights import NAMESPACE
from moss_train.errors import ConfigError, DataError
from moss_train.evaluate.config import EvaluationConfig
from moss_train.evaluate.judges import load_judge
from moss_train.evaluate.metrics import TEACHER_FORCED
from moss_train.evaluate.offline import (
    OfflineAnswer,
    OfflineRun,
    PreparedConversation,
    answers_of,
    offline_figures,
    prepare_conversations,
    run_conversations,
)
from moss_train.evaluate.prepared import FrameCache, PreparedCorpus, PreparedStream, Share, prepare_streams
from moss_train.evaluate.runner import EvaluationResult, StreamsRun, result_of, run_streams
from moss_train.model.build import whole_model
from moss_train.model.precision import Precision
from moss_train.model.video_model import VideoModel
from moss_train.parallel import groups
from moss_train.parallel.agreement import gather_to_main, told_by_main
from moss_train.streams.config import CompilerConfig
from moss_train.streams.tokenizer import StreamTokenizer
from moss_train.train.config import RunConfig

Progress = Callable[[int, int], None]  #: told of (done, total) after each batch


@dataclass(frozen=True)
class EvaluatedModel:
    """What this process evaluates in training."""

    model: torch.nn.Module | None  #: None: another process of its model-parallel group evaluates
    share: Share
    group: dist.ProcessGroup | None = None  #: with whom it runs the share in lockstep; None: `model` is whole

    @property
    def reports(self) -> bool:
        """Whether what this process finds is counted: once for each group."""
        return self.model is not None and (self.group is None or self.group.rank() == 0)


class Evaluator:
    """Evaluates models of one run on `evaluate.source`, which must be set, and `evaluate.offline_source`.

    What it has prepared of them, frames included as far as `evaluate.settings.cache_mb` allows, it keeps for the next
    evaluation.
    """

    def __init__(self, run: RunConfig, tokenizer: StreamTokenizer):
        if run.evaluate.source is None:
            raise ConfigError("the run names no held-out source; set evaluate.source=<packed folder>")
        self._run = run
        self._config = run.evaluate
        self._tokenizer = tokenizer
        self._streams: dict[tuple[str, int | None], PreparedCorpus[PreparedStream]] = {}
        self._conversations: dict[tuple[str, int | None], PreparedCorpus[PreparedConversation]] = {}
        self.judge = load_judge(run.evaluate.judge)

    def open(self) -> None:
        """Open the sources. DataError when one is missing or damaged, which is better known before training."""
        _ = self._stream_frames
        if self._config.offline_source is not None:
            _ = self._conversation_frames

    def frames_of(self, compiler: CompilerConfig, key: str) -> torch.Tensor:
        """uint8 [F, C, H, W]: the frames of the held-out stream with this key, as the model sees them."""
        return self._prepared_streams(compiler, None).frames_of(key)

    def evaluate(
        self,
        model: torch.nn.Module,
        compiler: CompilerConfig,
        limit: int | None = None,
        on_progress: Progress | None = None,
    ) -> EvaluationResult:
        """Free-running and teacher-forced figures of `model`, which is whole on this process, on at most `limit`
        streams when it is given."""
        settings, prepared = self._settings(limit), self._prepared_streams(compiler, limit)
        run = run_streams(model, prepared, self._tokenizer, settings, self._config.decode, on_progress=on_progress)
        return result_of(prepared, [run], self.judge, settings)

    def answer_offline(
        self,
        model: torch.nn.Module,
        compiler: CompilerConfig,
        limit: int | None = None,
        on_progress: Progress | None = None,
    ) -> list[OfflineAnswer]:
        """What `model`, whole on this process, answers in at most `limit` held-out conversations; [] where the run
        names none. `compiler` is the evaluated stage's."""
        if self._config.offline_source is None:
            return []
        prepared = self._prepared_conversations(compiler, limit)
        run = run_conversations(model, prepared, self._tokenizer, self._settings(limit), on_progress=on_progress)
        return answers_of(prepared, [run])[0]

    def figures(self, engine: Engine, compiler: CompilerConfig) -> dict[str, float]:
        """Figures during training of what `engine` trains: free-running ones by their names, teacher-forced ones under
        `teacher_forced/`, `offline_accuracy`. Every process must call it and gets the same figures.

        A source that cannot be evaluated raises the same error on every process.
        """
        limit = self._config.during_training
        evaluated = self.evaluated_model(engine)
        streams = self._prepared_streams(compiler, limit)
        talks = None if self._config.offline_source is None else self._prepared_conversations(compiler, limit)
        settings, own, own_talks = self._settings(limit), StreamsRun(), OfflineRun()
        if evaluated.model is not None:
            how = {"share": evaluated.share, "group": evaluated.group}
            own = run_streams(evaluated.model, streams, self._tokenizer, settings, self._config.decode, **how)
            if talks is not None:
                own_talks = run_conversations(evaluated.model, talks, self._tokenizer, settings, **how)
        if not evaluated.reports:
            own, own_talks = StreamsRun(), OfflineRun()
        gathered = gather_to_main([own.to_json(), own_talks.to_json()])
        told = None
        if gathered is not None:
            try:
                told = {"figures": self._figures_of(gathered, streams, talks, settings)}
            except DataError as error:
                told = {"error": str(error)}
        told = told_by_main(told)
        if "error" in told:
            raise DataError(told["error"])
        return told["figures"]

    def _figures_of(
        self,
        gathered: list,
        streams: PreparedCorpus[PreparedStream],
        talks: PreparedCorpus[PreparedConversation] | None,
        settings: EvaluationConfig,
    ) -> dict[str, float]:
        """The figures of what all processes found."""
        runs = [StreamsRun.from_json(streams_run) for streams_run, _ in gathered]
        result = result_of(streams, runs, self.judge, settings)
        figures = result.figures | {f"{TEACHER_FORCED}/{name}": value for name, value in result.teacher_forced.items()}
        if talks is not None:
            answers, _ = answers_of(talks, [OfflineRun.from_json(talks_run) for _, talks_run in gathered])
            figures |= offline_figures(answers, self.judge)
        return figures

    def evaluated_model(self, engine: Engine) -> EvaluatedModel:
        """What this process evaluates of what `engine` trains. Every process must call it.

        That is the engine's own part of the model, but for two cases in which the first process of each model-parallel
        group assembles a whole copy: parameters are not whole between steps (ZeRO 3), or a model is split whose tokens
        see frames that have not arrived (`reference_compat`), which no cache can give.
        """
        state, layout = groups.state(), self._run.layout
        share = Share(state.data_rank * state.frame_ranks + state.frame_rank, state.data_ranks * state.frame_ranks)
        model, is_split = engine.evaluated_part(), layout.tp * layout.pp > 1
        if model is None or (is_split and self._run.model.reference_compat):
            return EvaluatedModel(self._assembled(engine), share)
        if is_split:
            return EvaluatedModel(model, share, state.model_group)
        if layout.cp > 1:
            # Its weights are whole, and evaluation gives each process all frames of its streams.
            model = copy.copy(model)
            model.frame_group = None
        return EvaluatedModel(model, share)

    def _assembled(self, engine: Engine) -> VideoModel | None:
        """A copy of the whole model on the first process of each model-parallel group."""
        state = groups.state()
        if state.tensor_rank or state.pipeline_rank:
            for _ in engine.each_weight():
                pass
            return None
        model = whole_model(self._run.model, state, Precision.named(self._run.precision).dtype)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in engine.each_weight():  # on the main process alone
                parameters[name.removeprefix(f"{NAMESPACE}/")].copy_(weight)
            model = model.to(state.device)
            if state.data_frame_group.size() > 1:
                for parameter in model.parameters():
                    if parameter.numel():
                        dist.broadcast(parameter.data, group=state.data_frame_group, group_src=0)
        return model

    def _settings(self, limit: int | None) -> EvaluationConfig:
        return self._config.settings if limit is None else replace(self._config.settings, limit=limit)

    def _prepared_streams(self, compiler: CompilerConfig, limit: int | None) -> PreparedCorpus[PreparedStream]:
        limit = self._settings(limit).limit
        place = (repr(compiler), limit)
        if place not in self._streams:
            self._streams = {known: kept for known, kept in self._streams.items() if known[0] == place[0]}
            cache = self._stream_frames
            self._streams[place] = prepare_streams(cache.corpus, self._tokenizer, compiler, limit, cache)
        return self._streams[place]

    def _prepared_conversations(
        self, compiler: CompilerConfig, limit: int | None
    ) -> PreparedCorpus[PreparedConversation]:
        stage = self._run.stages.get(self._config.offline_stage)
        compiler = compiler if stage is None else stage.compiler
        limit = self._settings(limit).limit
        place = (repr(compiler), limit)
        if place not in self._conversations:
            self._conversations = {known: kept for known, kept in self._conversations.items() if known[0] == place[0]}
            cache = self._conversation_frames
            self._conversations[place] = prepare_conversations(cache.corpus, self._tokenizer, compiler, limit, cache)
        return self._conversations[place]

    @cached_property
    def _stream_frames(self) -> FrameCache:
        return FrameCache(self._corpus(self._config.source), self._cache_mb)

    @cached_property
    def _conversation_frames(self) -> FrameCache:
        return FrameCache(self._corpus(self._config.offline_source), self._cache_mb)

    @property
    def _cache_mb(self) -> float:
        """Half of it for the streams, half for the conversations, where there are both."""
        return self._config.settings.cache_mb / (1 if self._config.offline_source is None else 2)

    def _corpus(self, source: str | None) -> Corpus:
        assert source is not None
        return load_source(source, image_size=self._run.model.vision.image_size)
