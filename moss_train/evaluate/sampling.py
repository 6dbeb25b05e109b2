"""How the next token is drawn from the model's predictions. Shape suffixes: R rows, V vocabulary."""

from dataclasses import dataclass

import torch

from moss_train.errors import ConfigError


@dataclass
class GenerationConfig:
    """How the next token of a reply is chosen. The default takes the most probable one."""

    temperature: float = 0.0
    """Logits are divided by this before a token is drawn; 0 takes the most probable token, and nothing is drawn."""
    top_k: int = 0
    """Draw from this many of the most probable tokens; 0 from all."""
    top_p: float = 1.0
    """Draw from the fewest most probable tokens that have this much of the probability together (Holtzman et al.
    2020)."""
    seed: int = 0
    """Of the draws; the same seed and stream give the same tokens."""

    def validate(self) -> None:
        for name, holds, remedy in (
            ("temperature", self.temperature >= 0, "must not be negative; 0 is greedy"),
            ("top_k", self.top_k >= 0, "must not be negative; 0 keeps all tokens"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
        ):
            if not holds:
                raise ConfigError(f"generation.{name}={getattr(self, name)}: {remedy}")


class Sampler:
    """Draws tokens; has its own random numbers, on the CPU, so that they do not depend on the device."""

    def __init__(self, config: GenerationConfig):
        config.validate()
        self._config = config
        self._random = torch.Generator().manual_seed(config.seed)

    def __call__(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """The chosen tokens, int64 [R]; logits of -inf are never chosen."""
        if self._config.temperature == 0:
            return logits_RV.argmax(-1)
        probabilities_RV = self.probabilities(logits_RV).cpu()
        return torch.multinomial(probabilities_RV, 1, generator=self._random)[:, 0].to(logits_RV.device)

    def probabilities(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """What is drawn from, [R, V]; a temperature above 0 is needed."""
        logits_RV = logits_RV.float() / self._config.temperature
        if 0 < self._config.top_k < logits_RV.shape[-1]:
            least_R1 = logits_RV.topk(self._config.top_k).values[:, -1:]
            logits_RV = logits_RV.masked_fill(logits_RV < least_R1, -torch.inf)
        probabilities_RV = logits_RV.softmax(-1)
        if self._config.top_p < 1:
            ordered_RV, order_RV = probabilities_RV.sort(descending=True)
            # A token stays when those before it do not have top_p yet; the first always stays.
            out_RV = ordered_RV.cumsum(-1) - ordered_RV >= self._config.top_p
            ordered_RV = ordered_RV.masked_fill(out_RV, 0.0)
            probabilities_RV = torch.zeros_like(probabilities_RV).scatter(1, order_RV, ordered_RV)
            probabilities_RV = probabilities_RV / probabilities_RV.sum(-1, keepdim=True)
        return probabilities_RV
