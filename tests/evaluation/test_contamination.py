"""Contamination: planted copies are found on both sides and counted, whatever form a side comes in."""

from __future__ import annotations

import json
import logging
import unicodedata
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from mates_hf.data.reference import ReferenceTask
from mates_hf.data.texts import texts_of
from mates_hf.evaluation.contamination import ContaminationReport, check_contamination

NUM_POOL, NUM_REFERENCE, NUM_SCIQ, NUM_PIQA = 60, 20, 15, 10
NGRAM = 13


def random_words(rng: np.random.Generator, num: int, vocabulary: int = 3_000) -> list[str]:
    return [f"w{i}" for i in rng.integers(3, vocabulary, size=num)]


class Planted:
    """Texts that share nothing, but for what is planted: 3 pool rows with 2 of `reference`, 2 with 1 of `sciq`."""

    def __init__(self, words: int = 40, vocabulary: int = 3_000) -> None:
        rng = np.random.default_rng(0)
        sizes = (NUM_POOL, NUM_REFERENCE, NUM_SCIQ, NUM_PIQA)
        self.pool, self.reference, self.sciq, self.piqa = (
            [random_words(rng, words, vocabulary) for _ in range(num)] for num in sizes
        )
        self.pool[4][3 : 3 + NGRAM] = self.reference[2][:NGRAM]
        self.pool[9][-NGRAM:] = self.reference[2][10 : 10 + NGRAM]
        self.pool[50][:NGRAM] = self.reference[19][-NGRAM:]
        self.pool[0][20 : 20 + NGRAM] = self.sciq[14][5 : 5 + NGRAM]
        self.pool[9][:NGRAM] = self.sciq[14][:NGRAM]
        self.pool[30][: NGRAM - 1] = self.sciq[1][: NGRAM - 1]  # one word too few
        self.reference[7][1 : 1 + NGRAM] = self.piqa[6][1 : 1 + NGRAM]
        self.texts = {name: [" ".join(row) for row in getattr(self, name)] for name in ("pool", "reference")}
        self.evaluation = {name: [" ".join(row) for row in getattr(self, name)] for name in ("sciq", "piqa")}


def positions(report: ContaminationReport) -> dict[str, tuple[list[int], list[int]]]:
    return {name: (pair.left_positions.tolist(), pair.right_positions.tolist()) for name, pair in report.pairs.items()}


EXPECTED = {
    "pool/reference": ([4, 9, 50], [2, 19]),
    "pool/sciq": ([0, 9], [14]),
    "pool/piqa": ([], []),
    "reference/sciq": ([], []),
    "reference/piqa": ([7], [6]),
}


@pytest.fixture
def planted() -> Planted:
    return Planted()


def test_planted_copies_are_found_on_both_sides_and_counted(planted: Planted) -> None:
    report = check_contamination(**planted.texts, evaluation=planted.evaluation)
    assert positions(report) == EXPECTED
    assert report.counts == {name: len(left) for name, (left, _) in EXPECTED.items()}
    assert not report.is_clean
    assert report.num_texts == {"pool": 60, "reference": 20, "sciq": 15, "piqa": 10}
    pair = report.pairs["pool/sciq"]
    assert (pair.num_left, pair.num_right) == (60, 15)


def test_what_is_kept_shares_nothing(planted: Planted) -> None:
    report = check_contamination(**planted.texts, evaluation=planted.evaluation)
    assert report.kept("pool").tolist() == sorted(set(range(NUM_POOL)) - {0, 4, 9, 50})
    assert report.kept("sciq").tolist() == list(range(14))
    kept = {side: [texts[i] for i in report.kept(side)] for side, texts in planted.texts.items()}
    evaluation = {side: [texts[i] for i in report.kept(side)] for side, texts in planted.evaluation.items()}
    assert check_contamination(**kept, evaluation=evaluation).is_clean
    with pytest.raises(ValueError, match=r"one of \['piqa', 'pool', 'reference', 'sciq'\], got 'boolq'"):
        report.kept("boolq")


def test_a_warning_a_finding_with_counts_and_none_when_clean(
    planted: Planted, caplog: pytest.LogCaptureFixture
) -> None:
    report = check_contamination(**planted.texts, evaluation=planted.evaluation)
    with caplog.at_level(logging.INFO, logger="mates_hf"):
        report.warn()
        messages = [record.getMessage() for record in caplog.records]
        assert {record.levelname for record in caplog.records} == {"WARNING"}
        assert len(messages) == 3
        assert messages[0].startswith("3 of 60 pool rows share a 13-gram with 2 of 20 reference passages.")
        assert messages[1].startswith("2 of 60 pool rows share a 13-gram with 1 of 15 texts of `sciq`.")
        assert messages[2].startswith("1 of 20 reference passages share a 13-gram with 1 of 10 texts of `piqa`.")
        assert all(message in report.lines() for message in messages)
        caplog.clear()
        clean = check_contamination(pool=planted.texts["pool"], evaluation={"piqa": planted.evaluation["piqa"]})
        clean.warn()
        assert caplog.records == []
    assert clean.is_clean
    assert clean.lines() == ["None of 60 pool rows share a 13-gram with any of 10 texts of `piqa`."]


def test_short_texts_are_counted_and_said(planted: Planted, caplog: pytest.LogCaptureFixture) -> None:
    short = [" ".join(row[: NGRAM - 1]) for row in planted.sciq[:4]]
    copies = [*planted.texts["pool"], *short]  # copies that cannot be seen
    with caplog.at_level(logging.INFO, logger="mates_hf"):
        report = check_contamination(pool=copies, evaluation={"sciq": [*short, *planted.evaluation["sciq"][4:]]})
        assert report.num_short == {"pool": 4, "sciq": 4}
        assert caplog.records == []
    assert report.lines()[-1] == (
        "Too short to be compared (fewer than 13 words): 4 of 64 pool rows, 4 of 15 texts of `sciq`."
    )
    assert report.counts == {"pool/sciq": 2}


ENGLISH = "the quick brown fox jumps over the lazy dog and then it runs away into the deep dark forest again"
WIDE = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in ENGLISH)
CHINESE = (
    "北京是中华人民共和国的首都，是全国的政治中心、文化中心，是世界著名古都和现代化国际城市，"
    "也是全国人民代表大会的办公所在地。"
)
JAPANESE = "東京は日本の首都であり、世界でも有数の規模を持つ都市である。ガラス張りの高層ビルが立ち並ぶ地区もある。"
KOREAN = (
    "서울특별시는 대한민국의 수도이자 최대 도시이다. 한반도 중앙에 있으며 한강을 사이에 두고 남북으로 펼쳐져 있다."
)
VIETNAMESE = "Hà Nội là thủ đô của nước Việt Nam, được hoà bình và nằm ở phía tây bắc của vùng đồng bằng sông Hồng."
THAI = "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย ทำน้ำให้ใสและจำคำไว้"
ARABIC = "القَاهِرَةُ هِيَ عَاصِمَةُ جُمْهُورِيَّةِ مِصْرَ العَرَبِيَّةِ وَأَكْبَرُ مُدُنِهَا وَتَقَعُ عَلَى ضِفَافِ نَهْرِ النِّيلِ فِي شَمَالِ البِلَادِ"
HEBREW = "יְרוּשָׁלַיִם הִיא עִיר הַבִּירָה שֶׁל מְדִינַת יִשְׂרָאֵל וְהִיא אַחַת הֶעָרִים הָעַתִּיקוֹת בָּעוֹלָם כֻּלּוֹ וְיֵשׁ בָּהּ"
HINDI = "नई दिल्ली भारत की राजधानी है और यह शहर यमुना नदी के किनारे पर बसा हुआ एक बहुत बड़ा नगर है"
GERMAN = "Die Straße führt über den großen Fluss, und außerdem weiß niemand mehr, wann die Brücke gebaut worden ist"


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def without_marks(text: str) -> str:
    return "".join(c for c in nfd(text) if not unicodedata.combining(c))


COPIES = {  # as it stands in the reference, and in the pool
    "full width": (ENGLISH, WIDE),
    "soft hyphens": (ENGLISH, "\u00ad".join(ENGLISH)),
    "zero-width spaces": (ENGLISH, "\u200b".join(ENGLISH)),
    "no-break spaces": (ENGLISH, ENGLISH.replace(" ", "\u00a0")),
    "Chinese": (CHINESE, f"前言。{CHINESE}后记。"),
    "Chinese, spaced": (CHINESE, " ".join(CHINESE)),
    "Chinese, lines": (CHINESE, "\n".join(CHINESE[i : i + 10] for i in range(0, len(CHINESE), 10))),
    "Japanese": (JAPANESE, f"序文。{nfd(JAPANESE)}"),
    "Korean, decomposed": (KOREAN, nfd(KOREAN)),
    "Korean, no spaces": (KOREAN, KOREAN.replace(" ", "")),
    "Vietnamese": (VIETNAMESE, nfd(VIETNAMESE).replace(nfd("hoà"), nfd("hòa"))),
    "Vietnamese, no marks": (VIETNAMESE, without_marks(VIETNAMESE)),
    "Thai": (THAI, THAI.replace("ำ", "\u0e4d\u0e32")),
    "Thai, words apart": (THAI, "\u200b".join(THAI[i : i + 9] for i in range(0, len(THAI), 9))),
    "Arabic": (ARABIC, without_marks(ARABIC).replace("ا", "ـا")),
    "Hebrew": (HEBREW, without_marks(HEBREW)),
    "Hindi": (HINDI, nfd(HINDI).replace("क", "क\u200d")),
    "German": (GERMAN, GERMAN.upper()),
    "mixed": (f"API の説明: {JAPANESE[:20]} uses the function", f"ＡＰＩの説明：{JAPANESE[:20]}uses  the\nfunction"),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_found_in_every_script_and_form(name) -> None:
    reference, copy = COPIES[name]
    others = [
        text for key, (text, _) in COPIES.items() if key.split(",")[0] != name.split(",")[0] and text != reference
    ]
    report = check_contamination(pool=[*others, f"{copy} end", "something else"], reference=[reference])
    assert positions(report) == {"pool/reference": ([len(others)], [0])}
    assert not report.is_clean
    assert len(report.findings()) == 1


def test_letters_of_a_name_are_no_copy() -> None:
    """What recurs in unrelated text (a long name, a proverb of eight letters, a date) is shorter than a run."""
    first = "中华人民共和国教育部公布了今年的招生计划，学海无涯苦作舟，详见附件一。"
    second = "昨天，中华人民共和国教育部的网站无法打开。俗话说：学海无涯苦作舟。"
    report = check_contamination(pool=[first], reference=[second])
    assert report.is_clean
    assert report.num_short == {"pool": 0, "reference": 0}


@pytest.mark.parametrize(
    "short", ["Paris is the capital of France.", "北京是首都。", "กรุงเทพฯ เป็นเมืองหลวง", "", "。。。"]
)
def test_what_is_too_short_is_not_clean_and_all_say_so(short, planted: Planted, caplog: Any) -> None:
    passages = [*planted.texts["reference"][3:6], short]
    report = check_contamination(pool=[planted.texts["pool"][1], short], reference=passages)
    assert not any(report.counts.values())
    assert not report.is_clean
    assert report.not_compared == {"reference": 1}
    told = "1 of 4 reference passages have fewer than 13 words"
    assert told in report.findings()[0]
    assert report.findings()[0] in report.lines()
    with caplog.at_level(logging.WARNING, "mates_hf"):
        report.warn()
        assert told in caplog.text
        caplog.clear()
        assert report.kept("pool").tolist() == [0, 1]
        assert "1 of 4 reference passages" in caplog.text
        caplog.clear()
        assert report.kept("reference", drop_short=True).tolist() == [0, 1, 2]
        assert not caplog.records
    kept = [passages[i] for i in report.kept("reference", drop_short=True)]
    assert check_contamination(pool=[planted.texts["pool"][1], short], reference=kept).is_clean  # the advice


def test_a_pool_of_nothing_but_short_rows_is_not_clean(planted: Planted) -> None:
    report = check_contamination(pool=["too short", "这也太短"], reference=planted.texts["reference"])
    assert not report.is_clean
    assert report.not_compared == {"pool": 2}
    assert report.findings()[0].startswith("2 of 2 pool rows have fewer than 13 words")


class TorchDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows by number only, as a plain torch dataset has them."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def test_every_form_of_a_side_gives_the_same_report(tiny_tokenizer: Any) -> None:
    planted = Planted(vocabulary=64)
    texts, evaluation = planted.texts["pool"], planted.evaluation
    rows = [{"body": text, "id": i} for i, text in enumerate(texts)]
    ids = [{"input_ids": [*tiny_tokenizer(text)["input_ids"], 2, 0, 0]} for text in texts]
    # An end of text and padding are no words.
    assert list(texts_of(ids, "pool", tokenizer=tiny_tokenizer)) == texts
    pools = [
        rows,
        datasets.Dataset.from_list(rows),
        datasets.Dataset.from_list(rows).to_iterable_dataset(),
        (row for row in rows),
        TorchDataset(rows),
        ids,
        datasets.Dataset.from_list(ids),
        datasets.Dataset.from_list(ids).with_format("torch"),
        datasets.Dataset.from_list(ids).to_iterable_dataset(),
    ]
    dataset = datasets.Dataset.from_dict({"body": planted.texts["reference"]})
    task = ReferenceTask.from_dataset(dataset, tiny_tokenizer, text_column="body")
    assert list(texts_of(task, "reference", tokenizer=tiny_tokenizer)) == planted.texts["reference"]
    expected = check_contamination(**planted.texts, evaluation=evaluation)
    assert positions(expected) == EXPECTED
    for pool in pools:
        report = check_contamination(
            pool=pool, reference=task, evaluation=evaluation, tokenizer=tiny_tokenizer, text_column="body"
        )
        assert positions(report) == EXPECTED
        assert report.num_texts == expected.num_texts
    assert positions(check_contamination(reference=dataset, evaluation=evaluation, text_column="body")) == {
        name: pair for name, pair in EXPECTED.items() if not name.startswith("pool")
    }


def test_first_pool_rows_only(planted: Planted) -> None:
    report = check_contamination(**planted.texts, max_pool_rows=10)
    assert positions(report) == {"pool/reference": ([4, 9], [2])}
    assert report.lines()[0].startswith("2 of the first 10 pool rows share")
    assert report.kept("pool").tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    endless = ({"text": text} for _ in iter(int, 1) for text in planted.texts["pool"])
    assert check_contamination(pool=endless, reference=planted.texts["reference"], max_pool_rows=60).counts == {
        "pool/reference": 3
    }
    whole = check_contamination(**planted.texts, max_pool_rows=NUM_POOL)
    assert whole.lines()[0].startswith("3 of 60 pool rows share")


def task_over(folder: Any, name: str, **splits: list[str]) -> Any:
    """An lm-eval task over local files, whose target is the last word."""
    from lm_eval.tasks import TaskManager

    files = {}
    for split, texts in splits.items():
        path = folder / f"{name}-{split}.json"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        files[split] = str(path)
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        **{f"{'training' if split == 'train' else split}_split": split for split in splits},
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [{"metric": "acc"}],
    }
    return TaskManager(include_defaults=False).load(config)["tasks"][name]


def test_lm_eval_tasks_are_read_as_evaluated_and_known_again(
    tmp_path: Any, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    planted = Planted(vocabulary=64)
    sciq, reference = planted.evaluation["sciq"], planted.texts["reference"]
    # The evaluated split is the test split where there is one: the copies in the training split do not count.
    with_test = task_over(tmp_path, "sciq_local", train=reference, validation=reference[:1], test=sciq)
    no_test = task_over(tmp_path, "piqa_local", train=sciq, validation=planted.evaluation["piqa"])
    trained_on, same = (
        ReferenceTask.from_lm_eval(with_test, tiny_tokenizer, split=split) for split in ("train", "test")
    )
    report = check_contamination(
        pool=planted.texts["pool"],
        reference=trained_on,
        evaluation={"sciq_local": with_test, "piqa_local": no_test},
        tokenizer=tiny_tokenizer,
    )
    assert list(positions(report).values()) == list(EXPECTED.values())
    assert report.also_evaluated == {"sciq_local": False}
    report.warn()
    assert "also evaluated, as `sciq_local`, on another split" in caplog.text

    again = check_contamination(reference=same, evaluation={"mine": with_test}, tokenizer=tiny_tokenizer)
    assert again.also_evaluated == {"mine": True}
    assert again.counts == {"reference/mine": NUM_SCIQ}
    assert "on the same split" in again.findings()[-1]
    unknown = check_contamination(reference=same, evaluation={"sciq_local": sciq}, tokenizer=tiny_tokenizer)
    assert unknown.also_evaluated == {"sciq_local": None}
    other = check_contamination(reference=same, evaluation={"piqa_local": no_test}, tokenizer=tiny_tokenizer)
    assert other.also_evaluated == {}
    assert other.is_clean


def test_a_reference_that_is_evaluated_is_no_clean_report_even_without_shared_text(tiny_tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(random_words(rng, 20, 64))}]
    task = ReferenceTask.from_dataset(rows, tiny_tokenizer, text_column="text", name="sciq")
    other = [" ".join(random_words(rng, 20, 64))]
    report = check_contamination(reference=task, evaluation={"sciq": other}, tokenizer=tiny_tokenizer)
    assert report.counts == {"reference/sciq": 0}
    assert not report.is_clean
    assert len(report.findings()) == 1


def test_wrong_input_says_what_there_is(planted: Planted, tiny_tokenizer: Any) -> None:
    texts = planted.texts["pool"]
    rows = [{"body": text, "id": 0} for text in texts]
    ids = [{"input_ids": [3, 4]}]

    def check(match: str, kind: type[Exception] = ValueError, **arguments: Any) -> None:
        with pytest.raises(kind, match=match):
            check_contamination(**arguments)

    check(r"got 'text' and the columns \['body', 'id'\] in row 0 of `pool`", pool=rows, reference=texts)
    check("`tokenizer` must be .* row 0 of `pool`, got NoneType", pool=ids, reference=texts)
    task = ReferenceTask.from_dataset(ids, input_ids_column="input_ids")
    check("`tokenizer` must be .* `reference`, got NoneType", pool=texts, reference=task)
    check("must hold texts, got int in row 1 of", pool=[{"text": "a"}, {"text": 3}], reference=texts)
    check("Two sides to compare", pool=texts)
    check("Two sides to compare", evaluation={"a": texts, "b": texts})
    check("`reference` must have rows, got none", pool=texts, reference=[])
    check("`pool` must have rows, got none", pool=iter(()), reference=texts)
    check("`max_pool_rows` must be at least 1", pool=texts, reference=texts, max_pool_rows=0)
    check("must not be called 'pool'", pool=texts, evaluation={"pool": texts})
    check("`evaluation` must be a mapping", TypeError, pool=texts, evaluation=texts)
    check(r"`evaluation\['sciq'\]` must be texts .* got str", TypeError, pool=texts, evaluation={"sciq": "a text"})
    check("one split of a dataset", TypeError, pool=datasets.DatasetDict(), reference=texts)
    check("in row 0 of `reference`, got list", TypeError, pool=texts, reference=[[1, 2, 3]])
