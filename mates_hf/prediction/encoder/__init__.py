"""The encoder influence model from the inside. A closed room: `encoder_model` alone opens it.

`folding` runs the encoder over a candidate's text and folds its states; `fine_tune` trains the encoder on labels.
"""
