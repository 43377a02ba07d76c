"""The page on clusters: the script for Slurm runs as it stands, on this machine, and the commands are understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.integrations.corpus import Corpus, cluster_scripts, make_corpus

TASKS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Corpus:
    """A corpus and a selector under the names of the page."""
    found = make_corpus(tmp_path_factory.mktemp("clusters"), tiny_tokenizer)
    assert (found.files.name, found.selector.name) == ("corpus", "selector")
    return found


def kept_texts(folder: Path) -> list[str]:
    return sorted(pq.read_table(folder / "kept")["text"].to_pylist())


def wanted_texts(corpus: Corpus) -> list[str]:
    texts = dict(zip(corpus.dataset["id"], corpus.dataset["text"], strict=True))
    return sorted(texts[one] for one in corpus.kept(ratio=0.2))


@pytest.mark.slow
def test_the_script_for_slurm(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    executors = pytest.importorskip("datatrove.executor")
    local, cluster = executors.LocalPipelineExecutor, executors.SlurmPipelineExecutor
    submitted = []

    class OnThisMachine(local):  # type: ignore[misc, valid-type]
        """Takes what Slurm's takes, submits what it depends on first, and runs three tasks in turn."""

        def __init__(self, pipeline: list[Any], **given: Any) -> None:
            cluster(pipeline, **given)  # its arguments are right
            self.submitted_as, tasks = given["job_name"], min(given["tasks"], TASKS)
            depends = given.get("depends")
            super().__init__(pipeline, tasks=tasks, workers=1, logging_dir=given["logging_dir"], depends=depends)

        def run(self) -> Any:
            if self.depends is not None and not self.depends._launched:
                self.depends.run()
            submitted.append(self.submitted_as)
            return super().run()

    monkeypatch.setattr(executors, "SlurmPipelineExecutor", OnThisMachine)
    monkeypatch.chdir(corpus.files.parent)
    script, look = (block for block in cluster_scripts("python") if "datatrove" in block)
    exec(compile(script, "docs/clusters.md", "exec"), {"__name__": "__main__"})
    assert submitted == ["mates-score", "mates-cut", "mates-keep"]
    assert kept_texts(corpus.files.parent) == wanted_texts(corpus)
    found: dict[str, Any] = {}
    exec(compile(look.replace("20_000", "5_000"), "docs/clusters.md", "exec"), found)
    assert 0.9 * 5_000 < found["cut"].cut.num_tokens_kept <= 5_000
    for name in ("kept", "scores", "logs"):
        (corpus.files.parent / name).rename(tmp_path / name)


def test_the_commands_are_understood() -> None:
    from mates_hf.cli import _parser

    commands = re.findall(r'mates-hf score [^\n"]*', "\n".join(cluster_scripts("bash")))
    assert len(commands) == 2
    for command in commands:
        arguments = _parser().parse_args(shlex.split(command)[1:])
        assert (arguments.ratio, arguments.workers) == (0.2, 8)
