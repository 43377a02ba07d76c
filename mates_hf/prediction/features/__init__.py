"""The room under `feature_model`: what the model that trains makes of a candidate, and the ridges on it.

In the order of the flow: `rows` opens candidates of any modality and runs them, `head` finds the output head and takes
what it read and what it got wrong, `gradient` has the ridge on their product, which is never built, and `pooled` one
vector a candidate. `reader` puts these together. `inputs` reads small copies of what rows show and their labels, and
runs no model. `media` reads images and sounds by an encoder of their own. `live` asks whether a model can be read, and
`saved` has the files.
"""
