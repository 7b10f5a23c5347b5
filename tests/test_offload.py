"""A reward model of its own that waits beside the GPU: where it is moved to, and when. No GPU is needed."""

import logging
from typing import Any

import judges
import pytest
import torch

from vlm_grpo.rewards.judge import JudgeReward


class Moves:
    """Stands in the place of a model's ``to``."""

    def __init__(self, refuses: str = "", error: Exception | None = None) -> None:
        self.places: list[str] = []
        self.refuses, self.error = refuses, error

    def __call__(self, place: Any) -> None:
        self.places.append(str(place))
        if self.error is not None and str(place) == self.refuses:
            raise self.error


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """One that has scored on the CPU, where nothing waits."""
    folder = tmp_path_factory.mktemp("offload")
    base = judges.base("qwen2_5_vl", folder / "base", layers=1)
    return JudgeReward(judges.reward_run(base, folder / "judge"), offload=True)


def on_a_gpu(judge: JudgeReward, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Moves:
    """As if the model had been loaded onto a GPU and waited on the CPU."""
    judges.call(judge, judges.rows("qwen2_5_vl")[:1], ["one"])
    standing, moves = judge._standing, Moves(**options)
    monkeypatch.setattr(standing, "_home", torch.device("cuda", 0))
    monkeypatch.setattr(standing, "_waits", True)
    monkeypatch.setattr(standing.model, "to", moves, raising=False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: moves.places.append("empty"))
    return moves


def test_it_is_on_the_gpu_only_while_it_scores(judge, monkeypatch):  # covers A3
    rows = judges.rows("qwen2_5_vl")[:2]
    expected = judges.call(judge, rows, ["one", "two"])
    assert judge._standing._waits is False, "nothing to wait for without a GPU"
    moves = on_a_gpu(judge, monkeypatch)
    scores = judge._standing.scores
    monkeypatch.setattr(judge._standing, "scores", _watched(scores, moves))
    assert judges.call(judge, rows, ["one", "two"]) == pytest.approx(expected, abs=1e-6)
    assert moves.places == ["cuda:0", "scored", "cpu", "empty"]
    assert all(not features.known for features in scores.sharing._features.values()), "nor its media"


def _watched(scores: Any, moves: Moves) -> Any:
    class Watched:
        sharing = scores.sharing

        def __call__(self, *args: Any) -> Any:
            moves.places.append("scored")
            return scores(*args)

    return Watched()


@pytest.mark.parametrize("where", ["while it moves", "while it scores"])
def test_it_goes_back_when_something_fails(judge, monkeypatch, where):
    error = torch.OutOfMemoryError("CUDA out of memory")
    moves = on_a_gpu(judge, monkeypatch, **({"refuses": "cuda:0", "error": error} if where.endswith("moves") else {}))

    class Failing:
        sharing = judge._standing.scores.sharing

        def __call__(self, *args: Any) -> Any:
            raise error

    monkeypatch.setattr(judge._standing, "scores", Failing())
    with pytest.raises(torch.OutOfMemoryError):
        judges.call(judge, judges.rows("qwen2_5_vl")[:1], ["one"])
    assert moves.places == ["cuda:0", "cpu", "empty"]


def test_weights_that_do_not_move_stay_and_are_said(judge, monkeypatch, caplog):
    rows = judges.rows("qwen2_5_vl")[:1]
    error = ValueError("`.to` is not supported for `4-bit` models")
    moves = on_a_gpu(judge, monkeypatch, refuses="cpu", error=error)
    with caplog.at_level(logging.WARNING, "vlm_grpo"):
        first = judges.call(judge, rows, ["one"])
        assert judges.call(judge, rows, ["one"]) == pytest.approx(first, abs=1e-6)
    assert moves.places == ["cuda:0", "cpu", "cuda:0", "empty"], "tried once"
    assert [r.message for r in caplog.records if "stays on the GPU: its weights cannot be moved (`.to` is" in r.message]
