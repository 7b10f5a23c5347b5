"""``vlm-grpo reward test``: what rewards give to right, wrong, empty and noisy completions, and who cannot tell."""

import json

import pytest
from typer.testing import CliRunner

from vlm_grpo import load_rewards
from vlm_grpo.cli import app
from vlm_grpo.config import RewardSpec
from vlm_grpo.errors import ConfigError
from vlm_grpo.trial import histogram, range_of, try_rewards
from vlm_grpo.trial.completions import completions_of

ROWS = [
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": f"{n} ?"}]}], "answer": str(n % 3)}
    for n in range(12)
]

OWN = """
from vlm_grpo.rewards import Failed

def blind(completions, **columns):
    return [0.5] * len(completions)

def talkative(completions, **columns):
    return [min(1.0, len(c[-1]["content"]) / 50) for c in completions]

def inside(completions, answer, **columns):
    return [float(a in c[-1]["content"]) for c, a in zip(completions, answer)]

async def none(completions, **columns):
    return [None] * len(completions)

def down(completions, **columns):
    return [Failed("refused")] * len(completions)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "own.py"
    path.write_text(OWN)
    return path


def warnings(*names, rows=ROWS):
    return try_rewards(*load_rewards([RewardSpec(name=str(name)) for name in names]), rows).warnings


def test_the_completions():
    made = completions_of(ROWS)
    assert made["reference"][:4] == ["0", "1", "2", "0"] and made["empty"] == [""] * 12
    assert made["reference in tags"][1] == "<think>\n...\n</think>\n<answer>1</answer>"
    assert all(other != own for other, own in zip(made["another row's"], made["reference"], strict=True))
    assert made["all answers at once"][2] == "<answer>2 0 1</answer>", "the right one first"
    assert completions_of(ROWS) == made and completions_of(ROWS, seed=1) != made
    assert "another row's" not in completions_of(ROWS[:1]), "there is no other answer"
    learned = completions_of([{"prompt": "p", "completion": [{"role": "assistant", "content": "It is 7."}]}])
    assert learned["reference"] == ["It is 7."]


def test_a_good_reward_raises_no_warning():
    trial = try_rewards(*load_rewards(["accuracy", RewardSpec(name="format", weight=0.5)]), ROWS)
    assert trial.warnings == [] and list(trial.scores) == ["accuracy", "format", "total"]
    assert trial.scores["total"]["reference in tags"].mean == 1.5
    assert histogram(trial.scores["accuracy"]["empty"], *range_of(trial.scores["accuracy"])) == [12] + [0] * 9


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("blind", 'The reward "blind" gave 0.5 to everything: it teaches nothing.'),
        ("inside", 'The reward "inside" cannot tell right answers from a list of all answers (mean 1 and 1).'),
        ("none", 'The reward "none" applies to no row: it returned None 72 times.'),
        ("down", 'The reward "down" failed for 72 completions.'),
    ],
)
def test_a_reward_that_cannot_tell_is_named(own, name, sentence):
    assert warnings(f"{own}:{name}") == [sentence]


def test_a_reward_that_prefers_noise_is_named(own):
    long = [{**row, "answer": "a", "prompt": "p"} for row in ROWS]
    said = warnings("format", rows=ROWS)
    assert said == ['The reward "format" cannot tell right answers from those of other rows (mean 0 and 0).']
    rows = [{**row, "answer": row["answer"] * 60} for row in ROWS]
    assert warnings(f"{own}:talkative", rows=rows)[0].startswith(
        'The reward "talkative" cannot tell right answers from garbage completions'
    )
    assert completions_of(long)["garbage"], "rows of one answer have noise too"


def test_the_command(own, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "run.yaml").write_text(f"data: {tmp_path / 'rows.jsonl'}\nrewards: [accuracy, '{own}:blind']\n")
    result = CliRunner().invoke(app, ["reward", "test", str(tmp_path / "run.yaml")])
    assert result.exit_code == 0, result.output
    assert "another row's" in result.output and "gave 0.5 to everything" in result.output
    arguments = ["reward", "test", "--data", str(tmp_path / "rows.jsonl"), "--reward", "accuracy", "--json"]
    figures = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert figures["rewards"]["accuracy"]["reference"]["mean"] == 1.0 and figures["rows"] == 12
    for more, sentence in (
        (["--answer-column", "anser"], 'Did you mean "answer"'),
        (["--reward", "acuracy"], 'Did you mean "accuracy"'),
    ):
        failed = CliRunner().invoke(app, [*arguments[:-1], *more])
        assert failed.exit_code == 2 and sentence in failed.output
    assert CliRunner().invoke(app, ["reward", "test", "--reward", "accuracy"]).exit_code == 2


def test_rows_without_answers_are_refused():
    with pytest.raises(ConfigError, match='No row has an answer in the column "answer" .columns: prompt, truth'):
        try_rewards(*load_rewards(["accuracy"]), [{"prompt": "p", "truth": "x"}])
