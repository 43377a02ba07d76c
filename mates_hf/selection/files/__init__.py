"""The room under `file_scoring`: files in, files out, in parts that are whole or absent.

In the order of the flow: `plan` finds the parts, `folder` keeps what is done of them, `parquet_files` and
`json_files` read and write one (by `lines`, `allow` and `ahead`), `work` scores and writes some of them, `groups`
reads which group their rows are of, and `workers` has it done by several processes. `run` goes through these stages.
"""
