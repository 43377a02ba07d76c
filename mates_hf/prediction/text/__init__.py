"""Parts of the text influence model, which `text_model` opens: how a text becomes units, and the fit of their effects.

In the order of the flow: `units` reads UTF-8 bytes, `ridge_path` fits effects of hashed units to a ranking.
"""
