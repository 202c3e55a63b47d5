"""What the official AutoAttack has beside its attacks: ``parts`` gives them to be set one by one,
``versions`` says which run, ``log`` prints and writes what is found."""
