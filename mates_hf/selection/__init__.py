"""From predicted influence to chosen candidates: what a round may draw, and which of it is trained on.

`ledger` says which pool rows are still unused and which of them a round may choose from and probe. `select_stage`
takes the k best of them, by `choose`, and no more of one text than `copies` lets through. `selector` does the same for
any dataset outside of a run: `inputs` decides what it is and which column is scored, `dataset_input` (with `opened`)
or `streaming` scores it, `result` keeps what a budget allows. `saved` and `card` are the selector's files.

Where it is used: it gets influence as a float array from `prediction/`, and `training/` turns the rows that it chose
into the order of a run. Only tokenizers and influence models that are handed in may need torch.
"""
