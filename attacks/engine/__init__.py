"""The engine: it takes many images through attacks, and knows no attack by name.

Read in this order; each file knows those before it at most.

- ``counters``: passes and warning signs of an image, spelled here alone. It knows no model.
- ``attempts``: attempts side by side as a dict of tensors. It knows neither model nor attack.
- ``routing_mode``: what a routing mode may do to the model of the search. It knows no mode.
- ``attacked_model``: images in; checked logits, losses and gradients out. It knows no attack.
- ``borrow``: the user's model in eval mode for a while, and everything restored.
- ``search``: the protocol, all that the engine asks of an attack.
- ``coupling``: which images must stay together, and which attacks cannot take them.
- ``inputs``: images checked, numbered and cut into units.
- ``budget``: a limit to passes and time.
- ``job``: what one unit goes through, stage after stage. It knows nothing of batches.
- ``rounds``: one question to the model about every attempt, and the verdict of the search. It knows
  no job.
- ``active_batch``: places of one attack, and who is in them. It knows no other attack.
- ``judging``: the judge, who makes every prediction that counts. It knows no job.
- ``verification``: candidates before the judge. It does not decide what becomes of a job.
- ``admission``: the clean prediction, and a job for each unit of the data. It attacks nothing.
- ``queue``: ``Engine``, which moves jobs between the files above. It knows neither data sets nor
  reports.
- ``records``: what is known of each image, in columns. It knows no file on disk.
"""
