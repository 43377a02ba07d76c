"""The ledger against hand-made files and real runs; the FLOP rule and the forecast against torch's own counter."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mates_hf.config import MatesConfig
from mates_hf.data.mixing import PassageSchedule
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.disk import write_json
from mates_hf.errors import MatesError
from mates_hf.evaluation.evaluator import Evaluator
from mates_hf.flops import NGRAM_FIT_FLOPS, forward_flops, gradient_flops, one_step_flops
from mates_hf.influence.probe import count_multiplied_parameters, count_parameters
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_loss_reduction import LossReductionProbe
from mates_hf.influence.probe_one_step import OneStepProbe
from mates_hf.prediction.encoder_model import EncoderInfluenceModel
from mates_hf.prediction.hidden_states import HiddenStateInfluenceModel
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.records import FitReport, InfluenceLabels
from mates_hf.reporting.cost import RunCost, StageCost, run_cost
from mates_hf.reporting.forecast import Encoder, RunSize, predict_cost
from mates_hf.selection.plan import RunPlan, num_candidates
from mates_hf.training.callback import MatesCallback
from mates_hf.training.clock import RowClock
from tests.evaluation.kit import make_model as evaluated_model
from tests.evaluation.kit import make_tokenizer as byte_tokenizer
from tests.evaluation.kit import write_local
from tests.training.kit import LENGTH, Stop, make_arguments, make_model, make_pool, make_reference, run, small_config

# --- the ledger, from files made by hand ---

STAGES = {
    "probe": {"seconds": 8.0, "flops": 3e12},
    "audit": {"seconds": 2.0, "flops": 1e12},
    "fit": {"seconds": 4.0},
    "score": {"seconds": 1.0},
    "select": {"seconds": 1.0},
}


def write_round(run_dir: Path, number: int, step: int, *, stages: Any = STAGES, name: str | None = None, **more: Any):
    path = run_dir / "_mates" / (name or f"round-{number:04d}")
    path.mkdir(parents=True)
    info = {"number": number, "step": step, "stages": stages, "config": {"random_rounds": 1, "keep_rounds": None}}
    write_json(path / "round.json", {**info, "flop_parameters": {"stages": 500, "trainer": 400}, **more})
    return path


def write_state(folder: Path, step: int, *, seconds: float | None = None, rate: float | None = None, **more: Any):
    folder.mkdir(parents=True, exist_ok=True)
    history = list(more.pop("history", []))
    if seconds is not None:
        history.append({"train_runtime": seconds, "train_steps_per_second": rate or step / seconds, "step": step})
    state = {"global_step": step, "total_flos": 8e13, "log_history": history, **more}
    write_json(folder / "trainer_state.json", state)


def two_rounds(run_dir: Path) -> Path:
    write_round(run_dir, 1, 100)
    write_round(run_dir, 2, 200)
    return run_dir


def test_the_ledger_adds_up(tmp_path):
    two_rounds(tmp_path)
    evaluations = [{"lm_eval/seconds": 10.0, "step": 100}, {"lm_eval/seconds": 14.0, "eval_runtime": 4.0, "step": 200}]
    write_state(tmp_path, 300, seconds=400.0, history=evaluations)
    cost = run_cost(tmp_path)
    assert (cost.steps, cost.rounds, cost.seconds, cost.notes) == (300, (1, 2), 400.0, ())
    # total_flos is 6 x 400 a token, our rule 6 x 500: the Trainer leaves a tied head out.
    assert cost.training == StageCost(seconds=340.0, flops=1e14, share_of_seconds=0.85, share_of_training_flops=1.0)
    assert cost.stages["probe"] == StageCost(
        seconds=16.0, flops=6e12, share_of_seconds=0.04, share_of_training_flops=0.06
    )
    assert cost.stages["fit"] == StageCost(seconds=8.0, flops=None, share_of_seconds=0.02)
    assert cost.mates == StageCost(
        seconds=32.0, flops=8e12, share_of_seconds=0.08, share_of_training_flops=0.08, complete=False
    )
    assert cost.evaluation == StageCost(seconds=28.0, flops=None, share_of_seconds=0.07, complete=False)
    # fit, score and select of two rounds, not probe nor audit
    assert (cost.idle_seconds, cost.idle_share) == (12.0, 0.03)
    assert list(cost.stages) == ["probe", "audit", "fit", "score", "select"]
    json.dumps(cost.to_dict())


def test_flops_of_evaluations_follow_from_their_tokens_and_are_a_lower_bound_where_one_does_not_say(tmp_path):
    two_rounds(tmp_path)
    ours = [{"lm_eval/seconds": 10.0, "lm_eval/tokens": 3e8, "step": step} for step in (100, 200)]
    write_state(tmp_path, 300, history=ours)
    assert run_cost(tmp_path).evaluation == StageCost(seconds=20.0, flops=6e11, share_of_training_flops=0.006)
    for other in ({"eval_runtime": 4.0, "step": 200}, {"lm_eval/seconds": 4.0, "step": 300}):
        write_state(tmp_path, 300, history=[*ours, other])
        found = run_cost(tmp_path)
        assert (found.evaluation.seconds, found.evaluation.flops, found.evaluation.complete) == (24.0, 6e11, False)
        assert any(line.startswith("evaluation") and ">= 6.000e+11" in line for line in found.lines())


def test_what_is_not_recorded_is_said_and_never_zero(tmp_path):
    stages = {**STAGES, "probe": {"seconds": 8.0}}
    write_round(tmp_path, 1, 100)
    write_round(tmp_path, 2, 200, stages=stages)
    write_state(tmp_path / "checkpoint-300", 300, total_flos=0)
    cost = run_cost(tmp_path)
    assert cost.stages["probe"].flops is None  # half of it is not the whole
    assert (cost.seconds, cost.training.seconds, cost.training.flops, cost.evaluation.seconds) == (None,) * 4
    assert (cost.mates.seconds, cost.mates.share_of_seconds, cost.mates.share_of_training_flops) == (32.0, None, None)
    lines = list(cost.lines())
    rows = {line[:14].strip(): line for line in lines}
    assert rows["training"].split() == ["training", *["not", "recorded"] * 4]
    assert rows["probe"].split() == ["probe", "16.00", *["not", "recorded"] * 3]
    assert ">= 2.000e+12" in rows["MATES together"]
    assert lines[-1] == "devices idle in rounds: at most 12.00 s, of the run: not recorded"


def test_an_influence_model_on_the_device_does_not_idle_it(tmp_path):
    for number, kind in ((1, "NgramInfluenceModel"), (2, "EncoderInfluenceModel"), (3, "SomebodysModel")):
        path = write_round(tmp_path, number, 100 * number)
        (path / "influence_model").mkdir()
        write_json(path / "influence_model" / "config.json", {"kind": kind})
    assert run_cost(tmp_path).idle_seconds == 6.0 + 1.0 + 6.0


def test_stale_and_unfinished_rounds_are_named_and_not_counted(tmp_path):
    two_rounds(tmp_path)
    write_state(tmp_path, 300, seconds=400.0)
    before = run_cost(tmp_path)
    write_round(tmp_path, 2, 200, name="round-0002.stale")
    write_round(tmp_path, 3, 300, name="round-0003.partial")
    after = run_cost(tmp_path)
    assert dataclasses.replace(after, notes=()) == before
    assert after.notes == ("not counted, though they took time: round-0002.stale, round-0003.partial",)


def test_rounds_later_than_the_training_known_of_are_left_out(tmp_path):
    two_rounds(tmp_path)
    write_state(tmp_path / "checkpoint-150", 150)
    cost = run_cost(tmp_path)
    assert (cost.rounds, cost.stages["probe"].flops) == ((1,), 3e12)
    assert "rounds 2" in cost.notes[0]


def test_the_newest_state_counts(tmp_path):
    two_rounds(tmp_path)
    write_state(tmp_path / "checkpoint-1000", 1000, total_flos=16e13)
    write_state(tmp_path / "checkpoint-900", 900)
    write_state(tmp_path, 300, seconds=50.0)
    assert run_cost(tmp_path).steps == 1000
    write_state(tmp_path, 1000, seconds=400.0, total_flos=16e13)
    assert (run_cost(tmp_path).seconds, run_cost(tmp_path).training.flops) == (400.0, 2e14)


@pytest.mark.parametrize(
    ("seconds", "rate"), [(40.0, 2.5), (20.0, 15.0)], ids=["few steps", "shorter than its rounds"]
)
def test_the_seconds_of_a_resumed_run_are_not_taken_for_all_of_it(tmp_path, seconds, rate):
    two_rounds(tmp_path)
    write_state(tmp_path, 300, seconds=seconds, rate=rate)
    cost = run_cost(tmp_path)
    assert (cost.seconds, cost.mates.share_of_seconds, cost.mates.seconds) == (None, None, 32.0)
    assert "resumed" in cost.notes[0]


def test_drift_checks_cost_what_their_rounds_sentinel_did(tmp_path):
    write_round(tmp_path, 1, 100, stages={**STAGES, "sentinel": {"seconds": 1.0, "flops": 2e11}})
    write_round(tmp_path, 2, 200, stages={**STAGES, "sentinel": {"seconds": 1.0, "flops": 5e11}})
    checks = [{"mates/drift_spearman": 0.9, "step": step} for step in (150, 200, 250)]
    write_state(tmp_path, 300, history=checks)
    cost = run_cost(tmp_path)
    assert cost.stages["drift checks"] == StageCost(seconds=None, flops=9e11, share_of_training_flops=0.009)
    assert cost.mates.flops == pytest.approx(8e12 + 7e11 + 9e11)


def test_no_run_a_missing_round_and_a_deleted_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold a finished round .* got none. Pass the run's `output_dir`"):
        run_cost(tmp_path)
    write_round(tmp_path, 1, 100, name="round-0001.partial")
    with pytest.raises(FileNotFoundError, match=r"got round-0001\.partial"):
        run_cost(tmp_path)
    write_round(tmp_path, 3, 300)
    with pytest.raises(MatesError, match="every round up to 3, got none for 1, 2, though `keep_rounds` is not set"):
        run_cost(tmp_path)
    shutil.rmtree(tmp_path / "_mates/round-0003")
    write_round(tmp_path, 3, 300, config={"random_rounds": 1, "keep_rounds": 2})
    cost = run_cost(tmp_path)
    assert cost.rounds == (3,)
    assert "`keep_rounds` deleted rounds 1, 2: figures of stages are lower bounds" in cost.notes


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"step": 1, "sta', "must be a whole JSON object"),
        ('{"step": 100}', "and `stages` with `seconds`"),
        ('{"step": 100, "stages": {"probe": {"flops": 1.0}}}', "and `stages` with `seconds`"),
        ('{"step": "x", "stages": {}}', "must have `step`, a whole number"),
    ],
)
def test_a_damaged_round_is_refused_by_name(tmp_path, text, complaint):
    path = two_rounds(tmp_path) / "_mates/round-0002/round.json"
    path.write_text(text)
    with pytest.raises(MatesError, match=complaint) as error:
        run_cost(tmp_path)
    assert str(path) in str(error.value)


def test_a_round_that_is_no_directory_of_one_is_refused_by_name(tmp_path):
    (two_rounds(tmp_path) / "_mates/round-0002/round.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"round-0002/round\.json"):
        run_cost(tmp_path)


# --- the rule, against torch's counter ---

VECTORS = 0.03  # norms' weights count as if multiplied, 2 FLOPs a token: up to so much at width 32
ATTENTION = 0.25  # what 6N and 2N leave out at these lengths: scores over 16 tokens at width 32
WIDTH, LAYERS, TOKENS = 32, 2, 16


def llama(vocab: int = 512, *, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def neox(vocab: int = 512) -> Any:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=vocab, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=2,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


MODELS = {"llama": llama, "llama, tied": lambda: llama(tied=True), "gpt_neox": neox}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def token_rows(count: int, seed: int) -> TokenRows:
    return TokenRows.from_lists(np.random.default_rng(seed).integers(3, 500, (count, TOKENS)))


def count(work: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def attention_forward(num_rows: int) -> int:
    """Scores and their product with the values, over whole squares."""
    return 4 * LAYERS * WIDTH * TOKENS**2 * num_rows


def attention_of_comparison(labels: InfluenceLabels) -> int:
    """Of the rows that are run forward to learn which loss is trained."""
    assert labels.info["num_compared_tokens"] > 0
    return attention_forward(labels.info["num_compared_tokens"] // TOKENS)


def made_labels(rows: TokenRows) -> InfluenceLabels:
    per_token = np.array([row.mean() for row in rows.values.reshape(-1, TOKENS)], np.float32)
    return InfluenceLabels(
        candidate_id=np.arange(len(rows)), influence=per_token / 100, influence_per_token=per_token,
        loss=np.ones(len(rows), np.float32), num_tokens=rows.num_targets, probe=np.full(len(rows), "made"),
        step_size=0.01,
    )  # fmt: skip


def word_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def train_on(model: Any, rows: TokenRows) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.from_numpy(rows.values.astype(np.int64)).view(-1, TOKENS)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def assert_accounts_for(recorded: float, counted: int, attention: int) -> None:
    """The rule is what is counted less attention scores, and they are all that it leaves out."""
    assert recorded == pytest.approx(counted - attention, rel=VECTORS)
    assert recorded == pytest.approx(counted, rel=ATTENTION)


@each_model
def test_training_is_six_flops_a_multiplied_parameter_and_token(make):
    model, rows = make(), token_rows(4, 0)
    counted = count(lambda: train_on(model, rows))
    recorded = gradient_flops(count_multiplied_parameters(model), len(rows.values))
    assert_accounts_for(recorded, counted, 3 * attention_forward(len(rows)))


@each_model
@pytest.mark.parametrize("second_moment", ["state", "batches"])
def test_recorded_flops_of_the_directional_probe(make, second_moment):
    model, rows, passages = make(), token_rows(6, 0), token_rows(3, 1)
    optimizer = train_on(model, rows)
    probe = DirectionalProbe(epsilon=1e-3, second_moment=second_moment, batch_rows=2)
    found: list[Any] = []
    reference = ReferenceTask(name="test", rows=passages)
    counted = count(lambda: found.append(probe.measure(model, optimizer, reference, rows)))
    moment = 4 * 2 if second_moment == "batches" else 0
    attention = 2 * attention_forward(6) + 3 * attention_forward(3 + moment) + attention_of_comparison(found[0])
    assert_accounts_for(found[0].info["flops"], counted, attention)


def test_recorded_flops_of_the_directional_probe_count_the_search_for_epsilon():
    model, rows, passages = llama(), token_rows(20, 0), token_rows(3, 1)
    optimizer = train_on(model, rows)
    found: list[Any] = []
    reference = ReferenceTask(name="test", rows=passages)
    counted = count(lambda: found.append(DirectionalProbe().measure(model, optimizer, reference, rows)))
    flops, each = found[0].info["flops"], 2 * count_multiplied_parameters(model) * TOKENS
    compared = found[0].info["num_compared_tokens"] // TOKENS
    num_rows = round((flops - each * 3 * len(passages)) / each) - compared
    assert (num_rows - 2 * len(rows)) % (4 * 16) == 0
    assert num_rows > 2 * len(rows)
    attention = attention_forward(num_rows + compared) + 3 * attention_forward(3)
    assert_accounts_for(flops, counted, attention)


@each_model
def test_recorded_flops_of_the_one_step_probe(make):
    model, rows, passages = make(), token_rows(4, 0), token_rows(3, 1)
    optimizer = train_on(model, rows)
    found: list[Any] = []
    reference = ReferenceTask(name="test", rows=passages)
    counted = count(lambda: found.append(OneStepProbe().measure(model, optimizer, reference, rows)))
    attention = 3 * attention_forward(4) + attention_forward(3 * 5) + attention_of_comparison(found[0])
    assert_accounts_for(found[0].info["flops"], counted, attention)


@each_model
def test_recorded_flops_of_the_probe_of_loss_reductions(make):
    model, rows, passages = make(), token_rows(4, 0), token_rows(3, 1)
    optimizer = train_on(model, rows)
    found: list[Any] = []
    reference, probe = ReferenceTask(name="test", rows=passages), LossReductionProbe(passes=2)
    counted = count(lambda: found.append(probe.measure(model, optimizer, reference, rows)))
    # Two passes over three passages are one step; they are read once before, the candidates before and after.
    attention = 3 * attention_forward(6) + attention_forward(3 + 2 * 4) + attention_of_comparison(found[0])
    assert_accounts_for(found[0].info["flops"], counted, attention)


def test_an_embedding_that_dominates_is_counted_where_it_is_multiplied():
    """All parameters are off by far where ids are looked up in most of them, the Trainer's where the head is tied."""
    rows = token_rows(4, 0)

    def off(model: Any, parameters: int) -> float:
        return gradient_flops(parameters, len(rows.values)) / count(lambda: train_on(model, rows)) - 1

    untied, tied = llama(4096), llama(4096, tied=True)
    assert off(untied, count_parameters(untied)) > 0.7
    assert off(tied, tied.num_parameters(exclude_embeddings=True)) < -0.7
    for model in (untied, tied):
        assert abs(off(model, count_multiplied_parameters(model))) < 0.05
    assert count_multiplied_parameters(untied) == untied.num_parameters(exclude_embeddings=True)


@pytest.mark.parametrize("head_only", [True, False])
def test_recorded_flops_of_the_encoder(head_only):
    """All documents are of one chunk, so that nothing is padded; attention is quadratic in 18 tokens of width 32."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=600, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    vocabulary = {f"w{i}": i for i in range(500)} | {"[UNK]": 500, "[PAD]": 501, "[CLS]": 502, "[SEP]": 503}
    tokenizer = word_tokenizer(vocabulary)
    model = EncoderInfluenceModel(
        (BertModel(config, add_pooling_layer=False), tokenizer), tokenizer=tokenizer, head_only=head_only,
        max_tokens=32, chunk_tokens=32, num_epochs=2, batch_rows=8, device="cpu",
    )  # fmt: skip
    rows = token_rows(60, 0)
    fit = count(lambda: model.fit(rows, made_labels(rows)))
    assert model.report.flops == pytest.approx(fit, rel=ATTENTION)
    score = count(lambda: model.predict(rows))
    assert model.report.flops_per_token * rows.num_targets.sum() == pytest.approx(score, rel=ATTENTION)
    # Two epochs of 4 to 5 times a pass, and three more passes over parts: far from a pass.
    assert (model.report.flops > 5 * score) == (not head_only)


def test_recorded_flops_of_hidden_states():
    model, rows = llama(), token_rows(60, 0)
    influence_model = HiddenStateInfluenceModel(model)
    fit = count(lambda: influence_model.fit(rows, made_labels(rows)))
    score = count(lambda: influence_model.predict(rows))
    assert influence_model.report.flops == pytest.approx(fit, rel=ATTENTION)
    assert influence_model.report.flops_per_token * rows.num_targets.sum() == pytest.approx(score, rel=ATTENTION)


def test_flops_survive_saving_and_are_unknown_in_an_older_file(tmp_path):
    rows = token_rows(60, 0)
    model = NgramInfluenceModel().fit(rows, made_labels(rows))
    model.save_pretrained(tmp_path)
    assert NgramInfluenceModel.from_pretrained(tmp_path).report == model.report
    assert model.report.flops == NGRAM_FIT_FLOPS * rows.num_targets.sum()
    older = {k: v for k, v in model.report.to_dict().items() if not k.startswith("flops")}
    assert (FitReport.from_dict(older).flops, FitReport.from_dict(older).flops_per_token) == (None, None)


def test_recorded_flops_of_an_evaluation(tmp_path):
    """Logits are made of few positions, and the head is a third of this model: the rule says more than is counted."""
    write_local(tmp_path / "data")
    model, tokenizer = evaluated_model(double=False, attn_implementation="eager"), byte_tokenizer()
    evaluator = Evaluator("mates_sciq_local", tokenizer, limit=4, metadata={"data_dir": str(tmp_path / "data")})
    evaluator.prepare(model)
    counted = count(lambda: evaluator.run(model))
    num_tokens = evaluator.num_tokens
    body = count_multiplied_parameters(model.model)
    assert forward_flops(body, num_tokens) < counted
    assert counted == pytest.approx(forward_flops(count_multiplied_parameters(model), num_tokens), rel=0.5)
    evaluator.run(model)
    assert evaluator.num_tokens == num_tokens


# --- real runs ---


def save_state(trainer: Any) -> None:
    trainer.state.save_to_json(str(Path(trainer.args.output_dir) / "trainer_state.json"))


def test_the_ledger_of_a_run_is_what_torch_counts(tmp_path):
    """Training and probing differ by more than three times here, so swapped they would be off by far."""
    config = small_config(update_steps=20, num_probes=16, selection_ratio=1.0, average_steps=0)
    callback = MatesCallback(make_reference(2), config)
    inside: list[int] = []
    original = callback.on_step_end

    def counted(*args: Any, **kwargs: Any) -> None:
        inside.append(count(lambda: original(*args, **kwargs)))

    callback.on_step_end = counted
    arguments = make_arguments(tmp_path, max_steps=42, per_device_train_batch_size=8)
    whole = count(lambda: save_state(run(arguments, [callback], make_pool(600)).trainer))
    cost = run_cost(tmp_path)
    training, probing = whole - sum(inside), sum(inside)
    assert cost.training.flops == pytest.approx(training, rel=ATTENTION)
    assert cost.mates.flops == pytest.approx(probing, rel=ATTENTION)
    assert training > 3 * probing
    assert cost.mates.share_of_training_flops == pytest.approx(probing / training, rel=0.05)
    assert cost.seconds == pytest.approx(cost.training.seconds + cost.mates.seconds, rel=1e-9)
    work = {name: stage.seconds for name, stage in cost.stages.items()}
    waited = sum(
        entry.get("mates/waited_seconds", 0.0)
        for entry in json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    )
    assert cost.mates.seconds == pytest.approx(work["digest"] + work["probe"] + work["audit"] + waited, rel=1e-9)
    assert 0 <= cost.idle_seconds == pytest.approx(waited, abs=1e-9)


def test_a_forecast_counts_a_look_inside_each_long_round():
    size = RunSize(
        num_parameters=10_000, num_looked_up=1_000, tokens_per_row=12, batch_rows=4, max_steps=360, num_passages=64,
        tokens_per_passage=12,
    )  # fmt: skip
    sizes = {"update_steps": 100, "switch_lead_steps": 2, "average_steps": 1, "num_probes": 200}
    fixed = predict_cost(size, MatesConfig(**sizes, first_round_steps=None, drift_check_steps=50))
    once = fixed.stages["sentinel"] / fixed.num_rounds
    assert fixed.stages["drift checks"] == pytest.approx(
        3 * once
    )  # of three rounds, of which the last one has 58 steps
    grows = predict_cost(size, MatesConfig(**sizes, first_round_steps=10))
    assert "sentinel" not in grows.stages
    assert grows.stages["gap checks"] == pytest.approx(3 * once)  # of rounds of 10, 20, 40, 80 and 100 steps
    often = predict_cost(size, MatesConfig(**sizes, first_round_steps=10, drift_check_steps=10))
    assert often.stages["gap checks"] == pytest.approx((1 + 3 + 7 + 9) * once)
    short = predict_cost(size, MatesConfig(**{**sizes, "update_steps": 30}, first_round_steps=10))
    assert "gap checks" not in short.stages


def test_the_forecast_is_what_a_run_records(tmp_path):
    config = small_config(
        update_steps=20, num_probes=40, selection_ratio=0.5, average_steps=4, drift_check_steps=5, drift_spearman=-1
    )
    reference = make_reference()
    callback = MatesCallback(reference, config, probe=DirectionalProbe(epsilon=1e-3, path_steps=32))
    save_state(run(make_arguments(tmp_path, max_steps=62), [callback], make_pool(600)).trainer)
    cost, model = run_cost(tmp_path), make_model()
    size = RunSize(
        num_parameters=count_parameters(model),
        num_looked_up=count_parameters(model) - count_multiplied_parameters(model),
        tokens_per_row=LENGTH,
        batch_rows=4,
        max_steps=62,
        num_passages=len(reference),
        tokens_per_passage=LENGTH,
    )
    predicted = predict_cost(size, config, epsilon_steps=0)
    assert predicted.num_rounds == len(cost.rounds) == 2
    assert predicted.training_flops == cost.training.flops
    for name in ("probe", "audit", "sentinel"):
        assert predicted.stages[name] == pytest.approx(cost.stages[name].flops, rel=1e-12), name
    # After the last round the checks go on only while a round could start from them.
    assert 0 < cost.stages["drift checks"].flops <= predicted.stages["drift checks"]
    infos = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("_mates/round-*/round.json"))]
    assert predicted.scored_tokens == LENGTH * sum(info["num_candidates"] for info in infos)
    # A row has a target less than it has tokens.
    for name in ("fit", "score"):
        targets = predicted.stages[name] * (LENGTH - 1) / LENGTH
        assert cost.stages[name].flops == pytest.approx(targets, rel=1e-12), name
    assert cost.stages["select"].flops == 0
    assert cost.mates.complete


@pytest.mark.slow
def test_a_resumed_run_counts_each_round_once(tmp_path):
    arguments = {"max_steps": 20, "save_strategy": "steps", "save_steps": 8}
    pool = make_pool()

    def train(folder: Path, stop: int, resume: str | None = None) -> RunCost:
        callbacks = [MatesCallback(make_reference(), small_config()), Stop(stop)]
        save_state(run(make_arguments(folder, **arguments), callbacks, pool, resume=resume).trainer)
        return run_cost(folder)

    whole = train(tmp_path / "whole", 20)
    train(tmp_path / "resumed", 14)  # past the round at step 12, which runs again from the checkpoint at step 8
    resumed = train(tmp_path / "resumed", 20, str(tmp_path / "resumed" / "checkpoint-8"))
    assert whole.rounds == resumed.rounds == (1, 2, 3)
    assert {name: cost.flops for name, cost in resumed.stages.items()} == {
        name: cost.flops for name, cost in whole.stages.items()
    }
    assert resumed.training.flops == whole.training.flops
    assert whole.seconds is not None


# --- the forecast, in closed form ---

PYTHIA = RunSize(
    num_parameters=405_334_016,
    num_looked_up=50_304 * 1024,
    tokens_per_row=1024,
    batch_rows=512,
    max_steps=50_000,
    num_passages=1024,
    tokens_per_passage=90,
)
EXACT = 1e-12


@pytest.mark.parametrize(
    ("num_parameters", "vocab", "width", "layers", "heads"),
    [
        (PYTHIA.num_parameters, 50_304, 1024, 24, 16),
        (1_011_781_632, 50_304, 2048, 16, 8),
        (6_857_302_016, 50_432, 4096, 32, 32),
    ],
    ids=["410M", "1B", "6.9B"],
)
def test_the_sizes_of_pythia(num_parameters, vocab, width, layers, heads):
    """Those of the published configs; the benchmark of the overhead predicts with the same."""
    with torch.device("meta"):
        config = GPTNeoXConfig(
            vocab_size=vocab, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=heads,
        )  # fmt: skip
        model = GPTNeoXForCausalLM(config)
    assert count_parameters(model) == num_parameters
    assert count_multiplied_parameters(model) == num_parameters - vocab * width


@pytest.mark.parametrize("scope", ["slice", "pool"])
def test_rounds_that_grow_are_counted_as_the_plan_has_them(scope):
    config = MatesConfig(update_steps=1_000, first_round_steps=30, candidate_scope=scope, selection_ratio=0.5)
    size = dataclasses.replace(PYTHIA, max_steps=9_100, pool_rows=20_000_000)
    plan = RunPlan(num_rows=size.pool_rows, batch_rows=size.batch_rows, max_steps=size.max_steps, config=config)
    predicted = predict_cost(size, config)
    assert predicted.num_rounds == len(plan.rounds)
    steps = [planned.to_step - planned.from_step for planned in plan.rounds]
    assert steps == [30, 60, 120, 240, 480, 960, *[1_000] * 6, 195]
    if scope == "slice":
        assert predicted.scored_tokens == 2 * sum(planned.num_rows for planned in plan.rounds) * size.tokens_per_row
    else:
        scored = [size.pool_rows - planned.from_step * size.batch_rows - 2_000 for planned in plan.rounds]
        assert predicted.scored_tokens == sum(scored) * size.tokens_per_row


def test_the_papers_schedule_in_closed_form():
    config = MatesConfig.paper()
    ours = predict_cost(PYTHIA, config)
    training, candidates, reference = 50_000 * 512 * 1024, 80_000 * 1024, 1024 * 90
    assert ours.num_rounds == 4
    assert ours.training_flops == pytest.approx(6 * PYTHIA.multiplied * training, rel=EXACT)
    share = 4 * (2 * (2 * candidates + 4 * 16 * 1024 + 1.25 * reference) + 6 * reference) / (6 * training)
    assert ours.stages["probe"] / ours.training_flops == pytest.approx(share, rel=EXACT)
    theirs = predict_cost(PYTHIA, config, probe="one_step", encoder=Encoder())
    share = 4 * (6 * candidates + 2 * reference * 80_001) / (6 * training)
    assert theirs.stages["probe"] / theirs.training_flops == pytest.approx(share, rel=EXACT)
    assert set(theirs.stages) == {"probe", "fit", "guard", "score"}
    other = predict_cost(PYTHIA, config, probe="loss_reduction", passes=2)
    share = 4 * (2 * (2 * candidates + reference) + 6 * 2 * reference) / (6 * training)
    assert other.stages["probe"] / other.training_flops == pytest.approx(share, rel=EXACT)
    assert "audit" not in other.stages
    judged = 2 * 3 * candidates  # by the model of the round before, which the first has not: the report, and the gap
    assert theirs.stages["guard"] == pytest.approx(2 * Encoder().multiplied * judged, rel=EXACT)
    # Five times the rows that are selected, which the last round has `lead_steps` fewer of.
    scored = 5 * (40_000 - config.lead_steps) * 512 * 1024
    assert ours.scored_tokens == theirs.scored_tokens == scored
    assert theirs.stages["score"] == pytest.approx(2 * Encoder().multiplied * scored, rel=EXACT)
    fit = 4 * 5 * Encoder().multiplied * candidates * (6 * 0.9 + 2 * 0.1)
    assert theirs.stages["fit"] == pytest.approx(fit, rel=EXACT)


def test_our_overhead_at_the_papers_schedule_is_within_one_and_three_percent():
    ours = predict_cost(PYTHIA, MatesConfig.paper())
    assert ours.share_of_training < 0.01
    assert ours.device_seconds_share(0.82) < 0.03
    assert ours.share_of_all < ours.share_of_training


def test_shares_of_wall_clock():
    ours = predict_cost(PYTHIA, MatesConfig.paper())
    on_cpu = sum(ours.stages[name] for name in ("fit", "guard", "score")) / ours.training_flops
    assert ours.device_seconds_share(0.5) == pytest.approx(2 * (ours.share_of_training - on_cpu), rel=1e-9)
    speeds = {"fit_tokens_per_second": 1e6, "score_tokens_per_second": 4e8}
    idle = ours.idle_seconds_share(training_tokens_per_second=1e6, **speeds)
    seconds = 4 * 80_000 * 1024 / 1e6 + ours.scored_tokens / 4e8
    assert idle == pytest.approx(seconds / (ours.trained_tokens / 1e6), rel=1e-9)
    encoder = predict_cost(PYTHIA, MatesConfig.paper(), encoder=Encoder())
    assert encoder.idle_seconds_share(training_tokens_per_second=1e6, **speeds) == 0
    assert encoder.device_seconds_share(1.0) == pytest.approx(encoder.share_of_training)


@pytest.mark.parametrize("max_steps", [10, 26, 27, 61, 100])
@pytest.mark.parametrize("ratio", [0.2, 0.3, 1.0])
def test_rounds_and_scored_rows_are_those_of_the_plan(max_steps, ratio):
    config = MatesConfig(update_steps=20, num_probes=20, selection_ratio=ratio)
    size = dataclasses.replace(PYTHIA, max_steps=max_steps, batch_rows=7)
    predicted = predict_cost(size, config)
    plan = RunPlan(num_rows=10**6, batch_rows=7, max_steps=max_steps, config=config)
    assert predicted.num_rounds == len(plan.rounds)
    rows = sum(num_candidates(planned.num_rows, ratio) for planned in plan.rounds)
    assert predicted.scored_tokens == rows * 1024


@pytest.mark.parametrize("scope", ["slice", "pool"])
def test_passages_that_are_mixed_in_are_no_rows_of_a_pool(scope):
    config = MatesConfig(
        update_steps=20, num_probes=20, selection_ratio=0.5, reference_passes=4, candidate_scope=scope
    )
    size = dataclasses.replace(PYTHIA, max_steps=61, batch_rows=10, num_passages=50, pool_rows=10_000)
    predicted, without = (
        predict_cost(size, each) for each in (config, dataclasses.replace(config, reference_passes=0))
    )
    schedule = PassageSchedule(num_passages=50, passes=4, start=0, num_rows=610, seed=0)
    clock = RowClock(batches_per_epoch=1_000, accumulation=1, batch_rows=10, passages=schedule)
    rounds = RunPlan(num_rows=10_000, batch_rows=10, max_steps=61, config=config, clock=clock).rounds
    if scope == "slice":
        assert predicted.scored_tokens == 2 * sum(planned.num_rows for planned in rounds) * size.tokens_per_row
    else:
        before = [clock.pool_position(planned.from_step) for planned in rounds]
        assert predicted.scored_tokens == sum(10_000 - each - 20 for each in before) * size.tokens_per_row
    assert predicted.training_flops == without.training_flops
    assert (predicted.scored_tokens < without.scored_tokens) == (scope == "slice")


def test_a_pool_is_scored_whole_but_for_what_is_used():
    config = MatesConfig(update_steps=20, num_probes=20, candidate_scope="pool")
    size = dataclasses.replace(PYTHIA, max_steps=61, batch_rows=10)
    with pytest.raises(ValueError, match="must have `pool_rows`"):
        predict_cost(size, config)
    predicted = predict_cost(dataclasses.replace(size, pool_rows=10_000), config)
    # Lead 5: rounds at steps 20 and 40 take effect at 25 and 45.
    assert predicted.scored_tokens == 1024 * ((10_000 - 250 - 20) + (10_000 - 450 - 20))


@pytest.mark.parametrize(
    ("change", "name"),
    [({"max_steps": 0}, "max_steps"), ({"num_looked_up": 405_334_016}, "num_looked_up"), ({"batch_rows": 0}, "batch")],
)
def test_impossible_sizes_are_refused(change, name):
    with pytest.raises(ValueError, match=f"`{name}"):
        dataclasses.replace(PYTHIA, **change)
    with pytest.raises(ValueError, match="relative_utilisation"):
        predict_cost(PYTHIA, MatesConfig.paper()).device_seconds_share(0.0)


def test_one_step_reads_the_reference_once_more_than_there_are_candidates():
    flops = one_step_flops(10, num_candidates=3, num_candidate_tokens=7, num_reference_tokens=11)
    assert flops == 10 * (6 * 7 + 2 * 11 * 4)
