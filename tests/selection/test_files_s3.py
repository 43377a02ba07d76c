"""Scoring of files on S3: in and out, by two processes, against a real server of its protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mates_hf.errors import MatesError, RoundMismatchError
from mates_hf.selection import score_file
from mates_hf.selection.file_scoring import score_files
from mates_hf.selection.files import plan
from tests.selection.files_kit import content_of, outputs, text_selector, write_corpus

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")
pytestmark = pytest.mark.slow


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # those of an earlier server
    fs = fsspec.filesystem("s3")
    for bucket in ("corpus", "kept"):
        fs.makedirs(bucket, exist_ok=True)
    yield fs
    server.stop()


def test_files_on_s3(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "_BUNDLE_FILES", 2)
    selector = text_selector()
    write_corpus(tmp_path / "in", 60)
    score_files(selector, tmp_path / "in", tmp_path / "whole", ratio=0.3)
    s3.put(f"{tmp_path}/in/", "corpus/in/", recursive=True)
    given = selector, "s3://corpus/in", "s3://kept/out"
    with monkeypatch.context() as patched:  # it breaks after one bundle
        patched.setattr("mates_hf.selection.files.run._write_one", _failing)
        with pytest.raises(MatesError, match="on its way"):
            score_files(*given, ratio=0.3)
    assert outputs("s3://kept/out") == []
    report = score_files(*given, ratio=0.3, workers=2)
    assert report.gb_per_hour is None
    s3.invalidate_cache()
    s3.get("kept/out/", f"{tmp_path}/out/", recursive=True)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")
    by_pattern = score_files(selector, "s3://corpus/in/**/*.parquet", tmp_path / "local", k=5)  # into a folder here
    assert (by_pattern.files, by_pattern.rows_kept) == (2, 5)
    s3.pipe_file("corpus/in/a.jsonl", b'{"text": "w3"}\n')
    with pytest.raises(RoundMismatchError, match="`a.jsonl` was changed"):
        score_files(*given, ratio=0.3)


def _failing(*arguments: Any) -> Any:
    raise MatesError("on its way")


def test_nothing_half_written_is_put(s3: Any):
    def broken() -> Any:
        yield score_file.joined_scores([])
        raise RuntimeError("no more")

    facts = {"selector": "a", "source": "b"}
    with pytest.raises(RuntimeError, match="no more"):
        score_file.write_scores("s3://kept/part.parquet", broken(), facts)
    assert not s3.exists("kept/part.parquet")
    score_file.write_scores("s3://kept/part.parquet", [], facts)
    assert score_file.read_facts("s3://kept/part.parquet")["num_rows"] == 0
