"""From predicted influence to chosen candidates: what a round may draw, and which of it is trained on.

`ledger` says which pool rows are still unused and which of them a round may choose from and probe. `select_stage`
takes the k best of them, by `choose`, and no more of one text than `copies` lets through. `selector` does the same for
any dataset outside of a run: `inputs` decides what it is and which column is scored, `dataset_input` (with `opened`)
or `streaming` scores it, `result` keeps what a budget allows, within a `quota` for each group. `saved` and `card` are
the selector's files.

A corpus that nobody holds at once is scored in parts: each leaves a `score_file`, and `cut` (with `prefix`) finds the
rows of all parts that are kept. `file_scoring` does that for files on one machine. On a cluster `table_scorer` and
`task_scores` score a task, `task_cut` and `content_rule` say what it keeps; `integrations/` hands them to the engines.

Where it is used: it gets influence as a float array from `prediction/`, and `training/` turns the rows that it chose
into the order of a run. Only tokenizers and influence models that are handed in may need torch.
"""
