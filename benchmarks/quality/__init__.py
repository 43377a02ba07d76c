"""Does it work: are labels right, do influence models rank, and does selecting pay?"""
