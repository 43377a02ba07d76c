"""Other people's engines: launchers that select data by their own config file, and engines that score corpora.

Where it is used: right of all folders; nothing in the package imports it. A module here needs the engine it is named
after, and says so by an error with the `pip` line. Launchers that take a callback need no module: docs/launchers.md.
"""
