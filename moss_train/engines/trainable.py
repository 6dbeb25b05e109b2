"""Whether a set of parameters can be trained with the rates that a configuration gives."""

from collections.abc import Mapping, Set

from moss_train.engines.config import OptimConfig
from moss_train.errors import ConfigError


def check_trainable(trainable: Set[str], group_of: Mapping[str, str], optim: OptimConfig) -> None:
    """Raise ConfigError unless every name is a parameter, one at least is trained, and no rate is for a group that is
    not. group_of: parameter → group, of the whole model."""
    unknown = sorted(trainable - set(group_of))
    if unknown:
        raise ConfigError(f"trainable: the model has no parameter {', '.join(unknown)}")
    if not trainable:
        raise ConfigError("trainable: no parameter is left to train; choose at least one parameter group")
    trained = {group_of[name] for name in trainable}
    for group in optim.group_lr:
        if group not in set(group_of.values()):
            legal = ", ".join(sorted(set(group_of.values())))
            raise ConfigError(f"optim.group_lr.{group}: the model has no such group; its groups are {legal}")
        if group not in trained:
            raise ConfigError(
                f"optim.group_lr.{group}: this group is not trained, so the rate means nothing; "
                f"remove it, or add {group} to trainable"
            )
