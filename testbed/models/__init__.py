"""The paper's models, any model by import path, and the search for the last layer.

`catalog` names the built-in models and needs no torch; `paper` holds their modules, `build`
makes a seeded module, and `last_layer` finds the layer whose gradient the attacks read.
"""
