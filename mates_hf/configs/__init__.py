"""Configs for `accelerate launch`: the ways of training on several devices that this library supports.

    accelerate launch --config_file $(python -m mates_hf.configs ddp) train.py
    accelerate launch --config_file $(python -m mates_hf.configs fsdp2) --num_processes 4 train.py

The files are data alone, for accelerate to read; nothing in the package imports this folder. The trade-off: they say
one machine of eight devices, and every line of them can be overridden on accelerate's command line.
"""
