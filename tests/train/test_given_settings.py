"""What `eval` takes over from the run."""

from moss_train.evaluate.config import EvaluationConfig
from moss_train.train.given_settings import evaluation_settings


def test_a_limit_of_training_is_not_taken_over():
    trained = EvaluationConfig(limit=64, batch_streams=8)
    settings = evaluation_settings(trained, {})
    assert (settings.limit, settings.batch_streams) == (None, 8)
    assert evaluation_settings(trained, {"limit": 3}).limit == 3
