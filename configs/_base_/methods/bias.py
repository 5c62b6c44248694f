# All biases of the backbone.
method = dict(type="bias")
