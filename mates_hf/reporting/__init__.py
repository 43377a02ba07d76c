"""What a person reads: reports and plots of finished rounds.

`cost` is the ledger of a run, `forecast` what a run would cost. Where it is used: reads round directories and never
writes into them. Trade-off: whatever a report shows must have been recorded by the round; nothing is measured again
here.
"""
