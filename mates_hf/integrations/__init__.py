"""Other people's engines: what a launcher needs to have data selected by its own config file.

Where it is used: right of all folders; nothing in the package imports it. A module here needs the engine it is named
after, and says so by an error with the `pip` line. Launchers that take a callback need no module: docs/launchers.md.
"""
