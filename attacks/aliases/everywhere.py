"""Foreign arguments that mean the same for every attack."""

from ironmoe.attacks.aliases.declared import Aliases, Only, declare

EVERYWHERE: Aliases = declare(
    n_iter="steps",
    n_restarts="restarts",
    eot_iter="eot",
    verbose=Only((False,), "give on_progress= to evaluate, which says how far it is"),
    logger=Only((None,), "give log_path= to AutoAttack"),
    is_tf_model=Only(
        (False,), "give as model a function from torch images to torch logits, with their gradient"
    ),
)
