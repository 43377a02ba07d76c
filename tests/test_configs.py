"""Configs for `accelerate launch` that are shipped: accelerate reads them, and they are found by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from mates_hf.configs.__main__ import NAMES, main

FOLDER = Path(main([]))


def test_each_is_read_by_accelerate_as_what_it_is_called() -> None:
    assert NAMES == ["ddp", "fsdp2"]
    found = {name: load_config_from_file(main([name])) for name in NAMES}
    assert all(type(config) is ClusterConfig and config.num_machines == 1 for config in found.values())
    assert found["ddp"].distributed_type == "MULTI_GPU"
    assert not found["ddp"].fsdp_config
    assert found["fsdp2"].distributed_type == "FSDP"
    options = found["fsdp2"].fsdp_config
    assert (options["fsdp_version"], options["fsdp_offload_params"]) == (2, False)
    assert all(config.mixed_precision == "bf16" for config in found.values())


def test_they_are_found_by_name_and_another_name_is_refused() -> None:
    command = [sys.executable, "-m", "mates_hf.configs", "fsdp2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=FOLDER.parents[1])
    assert Path(done.stdout.strip()) == FOLDER / "fsdp2.yaml"
    with pytest.raises(SystemExit, match="one of ddp, fsdp2, got 'fsdp'"):
        main(["fsdp"])


def test_what_fsdp2_says_is_what_accelerates_plugin_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    for name, value in load_config_from_file(main(["fsdp2"])).fsdp_config.items():
        monkeypatch.setenv(name.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert not plugin.activation_checkpointing
    assert "SHARDED" in str(plugin.state_dict_type)
