"""What is read of a row is what the run's own loss says of it: readings, ways to feed rows, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
)

from mates_hf import DirectionalProbe, ReferenceTask
from mates_hf.data.batches import PLAIN
from mates_hf.data.collated import forked_rng
from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import TokenRows
from mates_hf.errors import InfluenceError, UnsupportedSettingError
from mates_hf.influence.passes import mean_loss_gradient, token_losses
from mates_hf.influence.reading import find_reading
from mates_hf.influence.run_loss import RunLoss

ROUNDING = 1e-5
CURVATURE = 1e-3  # labels' losses are means of those at θ + ε u and θ − ε u
VOCAB = 64
RNG = np.random.default_rng(0)
ROWS = [RNG.integers(5, VOCAB, 6 + i % 7).tolist() for i in range(40)]
EVEN = [row[:6] for row in ROWS]
REFERENCE = ReferenceTask.from_dataset(Dataset.from_dict({"ids": ROWS[:8]}), input_ids_column="ids")
TINY = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32}  # fmt: skip


def seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def gpt2(**changes: Any) -> Any:
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=2,
                        eos_token_id=2, **changes)  # fmt: skip
    return seeded(lambda: GPT2LMHeadModel(config))


def bart() -> Any:
    config = BartConfig(vocab_size=VOCAB, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
                        pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64)  # fmt: skip
    return seeded(lambda: BartForCausalLM(config))


def bert() -> Any:
    return seeded(lambda: BertForMaskedLM(BertConfig(**TINY)))


def t5() -> Any:
    config = T5Config(vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2,
                      decoder_start_token_id=0)  # fmt: skip
    return seeded(lambda: T5ForConditionalGeneration(config))


class Own(LlamaForCausalLM):
    """A Llama whose loss is `kind`, on the labels as they stand."""

    kind = "unshifted"

    def forward(self, input_ids=None, attention_mask=None, labels=None, loss_mask=None, **kwargs):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if labels is None:
            return output
        shifts = self.kind != "unshifted"
        logits, labels = (output.logits[:, :-1], labels[:, 1:]) if shifts else (output.logits, labels)
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        counts = (labels != -100).flatten().float()
        if self.kind == "z-loss":
            nll = nll + 0.1 * torch.logsumexp(logits, -1).flatten() ** 2
        elif self.kind == "smoothed":
            nll = 0.7 * nll - 0.3 * logits.log_softmax(-1).mean(-1).flatten()
        elif loss_mask is not None:
            counts = loss_mask[:, 1:].flatten().float()
        output.loss = (nll * counts).sum() / counts.sum().clamp(min=1)
        if self.kind == "contrastive":
            output.loss = output.loss * len(labels) ** 2
        return output


def own(make_tiny_model: Callable[..., Any], kind: str) -> Any:
    model = make_tiny_model().eval()
    model.__class__ = type("Own", (Own,), {"kind": kind})
    return model


def trained(model: Any, batch: dict[str, torch.Tensor]) -> torch.optim.Optimizer:
    """An optimizer after a step on a batch; the model is left in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def right_padded(rows: list[dict[str, Any]], side: str = "right", positions: bool = False) -> dict[str, torch.Tensor]:
    """Every column padded to the longest row, with a mask."""
    length = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> torch.Tensor:
        parts = [([value] * (length - len(row[key])), list(row[key])) for row in rows]
        return torch.tensor([pad + body if side == "left" else body + pad for pad, body in parts])

    batch = {key: filled(key, -100 if key == "labels" else 0) for key in rows[0]}
    batch["attention_mask"] = (batch["labels"] != -100).long()
    if positions:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return batch


def losses_alone(model: Any, dataset: Any, collator: Any) -> np.ndarray:
    """The model's own loss of each row, collated alone as a probe collates it."""
    found = []
    for i in range(len(dataset)):
        with forked_rng(i):
            batch = collator([dataset[i]])
        with torch.no_grad():
            found.append(float(model(**batch).loss))
    return np.array(found)


def check(model: Any, dataset: Any, collator: Any, reference: ReferenceTask = REFERENCE) -> Any:
    """Labels of every row; their losses are the model's own, row by row."""
    pool = CandidatePool(dataset, collator)
    optimizer = trained(model, collator([dataset[i] for i in range(4)]))
    expected = losses_alone(model, dataset, collator)
    labels = DirectionalProbe().measure(model, optimizer, reference, pool)
    rows = pool.candidates()
    values = np.split(token_losses(model, rows, loss=pool.reading.loss), np.cumsum(rows.num_targets)[:-1])
    for i in labels.candidate_id:
        assert values[i].mean() == pytest.approx(expected[i], abs=ROUNDING, rel=ROUNDING)
    np.testing.assert_allclose(labels.loss, expected[labels.candidate_id], atol=CURVATURE)
    assert labels.info["reading"] == pool.reading.to_dict()
    return labels, pool.reading


def columns(**more: Any) -> Dataset:
    return Dataset.from_dict({"input_ids": ROWS, "labels": ROWS, **more})


def test_a_loss_that_shifts_is_read_in_batches(make_tiny_model: Callable[..., Any]) -> None:
    labels, reading = check(make_tiny_model().eval(), columns(), right_padded)
    assert (reading.likelihood, reading.loss, reading.feed) == ("shifted", None, "plain")
    assert labels.num_tokens.tolist() == [len(row) - 1 for row in ROWS]


@pytest.mark.parametrize("kind", ["bart", "llama"])
def test_a_loss_that_does_not_shift(kind: str, make_tiny_model: Callable[..., Any]) -> None:
    model = bart() if kind == "bart" else own(make_tiny_model, "unshifted")
    dataset = Dataset.from_dict({"input_ids": [r[:-1] for r in ROWS], "labels": [r[1:] for r in ROWS]})
    labels, reading = check(model, dataset, right_padded)
    assert (reading.likelihood, reading.loss, reading.looks_ahead) == ("unshifted", None, False)
    assert labels.num_tokens.tolist() == [len(row) - 1 for row in ROWS]
    # What influence models read is the whole text, and each trained token stands behind the one before it.
    pool = CandidatePool(dataset, right_padded)
    pool.reading = reading
    assert [pool.token_rows([i]).values.tolist() for i in range(3)] == ROWS[:3]
    plain = DirectionalProbe(loss=lambda m, b: m(**b).loss)
    optimizer = trained(model, right_padded([dataset[0]]))
    by_loss, by_token = (probe.measure(model, optimizer, REFERENCE, pool) for probe in (plain, DirectionalProbe()))
    assert spearmanr(by_loss.influence, by_token.influence).statistic > 0.999
    as_texts = DirectionalProbe().measure(model, optimizer, REFERENCE, TokenRows.from_lists(ROWS))
    np.testing.assert_allclose(as_texts.loss, by_token.loss, atol=ROUNDING)
    np.testing.assert_allclose(as_texts.influence, by_token.influence, rtol=1e-2, atol=1e-6)


def test_a_masked_language_model(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = tiny_tokenizer
    if tokenizer.mask_token is None:
        tokenizer.mask_token = tokenizer.unk_token or tokenizer.eos_token
    model = seeded(lambda: BertForMaskedLM(BertConfig(**TINY)))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.4)
    dataset = Dataset.from_dict({"input_ids": EVEN})
    labels, reading = check(model, dataset, collator)
    assert (reading.likelihood, reading.looks_ahead, reading.feed) == ("unshifted", True, "row")
    rows = CandidatePool(dataset, collator)
    rows.reading = reading
    assert rows.token_rows(labels.candidate_id).num_targets.tolist() == labels.num_tokens.tolist()
    assert rows.token_rows([3]).values.tolist()[1:] == EVEN[3]  # what was there before it was masked


@pytest.mark.parametrize(("build", "ahead"), [(bart, False), (bert, True)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_model_that_looks_ahead_is_told_before_it_has_learnt_to(build: Any, ahead: bool, kind: torch.dtype) -> None:
    """With small weights a token says nearly the same whatever is behind it: less than rounding is allowed for."""
    model = build().to(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dataset = Dataset.from_dict({"input_ids": [r[:-1] for r in ROWS], "labels": [r[1:] for r in ROWS]})
    reading = find_reading(model, CandidatePool(dataset, right_padded))
    assert (reading.likelihood, reading.looks_ahead) == ("unshifted", ahead)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_of_labels_under_other_names_is_found() -> None:
    class Answers(nn.Module):
        """Its forward names no `labels`, as those of transformers 4 that find answers in a text."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = BertForQuestionAnswering(BertConfig(**TINY))

        def forward(self, input_ids, attention_mask=None, start_positions=None, end_positions=None):
            return self.inner(input_ids=input_ids, start_positions=start_positions, end_positions=end_positions)

    where = {"start_positions": [1] * len(EVEN), "end_positions": [3] * len(EVEN)}
    dataset = Dataset.from_dict({"input_ids": EVEN, **where})
    reading = find_reading(seeded(Answers), CandidatePool(dataset, default_data_collator))
    assert reading.to_dict()["candidates"] == "row by row: the model's own loss"


def test_router_losses_that_a_forward_adds_by_default_are_left_out() -> None:
    class Routed(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, output_router_logits=True, **kwargs):
            output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
            if labels is not None and output_router_logits:
                output.loss = output.loss + len(input_ids)
            return output

    config = LlamaConfig(**TINY, max_position_embeddings=64)
    model = seeded(lambda: Routed(config))
    reading = find_reading(model, CandidatePool(columns(), right_padded))
    assert (reading.likelihood, reading.loss) == ("shifted", None)
    assert not model._forward_pre_hooks
    peft = pytest.importorskip("peft")
    adapted = seeded(lambda: peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])))
    assert find_reading(adapted, CandidatePool(columns(), right_padded)).loss is None


def test_an_encoder_decoder(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_dict({"input_ids": [row[:4] for row in ROWS], "labels": [row[4:] for row in ROWS]})
    collator = DataCollatorForSeq2Seq(tiny_tokenizer)
    pairs = Dataset.from_dict({"ids": ROWS[:8], "targets": [[-100] * 4 + row[4:] for row in ROWS[:8]]})
    reference = ReferenceTask.from_dataset(pairs, input_ids_column="ids", labels_column="targets")
    labels, reading = check(t5(), dataset, collator, reference)
    assert (reading.likelihood, reading.encoder_decoder) == ("unshifted", True)
    assert labels.num_tokens.tolist() == [len(row) - 4 for row in ROWS]
    with pytest.raises(UnsupportedSettingError, match=r'loss_on="completion"'):
        check(t5(), dataset, collator)


def test_a_class_a_row() -> None:
    model = seeded(lambda: BertForSequenceClassification(BertConfig(**TINY, num_labels=3)))
    dataset = Dataset.from_dict({"input_ids": EVEN, "labels": [i % 3 for i in range(len(EVEN))]})
    optimizer = trained(model, default_data_collator([dataset[i] for i in range(4)]))
    pool = CandidatePool(dataset, default_data_collator)
    probe = DirectionalProbe(reference_loss=lambda m, b: m(b["input_ids"]).logits.logsumexp(-1).mean())
    pool.reading = find_reading(model, pool)
    assert (pool.reading.likelihood, pool.reading.loss) == ("classes", None)
    labels = probe.measure(model, optimizer, REFERENCE, pool)
    np.testing.assert_allclose(labels.loss, losses_alone(model, dataset, default_data_collator), atol=ROUNDING)
    assert set(labels.num_tokens.tolist()) == {1}
    with pytest.raises(UnsupportedSettingError, match="one label a row"):
        DirectionalProbe().measure(model, optimizer, REFERENCE, pool)


@pytest.mark.parametrize("kind", ["z-loss", "smoothed"])
def test_a_loss_that_is_no_likelihood_is_measured_row_by_row(kind: str, make_tiny_model: Callable[..., Any]) -> None:
    labels, reading = check(own(make_tiny_model, kind), columns(), right_padded)
    assert reading.loss is not None
    assert reading.likelihood == "shifted"
    assert reading.to_dict()["candidates"] == "row by row: the model's own loss"


def test_a_mask_of_the_loss_reaches_the_probe_though_few_rows_show_it(make_tiny_model: Callable[..., Any]) -> None:
    masks = [[1] * len(row) for row in ROWS * 30]
    masks[777] = [0, 0, 0, *masks[777][3:]]
    dataset = Dataset.from_dict({"input_ids": ROWS * 30, "labels": ROWS * 30, "loss_mask": masks})
    model = own(make_tiny_model, "masked")
    pool = CandidatePool(dataset, right_padded)
    reading = find_reading(model, pool)
    assert (reading.mask_key, reading.loss, reading.likelihood) == ("loss_mask", None, "shifted")
    pool.reading = reading
    optimizer = trained(model, right_padded([dataset[i] for i in range(4)]))
    labels = DirectionalProbe().measure(model, optimizer, REFERENCE, pool.select([776, 777]))
    expected = losses_alone(model, dataset.select([776, 777]), right_padded)
    np.testing.assert_allclose(labels.loss, expected, atol=ROUNDING)
    assert labels.num_tokens[1] == len((ROWS * 30)[777]) - 3
    assert pool.token_rows([777]).num_targets.tolist() == [labels.num_tokens[1]]


@pytest.mark.parametrize("types", ["zeros", "mixed"])
def test_token_types_reach_the_model_from_pool_and_reference(types: str) -> None:
    given = [[0 if types == "zeros" else j % 2 for j in range(len(row))] for row in ROWS]
    model = gpt2()
    _, reading = check(model, columns(token_type_ids=given), right_padded)
    assert reading.feed == "collated"
    seen: list[set[str]] = []
    handle = model.register_forward_pre_hook(lambda m, a, kw: seen.append(set(kw)), with_kwargs=True)
    check(model, columns(token_type_ids=given), right_padded)
    handle.remove()
    if types == "zeros":  # the reference has no such column: its rows get what every row of the pool has
        assert all("token_type_ids" in keys for keys in seen)


@pytest.mark.parametrize("positions", [False, True])
def test_padding_on_the_left(positions: bool) -> None:
    """Absolute positions move with padding, unless the collator counts them: such rows are measured alone."""

    def collator(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return right_padded(rows, side="left", positions=positions)

    _, reading = check(gpt2(), columns(), collator)
    assert reading.feed == ("row" if positions else "plain")


def test_router_losses_are_left_out() -> None:
    config = MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
                           output_router_logits=True, router_aux_loss_coef=0.1)  # fmt: skip
    model = seeded(lambda: MixtralForCausalLM(config))
    reading = find_reading(model, CandidatePool(columns(), right_padded))
    assert (reading.likelihood, reading.loss) == ("shifted", None)
    assert config.output_router_logits is True


def test_prompt_tuning_and_its_virtual_tokens(make_tiny_model: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with torch.random.fork_rng():
        model = peft.get_peft_model(make_tiny_model(), config).eval()
    labels, reading = check(model, columns(), right_padded)
    assert reading.loss is None
    assert labels.num_tokens.tolist() == [len(row) for row in ROWS]  # a virtual token predicts the first one
    pool = CandidatePool(columns(), right_padded)
    pool.reading = reading
    assert pool.token_rows().num_targets.tolist() == labels.num_tokens.tolist()


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_readings_are_told_apart_where_the_model_says_the_same_of_every_token(
    noise: float, make_tiny_model: Callable[..., Any]
) -> None:
    for model, likelihood in ((make_tiny_model().eval(), "shifted"), (own(make_tiny_model, "unshifted"), "unshifted")):
        with torch.no_grad():
            model.lm_head.weight.mul_(noise)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert find_reading(model, CandidatePool(columns(), right_padded)).likelihood == likelihood
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_that_rows_do_not_make_up_is_refused_with_both_numbers(make_tiny_model: Callable[..., Any]) -> None:
    model = own(make_tiny_model, "contrastive")
    with pytest.raises(UnsupportedSettingError, match=r"together is \d+\.\d+.*one by one \d+\.\d+.*loss=\.\.\."):
        find_reading(model, CandidatePool(columns(), right_padded))
    # What the error advises works.
    optimizer = trained(model, right_padded([columns()[0]]))
    probe = DirectionalProbe(loss=lambda m, b: m(**b).loss, reference_loss=lambda m, b: m(**b).loss)
    labels = probe.measure(model, optimizer, REFERENCE, CandidatePool(columns(), right_padded))
    np.testing.assert_allclose(labels.loss, losses_alone(model, columns(), right_padded), atol=ROUNDING)


def test_weights_of_the_loss_are_refused_though_some_batches_hide_them(make_tiny_model: Callable[..., Any]) -> None:
    """Rows of one weight make up their batch; rows of several do not, whichever are looked at first."""
    weights = [[1 + (i % 7 == 0)] * len(row) for i, row in enumerate(ROWS)]
    with pytest.raises(UnsupportedSettingError, match=r"together is \d+\.\d+.*one by one \d+\.\d+"):
        find_reading(own(make_tiny_model, "masked"), CandidatePool(columns(loss_mask=weights), right_padded))


def test_a_reference_loss_that_is_not_the_models_is_refused(make_tiny_model: Callable[..., Any]) -> None:
    class Odd(LlamaForCausalLM):
        """Trains a token of some rows twice: those of the reference."""

        def forward(self, input_ids=None, labels=None, **kwargs):
            output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
            if labels is not None and bool((input_ids == 3).any()):
                output.loss = output.loss * 2
            return output

    model = make_tiny_model().eval()
    model.__class__ = Odd
    optimizer = trained(model, right_padded([columns()[0]]))
    threes = ReferenceTask.from_dataset(Dataset.from_dict({"ids": [[3, 4, 5, 6]] * 4}), input_ids_column="ids")
    with pytest.raises(UnsupportedSettingError, match=r"the model's is \d+\.\d+.*is \d+\.\d+.*reference_loss="):
        DirectionalProbe().measure(model, optimizer, threes, columns())


def test_a_model_whose_logits_have_another_shape_is_refused_by_name() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Embedding(VOCAB, VOCAB)

        def forward(self, input_ids):
            return self.head(input_ids[:, ::2])

    model = Halves()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([[5, 6]])).sum().backward()
    optimizer.step()
    with pytest.raises(UnsupportedSettingError, match=r"logits of the shape of its labels \(1, 6\).*got \(1, 3, 64\)"):
        DirectionalProbe().measure(model, optimizer, REFERENCE, Dataset.from_dict({"input_ids": EVEN}))


def test_a_run_whose_loss_is_not_finite_is_named(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model().eval()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(InfluenceError, match="must be finite"):
        find_reading(model, CandidatePool(columns(), right_padded))


def test_shift_labels_are_read_at_their_own_position(make_tiny_model: Callable[..., Any]) -> None:
    def collator(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = right_padded(rows)
        return {**batch, "shift_labels": nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)}

    labels, reading = check(make_tiny_model().eval(), columns(), collator)
    assert reading.likelihood == "unshifted"
    assert labels.num_tokens.tolist() == [len(row) - 1 for row in ROWS]


def test_a_random_collator_is_measured_a_row_at_a_time_and_twice_the_same(make_tiny_model: Callable[..., Any]) -> None:
    def drops(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = right_padded(rows)
        batch["labels"][torch.rand(batch["labels"].shape) < 0.3] = -100
        return batch

    model = make_tiny_model().eval()
    optimizer = trained(model, right_padded([columns()[0]]))
    first, again = (
        DirectionalProbe().measure(model, optimizer, REFERENCE, CandidatePool(columns(), drops)) for _ in range(2)
    )
    assert np.array_equal(first.influence, again.influence)
    expected = losses_alone(model, columns(), drops)
    np.testing.assert_allclose(first.loss, expected[first.candidate_id], atol=ROUNDING)


def test_a_loss_made_outside_of_the_model(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model().eval()

    def half(module: Any, batch: dict[str, Any]) -> torch.Tensor:
        return module(**batch).loss / 2

    reading = find_reading(model, CandidatePool(columns(), right_padded), RunLoss(half, "half of it"))
    assert reading.loss is not None
    assert reading.likelihood == "shifted"
    same = RunLoss(lambda module, batch: module(**batch).loss, "the same")
    assert find_reading(model, CandidatePool(columns(), right_padded), same).loss is None


@pytest.mark.slow
def test_many_targets_under_float16_rank_as_float32(make_tiny_model: Callable[..., Any]) -> None:
    """The gradient of a mean over 20,000 targets underflows in float16; that of their sum does not."""
    model = make_tiny_model(vocab_size=2_048, hidden_size=64).eval()
    optimizer = trained(model, {"input_ids": torch.arange(60)[None], "labels": torch.arange(60)[None]})
    rng = np.random.default_rng(1)
    rows = TokenRows.from_lists(rng.integers(3, 2_048, (330, 62)))
    reference = ReferenceTask(name="many", rows=rows)
    assert reference.num_targets > 20_000
    candidates = TokenRows.from_lists(rng.integers(3, 2_048, (60, 24)))
    exact = DirectionalProbe().measure(model, optimizer, reference, candidates)
    with torch.autocast("cpu", torch.float16):
        mean_loss_gradient(model, rows.take(np.arange(4)))
        half = DirectionalProbe().measure(model, optimizer, reference, candidates)
    assert spearmanr(exact.influence, half.influence).statistic > 0.99


def test_labels_and_ids_beyond_the_model_are_named(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model().eval()
    rows = TokenRows.from_lists([[3, 4, 5]], [[-100, 4, VOCAB]])
    with pytest.raises(ValueError, match=r"Labels must be -100 or 0 to 63.*got 4 to 64"):
        token_losses(model, rows)
    dataset = Dataset.from_dict({"input_ids": [[3, VOCAB]], "labels": [[3, 4]], "token_type_ids": [[0, 0]]})
    pool = CandidatePool(dataset, right_padded)
    with pytest.raises(ValueError, match="below the model's 64"):
        token_losses(model, pool.collated(np.array([0]), PLAIN))


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_token_rows_of_any_integers_are_compared(kind: type, make_tiny_model: Callable[..., Any]) -> None:
    rows = TokenRows.from_lists(ROWS)
    rows = TokenRows(values=rows.values.astype(kind), offsets=rows.offsets)
    model = make_tiny_model().eval()
    optimizer = trained(model, right_padded([columns()[0]]))
    labels = DirectionalProbe().measure(model, optimizer, REFERENCE, rows)
    assert labels.info["reading"]["own_loss"] == pytest.approx(labels.info["reading"]["read_loss"], abs=1e-4)


def test_a_loss_without_labels(make_tiny_model: Callable[..., Any]) -> None:
    def entropy(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        assert "labels" not in batch
        return torch.distributions.Categorical(logits=model(batch["input_ids"]).logits).entropy().mean()

    def ids_only(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

    pool = CandidatePool(Dataset.from_dict({"input_ids": EVEN}), ids_only)
    model = make_tiny_model().eval()
    pool.reading = find_reading(model, pool, RunLoss(entropy, "an entropy", reads_all=True))
    optimizer = trained(model, right_padded([columns()[0]]))
    labels = DirectionalProbe().measure(model, optimizer, REFERENCE, pool)
    assert labels.num_tokens.tolist() == [5] * len(EVEN)
