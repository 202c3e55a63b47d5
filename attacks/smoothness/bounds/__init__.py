"""What is proved of smoothness, and where it holds: one layer whose tokens keep their experts, on a
ball; and the experiment of clusters, in which a mixture of linear experts is compared with one
linear model. Bounds of a whole network are left out: layer norms and attention make them useless.
"""
