"""What the questions share: the harness, resumable units, machine, tables, plots, corpus, models and rival filters."""
