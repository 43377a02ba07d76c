"""The room under `feature_model`: what the model that trains makes of a candidate, and the ridges on it.

In the order of the flow: `rows` opens candidates of any modality and runs them, `head` finds the output head and takes
what it read and what it got wrong, `gradient` has the ridge on their product, which is never built, and `pooled` one
vector a candidate. `reader` puts these together. `live` asks whether the model can be read, and `saved` has the files.
"""
