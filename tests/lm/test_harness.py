"""Requests of the harness as text, without it; and a task of its own, where it is installed."""

import json
from typing import NamedTuple

import jax
import numpy as np
import pytest

import lm
from lm.config import ConfigError, ModelConfig
from lm.data.tokenizer import ByteTokenizer
from lm.harness import HarnessModel, run_tasks
from lm.scoring import Scorer

CONFIG = ModelConfig(
    vocab_size=257,
    num_layers=2,
    d_model=32,
    num_heads=4,
    d_ff=48,
    max_context=64,
    dtype="float32",
)


class Request(NamedTuple):
    args: tuple


@pytest.fixture(scope="module")
def params():
    return jax.jit(lm.init, static_argnums=0)(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def model(params):
    return HarnessModel(Scorer(CONFIG, params, batch_size=4), ByteTokenizer())


@pytest.fixture(scope="module")
def likelihood(params):
    """Log-likelihood of ids[start:], by `lm.apply` on one padded row."""
    apply = jax.jit(lambda tokens: lm.apply(CONFIG, params, tokens))

    def measure(ids, start):
        row = np.zeros((1, 64), np.int32)
        row[0, : len(ids) - 1] = ids[:-1]
        logp = np.asarray(jax.nn.log_softmax(apply(row)))[0]
        return sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids)))

    return measure


def test_likelihoods_behind_the_separator(model, likelihood):
    texts = [("two and two is", " four"), ("", "hello"), ("a ", "b"), ("  ", "c")]
    found = model.loglikelihood([Request(each) for each in texts])
    for (context, continuation), (score, _) in zip(texts, found, strict=True):
        ids = [256, *f"{context}{continuation}".encode()]
        # Blanks at the end of the context count with the continuation.
        start = 1 + len(context.rstrip())
        assert score == pytest.approx(likelihood(ids, start), abs=1e-4)


def test_rolling(model, likelihood):
    (score,) = model.loglikelihood_rolling([Request(("one text",))])
    assert score == pytest.approx(likelihood([256, *b"one text"], 1), abs=1e-4)


def test_the_tokenizers_own_prefix_is_put_once(params):
    scorer = Scorer(CONFIG, params, batch_size=4)
    bare = HarnessModel(scorer, ByteTokenizer(), prefix=[])
    assert bare.encode("ab") == [97, 98] and bare.before == 256
    front = HarnessModel(scorer, ByteTokenizer(), prefix=[256])
    assert front.encode("ab") == front.encode("<|endoftext|>ab") == [256, 97, 98]
    assert front.split("a", "b") == ([256, 97], [98])


def test_generation_ends_where_it_is_told(model, params):
    def ask(context, **settings):
        return model.generate_until([Request((context, settings))])[0]

    whole = ask("abc", max_gen_toks=12)
    ids = model.scorer.continuations(
        [[256, *b"abc"]],
        max_tokens=12,
        sampling=lm.generate.Sampling(temperature=0.0),
        finished=lambda ids: ids[-1] == 256,
    )[0]
    assert whole == bytes(i for i in ids if i < 256).decode("utf-8", "replace")
    stop = whole[4:6]
    assert ask("abc", until=[stop, "never"], max_gen_toks=12) == whole.partition(stop)[0]
    assert ask("abc", until=stop, max_new_tokens=12) == whole.partition(stop)[0]
    assert ask("abc", do_sample=False, temperature=3.0, max_gen_toks=12) == whole
    drawn = [ask("abc", temperature=2.0, max_gen_toks=12) for _ in range(2)]
    assert drawn[0] == drawn[1] != whole
    several = model.generate_until(
        [
            Request(("abc", {"max_gen_toks": 12})),
            Request(("x", {"max_gen_toks": 3})),
            Request(("abc", {"max_gen_toks": 12, "until": [stop]})),
        ]
    )
    assert several[0] == whole and several[2] == whole.partition(stop)[0]


def test_a_stop_that_is_one_token_ends_a_text(params):
    """Names of special tokens are not in decoded text, so they are known by their id."""
    scorer = Scorer(CONFIG, params, batch_size=4)
    model = HarnessModel(scorer, ByteTokenizer())
    ids = [65, 66, 256]
    assert model.stop_ids(("<|endoftext|>", "ab", "B")) == {256, 66}
    assert not model._finished(("zz",))([65, 66]) and model._finished(("zz",))(ids)
    assert model._finished(("B",))([65, 66]) and model._text([65, 66, 67], ("B",)) == "A"


def test_a_multiple_choice_task_is_scored_by_likelihood(model, likelihood):
    questions = [("the sky is", [" blue", " loud", " seven"]), ("2 + 2 =", [" 4", " 5", " fish"])]
    requests = [Request((q, choice)) for q, choices in questions for choice in choices]
    scores = [score for score, _ in model.loglikelihood(requests)]
    for number, (question, choices) in enumerate(questions):
        direct = [
            likelihood([256, *f"{question}{choice}".encode()], 1 + len(question))
            for choice in choices
        ]
        mine = scores[3 * number : 3 * number + 3]
        assert int(np.argmax(mine)) == int(np.argmax(direct))
        np.testing.assert_allclose(mine, direct, atol=1e-4)


def test_without_the_harness_the_extra_is_named(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'aniso\[eval\]'"):
        run_tasks(model, ["arc_easy"])


@pytest.fixture
def task(tmp_path):
    """A task of three questions on the disk."""
    rows = [
        {"question": "the sky is", "choices": ["blue", "loud", "seven"], "answer": 0},
        {"question": "2 + 2 =", "choices": ["5", "4", "fish"], "answer": 1},
        {"question": "cats say", "choices": ["moo", "tweet", "meow"], "answer": 2},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    file = tmp_path / "choices.yaml"
    file.write_text(
        f"""\
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
metadata: {{version: 1.0}}
"""
    )
    return file, rows


@pytest.mark.filterwarnings("ignore")  # the harness's libraries warn in their own right
def test_a_local_task_through_the_harness(model, task, likelihood, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    file, rows = task
    results = run_tasks(model, [str(file)])
    right = 0
    for row in rows:
        ids = [[256, *f"{row['question']} {choice}".encode()] for choice in row["choices"]]
        scores = [likelihood(each, 1 + len(row["question"])) for each in ids]
        right += int(np.argmax(scores)) == row["answer"]
    assert results["results"]["choices"]["acc,none"] == pytest.approx(right / 3)
    assert results["n-samples"]["choices"]["effective"] == 3
    assert run_tasks(model, [str(file)], limit=1)["n-samples"]["choices"]["effective"] == 1
    with pytest.raises(ConfigError, match="no task 'hellaswagg': did you mean hellaswag"):
        run_tasks(model, ["hellaswagg"])
    with pytest.raises(ConfigError, match="there is no such file"):
        run_tasks(model, ["nothing.yaml"])
    with pytest.raises(ConfigError, match="this model has no chat template"):
        run_tasks(model, [str(file)], chat=True)
